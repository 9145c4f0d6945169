"""Trials on a Ray cluster: the only place that knows Ray.

The driver asks the study for plans and writes everything down; workers get a `TrialSpec` and give back a
`TrialResult`. Each worker is one Ray Tune actor that is reused from trial to trial, so that a trial does not
pay for a process, for importing torch or for unpacking the base.

Whatever dies, the search goes on: a trial whose worker was lost runs again, so often and no more; a cluster
of the search's own that was lost is started anew; a trial that takes too long is stopped. A trial that fails
by itself has failed.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import ray
from ray import cloudpickle, tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from components.errors import UserError
from search.rungs import Report, SteppedTrial
from search.scheduler import EarlyStopping
from search.trial_types import Proposal, TrialResult, TrialSpec, timestamp

logger = logging.getLogger(__name__)

RunTrial = Callable[..., TrialResult]
"""Called with specification, base and device, and a `Report` where the specification has rungs."""

T = TypeVar("T")

# So many failures to start, without any trial having been completed, are the cluster's, not the trials'.
_STILLBORN_LIMIT = 3
# So many clusters lost, without any trial having finished in between, and the search ends.
_RESTART_LIMIT = 3
# Between two looks at whether the cluster lives and trials take too long.
_WATCH_SECONDS = 1.0
# Tune may wait for a lost head for ever, out of reach of any exception; after so long the process ends.
_HEAD_SECONDS = 8.0

LOST = 75
"""Exit code of a process whose cluster was lost in a way that it could not survive; `--resume` goes on."""

# In force while a search runs, in this process and in the local cluster that it starts.
_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default, whose announcement is a warning
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a table even when it is told to be silent
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",  # a lost head ends this process after so long, not 60 s
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files of every trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's waits up to 15 s for running trials; ours is below
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # snapshots that nobody reads
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # failures are reported by us
}
# What Ray sets by itself and leaves behind.
_SET_BY_RAY = ("PYTHONBREAKPOINT", "RAY_AUTH_MODE")


class Proposer(Protocol):
    """Where proposals come from, and where results go; `Study` in a search."""

    def ask(self, number: int) -> Proposal:
        """What trial `number` is to do, and who proposed it."""

    def tell(self, result: TrialResult) -> None:
        """Learn from a finished trial, failed ones included."""


@dataclass(frozen=True)
class SearchOutcome:
    """How a search ended.

    Attributes:
        complete: trials that were measured.
        failed: trials that failed; each was recorded with its reason.
        interrupted: Ctrl-C or SIGTERM ended the search before all trials had run; running ones were dropped.
        out_of_time: the time was up before all trials had begun.
        repeated: how often a trial ran again because its worker was lost.
        concurrency: trials that could run at once, in the end.
        seconds: wall time, the cluster's start included.
        stopped: trials that were stopped early.
    """

    complete: int
    failed: int
    interrupted: bool
    concurrency: int
    seconds: float
    out_of_time: bool = False
    repeated: int = 0
    stopped: int = 0

    @property
    def finished(self) -> int:
        """Trials that are over, however they ended."""
        return self.complete + self.stopped + self.failed


def run_search(
    numbers: Iterable[int],
    *,
    study: Proposer,
    make_spec: Callable[[int, Proposal], TrialSpec],
    run_trial: RunTrial,
    base: object,
    record: Callable[[TrialResult], None],
    observers: Sequence[Callable[[TrialResult], None]] = (),
    cpus: float = 1,
    gpus: float | None = 0,
    concurrency: int | None = None,
    address: str | None = None,
    code: Sequence[Path] = (),
    retries: int = 2,
    trial_timeout: float | None = None,
    seconds: float | None = None,
    early_stopping: EarlyStopping | None = None,
) -> SearchOutcome:
    """Run the trials with these numbers on a Ray cluster, until all have finished or Ctrl-C is pressed.

    SIGTERM is heeded like Ctrl-C.

    Everything but `run_trial` is called in this process and thread. For each trial: `study.ask(number)`,
    `make_spec`, `run_trial(spec, base, device)` on a worker, then `record(result)`, `study.tell(result)` and
    every observer, in this order, exactly once. A trial is asked for only when a worker is free for it, so a
    plan always builds on everything that was finished by then; with `concurrency=1` the search is sequential.

    Args:
        numbers: of the trials to run, in this order; none twice.
        study: proposes plans; an exception in `tell` is logged, one in `ask` ends the search.
        make_spec: trial number and proposal -> specification.
        run_trial: a picklable function; `device` is "cpu" or "cuda". An exception in it and a result that is
            not one or not finite each make a failed trial. Where a specification has rungs, it is given a
            fourth argument to report them with.
        base: any picklable value, or None; it is put into the object store once, and unpacked once by each
            worker. Its arrays are read-only there.
        record: stores a result for good before anybody learns of it; an exception in it ends the search.
        observers: called with each result; one that raises is logged and not called again.
        cpus: CPUs of a trial; torch gets as many threads (at least one).
        gpus: GPUs of a trial, possibly a fraction; None shares the GPUs that there are among the trials that
            the CPUs admit.
        concurrency: trials at once; None, or more than fit, for as many as fit.
        address: of a running cluster; None starts one on this machine, and stops it afterwards.
        code: directories of packages and single modules that are sent to the workers of such a cluster.
        retries: how often a trial runs again whose worker was lost; then it has failed.
        trial_timeout: seconds after which a trial that still runs is stopped and has failed; None for never.
        seconds: after which no further trial begins; None for no limit.
        early_stopping: decides which of the trials that report a rung are stopped there; None stops none.

    Raises:
        UserError: no cluster answers at `address`, no node of it can hold a trial, no worker can start, or
            the cluster is lost again and again.
        Exception: whatever `study.ask`, `make_spec` or `record` raised; what had finished is recorded.
        KeyboardInterrupt: a second Ctrl-C while the first was being heeded.
    """
    started = time.monotonic()
    with (
        _environment(_ENVIRONMENT),
        _quiet_ray(),
        tempfile.TemporaryDirectory(prefix="prunefront-") as scratch,
        _Interruption() as interrupted,
    ):
        driver = _Driver(
            list(numbers),
            study=study,
            make_spec=make_spec,
            record=record,
            observers=list(observers),
            wanted=concurrency,
            interrupted=interrupted,
            early_stopping=early_stopping,
            retries=retries,
            trial_timeout=trial_timeout,
            seconds=seconds,
        )
        while True:
            with _cluster(address, code):
                interrupted.listen()
                slots, share = _slots(cpus, gpus)
                driver.resize(slots)
                if driver.over:
                    break
                trainable = tune.with_resources(
                    tune.with_parameters(_Worker, base=base, run_trial=run_trial, cpus=cpus, gpus=share),
                    {"cpu": cpus, "gpu": share},
                )
                with suppress(_Stop):
                    _tune(trainable, driver, partial(_count_slots, cpus, share), scratch)
            if driver.over:
                break
            driver.lose_cluster(address)
    if driver.fatal is not None:
        raise driver.fatal
    unfinished = driver.finished < len(driver.numbers)
    return SearchOutcome(
        complete=driver.complete,
        failed=driver.failed,
        interrupted=unfinished and interrupted.is_set(),
        concurrency=driver.concurrency,
        seconds=time.monotonic() - started,
        out_of_time=unfinished and not interrupted.is_set(),
        repeated=driver.repeated,
        stopped=driver.stopped_early,
    )


def _tune(trainable: Any, driver: _Driver, count_slots: Callable[[], int], scratch: str) -> None:
    """Run trials until there are no more, or `_Stop` is raised."""
    with _unhurried_actors():
        tune.run(
            trainable,
            name="search",
            num_samples=-1,  # the searcher says when there are no more: some trials run again
            search_alg=_Searcher(driver),
            scheduler=_Scheduler(driver) if driver.ranks else None,
            callbacks=[_Callback(driver, count_slots)],
            storage_path=scratch,
            reuse_actors=True,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
            raise_on_failed_trial=False,
            verbose=0,
        )


class _Driver:
    """The state of a search in the driver; Tune's searcher and callback are two views of it."""

    def __init__(
        self,
        numbers: list[int],
        *,
        study: Proposer,
        make_spec: Callable[[int, Proposal], TrialSpec],
        record: Callable[[TrialResult], None],
        observers: list[Callable[[TrialResult], None]],
        wanted: int | None,
        interrupted: _Interruption,
        early_stopping: EarlyStopping | None,
        retries: int,
        trial_timeout: float | None,
        seconds: float | None,
    ) -> None:
        self.numbers = numbers
        self.concurrency = 1  # until it is known how many fit
        self._wanted = wanted
        self.complete = 0
        self.stopped_early = 0
        self.failed = 0
        self.repeated = 0
        self.fatal: BaseException | None = None
        self._study = study
        self._make_spec = make_spec
        self._record = record
        self._observers = observers
        self._interrupted = interrupted
        self._early_stopping = early_stopping
        self._retries = retries
        self._trial_timeout = trial_timeout
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds
        self._asked = 0
        self._stillborn = 0  # workers that failed to start, one after the other
        self._restarts = 0  # clusters lost, one after the other
        self._running: dict[str, tuple[TrialSpec, str]] = {}  # Tune's trial id -> specification, asked when
        self._again: deque[TrialSpec] = deque()  # lost, and to run again before any other
        self._losses: Counter[int] = Counter()  # by trial number
        self._begun: dict[str, tuple[float, Any]] = {}  # Tune's trial id -> when it began, its actor

    def next_spec(self, trial_id: str) -> TrialSpec | None:
        """The next trial to run, or None while all workers are busy and once the search is ending."""
        if self.ending or len(self._running) >= self.concurrency:
            return None
        if self._again:
            spec = self._again.popleft()
            self._running[trial_id] = (spec, timestamp())
            return spec
        number = self.numbers[self._asked]
        try:
            spec = self._make_spec(number, self._study.ask(number))
        except Exception as error:
            self.fatal = error
            return None
        self._asked += 1
        self._running[trial_id] = (spec, timestamp())
        return spec

    @property
    def ranks(self) -> bool:
        """Whether trials may be stopped early."""
        return self._early_stopping is not None

    @property
    def finished(self) -> int:
        """Trials that are over, however they ended."""
        return self.complete + self.stopped_early + self.failed

    def goes_on(self, report: TrialResult) -> bool:
        """Whether a trial that reports from a rung goes on; it does where that cannot be told."""
        if self._early_stopping is None:
            return True
        try:
            return self._early_stopping.goes_on(report)
        except Exception as error:
            logger.warning("trial %d could not be ranked, and goes on: %s", report.number, describe(error))
            return True

    def finish(self, trial_id: str, outcome: object) -> None:
        """Take in what became of a trial: a `TrialResult`, or one line saying why there is none."""
        self._begun.pop(trial_id, None)
        if trial_id not in self._running:
            return
        spec, asked = self._running.pop(trial_id)
        if not isinstance(outcome, TrialResult):
            outcome = TrialResult.failure(spec, str(outcome), started=asked, finished=timestamp())
        result = _checked(outcome)
        try:
            self._record(result)
        except Exception as error:
            self.fatal = error
            return
        self._restarts = 0
        self.complete += result.complete
        self.stopped_early += result.stopped
        self.failed += result.failed
        try:
            if self._early_stopping is not None:
                self._early_stopping.finish(result)
            self._study.tell(result)
        except Exception as error:
            logger.warning(
                "trial %d is stored, but the search did not learn from it: %s", spec.number, describe(error)
            )
        for observer in list(self._observers):
            try:
                observer(result)
            except Exception as error:
                self._observers.remove(observer)
                logger.warning("an observer of the search failed and was dropped: %s", describe(error))

    def resize(self, slots: int) -> None:
        """So many trials fit at once from now on; with none, one that waits for room to come back."""
        self.concurrency = max(1, min(slots, self._wanted or slots))

    def begin(self, trial_id: str, actor: Any) -> None:
        """A worker begins to run a trial."""
        self._begun[trial_id] = (time.monotonic(), actor)

    def lose(self, trial_id: str, account: str) -> None:
        """A trial's worker is gone, or never was; `account` is what Ray wrote about it."""
        reason, had_started = _reason_of_loss(account)
        self._stillborn = 0 if had_started else self._stillborn + 1
        if self._stillborn >= _STILLBORN_LIMIT and not self.complete:
            self.fatal = self.fatal or UserError(f"no worker can run trials: {reason}")
        else:
            self._lose(trial_id, reason)

    def lose_cluster(self, address: str | None) -> None:
        """The cluster is gone, with all that ran on it."""
        for trial_id in list(self._running):
            self._lose(trial_id, "the worker was lost with the whole cluster")
        self._restarts += 1
        if address is not None:
            self.fatal = UserError(f"the Ray cluster at address {address!r} is gone")
        elif self._restarts >= _RESTART_LIMIT and self.fatal is None:
            self.fatal = UserError(
                f"the Ray cluster on this machine was lost {self._restarts} times in a row"
            )
        else:
            logger.warning("the Ray cluster was lost and is started again")

    def stop_overdue(self) -> None:
        """End trials that take too long; they have failed, and their workers are replaced."""
        if self._trial_timeout is None:
            return
        now = time.monotonic()
        for trial_id, (begun, actor) in list(self._begun.items()):
            if now - begun > self._trial_timeout:
                self.finish(trial_id, f"it ran for longer than trial_timeout, {self._trial_timeout:g} s")
                ray.kill(actor)

    def _lose(self, trial_id: str, reason: str) -> None:
        """Let a trial run again, unless it was lost too often."""
        self._begun.pop(trial_id, None)
        if trial_id not in self._running:
            return
        spec, _ = self._running[trial_id]
        self._losses[spec.number] += 1
        times = self._losses[spec.number]
        if times > self._retries:
            self.finish(trial_id, reason if times == 1 else f"{reason} (the last of {times} times)")
            return
        del self._running[trial_id]
        self._again.append(spec)
        self.repeated += 1
        logger.warning("trial %d runs again: %s", spec.number, reason)

    @property
    def stopped(self) -> bool:
        """Ctrl-C was pressed, or an exception makes going on pointless."""
        return self._interrupted.is_set() or self.fatal is not None

    @property
    def ending(self) -> bool:
        """No further trial will begin."""
        if self.stopped:
            return True
        return not self._again and (self._asked == len(self.numbers) or time.monotonic() > self._deadline)

    @property
    def over(self) -> bool:
        """No further result is waited for."""
        return self.stopped or (self.ending and not self._running)


