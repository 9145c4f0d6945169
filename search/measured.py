"""What was measured of a trial, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.constraints import Constraint
    from search.front import FrontTrial
    from search.trial_types import TrialResult

SIZES = ("parameters", "size_ratio", "macs", "retention")
"""What every trial measures, whatever its objectives."""


def look_up(name: str, trial: TrialResult | FrontTrial, others: Mapping[str, float]) -> float | None:
    """An objective, one of `SIZES`, or another measurement of a trial; None if it was not measured.

    Args:
        name: of the measurement.
        trial: with its objectives and sizes.
        others: what else was measured; of equal names the trial's own count.
    """
    sizes = {size: getattr(trial, size) for size in SIZES}
    value = {**others, **sizes, **trial.objectives}.get(name)
    return None if value is None else float(value)


def first_missed(
    constraints: Iterable[Constraint], measurement: Callable[[str], float | None]
) -> Constraint | None:
    """The first constraint that is missed, None if all are met; what was not measured meets none."""
    for constraint in constraints:
        value = measurement(constraint.name)
        if value is None or not constraint.violation(value) <= 0:
            return constraint
    return None
