"""Selecting one trial of a front by what it must achieve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from components.errors import UserError
from search import pareto
from search.constraints import written
from search.front import Front, FrontTrial, percent

LATENCY = ("latency_p99_ms", "latency_median_ms")
"""The measurements that a latency limit is about, in order of preference."""


@dataclass(frozen=True)
class Wish:
    """What the selected trial must be.

    Attributes:
        kind: `min_retention` takes the smallest trial that retains at least `value`, on validation data;
            `max_parameters` and `max_latency` (milliseconds, at the 99th percentile where that was measured)
            take the trial with the best retention within `value`; `knee` takes the knee of the front; `trial`
            takes the trial with number `value`.
        value: what `kind` says; not used by `knee`.
    """

    kind: Literal["min_retention", "max_parameters", "max_latency", "knee", "trial"]
    value: float = 0.0


def select(front: Front, wish: Wish) -> FrontTrial:
    """The trial of a front that meets a wish, and the constraints of the search.

    Raises:
        UserError: the front is empty, no trial of it meets the constraints of the search in the end, or none
            that does meets the wish; the sentence names the closest.
    """
    if not front.trials:
        raise UserError(f"the front of {front.experiment!r} is empty: {unmet(front)}")
    trials = [trial for trial in front.trials if front.missed(trial) is None]
    if wish.kind == "trial":
        return _numbered(front, int(wish.value))
    if not trials:
        raise UserError(
            f"no trial of the front of {front.experiment!r} meets the constraints by what was measured at "
            f"the end of the search: {_missing(front, front.trials[-1])}"
        )
    retention = [trial.retention for trial in trials]
    match wish.kind:
        case "knee":
            return trials[pareto.knee([trial.size_ratio for trial in trials], retention)]
        case "min_retention":
            chosen = pareto.smallest_retaining([trial.parameters for trial in trials], retention, wish.value)
            failure = f"no trial of the front retains {wish.value:g} of the base"
        case "max_parameters":
            chosen = pareto.best_within([trial.parameters for trial in trials], retention, wish.value)
            failure = f"no trial of the front has at most {wish.value:,.0f} parameters"
        case "max_latency":
            name, latencies = _latencies(front, trials)
            chosen = pareto.best_within(latencies, retention, wish.value)
            failure = f"no trial of the front has a {name} of at most {wish.value:g}"
    closest = trials[chosen.index]
    if not chosen.satisfied:
        raise UserError(f"{failure}: the closest is {_described(front, closest)}")
    return closest


def _numbered(front: Front, number: int) -> FrontTrial:
    for trial in front.trials:
        if trial.trial == number:
            if front.missed(trial) is not None:
                raise UserError(f"{_missing(front, trial)}, by what was measured at the end of the search")
            return trial
    numbers = sorted(trial.trial for trial in front.trials)
    closest = min(numbers, key=lambda other: (abs(other - number), other))
    listed = ", ".join(str(other) for other in numbers)
    raise UserError(f"trial {number} is not on the front: the closest number is {closest}, all are {listed}")


def unmet(front: Front) -> str:
    """Why a front is empty, in half a sentence."""
    if not front.constraints:
        return "no trial was complete and feasible"
    bounds = ", ".join(f"{name} {text}" for name, text in written(front.constraints).items())
    return f"no complete trial meets the constraints {bounds}"


def _missing(front: Front, trial: FrontTrial) -> str:
    """Which constraint a trial misses, and by which value."""
    constraint = front.missed(trial)
    assert constraint is not None
    value = trial.measurement(constraint.name)
    shown = "not measured" if value is None else f"{value:.4g}"
    return f"trial {trial.trial} misses {constraint.name} {constraint}, its {constraint.name} is {shown}"


def _latencies(front: Front, trials: Sequence[FrontTrial]) -> tuple[str, Sequence[float]]:
    for name in LATENCY:
        known = [value for trial in trials if (value := trial.measurement(name)) is not None]
        if len(known) == len(trials):
            return name, known
    raise UserError(
        f"the search {front.experiment!r} measured no latency: add {LATENCY[0]} to search.objectives or "
        "search.constraints"
    )


def _described(front: Front, trial: FrontTrial) -> str:
    latency = "".join(
        f", {name} {value:.3g}" for name in LATENCY[:1] if (value := trial.measurement(name)) is not None
    )
    return (
        f"trial {trial.trial} with retention {trial.retention:.4f} and {trial.parameters:,} parameters "
        f"({percent(trial.size_ratio)} of the base){latency}"
    )
