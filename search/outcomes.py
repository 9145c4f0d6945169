"""What a study hears of a trial: values, violations of constraints, or why there are none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from search.config import MEASURED
from search.trial_types import TrialResult

if TYPE_CHECKING:
    from agents.agent import Objective
    from search.constraints import Constraint

LOGARITHMIC = frozenset({"parameters", "macs"})
"""Objectives that the sampler sees as natural logarithms: the front is looked at over log size."""


@dataclass(frozen=True)
class Outcome:
    """Values in the order of the objectives, or None and, of a failure, the reason.

    Violations are <= 0 where feasible.
    """

    values: list[float] | None
    violations: dict[str, float]
    reason: str | None
    state: TrialState = TrialState.FAIL


class Judge:
    """Makes outcomes of results.

    Args:
        objectives: what is traded off.
        constraints: what feasible trials meet.
    """

    def __init__(self, objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> None:
        self._objectives = tuple(objectives)
        self._constraints = tuple(constraints)

    @property
    def names(self) -> list[str]:
        """What the values are."""
        return [f"log {o.name}" if o.name in LOGARITHMIC else o.name for o in self._objectives]

    def result(self, result: TrialResult) -> Outcome:
        """What the sampler hears of a result."""
        if result.stopped:
            return Outcome(None, {}, None, TrialState.PRUNED)
        if not result.complete:
            return Outcome(None, {}, result.reason or "the trial failed")
        return self.measured(result.measurement)

    def measured(self, measurement: Callable[[str], float | None]) -> Outcome:
        """The outcome of a trial that measures this by name."""
        values = []
        for objective in self._objectives:
            value = measurement(objective.name)
            if value is None or not math.isfinite(value):
                return Outcome(None, {}, f"objective {objective.name} is {_word(value)}")
            if objective.name in LOGARITHMIC:
                if value <= 0:
                    return Outcome(None, {}, f"objective {objective.name} is {value}, which has no logarithm")
                value = math.log(value)
            values.append(float(value))
        violations = {}
        for constraint in self._constraints:
            measured = measurement(constraint.name)
            if measured is None or not math.isfinite(measured):
                return Outcome(None, {}, f"constraint {constraint.name} is {_word(measured)}")
            violations[f"{constraint.name} {constraint}"] = constraint.violation(measured)
        return Outcome(values, violations, None, TrialState.COMPLETE)


def attributes_of(result: TrialResult, outcome: Outcome) -> dict[str, object]:
    """What optuna-dashboard shows beside the values: JSON-able, finite."""
    names = [*MEASURED, *result.performance, *result.objectives]
    attributes: dict[str, object] = {"trial": result.number, "origin": result.origin}
    for name in names:
        number = result.measurement(name)
        if number is not None and math.isfinite(number):
            attributes[name] = number
    attributes |= {f"constraint {name}": violation for name, violation in outcome.violations.items()}
    if result.rung_losses:
        attributes["rung_loss"] = result.rung_losses[-1][1]
    attributes["updates"] = result.updates
    if outcome.reason is not None:
        attributes["reason"] = outcome.reason
    return attributes


def _word(value: float | None) -> str:
    return "missing" if value is None else str(value)
