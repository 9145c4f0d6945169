"""The state of a running search in the driver: what runs, what runs again, what has finished.

It knows nothing of Ray; `search.cluster` tells it what Ray tells, and asks it what comes next.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from components.errors import UserError, text_of
from search.interruption import Interruption
from search.scheduler import EarlyStopping
from search.trial_types import Proposal, TrialResult, TrialSpec, timestamp

logger = logging.getLogger(__name__)

STILLBORN_LIMIT = 3
"""So many workers for each that there may be that fail to start, while none does, and the search ends."""

STILLBORN_SECONDS = 15.0
"""But not before: on other machines workers may still be starting."""

RESTART_LIMIT = 3
"""So many clusters lost, without any trial finished in between, and the search ends."""


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
        interrupted: Ctrl-C or SIGTERM came before the cluster was left; trials that ran were dropped.
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


class Driver:
    """The state of a search in the driver; Tune's searcher, scheduler and callback are views of it."""

    def __init__(
        self,
        numbers: list[int],
        *,
        study: Proposer,
        make_spec: Callable[[int, Proposal], TrialSpec],
        record: Callable[[TrialResult], None],
        observers: list[Callable[[TrialResult], None]],
        wanted: int | None,
        interrupted: Interruption,
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
        self._seconds = math.inf if seconds is None else seconds
        self._deadline = math.inf  # until the first trial begins
        self._asked = 0
        self._stillborn: list[float] = []  # when workers failed to start, one after the other
        self._restarts = 0  # clusters lost, one after the other
        self._running: dict[str, tuple[TrialSpec, str]] = {}  # Tune's trial id -> specification, asked when
        self._again: deque[TrialSpec] = deque()  # lost, and to run again before any other
        self._losses: Counter[int] = Counter()  # by trial number
        # Tune's trial id -> when it began, how to end its worker
        self._begun: dict[str, tuple[float, Callable[[], None]]] = {}

    def next_spec(self, trial_id: str) -> TrialSpec | None:
        """The next trial to run, or None while all workers are busy and once the search is ending."""
        if self.ending or len(self._running) >= self.concurrency:
            return None
        if self._again:
            spec = self._again.popleft()
        else:
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
        try:
            result = self._store(spec, _checked(outcome), asked)
        except Exception as error:
            self.fatal = error
            return
        result = result.light()  # what remembers it would keep the rest for ever
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

    def _store(self, spec: TrialSpec, result: TrialResult, asked: str) -> TrialResult:
        """Record a result or, where it is none that can be recorded, that the trial failed by that."""
        try:
            self._record(result)
            return result
        except (TypeError, ValueError) as error:
            if result.failed:
                raise
            reason = f"its result cannot be stored: {describe(error)}"
            result = TrialResult.failure(spec, reason, started=asked, finished=timestamp())
            self._record(result)
            return result

    def resize(self, slots: int) -> None:
        """So many trials fit at once from now on; with none, one that waits for room to come back."""
        self.concurrency = max(1, min(slots, self._wanted or slots))

    def begin(self, trial_id: str, kill: Callable[[], None]) -> None:
        """A worker begins to run a trial; `kill` ends the worker."""
        now = time.monotonic()
        self._stillborn.clear()
        self._begun[trial_id] = (now, kill)
        self._deadline = min(self._deadline, now + self._seconds)

    def lose(self, trial_id: str, account: str) -> None:
        """A trial's worker is gone, or never was; `account` is what Ray wrote about it."""
        reason = _reason_of_loss(account)
        if trial_id in self._begun:
            self._lose(trial_id, reason)
            return
        self._run_again(trial_id)  # the trial is not to blame
        now = time.monotonic()
        self._stillborn.append(now)
        lasting = now - self._stillborn[0] > STILLBORN_SECONDS
        many = len(self._stillborn) >= STILLBORN_LIMIT * self.concurrency
        if many and lasting and not self._begun and self.fatal is None:
            self.fatal = UserError(f"no worker can run trials: {reason}")

    def lose_cluster(self, address: str | None) -> None:
        """The cluster is gone, with all that ran on it; no trial is to blame."""
        for trial_id in list(self._running):
            self._run_again(trial_id)
            self.repeated += 1
        self._restarts += 1
        if address is not None:
            self.fatal = UserError(f"the Ray cluster at address {address!r} is gone")
        elif self._restarts >= RESTART_LIMIT and self.fatal is None:
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
        for trial_id, (begun, kill) in list(self._begun.items()):
            if now - begun > self._trial_timeout:
                self.finish(trial_id, f"it ran for longer than trial_timeout, {self._trial_timeout:g} s")
                kill()

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
        self._run_again(trial_id)
        self.repeated += 1
        logger.warning("trial %d runs again: %s", spec.number, reason)

    def _run_again(self, trial_id: str) -> None:
        self._begun.pop(trial_id, None)
        if trial_id in self._running:
            self._again.append(self._running.pop(trial_id)[0])

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
        if time.monotonic() > self._deadline:  # what waits for room has not begun, and is not waited for
            return self.stopped or not self._begun
        return self.stopped or (self.ending and not self._running)


def describe(error: BaseException) -> str:
    """An exception in one line that any file can hold."""
    lines = text_of(error).strip().splitlines()
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


def _reason_of_loss(account: str) -> str:
    """One line from Ray's account of how a worker was lost."""
    lines = [line.strip() for line in account.splitlines() if line.strip()]
    last = lines[-1] if lines else "Ray gave no reason"
    if "raised in its creation task" in account or "RuntimeEnvSetupError" in account:
        return f"the worker could not start: {last}"
    if "OutOfMemoryError" in account or "running low on memory" in account:
        return "the worker was stopped because its machine ran out of memory"
    if "node has died" in account or "node was terminated" in account:
        return "the worker was lost with its machine"
    if "The actor" in account:
        return "the worker died: killed, out of memory, or crashed"
    return f"the worker was lost: {last}"
