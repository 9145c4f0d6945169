"""A front as people read it in a terminal: at most 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from textwrap import wrap
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search.front import Front, FrontTrial, percent
from search.stability import STABILITIES, STABILITY, stability_sentence

if TYPE_CHECKING:
    from search.base import Base
    from search.trial_types import TrialResult
    from search.verification import VerificationReport

WIDTH = 100
"""Columns of everything that is printed."""

LEAST_ORIGIN = 9
"""Characters of who proposed a trial, or there is no such column."""

FIRST_TO_GO = ("proposed by", "MACs")
"""Columns that give way first where not all have room; then those beyond the usual ones, the last first."""

USUAL = 7
"""Columns that every front has, from the left."""

SHOWN_FAILURES = 5
"""Different reasons of failure that are listed."""


def front_table(front: Front, width: int = WIDTH) -> Table:
    """Size, cost and performance of a front's trials, smallest first; performance on test data once known.

    Args:
        front: whose trials are listed.
        width: columns of the terminal. What has no room is left out as whole columns, named below the table.
    """
    every = list(_columns(front))
    named = {column.heading: column for column in reversed(every)}  # of two alike, the usual one
    queue = [named[heading] for heading in FIRST_TO_GO]
    queue += [*every[: USUAL - 1 : -1], named["test"], named["parameters"]]
    columns = list(every)
    table = _filled(front, columns, narrow=False)
    if _least_width(table) > width:
        table = _filled(front, columns)
    for leaving in dict.fromkeys(queue):
        if _least_width(table) <= width:
            break
        columns.remove(leaving)
        table = _filled(front, columns)
    left_out = [column.heading.partition("\n")[0] for column in every if column not in columns]
    if left_out:
        table.caption = f"No room for: {', '.join(left_out)}."
        table.caption_justify = "left"
    return table


@dataclass(frozen=True, eq=False)
class _Column:
    """A heading, and what stands below it for every trial."""

    heading: str
    cell: Callable[[FrontTrial], str]


def _columns(front: Front) -> Iterator[_Column]:
    yield _Column("trial", lambda trial: str(trial.trial))
    yield _Column("size", lambda trial: percent(trial.size_ratio))
    yield _Column("parameters", lambda trial: f"{trial.parameters:,}")
    yield _Column("MACs", lambda trial: f"{trial.macs:,}")
    yield _Column("retention", lambda trial: _ratio(trial.retention))
    yield _Column("test", lambda trial: _ratio(trial.test_retention))
    split = "test" if front.tested else "validation"
    performance = f"{front.performance}\n({split})".replace("_", " ")
    yield _Column(performance, lambda trial: _number(_performance(trial, front)))
    bounded = [constraint.name for constraint in front.constraints]
    shown = ("parameters", "macs", "size_ratio", "retention", front.performance)
    extra = [name for name in dict.fromkeys([*_names(front), *bounded]) if name not in (*shown, *STABILITIES)]
    for name in extra:
        yield _Column(name.replace("_", " "), _measurement(name))
    if any(STABILITY in trial.measured for trial in front.trials):
        yield _Column("stability\n(95 %)", _interval)
    for name in dict.fromkeys(name for trial in front.trials for name in trial.options):
        yield _Column(name.replace("_", " "), _option(name))
    yield _Column("proposed by", lambda trial: trial.origin.removeprefix("anchor: "))


def _measurement(name: str) -> Callable[[FrontTrial], str]:
    return lambda trial: _number(trial.measurement(name))


def _option(name: str) -> Callable[[FrontTrial], str]:
    return lambda trial: _number(trial.options.get(name))


def _filled(front: Front, columns: Sequence[_Column], narrow: bool = True) -> Table:
    """Only who proposed a trial may be cut off; narrow, headings wrap to the width of their numbers."""
    table = plain_table(f"Front of {front.experiment}: {len(front.trials)} trials")
    for column in columns:
        if column.heading == FIRST_TO_GO[0]:
            table.add_column(column.heading, min_width=LEAST_ORIGIN)
            continue
        numbers = max((len(column.cell(trial)) for trial in front.trials), default=0)
        words = max(map(len, column.heading.split()), default=1)
        most = max(numbers, words) if narrow else WIDTH
        lines = [wrap(line, most) for line in column.heading.split("\n")]
        table.add_column("\n".join(chain(*lines)), justify="right", no_wrap=True)
    for trial in front.trials:
        table.add_row(*(Text(column.cell(trial), no_wrap=True, overflow="ellipsis") for column in columns))
    return table


def _least_width(table: Table) -> int:
    return Console(width=10 * WIDTH).measure(table).minimum


def base_line(base: Base, performance: str) -> str:
    """What the base is and achieves, in one line."""
    widths = ", ".join(f"{group} {width}" for group, width in base.widths.items())
    return (
        f"Base: {base.parameters:,} parameters ({widths}), trained in {base.training_seconds:.0f} s; "
        f"{performance.replace('_', ' ')} on validation data {_number(base.performance['validation'])}, "
        f"that of a trivial agent {_number(base.trivial['validation'])}."
    )


def retention_table(front: Front) -> Table:
    """The best retention at or below 1, 2, 5, 10 and 25 % of the base's size, chosen on validation data."""
    table = plain_table("Best retention at or below a size")
    rows = front.retention_at()
    table.add_column("size", no_wrap=True)
    for row in rows:
        table.add_column(f"≤ {percent(row['size_ratio'])}", justify="right", no_wrap=True)
    for key in ("retention", "test_retention", "trial"):
        name = key.replace("_", " ")
        shown = str if key == "trial" else _ratio
        table.add_row(name, *("–" if row[key] is None else shown(row[key]) for row in rows))
    return table


