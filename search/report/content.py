"""What a report shows: everything there is to know of a search, read back from its run directory."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from components import UserError
from search import pareto
from search.config import parse_experiment
from search.constraints import Constraint
from search.durable_files import read_json
from search.front import Front, feasible
from search.parameter_importance import choices, parameter_importance
from search.report.importance import importance_over_training
from search.report.short import short
from search.run_directory import RunDirectory
from search.stability import stability_sentence
from search.trial_types import TrialResult

PAUSE_SECONDS = 300.0
"""A time without trials that is longer than this, and than ten of the longest trial, is a pause."""


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
    configuration = run.experiment.read_text(encoding="utf-8")
    config = parse_experiment(configuration, source=str(run.experiment))
    constraints = config.search.constraints
    stable = front.stable_compression
    return {
        "experiment": front.experiment,
        "objectives": [dict(objective) for objective in front.objectives],
        "performance": front.performance,
        "constraints": [f"{constraint.name} {constraint}" for constraint in constraints],
        "base": _base(run, front, config.base.mode),
        "hypervolumes": {name: short(value) for name, value in front.hypervolumes().items()},
        "retention_at": front.retention_at(),
        "knee": _knee(front),
        "stability": None if stable is None else stability_sentence(stable),
        "trials": _trials(results, objectives, constraints),
        "front": {
            "trial": [trial.trial for trial in front.trials],
            "test_retention": [short(trial.test_retention) for trial in front.trials],
            # Latencies of a front are measured once more when nothing else runs.
            "latencies": [_latencies({**trial.measured, **trial.objectives}) for trial in front.trials],
        },
        "course": _course(results, constraints),
        "choices": _choices(results),
        "importance": importance_over_training(run),
        "parameters": parameter_importance(complete, list(dict.fromkeys([*objectives, "retention"]))),
        "failures": _failures(results),
        "stages": _stages(complete),
        "configuration": configuration,
        "path": shlex.quote(str(run.path.resolve())),
        "hosts": dict(Counter(result.host for result in results if result.host)),
        "devices": dict(Counter(result.device for result in results if result.device)),
    }


def _base(run: RunDirectory, front: Front, mode: str) -> dict[str, Any]:
    base = dict(front.base)
    stored = read_json(run.base / "metrics.json") if (run.base / "metrics.json").is_file() else {}
    environment = stored.get("environment")
    return {**base, "mode": mode, "environment": environment if isinstance(environment, dict) else {}}


def _knee(front: Front) -> int | None:
    if not front.trials:
        return None
    sizes = [trial.size_ratio for trial in front.trials]
    return front.trials[pareto.knee(sizes, [trial.retention for trial in front.trials])].trial


def _latencies(objectives: Mapping[str, float]) -> dict[str, float | None]:
    return {name: short(value) for name, value in objectives.items() if name.startswith("latency")}


def _trials(
    results: Sequence[TrialResult], objectives: Sequence[str], constraints: Sequence[Constraint]
) -> dict[str, Any]:
    """Column -> one entry for every trial: a third of the size of one object for each."""
    groups = list(dict.fromkeys(group for result in results for group in result.widths))
    stages = list(dict.fromkeys(stage for result in results for stage in result.timings))
    known = {*objectives, "parameters", "size_ratio", "macs", "retention"}
    return {
        "number": [result.number for result in results],
        "status": [result.status for result in results],
        "feasible": [result.complete and feasible(constraints, result) for result in results],
        "origin": [result.origin for result in results],
        "reason": [result.reason for result in results],
        "parameters": [result.parameters for result in results],
        "size_ratio": [short(result.size_ratio) for result in results],
        "macs": [result.macs for result in results],
        "retention": [short(result.retention) for result in results],
        "objectives": {
            name: [short(result.objectives.get(name)) for result in results] for name in objectives
        },
        "measured": {
            name: [short(result.measurement(name)) for result in results] for name in _others(results, known)
        },
        "groups": groups,
        "widths": [[result.widths.get(group) for group in groups] for result in results],
        "stages": stages,
        "timings": [[short(result.timings.get(stage), 3) for stage in stages] for result in results],
        "device": [result.device for result in results],
    }


def _others(results: Sequence[TrialResult], known: Collection[str]) -> list[str]:
    """What trials measured besides: all that the agent's evaluation reports, and latencies."""
    names = (name for result in results for name in (*result.performance, *result.latencies))
    return [name for name in dict.fromkeys(names) if name not in known]


def _course(
    results: Sequence[TrialResult], constraints: Sequence[Constraint]
) -> dict[str, list[float | None]]:
    """The front's hypervolume after every trial, as they finished, and the seconds of searching by then.

    Pauses, as between a search and its resumption, do not count: see `PAUSE_SECONDS`.
    """
    spans = {
        result.number: (began, ended)
        for result in results
        if (began := _seconds(result.started)) is not None
        and (ended := _seconds(result.finished)) is not None
    }
    finished = sorted(
        (result for result in results if result.number in spans),
        key=lambda result: (spans[result.number][1], result.number),
    )
    volumes: list[float | None] = []
    sizes: list[float] = []
    retention: list[float] = []
    volume = 0.0
    for result in finished:
        if result.complete and feasible(constraints, result):
            sizes.append(result.size_ratio or 1.0)
            retention.append(result.retention or 0.0)
            keep = pareto.front(np.column_stack([sizes, retention]), ["minimize", "maximize"])
            sizes, retention = [sizes[i] for i in keep], [retention[i] for i in keep]
            volume = pareto.hypervolume_log(sizes, retention)
        volumes.append(short(volume))
    seconds = _searched([spans[result.number] for result in finished])
    return {"seconds": [round(second, 2) for second in seconds], "hypervolume": volumes}


def _searched(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds without pauses until the end of each span; the spans are in the order of their ends."""
    longest = max([PAUSE_SECONDS, *(10 * (ended - began) for began, ended in spans)])
    merged: list[list[float]] = []
    for began, ended in sorted(spans):
        if merged and began <= merged[-1][1] + longest:
            merged[-1][1] = max(merged[-1][1], ended)
        else:
            merged.append([began, ended])
    starts = np.array([began for began, _ in merged])
    before = np.concatenate([[0.0], np.cumsum([ended - began for began, ended in merged])])
    found = []
    for _, ended in spans:
        place = int(np.searchsorted(starts, ended, side="right")) - 1
        found.append(float(before[place] + ended - starts[place]))
    return found


def _choices(results: Sequence[TrialResult]) -> dict[str, list[float | None]]:
    """What each trial chose: shares kept, coefficients, options; one column each."""
    rows = [choices(result) for result in results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [_choice(name, row.get(name)) for row in rows] for name in names}


def _choice(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    return short(math.exp(value) if name.startswith("share ") else value, 4)


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
    return {name: short(float(np.median([r.timings.get(name, 0.0) for r in complete])), 3) for name in names}


def _seconds(iso: str) -> float | None:
    try:
        return datetime.fromisoformat(iso).timestamp()
    except ValueError:
        return None
