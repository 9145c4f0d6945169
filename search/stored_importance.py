"""The course of importance that a base stores, read back without its weights and data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agents.agent import agent_class
from components import UserError
from search.arrays import to_tensors
from search.base import trace_agent
from search.base_files import BaseShape, read_shape
from search.config import parse_experiment
from search.determinism import deterministic
from search.durable_files import Arrays, CorruptFileError, read_arrays
from search.importance_course import CourseGroup, ImportanceCourse
from search.run_directory import RunDirectory

FILE = "importance.safetensors"


def read_course(run: RunDirectory, *, traced: bool = True) -> ImportanceCourse:
    """The course of importance of a run's base.

    Args:
        run: which may have no trials yet.
        traced: trace the agent for the components of its groups, which takes the agent's code; without that
            they are left empty.

    Raises:
        CorruptFileError: a file of the base is damaged.
        UserError: there is no base, it has no course, or its agent is not known here.
    """
    _require_base(run)
    shape = read_shape(run.base)
    stored = read_arrays(run.base / FILE)
    groups = _traced_groups(run.base, shape) if traced else _groups(shape)
    return _course(run.base / FILE, stored, groups)


def _require_base(run: RunDirectory) -> None:
    if (run.base / "metrics.json").is_file():
        return
    config = parse_experiment(run.experiment.read_text(encoding="utf-8"), source=str(run.experiment))
    if not config.has_trained_base:
        raise UserError(
            f"{run.path} stores no base: with base.mode 'per_trial' every trial trains its own, and keeps "
            "the pruned agent only"
        )
    raise UserError(f"{run.path} has no base yet: `prunefront train` and `prunefront search` train it")


def _groups(shape: BaseShape) -> tuple[CourseGroup, ...]:
    return tuple(CourseGroup(name, (), width) for name, width in shape.widths.items())


def _traced_groups(directory: Path, shape: BaseShape) -> tuple[CourseGroup, ...]:
    """The groups with their components: not stored, since the agent's graph has them."""
    file = directory / "calibration.safetensors"
    inputs = {
        name.removeprefix("input/"): array
        for name, array in read_arrays(file).items()
        if name.startswith("input/")
    }
    with deterministic(shape.seed):
        agent = agent_class(shape.kind)(shape.options, shape.widths, None, "cpu")
        graph = trace_agent(agent, to_tensors(inputs))
    if graph.widths != shape.widths:
        raise CorruptFileError(f"{directory / 'widths.json'} is corrupt: the agent has other groups")
    return tuple(
        CourseGroup(group.name, tuple(c for c in graph.components if c in group.components), group.size)
        for group in graph.groups
    )


def _course(path: Path, stored: Arrays, groups: tuple[CourseGroup, ...]) -> ImportanceCourse:
    steps = stored.get("history/steps")
    if steps is None or not len(steps):
        raise UserError(
            f"{path} has no course of importance: the base trained for too few steps that were tracked, or "
            "by a version that kept none; train it again, or with a lower base.importance.every"
        )
    if steps.ndim != 1 or steps.dtype.kind != "i" or (np.diff(steps) <= 0).any():
        raise CorruptFileError(f"{path} is corrupt: its steps do not increase")
    by_metric: dict[str, dict[str, np.ndarray]] = {}
    final: dict[str, dict[str, np.ndarray]] = {}
    for name, array in stored.items():
        place, _, rest = name.partition("/")
        metric, _, channels_of = rest.partition("/")
        if rest != "steps":
            target = by_metric if place == "history" else final
            target.setdefault(metric, {})[channels_of] = array.astype(np.float64)
    for table, rows in ((by_metric, (len(steps),)), (final, ())):
        for metric, found in table.items():
            for group in groups:
                if group.name not in found or found[group.name].shape != (*rows, group.channels):
                    raise CorruptFileError(
                        f"{path} is corrupt: the {metric!r} scores do not fit group {group.name!r} of "
                        f"{group.channels} channels"
                    )
    return ImportanceCourse(
        steps=steps.astype(np.int64),
        groups=groups,
        scores=dict(sorted(by_metric.items())),
        final={metric: found for metric, found in sorted(final.items()) if metric not in by_metric},
    )
