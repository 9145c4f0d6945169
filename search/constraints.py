"""Constraints: bounds on what a trial measures, as an experiment writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from search.config_errors import Fault, shown


@dataclass(frozen=True)
class Constraint:
    """A bound that a trial must meet to be feasible, such as `retention >= 0.5`.

    Attributes:
        name: an objective or another measurement of a trial.
        operator: `>=` or `<=`.
        bound: in the unit of the measurement, finite.
    """

    name: str
    operator: Literal[">=", "<="]
    bound: float

    def violation(self, value: float) -> float:
        """By how much a value misses the bound: <= 0 where it is met. NaN stays NaN."""
        return self.bound - value if self.operator == ">=" else value - self.bound

    @staticmethod
    def parse(name: str, text: object) -> tuple[Constraint, ...]:
        """The constraints that YAML writes as `name: ">= 0.5"` or, two of them, as `name: ">= 0.5, <= 0.9"`.

        Raises:
            Fault: the text is not one or two of `>=` and `<=` followed by a finite number, or no value can
                meet both; a `ValueError`.
        """
        parts = text.split(",") if isinstance(text, str) else []
        found = [_one(name, part) for part in parts]
        bounds = [constraint for constraint in found if constraint is not None]
        if not bounds or len(bounds) < len(found):
            reason = "it must be '>=' or '<=' and a number, such as '>= 0.5', or two such as '>= 0.5, <= 0.9'"
            raise Fault(reason, key=name, value=shown(text))
        operators = [constraint.operator for constraint in bounds]
        if len(set(operators)) < len(operators):
            twice = "lower" if operators.count(">=") > 1 else "upper"
            reason = f"it has more than one {twice} bound, of which one says all"
            raise Fault(reason, key=name, value=shown(text))
        low, high = limits(bounds)
        if low > high:
            reason = f"nothing is at least {low:g} and at most {high:g}"
            raise Fault(reason, key=name, value=shown(text))
        return tuple(bounds)

    def __str__(self) -> str:
        return f"{self.operator} {self.bound!r}"


def parse_all(texts: Mapping[str, object]) -> tuple[Constraint, ...]:
    """The constraints of a mapping from measurements to bounds.

    Raises:
        Fault: as `Constraint.parse`.
    """
    return tuple(bound for name, text in texts.items() for bound in Constraint.parse(str(name), text))


def written(constraints: Iterable[Constraint]) -> dict[str, str]:
    """The mapping that `parse_all` reads back equal, if those of one measurement stand together."""
    texts: dict[str, str] = {}
    for constraint in constraints:
        before = f"{texts[constraint.name]}, " if constraint.name in texts else ""
        texts[constraint.name] = f"{before}{constraint}"
    return texts


def limits(constraints: Iterable[Constraint]) -> tuple[float, float]:
    """Between which values the bounds on one measurement leave it; infinite where there is none."""
    low, high = -math.inf, math.inf
    for constraint in constraints:
        if constraint.operator == ">=":
            low = max(low, constraint.bound)
        else:
            high = min(high, constraint.bound)
    return low, high


def _one(name: str, text: str) -> Constraint | None:
    match = re.fullmatch(r"\s*(>=|<=)\s*(\S+)\s*", text)
    try:
        bound = float(match[2]) if match else math.nan
    except ValueError:
        return None
    if match is None or not math.isfinite(bound):
        return None
    return Constraint(name, ">=" if match[1] == ">=" else "<=", bound)