class _Stop(BaseException):
    """Unwinds Tune's loop. Not an `Exception`: for those, Tune first waits for its workers to stop."""


class _Searcher(Searcher):
    """Tune's source of configurations: one per free worker."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self._driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        spec = self._driver.next_spec(trial_id)
        if spec is not None:
            return {"spec": _Parcel(spec)}
        # With no trial running, Tune would wait ten minutes for a configuration.
        return Searcher.FINISHED if self._driver.ending else None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the study hears of a result from the callback, after it has been stored."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is resumed from its own records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class _Scheduler(FIFOScheduler):
    """Tune's question whether a trial goes on, at every rung; of one that is over it does not ask."""

    _supports_buffered_results = False  # a trial stands still until its report is answered

    def __init__(self, driver: _Driver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        goes_on = self._driver.goes_on(result["outcome"].content)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


class _Callback(tune.Callback):
    """Tune's reports of what happens."""

    def __init__(self, driver: _Driver, count_slots: Callable[[], int]) -> None:
        self._driver = driver
        self._count_slots = count_slots
        self._looked = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() - self._looked > _WATCH_SECONDS:
            if not _cluster_lives():
                raise _Stop
            self._driver.resize(self._count_slots())  # nodes come and go
            self._driver.stop_overdue()
            self._looked = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._driver.begin(trial.trial_id, trial.temporary_state.ray_actor)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if self._driver.over:
            raise _Stop

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        # Removed here, before Tune keeps a copy of every result it sees.
        outcome = result.pop("outcome")
        # Also after a rung at which the scheduler stopped the trial, whose report is then its result.
        if result["done"]:
            self._driver.finish(trial.trial_id, outcome.content)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        account = Path(trial.error_file).read_text() if trial.error_file else ""
        self._driver.lose(trial.trial_id, account)


class _Worker(tune.Trainable):
    """One process that runs trial after trial."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Read by the base class; a variable of this process only.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        super().__init__(*args, **kwargs)

    def setup(  # type: ignore[override]  # tune.with_parameters adds the rest
        self, config: dict[str, Any], base: object, run_trial: RunTrial, cpus: float, gpus: float
    ) -> None:
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        self._device = "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"
        self._base = base
        self._run_trial = run_trial
        self._trial = self._new_trial(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._trial.end()  # it may have been stopped at a rung
        self._trial = self._new_trial(new_config)
        return True

    def cleanup(self) -> None:
        self._trial.end()

    def step(self) -> dict[str, Any]:
        """Run to the next rung or, where there is none, to the end."""
        outcome: object
        try:
            outcome = self._trial.step()
        except Exception as error:
            outcome = describe(error)
        if not isinstance(outcome, TrialResult | str):
            outcome = f"the trial returned a {type(outcome).__name__} instead of a TrialResult"
        return {"outcome": _Parcel(outcome), "done": self._trial.over or isinstance(outcome, str)}

    def _new_trial(self, config: dict[str, Any]) -> SteppedTrial:
        spec: TrialSpec = config["spec"].content

        def run(report: Report) -> TrialResult:
            reports = (report,) if spec.pruning.rungs else ()
            return self._run_trial(spec, self._base, self._device, *reports)

        return SteppedTrial(run)


class _Parcel(Generic[T]):
    """A value that Tune hands on unseen: not copied, not flattened, and printed in one word."""

    __slots__ = ("content",)

    def __init__(self, content: T) -> None:
        self.content = content

    def __repr__(self) -> str:
        return type(self.content).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> _Parcel[T]:
        return self


def describe(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _checked(result: TrialResult) -> TrialResult:
    """The result with arrays of its own, or a failed one if an objective is not finite."""
    unfit = {name: value for name, value in result.objectives.items() if not math.isfinite(value)}
    if result.complete and unfit:
        reason = ", ".join(f"objective {name!r} is {value}" for name, value in unfit.items())
        return replace(result, status="failed", reason=reason, objectives={}, state=None)
    if result.state is None:
        return result
    # What came through the object store is read-only, and gone when the cluster is.
    return replace(result, state={name: np.array(array) for name, array in result.state.items()})


def _reason_of_loss(account: str) -> tuple[str, bool]:
    """One line from Ray's account of how a worker was lost, and whether it had started."""
    lines = [line.strip() for line in account.splitlines() if line.strip()]
    last = lines[-1] if lines else "Ray gave no reason"
    if "raised in its creation task" in account:
        return f"the worker could not start: {last}", False
    if "OutOfMemoryError" in account or "running low on memory" in account:
        return "the worker was stopped because its machine ran out of memory", True
    if "node has died" in account or "node was terminated" in account:
        return "the worker was lost with its machine", True
    if "The actor" in account:
        return "the worker died: killed, out of memory, or crashed", True
    return f"the worker was lost: {last}", True


def _slots(cpus: float, gpus: float | None) -> tuple[int, float]:
    """How many trials fit on the cluster at once, and the GPUs of each.

    Raises:
        UserError: no node can hold one trial.
    """
    nodes = _node_resources()
    by_cpu = [int(node.get("CPU", 0) / cpus) for node in nodes]
    if gpus is None:
        shares = [n / node["GPU"] for n, node in zip(by_cpu, nodes, strict=True) if node.get("GPU") and n]
        # Equal on every node with GPUs, so that trials do not depend on where they run.
        gpus = 1 / math.ceil(max(shares)) if shares and max(shares) >= 1 else (1.0 if shares else 0.0)
    slots = _count_slots(cpus, gpus)
    if slots == 0:
        most_cpus = max((node.get("CPU", 0) for node in nodes), default=0)
        most_gpus = max((node.get("GPU", 0) for node in nodes), default=0)
        raise UserError(
            f"a trial needs {cpus:g} CPUs and {gpus:g} GPUs, but the largest node of the cluster has "
            f"{most_cpus:g} CPUs and {most_gpus:g} GPUs"
        )
    return slots, gpus


def _count_slots(cpus: float, gpus: float) -> int:
    """How many trials of this size the cluster holds now."""
    return sum(
        min(int(node.get("CPU", 0) / cpus), int(node.get("GPU", 0) / gpus) if gpus else sys.maxsize)
        for node in _node_resources()
    )


def _node_resources() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _cluster_lives() -> bool:
    """Whether the cluster still works for this process; without its own node Tune would wait for ever."""
    node = _own_node()
    if node.head:  # a cluster of this process's own: its processes are its children
        parts = [node.all_processes.get(part, []) for part in ("gcs_server", "raylet")]
        return all(info.process.poll() is None for processes in parts for info in processes)
    here = ray.get_runtime_context().get_node_id()
    return any(entry["NodeID"] == here and entry["Alive"] for entry in ray.nodes())  # type: ignore[no-untyped-call]


def _own_node() -> Any:
    """Ray's account of what this process has started; there is no public one."""
    return ray._private.worker._global_node


@dataclass(frozen=True)
class NodeAnswer:
    """What became of a call on one node.

    Attributes:
        node: its host name and address.
        answer: what the function returned; None where it did not.
        fault: why it did not, in a few words; empty where it did.
    """

    node: str
    answer: Any
    fault: str


def on_every_node(
    function: Callable[[dict[str, Any]], object],
    known: Mapping[str, Any],
    address: str | None,
    seconds: float,
) -> list[NodeAnswer]:
    """Call a function once on every living node of a cluster, all at the same time; it occupies no CPU there.

    Args:
        function: gets what is `known` and, as Ray has them of its node, `cpus`, `gpus`, `object_store_bytes`
            and `temporary`, the directory of Ray's files. The whole module that it is of is sent along, so
            that nodes need not have it; it may import the standard library only.
        known: plain values for every node.
        address: of a running cluster; None starts one on this machine and stops it afterwards.
        seconds: that a node may take to answer.

    Raises:
        UserError: no cluster answers at the address.
    """
    module = sys.modules[function.__module__]
    cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    try:
        with _environment(_ENVIRONMENT), _quiet_ray(), _cluster(address):
            every = ray.nodes()  # type: ignore[no-untyped-call]
            nodes = {node["NodeID"]: node for node in every if node["Alive"]}
            task = ray.remote(num_cpus=0, max_retries=0)(function)
            calls = {}
            for identifier, node in nodes.items():
                only_there = NodeAffinitySchedulingStrategy(identifier, soft=False)
                facts = {**known, **_facts(node)}
                calls[identifier] = task.options(scheduling_strategy=only_there).remote(facts)
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds)
            return [_answer_of(node, calls[identifier], seconds) for identifier, node in nodes.items()]
    finally:
        cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]


