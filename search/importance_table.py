"""The course of importance as people read it in a terminal, as JSON, and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table

from search.front import percent
from search.front_table import plain_table
from search.importance_course import TOP, CourseGroup, Floats, ImportanceCourse, Shift

SHOWN = 0.1
"""Share of the training that tables call early."""

DIGITS = 6
"""Significant digits of scores: what single precision has."""

COLUMNS = ("step", "metric", "component", "group", "coupling", "channel", "score")
"""Of the CSV; a coupling group's component names all of its components, joined by `+`."""


# --- a terminal --------------------------------------------------------------------------------------------


def importance_tables(course: ImportanceCourse) -> list[Table]:
    """Ranks of groups, what kinds and components count, shifts of channels, agreement of metrics."""
    tables = [_rank_table(course), _part_table(course)]
    if any(course.shifts(metric) for metric in course.metrics):
        tables.append(_shift_table(course))
    return [*tables, _agreement_table(course)]


def notes(course: ImportanceCourse) -> list[str]:
    """What has to be known to read the tables."""
    lines = ["Relative importance: 1 is the average channel of the model at that time."]
    if len(course.steps) == 1:
        lines.append(
            "There is one snapshot only, so nothing shows how importance moved: follow the training more "
            "closely, by a smaller base.importance.every or interval."
        )
    alike = [metric for metric in course.metrics if not course.compares_groups(metric)]
    if alike:
        lines.append(
            f"–: by {', '.join(alike)}, every group of this base has the same mean all through the training, "
            "which says nothing of groups against one another."
        )
    return lines


def _span(course: ImportanceCourse) -> str:
    first = int(course.steps[course.nearest(SHOWN)])
    return f"after {first:,} → after {int(course.steps[-1]):,} training steps"


def _rank_table(course: ImportanceCourse) -> Table:
    table = plain_table(f"Ranks of groups, 1 the most important, {_span(course)}")
    table.add_column("group", overflow="ellipsis", no_wrap=True)
    table.add_column("component", overflow="ellipsis", no_wrap=True, max_width=12)
    table.add_column("channels", justify="right", no_wrap=True)
    early = course.nearest(SHOWN)
    ranks = {}
    for metric in course.metrics:
        table.add_column(metric.replace("_", " "), justify="right")
        ranks[metric] = course.ranks(metric) if course.compares_groups(metric) else None
    for row, group in enumerate(course.groups):
        cells = (
            "–" if found is None else f"{_rank(found[row, early])} → {_rank(found[row, -1])}"
            for found in ranks.values()
        )
        table.add_row(group.name, group.part or "–", f"{group.channels:,}", *cells)
    return table


def _part_table(course: ImportanceCourse) -> Table:
    """Relative importance of component-specific groups against coupling ones, and of components."""
    table = plain_table(f"Relative importance, {_span(course)}")
    table.add_column("groups of", no_wrap=True, overflow="ellipsis")
    for metric in course.metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    early = course.nearest(SHOWN)

    def add(name: str, groups: Sequence[CourseGroup]) -> None:
        cells = []
        for metric in course.metrics:
            values = course.relative(metric, groups)
            known = course.compares_groups(metric)
            cells.append(f"{_short(values[early])} → {_short(values[-1])}" if known else "–")
        table.add_row(name, *cells)

    for name, groups in course.kinds.items():
        add(name, groups)
    table.add_section()
    for name, groups in course.parts.items():
        if not groups[0].is_coupling:
            add(name, groups)
    return table


def _shift_table(course: ImportanceCourse) -> Table:
    table = plain_table("From early to the end: rank correlation, and what stays of the top channels")
    table.add_column("metric", no_wrap=True)
    for heading in ("of training", "groups", "channels", *(f"top {percent(top)}" for top in TOP)):
        table.add_column(heading, justify="right", no_wrap=True)
    for metric in course.metrics:
        for place, shift in enumerate(course.shifts(metric)):
            table.add_row(
                "" if place else metric,
                percent(shift.share),
                _decimal(shift.groups),
                _decimal(shift.mean_channels),
                *("–" if share is None else f"{100 * share:.0f} %" for share in shift.mean_overlap.values()),
            )
        table.add_section()
    return table


