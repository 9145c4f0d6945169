"""What a report shows: everything there is to know of a search, read back from its run directory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from components import UserError
from search import pareto
from search.durable_files import read_arrays, read_json
from search.front import Front
from search.parameter_importance import choices, parameter_importance
from search.run_directory import RunDirectory
from search.trial_types import TrialResult

STEPS = 48
"""Snapshots of the importance that a heat map shows at most."""

DIGITS = 5
"""Significant digits of measured numbers: more than anybody reads, and a third of the bytes of all."""


def gather(run: RunDirectory) -> dict[str, Any]:
    """The content of a report: plain values, JSON-able, without NaN.

    Raises:
        UserError: no trial was completed, or a file of the run is damaged.
    """
    results = sorted(run.read_trials(), key=lambda result: result.number)
    front = Front.from_json(run.front, run.read_front())
    objectives = [str(objective["name"]) for objective in front.objectives]
    complete = [result for result in results if result.complete]
    if not complete:
        raise UserError(f"{run.path} has nothing to report: no trial of the search was completed")
    return {
        "experiment": front.experiment,
        "objectives": [dict(objective) for objective in front.objectives],
        "performance": front.performance,
        "base": _base(run, front),
        "reference": {"smallest": pareto.SMALLEST_SIZE},
        "hypervolumes": {name: _short(value) for name, value in front.hypervolumes().items()},
        "retention_at": front.retention_at(),
        "knee": _knee(front),
        "trials": _trials(results, objectives),
        "front": {
            "trial": [trial.trial for trial in front.trials],
            "test_retention": [_short(trial.test_retention) for trial in front.trials],
            "test_performance": [_short(trial.test_performance) for trial in front.trials],
            "latencies": [_latencies(trial.objectives) for trial in front.trials],
        },
        "course": _course(results),
        "choices": _choices(results),
        "importance": _importance_over_training(run),
        "parameters": {
            name: {choice: round(share, 4) for choice, share in shares.items()}
            for name, shares in parameter_importance(
                results, list(dict.fromkeys([*objectives, "retention"]))
            ).items()
        },
        "failures": _failures(results),
        "stages": _stages(complete),
        "configuration": run.experiment.read_text(encoding="utf-8"),
        "path": str(run.path),
        "hosts": dict(Counter(result.host for result in results if result.host)),
        "devices": dict(Counter(result.device for result in results if result.device)),
    }


def _base(run: RunDirectory, front: Front) -> dict[str, Any]:
    base = dict(front.base)
    stored = read_json(run.base / "metrics.json") if (run.base / "metrics.json").is_file() else {}
    environment = stored.get("environment")
    return {**base, "environment": environment if isinstance(environment, dict) else {}}


def _knee(front: Front) -> int | None:
    if not front.trials:
        return None
    sizes = [trial.size_ratio for trial in front.trials]
    return front.trials[pareto.knee(sizes, [trial.retention for trial in front.trials])].trial


def _latencies(objectives: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _short(value) for name, value in objectives.items() if name.startswith("latency")}


def _trials(results: Sequence[TrialResult], objectives: Sequence[str]) -> dict[str, Any]:
    """Column -> one entry for every trial: a third of the size of one object for each."""
    groups = list(dict.fromkeys(group for result in results for group in result.widths))
    components = list(dict.fromkeys(name for result in results for name in result.component_sizes))
    began = [_seconds(result.started) for result in results]
    first = min((moment for moment in began if moment is not None), default=0.0)
    return {
        "number": [result.number for result in results],
        "status": [result.status for result in results],
        "origin": [result.origin for result in results],
        "reason": [result.reason for result in results],
        "parameters": [result.parameters for result in results],
        "size_ratio": [_short(result.size_ratio) for result in results],
        "macs": [result.macs for result in results],
        "retention": [_short(result.retention) for result in results],
        "objectives": {
            name: [_short(result.objectives.get(name)) for result in results] for name in objectives
        },
        "groups": groups,
        "widths": [[result.widths.get(group) for group in groups] for result in results],
        "components": components,
        "component_sizes": [[result.component_sizes.get(name) for name in components] for result in results],
        "coefficients": [_coefficients(result) for result in results],
        "options": [dict(result.options) for result in results],
        "timings": [
            {stage: _short(value, 3) for stage, value in result.timings.items()} for result in results
        ],
        "rungs": [[[updates, _short(value)] for updates, value in result.rungs] for result in results],
        "rung_losses": [
            [[updates, _short(value)] for updates, value in result.rung_losses] for result in results
        ],
        "updates": [result.updates for result in results],
        "repaired_by": [result.repaired_by for result in results],
        "seed": [result.seed for result in results],
        "device": [result.device for result in results],
        "host": [result.host for result in results],
        "began": [None if moment is None else round(moment - first, 2) for moment in began],
    }


def _coefficients(result: TrialResult) -> dict[str, Any]:
    return {
        name: {metric: _short(weight, 3) for metric, weight in value.items()}
        if isinstance(value, Mapping)
        else _short(value, 3)
        for name, value in result.plan.coefficients.items()
    }


def _course(results: Sequence[TrialResult]) -> dict[str, list[float | None]]:
    """Hypervolume after every finished trial, in the order in which they finished, and seconds by then."""
    finished = sorted(
        (moment, result.number, result)
        for result in results
        if (moment := _seconds(result.finished)) is not None
    )
    started = min(
        (moment for result in results if (moment := _seconds(result.started)) is not None), default=0.0
    )
    seconds: list[float | None] = []
    volumes: list[float | None] = []
    sizes: list[float] = []
    retention: list[float] = []
    volume = 0.0
    for moment, _, result in finished:
        if result.complete and result.size_ratio is not None and result.retention is not None:
            sizes.append(result.size_ratio)
            retention.append(result.retention)
            keep = pareto.front(np.column_stack([sizes, retention]), ["minimize", "maximize"])
            sizes, retention = [sizes[i] for i in keep], [retention[i] for i in keep]
            volume = pareto.hypervolume_log(sizes, retention)
        seconds.append(round(moment - started, 2))
        volumes.append(_short(volume))
    return {"seconds": seconds, "hypervolume": volumes}


def _choices(results: Sequence[TrialResult]) -> dict[str, list[float | None]]:
    """What each trial chose: shares kept, coefficients, options; one column each."""
    rows = [choices(result) for result in results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {
        name: [
            None
            if name not in row
            else _short(math.exp(row[name]) if name.startswith("share ") else row[name], 4)
            for row in rows
        ]
        for name in names
    }


def _importance_over_training(run: RunDirectory) -> dict[str, Any]:
    """By metric and group, how much more a channel counted than the average channel, over the training.

    A binary logarithm: 1 is twice as important, 0 the same, -1 half.
    """
    path = run.base / "importance.safetensors"
    if not path.is_file():
        return {}
    arrays = {
        name.removeprefix("history/"): array
        for name, array in read_arrays(path).items()
        if name.startswith("history/")
    }
    steps = arrays.pop("steps", None)
    if steps is None or not len(steps):
        return {}
    shown = np.unique(np.linspace(0, len(steps) - 1, STEPS).astype(int))
    metrics: dict[str, dict[str, np.ndarray]] = {}
    for name, scores in arrays.items():
        metric, _, group = name.partition("/")
        metrics.setdefault(metric, {})[group] = scores[shown].astype(np.float64).mean(axis=1)
    found: dict[str, Any] = {"steps": [int(step) for step in steps[shown]], "metrics": {}}
    for metric, by_group in metrics.items():
        values = np.stack(list(by_group.values()))  # (groups, steps)
        average = values.mean(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.log2(values / average)
        if not np.isfinite(relative).any():
            continue
        found["metrics"][metric] = {
            "groups": list(by_group),
            "values": [[_short(value, 3) for value in row] for row in relative],
        }
    return found if found["metrics"] else {}


def _failures(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Reasons of failed trials, the most frequent first, with the trials that each had."""
    by_reason: dict[str, list[int]] = {}
    for result in results:
        if result.failed:
            by_reason.setdefault(result.reason or "no reason is known", []).append(result.number)
    ordered = sorted(by_reason.items(), key=lambda entry: -len(entry[1]))
    return [{"reason": reason, "trials": numbers} for reason, numbers in ordered]


def _stages(complete: Sequence[TrialResult]) -> dict[str, float | None]:
    """Median seconds of each stage of the complete trials."""
    names = list(dict.fromkeys(stage for result in complete for stage in result.timings))
    return {name: _short(float(np.median([r.timings.get(name, 0.0) for r in complete])), 3) for name in names}


def _seconds(iso: str) -> float | None:
    try:
        return datetime.fromisoformat(iso).timestamp()
    except ValueError:
        return None


def _short(value: float | None, digits: int = DIGITS) -> float | None:
    """A number with few digits; None for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
