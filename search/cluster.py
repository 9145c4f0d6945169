"""Trials on a Ray cluster: with `ray_connection` and `tune_repairs`, the only place that knows Ray.

The driver asks the study for plans and writes everything down; workers get a `TrialSpec` and give back a
`TrialResult`. Each worker is one Ray Tune actor that is reused from trial to trial, so that a trial does not
pay for a process, for importing torch or for unpacking the base.

Whatever dies, the search goes on: a trial whose worker was lost runs again, so often and no more; a cluster
of the search's own that was lost is started anew; a trial that takes too long is stopped. A trial that fails
by itself has failed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from components.errors import UserError
from search.driver import Driver, Proposer, SearchOutcome, describe
from search.gpu_memory import release
from search.interruption import Interruption
from search.ray_connection import cluster_lives, connected, count_slots, quiet_ray, ray_environment, slots_of
from search.rungs import Report, SteppedTrial
from search.scheduler import EarlyStopping
from search.trial_types import Proposal, TrialResult, TrialSpec
from search.tune_repairs import repaired_tune

RunTrial = Callable[..., TrialResult]
"""Called with specification, base and device, and a `Report` where the specification has rungs."""

T = TypeVar("T")

WATCH_SECONDS = 1.0
"""Between two looks at whether the cluster has grown or shrunk, and trials take too long."""

ALIVE_SECONDS = 0.2
"""Between two looks at whether it lives: some time after its raylet has died, Ray ends this process."""


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
    least_gpus: float = 0.0,
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
        least_gpus: the share of a GPU that a trial's memory needs: None shares no further than that.
        concurrency: trials at once; None, or more than fit, for as many as fit.
        address: of a running cluster; None starts one on this machine, and stops it afterwards.
        code: directories of packages and single modules that are sent to the workers of such a cluster.
        retries: how often a trial runs again whose worker was lost; then it has failed.
        trial_timeout: seconds after which a trial that still runs is stopped and has failed; None for never.
        seconds: after the first trial began, after which no further one does; None for no limit.
        early_stopping: decides which of the trials that report a rung are stopped there; None stops none.

    Raises:
        UserError: no cluster answers at `address`, no node of it can hold a trial, no worker can start, or
            the cluster is lost again and again.
        Exception: whatever `study.ask`, `make_spec` or `record` raised; what had finished is recorded.
        KeyboardInterrupt: a second Ctrl-C while the first was being heeded.
    """
    started = time.monotonic()
    with (
        ray_environment(),
        quiet_ray(),
        tempfile.TemporaryDirectory(prefix="prunefront-") as scratch,
        Interruption() as interrupted,
    ):
        driver = Driver(
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
            with connected(address, code):
                interrupted.listen()
                slots, share = slots_of(cpus, gpus, least_gpus)
                driver.resize(slots)
                if driver.over:
                    break
                try:
                    whole = tune.with_parameters(
                        _Worker, base=base, run_trial=run_trial, cpus=cpus, gpus=share
                    )
                except ray.exceptions.RayError as error:  # its object store, or the disk behind it, is full
                    raise UserError(f"the base cannot be given to the cluster: {describe(error)}") from error
                trainable = tune.with_resources(whole, {"cpu": cpus, "gpu": share})
                with suppress(_Stop):
                    _tune(trainable, driver, partial(count_slots, cpus, share), scratch)
            if driver.over:
                break
            driver.lose_cluster(address)
    if driver.fatal is not None:
        raise driver.fatal
    unfinished = driver.finished < len(driver.numbers)
    return SearchOutcome(
        complete=driver.complete,
        failed=driver.failed,
        interrupted=interrupted.is_set(),
        concurrency=driver.concurrency,
        seconds=time.monotonic() - started,
        out_of_time=unfinished and not interrupted.is_set(),
        repeated=driver.repeated,
        stopped=driver.stopped_early,
    )


def _tune(trainable: Any, driver: Driver, count_slots: Callable[[], int], scratch: str) -> None:
    """Run trials until there are no more, or `_Stop` is raised."""
    with repaired_tune():
        tune.run(
            trainable,
            name="search",
            num_samples=-1,  # the searcher says when there are no more: some trials run again
            search_alg=_Searcher(driver),
            scheduler=_Scheduler(driver),
            callbacks=[_Callback(driver, count_slots)],
            storage_path=scratch,
            reuse_actors=True,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
            raise_on_failed_trial=False,
            verbose=0,
        )


class _Stop(BaseException):
    """Unwinds Tune's loop. Not an `Exception`: for those, Tune first waits for its workers to stop."""


class _Searcher(Searcher):
    """Tune's source of configurations: one per free worker."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        spec = self._driver.next_spec(trial_id)
        if spec is not None:
            return {"spec": _Parcel(spec)}
        # Not as soon as it is ending: a trial that runs may be lost and run again, and this is final. But
        # where it is over, Tune would wait ten minutes for a configuration.
        return Searcher.FINISHED if self._driver.over else None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the study hears of a result from the callback, after it has been stored."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is resumed from its own records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class _Scheduler(FIFOScheduler):
    """Tune's questions: which trial comes next, and, at every rung, whether one goes on."""

    _supports_buffered_results = False  # a trial stands still until its report is answered

    def __init__(self, driver: Driver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._driver = driver
        self._open: list[Trial] = []

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._open.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first that waits. Tune's own looks through all trials there have been, twice for each."""
        self._open = [trial for trial in self._open if trial.status not in (Trial.TERMINATED, Trial.ERROR)]
        for status in (Trial.PENDING, Trial.PAUSED):
            for trial in self._open:
                if trial.status == status:
                    return trial
        return None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        goes_on = self._driver.goes_on(result["outcome"].content)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


class _Callback(tune.Callback):
    """Tune's reports of what happens."""

    def __init__(self, driver: Driver, count_slots: Callable[[], int]) -> None:
        self._driver = driver
        self._count_slots = count_slots
        self._looked = self._felt = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        now = time.monotonic()
        if now - self._felt > ALIVE_SECONDS:
            self._felt = now
            if not cluster_lives():
                raise _Stop
        if now - self._looked > WATCH_SECONDS:
            self._looked = now
            self._driver.resize(self._count_slots())  # nodes come and go
            self._driver.stop_overdue()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        actor = trial.temporary_state.ray_actor
        assert actor is not None
        self._driver.begin(trial.trial_id, partial(ray.kill, actor))

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
        release(self._device)  # of the trial before, whose memory others may need meanwhile
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


def _trial_name(trial: Trial) -> str:
    return f"trial-{trial.trial_id}"
