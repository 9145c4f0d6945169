"""A base for measuring only: what trials and training cost, without training.

How long pruning, fine-tuning and evaluation take hardly depends on the weights, so an agent that has trained
for a moment serves as well as a trained one. What it achieves means nothing.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

from agents.agent import Agent, Progress, agent_class, rehearsal, unwatched
from components.tracker import USUAL, ImportanceTracker, Tracking
from search.base import TRACE_ROWS, Base, scored_base, trace_agent
from search.determinism import deterministic

REHEARSAL_SECONDS = 4.0
"""After which a training that can be stopped is stopped, once two reports of its progress were heard."""

SILENT_SECONDS = 20.0
"""After which a training that reports no progress is stopped at its next step."""


@dataclass(frozen=True)
class TrainingTime:
    """How long training the base takes.

    Attributes:
        seconds: of the training; None where it is not known.
        basis: how that is known, or why it is not, in a few words.
    """

    seconds: float | None
    basis: str


def rehearse(
    kind: str,
    agent: Agent,
    *,
    seed: int,
    metrics: tuple[str, ...],
    reconstruction: str,
    tracking: Tracking = USUAL,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = unwatched,
) -> tuple[Base, TrainingTime]:
    """A base to measure trials on, and how long training one takes.

    The agent trains as its `rehearsal` says or, without one, until enough was seen. The performance of the
    base is made up.

    Args:
        kind: of the agent.
        agent: as `kind` makes it; it stays untrained.
        seed, metrics, reconstruction, tracking, device, threads: as in `train_base`.
        progress: is told how far the rehearsal is.

    Raises:
        Exception: whatever the agent's training or the scoring of its channels raises.
    """
    short = rehearsal(agent)
    options = agent.options if short is None else short.options
    data = {name: tensor.to(device) for name, tensor in agent.data().items()}
    with deterministic(seed, threads):
        pupil = agent_class(kind)(options, None, data, device)
        graph = trace_agent(pupil, pupil.calibration_inputs(TRACE_ROWS, seed))
        watch = _Watch(progress, may_stop=short is None)
        watch.tracker = ImportanceTracker(graph, pupil.model, **asdict(tracking))
        tracker = _Stopping(watch.tracker, watch)
        try:
            pupil.train(seed, tracker, watch)
            finished = True
        except _EnoughError:
            finished = False
        in_full = finished and short is None
        taken = watch.elapsed
        base = scored_base(kind, pupil, graph, tracker.inner, seed, metrics, reconstruction)
    if in_full:
        measured = TrainingTime(taken, "trained in full")
    else:
        measured = watch.training_time(None if short is None else short.steps)
    # So far above that no agent retains half: what a trial measures then hangs on nothing.
    made_up = {split: value + 1e6 for split, value in base.trivial.items()}
    return replace(base, options=dict(agent.options), performance=made_up), measured


class _EnoughError(BaseException):
    """Ends a training that is only rehearsed. No `Exception`, so that no agent's own handlers catch it."""


class _Watch:
    """Listens to a training's progress: how fast it is, and when enough of it was seen.

    Attributes:
        tracker: of the training, which is not ended before that has something to say; None asks none.
    """

    def __init__(self, progress: Progress, may_stop: bool) -> None:
        self._progress = progress
        self._may_stop = may_stop
        self._started = time.perf_counter()
        self._reports: list[tuple[float, int, int]] = []  # (seconds, done, total)
        self.tracker: ImportanceTracker | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the training began."""
        return time.perf_counter() - self._started

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self._reports.append((self.elapsed, done, total))
        self._progress(done, total, note)
        if self._may_stop and self.elapsed > REHEARSAL_SECONDS and self._steady() and done < total:
            self._end()

    def step(self) -> None:
        """A step of the training has ended."""
        if self._may_stop and not self._reports and self.elapsed > SILENT_SECONDS:
            self._end()

    def _end(self) -> None:
        """End the training, once there is enough to score by: a variance over two tracked steps."""
        if self.tracker is None or self.tracker.steps >= 2:
            raise _EnoughError

    def _steady(self) -> bool:
        """Whether two reports tell the speed."""
        return len(self._reports) > 1 and self._reports[-1][1] > self._reports[0][1]

    def training_time(self, steps: int | None) -> TrainingTime:
        """The time of the whole training at the speed between the first and the last report.

        Args:
            steps: of the whole training; None for what the reports say.
        """
        if not self._steady():
            return TrainingTime(None, "not measured: the training does not report its progress")
        (before, first, _), (after, last, total) = self._reports[0], self._reports[-1]
        whole = total if steps is None else steps
        rate = (after - before) / (last - first)
        rest = before + rate * (whole - first) if steps is None else rate * whole
        return TrainingTime(rest, f"estimated from {last:,} of {whole:,} steps")


class _Stopping:
    """A tracker that lets the watch end a training that reports nothing."""

    def __init__(self, inner: ImportanceTracker, watch: _Watch) -> None:
        self.inner = inner
        self._watch = watch

    def is_due(self, loss: str = "model") -> bool:
        return self.inner.is_due(loss)

    def capture(self, loss: str = "model") -> AbstractContextManager[None]:
        return self.inner.capture(loss)

    def update(self, loss: str = "model") -> None:
        self.inner.update(loss)
        self._watch.step()
