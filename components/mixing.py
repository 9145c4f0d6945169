"""From several importance metrics to one: normalise and combine."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from components.dependency import Group
from components.errors import UserError, nearest
from components.plan import PruningPlan, is_number


def simplex(u: Sequence[float]) -> list[float]:
    """Weights on the simplex, proportional to (-log u)^3.

    For independent uniform u, -log u is exponential, so the first power would be Dirichlet(1), which
    practically never comes near a corner; the third power does. A smaller u means a larger weight; u = 1
    means exactly 0, so one u below 1 among ones is a pure metric, and all ones mean equal weights.

    Args:
        u: one number in [0, 1] for each metric.

    Returns:
        As many numbers >= 0, summing to 1.

    Raises:
        UserError: u is empty, or an element is outside [0, 1] or not a number.
    """
    if not u:
        raise UserError("mixing coefficients need at least one coordinate")
    for value in u:
        if not is_number(value) or not 0.0 <= value <= 1.0:
            raise UserError(f"a simplex coordinate has to be in [0, 1], not {value!r}")
    logs = [abs(math.log(max(value, sys.float_info.min))) for value in u]
    largest = max(logs)
    if largest == 0.0:
        return [1.0 / len(u)] * len(u)
    weights = [(value / largest) ** 3 for value in logs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def normalise(scores: Tensor) -> Tensor:
    """The scores of one group `(size,)`, scaled to mean 1, in float64; all zero becomes all one.

    Raises:
        UserError: a score is negative or not finite.
    """
    values = scores.detach().double()
    least, largest = (float(bound) for bound in values.aminmax()) if values.numel() else (0.0, 0.0)
    if not (least >= 0 and largest < math.inf):  # NaN is neither
        bad = values[~torch.isfinite(values) | (values < 0)][0]
        raise UserError(f"importance scores have to be finite and >= 0, not {float(bad)}")
    if largest == 0.0:
        return torch.ones_like(values)
    scaled = values / largest  # so that the mean can neither overflow nor vanish
    return scaled / scaled.mean()


def normalise_together(scores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The scores of groups that compete, scaled by one factor to mean 1 over all of them: see `normalise`."""
    return torch.split(normalise(torch.cat(list(scores))), [len(values) for values in scores])


def mix(scores: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> Tensor:
    """The mixed scores of one group: the weighted sum of its normalised metrics.

    Args:
        scores: `(size,)` for every metric with a positive weight; others may be there and are not read.
        coefficients: the weight of each metric.

    Returns:
        `(size,)` float64, >= 0, with mean 1; higher means keep.

    Raises:
        UserError: a metric has a positive weight and no scores, or scores that are negative or not finite.
    """
    weights = {metric: weight for metric, weight in coefficients.items() if weight > 0}
    for metric in weights:
        require_metric(metric, scores)
    return weighted({metric: normalise(scores[metric]) for metric in weights}, weights)


def weighted_metrics(plan: PruningPlan, groups: Iterable[Group]) -> tuple[str, ...]:
    """The metrics that a plan gives weight to in any of some groups, in its order."""
    found: dict[str, None] = {}
    for group in groups:
        found |= {metric: None for metric, weight in plan.coefficients_of(group).items() if weight > 0}
    return tuple(found)


def require_metric(metric: str, scores: Mapping[str, Tensor]) -> None:
    """Refuse scores by metric that lack one.

    Raises:
        UserError: there are none of that metric.
    """
    if metric not in scores:
        raise UserError(f"there are no scores of metric {metric!r}: {nearest(metric, scores)}")


def weighted(normalised: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted mean of normalised scores, `(size,)` float64; of the positive weights."""
    total = math.fsum(weights.values())
    parts = [normalised[metric] * (weight / total) for metric, weight in weights.items() if weight > 0]
    return torch.stack(parts).sum(0)
