"""What a search or a training shows while it runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.front_chart import front_chart

_LINE_EVERY = 5.0  # seconds between plain lines


@dataclass(frozen=True)
class SearchStatus:
    """How far a search has come.

    Attributes:
        finished: trials that were run, stopped and failed ones included.
        total: trials to run.
        failed: trials that failed.
        front_size: trials on the front.
        hypervolume: of the front, in [0, 1]; None before the first complete trial.
        per_minute: trials finished per minute; None before there are two.
        seconds_left: estimated time to the end; None with `per_minute`.
        last_failure: reason of the latest failure; None without one.
        stopped: trials that were stopped early.
    """

    finished: int
    total: int
    failed: int = 0
    front_size: int = 0
    hypervolume: float | None = None
    per_minute: float | None = None
    seconds_left: float | None = None
    last_failure: str | None = None
    stopped: int = 0


def status_line(status: SearchStatus) -> str:
    """A search's state in one line, such as `trials 12/64, 1 failed, front 5, hypervolume 0.512, ...`."""
    parts = [f"trials {status.finished}/{status.total}"]
    if status.stopped:
        parts.append(f"{status.stopped} stopped early")
    if status.failed:
        parts.append(f"{status.failed} failed")
    parts.append(f"front {status.front_size}")
    if status.hypervolume is not None:
        parts.append(f"hypervolume {status.hypervolume:.3f}")
    if status.per_minute is not None:
        parts.append(f"{status.per_minute:.3g} trials/min")
    if status.seconds_left is not None and status.finished < status.total:
        parts.append(f"{duration(status.seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Display:
    """A bar with lines below it on a terminal; elsewhere a line now and then, and one at the end."""

    def __init__(self, console: Console | None, clock: Callable[[], float]) -> None:
        self._console = console or Console()
        self._clock = clock
        self._lines: list[str] = []
        self._picture: list[str] = []  # below the lines, on a terminal only
        self._done, self._total = 0, 1
        self._printed: list[str] = []
        self._printed_at = clock()
        self._live = (
            Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        self._printed_at = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        else:
            self._print()

    def _show(self, done: int, total: int, lines: list[str]) -> None:
        self._done, self._total, self._lines = done, max(total, 1), lines
        if self._live:
            self._live.start()  # once: what may have nothing to do draws nothing before it has
        if not self._live and self._clock() - self._printed_at >= _LINE_EVERY:
            self._print()

    def _print(self) -> None:
        if self._lines and self._lines != self._printed:
            self._console.print(Text("; ".join(self._lines)), soft_wrap=True)
            self._printed = self._lines
        self._printed_at = self._clock()

    def _render(self) -> RenderableType:
        bar = ProgressBar(total=self._total, completed=self._done, width=min(60, self._console.width))
        rows = Table.grid()
        rows.add_row(bar)
        for line in (*self._lines, *self._picture):
            rows.add_row(Text(line, overflow="ellipsis", no_wrap=True))
        return rows


class SearchProgress(_Display):
    """Progress of a search, as a context manager; `update` after every trial.

    Args:
        total: trials to run.
        console: where to show it; None for standard output.
        clock: seconds, for the rate and the time left.
    """

    def __init__(
        self, total: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, clock)
        self._total_trials = total
        self._first: tuple[float, int] | None = None  # when the first trials had finished, and how many
        self.status = SearchStatus(finished=0, total=total)

    def __enter__(self) -> Self:
        super().__enter__()
        self._show(0, self._total_trials, [])  # a bar at nothing, while the workers start
        return self

    def update(
        self,
        *,
        finished: int,
        failed: int,
        front_size: int,
        hypervolume: float | None,
        last_failure: str | None = None,
        stopped: int = 0,
        front: Sequence[tuple[float, float]] = (),
    ) -> None:
        """Show a new state.

        Args:
            finished, failed, front_size, hypervolume, last_failure, stopped: as in `SearchStatus`, which adds
                the rate and the time left.
            front: size ratio and retention of its trials, drawn on a terminal.
        """
        now = self._clock()
        if self._first is None and finished:
            self._first = (now, finished)
        per_minute = seconds_left = None
        if self._first is not None and finished > self._first[1] and now > self._first[0]:
            per_second = (finished - self._first[1]) / (now - self._first[0])
            per_minute = 60 * per_second
            seconds_left = (self._total_trials - finished) / per_second
        self.status = SearchStatus(
            finished=finished,
            total=self._total_trials,
            failed=failed,
            front_size=front_size,
            hypervolume=hypervolume,
            per_minute=per_minute,
            seconds_left=seconds_left,
            last_failure=last_failure,
            stopped=stopped,
        )
        lines = [status_line(self.status)]
        if last_failure:
            lines.append(f"last failure: {last_failure}")
        if front and self._live:
            sizes, retention = zip(*front, strict=True)
            self._picture = front_chart(sizes, retention, width=max(20, min(60, self._console.width - 12)))
        self._show(finished, self._total_trials, lines)


class TrainingProgress(_Display):
    """Progress of a training, as a context manager that is called with (done, total, note).

    Args:
        title: what is being trained, such as `base`.
        console: where to show it; None for standard output.
        clock: seconds, for the time left.
    """

    def __init__(
        self, title: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, clock)
        self._title = title
        self._first: tuple[float, int] | None = None  # when the first steps were done, and how many

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` steps are done; `note` is for the agent's own words."""
        if self._first is None:  # of a training that goes on, much was done before
            self._first = (self._clock(), done)
        began, before = self._first
        self._show(
            done, total, [training_line(self._title, done, total, self._clock() - began, note, before)]
        )


def training_line(title: str, done: int, total: int, elapsed: float, note: str = "", before: int = 0) -> str:
    """A training's state in one line, such as `base: 1200/3000 (40 %), loss 0.013, 9 s left`.

    Args:
        title: what is being trained.
        done, total: steps.
        elapsed: seconds since `before` of them were done.
        note: in the agent's own words.
        before: steps.
    """
    share = done / total if total else 1.0
    parts = [f"{title}: {done}/{total} ({share:.0%})".replace("%", " %")]
    if note:
        parts.append(note)
    if before < done < total:
        parts.append(f"{duration(elapsed / (done - before) * (total - done))} left")
    return ", ".join(parts)