def _facts(node: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray says of a node."""
    resources = node["Resources"]
    return {
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "object_store_bytes": resources.get("object_store_memory", 0.0),
        "temporary": str(
            Path(node["ObjectStoreSocketName"]).parents[2]
        ),  # .../session_.../sockets/plasma_store
    }


def _answer_of(node: Mapping[str, Any], call: Any, seconds: float) -> NodeAnswer:
    """What a node has answered by now."""
    name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}:{node['NodeManagerPort']})"
    try:
        return NodeAnswer(name, ray.get(call, timeout=0), "")
    except ray.exceptions.GetTimeoutError:
        ray.cancel(call, force=True)
        return NodeAnswer(name, None, f"it did not answer within {seconds:g} s")
    except Exception as error:
        return NodeAnswer(name, None, f"it could not run the checks: {describe(error)}")


def _trial_name(trial: Trial) -> str:
    return f"trial-{trial.trial_id}"


@contextmanager
def _unhurried_actors() -> Iterator[None]:
    """Let workers finish starting.

    Tune gives a trial whose own worker is still starting the first other one that becomes free, and ends the
    one that starts. Where a trial is over before a worker has started, which imports torch, no second worker
    would ever come to life: not on a node that has joined, nor after one was lost.
    """
    original = TuneController._maybe_reuse_cached_actor

    def reuse(self: TuneController, trial: Trial) -> bool:
        own = self._trial_to_actor.get(trial)
        # One that waits for room waits for ever, where the free one holds it.
        has_room = own is not None and self._actor_manager.is_actor_started(own)
        return False if has_room and trial not in self._resetting_trials else original(self, trial)

    TuneController._maybe_reuse_cached_actor = reuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        TuneController._maybe_reuse_cached_actor = original  # type: ignore[method-assign]


@contextmanager
def _cluster(address: str | None, code: Sequence[Path] = ()) -> Iterator[None]:
    """Connected to a cluster, whose workers get the code; with no address, to one of this process's own."""
    if address is None:
        with _environment({"PYTHONPATH": _import_path()}):
            # Never a bare init(): a stale file of an earlier cluster would make that hang.
            ray.init(address="local", include_dashboard=False, configure_logging=False, log_to_driver=False)
    else:
        _require_answer(address)
        try:
            with _environment({"RAY_gcs_server_port_wait_time_s": "1"}):  # one attempt, not twenty
                ray.init(
                    address=address,
                    configure_logging=False,
                    log_to_driver=False,
                    runtime_env={"py_modules": [str(path) for path in code]} if code else None,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            whole = " ".join(str(error).split())  # a mismatch of versions takes several lines to tell
            raise UserError(f"the Ray cluster at address {address!r} cannot be joined: {whole}") from error
    left = threading.Event()
    threading.Thread(target=_watch_head, args=(left,), name="ray-head-watch", daemon=True).start()
    try:
        yield
    finally:
        ray.shutdown()
        left.set()


def _watch_head(left: threading.Event) -> None:
    """End the process if the head of its own cluster has died and it does not get away from it.

    Tune's loop then waits inside Ray, and Ray would end the process a little later, without a word about what
    can be done. Everything that has finished is on the disk.
    """
    heads = _own_node().all_processes.get("gcs_server", [])
    while not left.wait(_WATCH_SECONDS):
        if all(head.process.poll() is None for head in heads):
            continue
        if not left.wait(_HEAD_SECONDS):
            print(
                "\nprunefront: the head of the Ray cluster on this machine died; everything that had "
                "finished is kept, and the same command with --resume goes on from there",
                file=sys.stderr,
                flush=True,
            )
            os._exit(LOST)


def _import_path() -> str:
    """Where this process finds modules besides its installation, for workers on this machine."""
    installed = (sys.prefix, sys.base_prefix)
    paths = [os.path.abspath(path) for path in sys.path if path]
    return os.pathsep.join(path for path in paths if not path.startswith(installed))


def _require_answer(address: str) -> None:
    """Ask for an address that can be right, before Ray tries it for minutes."""
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise UserError(
            f"address {address!r} is a Ray Client address; start the search on a machine of the cluster, "
            "with 'auto' or its 'host:port'"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"address {address!r} is neither 'auto' nor of the form 'host:port'")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at address {address!r} ({describe(error)})") from error


class _Interruption:
    """Ctrl-C or SIGTERM, once; another interrupts as usual. Signal handlers are as before afterwards."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            names = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            self._before = {name: signal.getsignal(name) for name in names}
            self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def listen(self) -> None:
        """Begin to listen; again after Ray was started, which takes SIGTERM for itself."""
        if self._before:
            signal.signal(signal.SIGINT, self._on_signal)
            signal.signal(signal.SIGTERM, self._on_signal)

    def is_set(self) -> bool:
        """Whether it has come."""
        return self._event.is_set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time being; those that Ray adds go with them."""
    before = {name: os.environ.get(name) for name in (*variables, *_SET_BY_RAY)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray's and Tune's own log lines are muted: what a user should know comes from us."""
    ray_logger = logging.getLogger("ray")
    level = ray_logger.level
    # CRITICAL: Tune calls failed trials, and result files that it was told not to write, errors.
    ray_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray_logger.setLevel(level)