def hypervolume_line(front: Front) -> str:
    """Both hypervolumes in one line."""
    volumes = front.hypervolumes()
    line = (
        f"Hypervolume {volumes['hypervolume']:.3f} over log size, {volumes['hypervolume_linear']:.3f} linear"
    )
    if front.tested and front.trials:
        line += (
            f"; on test data {volumes['test_hypervolume']:.3f} and {volumes['test_hypervolume_linear']:.3f}"
        )
    return line


def stability_line(front: Front) -> str:
    """How far down the front the stability of the base holds; empty where it was not measured."""
    found = front.stable_compression
    return "" if found is None else stability_sentence(found)


def missed_lines(front: Front) -> list[str]:
    """Trials that miss a constraint by what was measured at the end: one line each."""
    lines = []
    for trial in front.trials:
        missed = front.missed(trial)
        if missed is not None:
            lines.append(
                f"Trial {trial.trial} misses {missed.name} {missed} by what was measured at the end of the "
                f"search ({_number(trial.measurement(missed.name))}); select does not take it."
            )
    return lines


def front_lines(front: Front) -> list[str]:
    """What stands below the tables of a front."""
    return [hypervolume_line(front), *filter(None, [stability_line(front)]), *missed_lines(front)]


def failure_lines(results: Sequence[TrialResult]) -> list[str]:
    """How many trials failed, and why: one line per reason, most frequent first."""
    by_reason: dict[str, list[int]] = {}
    for result in results:
        if result.failed:
            by_reason.setdefault(result.reason or "unknown", []).append(result.number)
    if not by_reason:
        return []
    failed = sum(len(numbers) for numbers in by_reason.values())
    lines = [f"{failed} of {len(results)} trials failed:"]
    ordered = sorted(by_reason.items(), key=lambda item: (-len(item[1]), min(item[1])))
    for reason, numbers in ordered[:SHOWN_FAILURES]:
        which = f"trial {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} trials, first {min(numbers)}"
        lines.append(f"  {which}: {reason}")
    if len(ordered) > SHOWN_FAILURES:
        lines.append(f"  and {len(ordered) - SHOWN_FAILURES} other reasons, all in trials.jsonl")
    return lines


def early_stopping_line(results: Sequence[TrialResult], updates: int) -> str:
    """How many trials were stopped early, and what that left undone; empty where none was.

    Args:
        results: of the search.
        updates: of fine-tuning that every trial would have had.
    """
    stopped = [result for result in results if result.stopped]
    if not stopped:
        return ""
    made, full = sum(result.updates for result in results), updates * len(results)
    return (
        f"{len(stopped)} of {len(results)} trials were stopped early: {made:,} of {full:,} updates of "
        f"fine-tuning were made ({percent(made / full)})."
    )


def stage_line(results: Sequence[TrialResult]) -> str:
    """Where the time of complete trials went: medians in seconds, of whole trials and of their stages.

    The whole is a median of its own, not the sum. Empty where no trial is complete.
    """
    complete = [result.timings for result in results if result.complete]
    if not complete:
        return ""
    whole = median(sum(timings.values()) for timings in complete)
    decimals = 1 if whole >= 1 else 2 if whole >= 0.1 else 3
    stages = dict.fromkeys(stage for timings in complete for stage in timings)
    shown = (
        f"{stage.replace('_', '-')} {median(timings.get(stage, 0.0) for timings in complete):.{decimals}f}"
        for stage in stages
    )
    return f"median trial {whole:.{decimals}f} s: {', '.join(shown)}"


def verification_table(report: VerificationReport) -> Table:
    """What a bundle says of itself, and what it measures now."""
    table = plain_table("Measured again")
    for heading in ("", "stored", "now"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in report.measurements:
        table.add_row(row.name.replace("_", " "), _number(row.stored), _number(row.now))
    return table


def plain_table(title: str) -> Table:
    """An empty table as all of the command's look."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _interval(trial: FrontTrial) -> str:
    """Stability with its interval, as short as can be: `0.98 .95–1`."""
    value, low, high = (trial.measured.get(name) for name in STABILITIES)
    if value is None or low is None or high is None:
        return "–"
    ends = [f"{end:.2f}".removeprefix("0").replace("1.00", "1").replace(".00", "0") for end in (low, high)]
    return f"{value:.2f} {ends[0]}–{ends[1]}"


def _names(front: Front) -> list[str]:
    return [objective["name"] for objective in front.objectives]


def _performance(trial: FrontTrial, front: Front) -> float | None:
    return trial.test_performance if front.tested else trial.objectives.get(front.performance)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"
