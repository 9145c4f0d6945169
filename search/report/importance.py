"""What a report shows of importance over the base's training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from components import UserError
from search.durable_files import CorruptFileError
from search.importance_course import TOP, Floats, ImportanceCourse, Shift
from search.report.short import short
from search.run_directory import RunDirectory
from search.stored_importance import read_course

STEPS = 48
"""Snapshots that charts show at most."""


def importance_over_training(run: RunDirectory) -> dict[str, Any]:
    """Relative importance, ranks of groups, shifts and agreement; empty where nothing is known.

    By metric, `values` by group and `parts` by component and kind of group are binary logarithms of relative
    importance: 1 is twice the average channel, 0 the same, -1 half. Metrics that do not compare groups are
    among `shifts` and in the `agreement` only. Without the agent's code the components are not known.

    Raises:
        CorruptFileError: a file of the base is damaged.
    """
    if not (run.base / "metrics.json").is_file():
        return {}
    for traced in (True, False):
        try:
            return _shown(read_course(run, traced=traced))
        except CorruptFileError:
            raise
        except UserError:  # the agent is not known here, or there is no course
            continue
    return {}


def _shown(whole: ImportanceCourse) -> dict[str, Any]:
    course = whole.thinned(STEPS)
    return {
        "steps": course.steps.tolist(),
        "components": {group.name: group.part for group in course.groups},
        "metrics": {
            metric: _of_metric(course, metric) for metric in course.metrics if whole.compares_groups(metric)
        },
        "top": list(TOP),
        "shifts": {metric: [_shift(shift) for shift in whole.shifts(metric)] for metric in course.metrics},
        "agreement": {
            "metrics": list(course.agreement),
            "values": [[short(value, 3) for value in row.values()] for row in course.agreement.values()],
        },
    }


def _of_metric(course: ImportanceCourse, metric: str) -> dict[str, Any]:
    sets = {**course.parts, **course.kinds}
    return {
        "groups": [group.name for group in course.groups],
        "values": [_logarithms(row) for row in course.by_group(metric)],
        "ranks": [[short(rank, 3) for rank in row] for row in course.ranks(metric)],
        "parts": {name: _logarithms(course.relative(metric, groups)) for name, groups in sets.items()},
    }


def _logarithms(relative: Floats) -> list[float | None]:
    with np.errstate(divide="ignore"):
        return [short(value, 3) for value in np.log2(relative)]


def _shift(shift: Shift) -> Mapping[str, Any]:
    return {
        "share": shift.share,
        "groups": short(shift.groups, 3),
        "channels": short(shift.mean_channels, 3),
        "overlap": [short(value, 3) for value in shift.mean_overlap.values()],
    }