def _agreement_table(course: ImportanceCourse) -> Table:
    table = plain_table("Agreement of metrics at the end: rank correlation of channels inside groups")
    table.add_column("", no_wrap=True)
    for metric in course.agreement:
        table.add_column(metric.replace("_", " "), justify="right", overflow="fold")
    for metric, row in course.agreement.items():
        table.add_row(metric, *map(_decimal, row.values()))
    return table


def _rank(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:g}"


def _short(value: float) -> str:
    """A relative importance: what is below 0.01 counts for nothing."""
    if math.isnan(value):
        return "?"
    return "<0.01" if value < 0.01 else f"{value:.{2 if value < 10 else 1}f}"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


# --- JSON --------------------------------------------------------------------------------------------------


def to_json(course: ImportanceCourse) -> dict[str, Any]:
    """Everything: scores of channels, relative importance and ranks at every snapshot, shifts, agreement.

    Plain values; what is not known or not defined is None. Relative importance, ranks and the shifts of
    groups are None of metrics that do not compare groups.
    """
    return {
        "steps": course.steps.tolist(),
        "groups": [
            {
                "group": group.name,
                "components": list(group.components),
                "coupling": group.is_coupling,
                "channels": group.channels,
            }
            for group in course.groups
        ],
        "metrics": {metric: _metric_json(course, metric) for metric in course.metrics},
        "final_scores": {
            metric: {group: _plain(scores) for group, scores in found.items()}
            for metric, found in course.final.items()
        },
        "agreement": {
            one: {other: _rounded(value) for other, value in row.items()}
            for one, row in course.agreement.items()
        },
    }


def _metric_json(course: ImportanceCourse, metric: str) -> dict[str, Any]:
    known = course.compares_groups(metric)
    relative, ranks = course.by_group(metric), course.ranks(metric)

    def of(sets: Iterable[tuple[str, tuple[CourseGroup, ...]]]) -> dict[str, Any] | None:
        found = {
            name: {
                "relative": _plain(course.relative(metric, groups)),
                "share": _plain(course.share(metric, groups)),
            }
            for name, groups in sets
        }
        return found if known else None

    return {
        "compares_groups": known,
        "groups": {
            group.name: {"relative": _plain(relative[row]), "rank": _plain(ranks[row])}
            for row, group in enumerate(course.groups)
        }
        if known
        else None,
        "components": of(course.parts.items()),
        "kinds": of(course.kinds.items()),
        "shifts": [_shift_json(shift) for shift in course.shifts(metric)],
        "scores": {
            group.name: [_plain(row) for row in course.scores[metric][group.name]] for group in course.groups
        },
    }


def _shift_json(shift: Shift) -> dict[str, Any]:
    return {
        "share": shift.share,
        "step": shift.step,
        "groups": _rounded(shift.groups),
        "channels": _rounded(shift.mean_channels),
        "channels_by_group": {group: _rounded(value) for group, value in shift.channels.items()},
        "overlap": {f"{top:g}": _rounded(value) for top, value in shift.mean_overlap.items()},
        "overlap_by_group": {
            f"{top:g}": {group: _rounded(value) for group, value in found.items()}
            for top, found in shift.overlap.items()
        },
    }


def _plain(values: Floats) -> list[float | None]:
    return [_rounded(value) for value in values.tolist()]


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


# --- CSV ---------------------------------------------------------------------------------------------------


def csv_lines(course: ImportanceCourse) -> Iterator[str]:
    """A heading and one line for every step, metric, group and channel, without line ends.

    A score that is not finite is left empty.
    """
    yield ",".join(COLUMNS)
    for place, step in enumerate(course.steps.tolist()):
        for metric in course.metrics:
            for group in course.groups:
                coupling = str(group.is_coupling).lower() if group.components else ""
                head = _csv_line((step, metric, "+".join(group.components), group.name, coupling))
                for channel, score in enumerate(course.scores[metric][group.name][place].tolist()):
                    known = f"{score:.{DIGITS}g}" if math.isfinite(score) else ""
                    yield f"{head},{channel},{known}"


def _csv_line(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()
