"""How far a search could compress and the closed loop still held its stability, by an empirical measure.

For agents whose evaluation reports `stability`, a share in [0, 1], and the bounds of its 95 % interval,
`stability_low` and `stability_high`, as TD-MPC's does (`agents.tdmpc.stability`). A statistic of the episodes
that were played, and never a certificate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.front import FrontTrial

STABILITY, LOW, HIGH = STABILITIES = "stability", "stability_low", "stability_high"
"""Measurements, each in [0, 1]."""

MARGIN = 0.05
"""By how much less than the base's the stability of an agent that holds it may be."""


@dataclass(frozen=True)
class StableCompression:
    """How far down a front the stability of the base holds.

    Attributes:
        base: the stability of the base.
        least: what `stability_low` has to be for an agent to hold it: `base` - `MARGIN`.
        trial: the smallest trial that holds it and has no larger one that does not; None where the largest
            does not.
        size_ratio: of that trial.
        broken: the next smaller trial, which does not hold it; None where all do.
    """

    base: float
    least: float
    trial: int | None
    size_ratio: float | None
    broken: int | None


def stable_compression(base: Mapping[str, float], trials: Sequence[FrontTrial]) -> StableCompression | None:
    """The largest compression at which the stability still holds; None where it was not measured.

    From the largest trial downwards, as far as every one has a `stability_low` of at least the base's
    `stability` less `MARGIN`. A smaller trial beyond one that does not hold it says little: among many that
    do not, some do by chance. A trial that lacks the measurement does not hold it.

    Args:
        base: what the evaluation of the base reports.
        trials: of a front, in any order; of equal sizes all have to hold it.
    """
    if STABILITY not in base or not any(LOW in trial.measured for trial in trials):
        return None
    least = base[STABILITY] - MARGIN

    def holds(trial: FrontTrial) -> bool:
        return trial.measured.get(LOW, least - 1.0) >= least

    # Of equal sizes those first that do not hold it.
    downwards = sorted(trials, key=lambda trial: (-trial.parameters, holds(trial), trial.trial))
    held = 0
    while held < len(downwards) and holds(downwards[held]):
        held += 1
    smallest = downwards[held - 1] if held else None
    broken = downwards[held] if held < len(downwards) else None
    return StableCompression(
        base=base[STABILITY],
        least=least,
        trial=None if smallest is None else smallest.trial,
        size_ratio=None if smallest is None else smallest.size_ratio,
        broken=None if broken is None else broken.trial,
    )


def stability_sentence(found: StableCompression) -> str:
    """What was found, for people."""
    held = "does not hold even for the largest agent of the front"
    if found.size_ratio is not None:
        end = "the smallest of the front" if found.broken is None else f"and not in trial {found.broken}"
        size = f"{100 * found.size_ratio:.3g} % of the base's parameters"
        held = f"holds down to trial {found.trial}, {size}, {end}"
    return (
        f"Stability, empirical and no certificate: that of the base, {found.base:.3f}, {held} "
        f"(lower bounds of at least {found.least:.3f})."
    )
