"""From several importance metrics to one decision: normalise, combine, choose what to keep."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from components.dependency import DependencyGraph, Group, Scores
from components.errors import UserError, nearest

COUPLING = "coupling"
"""The key of the coefficients of coupling groups, where they have some of their own."""

OTHERS = "others"
"""The key of the coefficients of all groups that no other key covers."""

Coefficients = Mapping[str, float] | Mapping[str, Mapping[str, float]]
"""`{metric: weight}` for all groups, or `{key: {metric: weight}}`: see `mixture_of` for the keys."""


def mixture_of(group: Group, keys: Collection[str]) -> str | None:
    """Which of the keys of separate coefficients are a group's; None if it has none.

    The group's own name comes before its component (`coupling` for a coupling group), that before `others`.
    """
    wishes = (group.name, component_key(group), OTHERS)
    return next((key for key in wishes if key in keys), None)


def component_key(group: Group) -> str:
    """The key of a group's coefficients where these are per component: its component, or `coupling`."""
    return COUPLING if group.is_coupling else next(iter(group.components), "")


@dataclass(frozen=True)
class PruningPlan:
    """How to score channels and how many of them to remove.

    Attributes:
        coefficients: the weight of each importance metric, >= 0 and not all zero; only their proportions
            matter. Shared by all groups, `{metric: weight}`, or separate, `{key: {metric: weight}}`, where a
            key is the name of a group, a component, `"coupling"` for all coupling groups, or `"others"`; the
            first of these that is there counts.
        ratios: the share of each group's channels to remove, in [0, 1), by group name; a group that is not
            named keeps all its channels.

    The mappings are not copied: do not change them afterwards.

    Raises:
        UserError: a weight that is negative, not finite or not a number, weights that are all zero, or a
            ratio outside [0, 1).
    """

    coefficients: Coefficients
    ratios: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.coefficients:
            raise UserError("the plan has no mixing coefficients: give at least one metric a positive weight")
        if not self.is_shared:
            for key, weights in self.coefficients.items():
                if not isinstance(weights, Mapping):
                    raise UserError(
                        f"coefficients are either shared or separate, not both: {key!r} has {weights!r}"
                    )
                check_weights(weights, f" of {key!r}")
        else:
            check_weights(cast(Mapping[str, float], self.coefficients), "")
        for group, ratio in self.ratios.items():
            if not _is_number(ratio) or not 0.0 <= ratio < 1.0:
                raise UserError(f"the pruning ratio of group {group!r} has to be in [0, 1), not {ratio!r}")

    @property
    def is_shared(self) -> bool:
        """True where all groups have the same coefficients; false where they have keys."""
        return not any(isinstance(value, Mapping) for value in self.coefficients.values())

    def coefficients_of(self, group: Group) -> Mapping[str, float]:
        """The weights that score one group.

        Raises:
            UserError: the coefficients are separate, and none of the keys is the group's.
        """
        if self.is_shared:
            return cast(Mapping[str, float], self.coefficients)
        key = mixture_of(group, self.coefficients.keys())
        if key is None:
            wish = component_key(group)
            raise UserError(
                f"the plan has no coefficients for {wish!r}, which group {group.name!r} needs: "
                f"{nearest(wish, self.coefficients)}"
            )
        return cast(Mapping[str, float], self.coefficients[key])

    def to_json(self) -> str:
        """As one line of JSON; floats survive the round trip exactly."""
        return json.dumps({"coefficients": self.coefficients, "ratios": self.ratios}, default=dict)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The inverse of `to_json`.

        Raises:
            UserError: the text is not the JSON of a plan, or the plan is not valid.
        """
        try:
            fields: Any = json.loads(text)
            coefficients, ratios = fields["coefficients"], fields["ratios"]
        except (ValueError, KeyError, TypeError):
            raise UserError("a pruning plan has to be JSON with 'coefficients' and 'ratios'") from None
        if not isinstance(coefficients, dict) or not isinstance(ratios, dict):
            raise UserError("the 'coefficients' and 'ratios' of a pruning plan have to be JSON objects")
        return cls(coefficients=coefficients, ratios=ratios)


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
        if not _is_number(value) or not 0.0 <= value <= 1.0:
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
        _require(metric, scores)
    return _weighted({metric: normalise(scores[metric]) for metric in weights}, weights)


def weighted_metrics(plan: PruningPlan, groups: Iterable[Group]) -> tuple[str, ...]:
    """The metrics that a plan gives weight to in any of some groups, in its order."""
    found: dict[str, None] = {}
    for group in groups:
        found |= {metric: None for metric, weight in plan.coefficients_of(group).items() if weight > 0}
    return tuple(found)


def _require(metric: str, scores: Mapping[str, Tensor]) -> None:
    if metric not in scores:
        raise UserError(f"there are no scores of metric {metric!r}: {nearest(metric, scores)}")


def _weighted(normalised: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted mean of normalised scores, `(size,)` float64; of the positive weights."""
    total = math.fsum(weights.values())
    parts = [normalised[metric] * (weight / total) for metric, weight in weights.items() if weight > 0]
    return torch.stack(parts).sum(0)


def kept_count(size: int, ratio: float, round_to: int = 1) -> int:
    """How many of a group's channels stay: its kept share, rounded, at least one.

    Args:
        size: channels of the group.
        ratio: the share to remove, in [0, 1).
        round_to: the width becomes a multiple of it, the nearest one, or stays whole where that is as near;
            at least one multiple stays, and a group that is smaller stays whole.
    """
    wanted = (1.0 - ratio) * size
    if round_to == 1:
        return max(1, round(wanted))
    if size <= round_to:
        return size
    rounded = max(1, round(wanted / round_to)) * round_to
    return size if rounded > size or abs(size - wanted) <= abs(rounded - wanted) else rounded


@dataclass(frozen=True)
class Ranking:
    """Which channels compete with one another, and which widths are allowed.

    Attributes:
        scope: `group`: those of one group, so that every group loses the share that the plan says;
            `isomorphic`: those of all groups that are built alike (`comparable_groups`), which together lose
            as many as they would one by one, wherever the scores are lowest (after Fang et al., 2024,
            2407.04616).
        round_to: widths are multiples of it, as hardware likes them: see `kept_count`.
    """

    scope: Literal["group", "isomorphic"] = "group"
    round_to: int = 1


PER_GROUP = Ranking()
"""Every group on its own, of any width."""


def choose(
    graph: DependencyGraph,
    scores: Mapping[str, Scores],
    plan: PruningPlan,
    ranking: Ranking = PER_GROUP,
    counts: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The channels to keep: the highest mixed scores, and in every group at least one channel.

    Args:
        graph: the dependency graph.
        scores: for every metric that the plan gives weight to, the scores of all groups.
        plan: mixing coefficients and pruning ratios.
        ranking: which channels compete with one another.
        counts: group -> how many stay, from 1 to its size, instead of what the plan's ratios say.

    Returns:
        For every group a bool tensor `(size,)` on the CPU; True keeps the channel. Among equal scores the
        lower index stays, so equal inputs give equal decisions on every machine.

    Raises:
        UserError: the plan names a group that the graph does not have, a metric has no scores, or scores have
            the wrong shape, are negative or not finite.
    """
    for name in plan.ratios:
        if name not in graph.by_name:
            raise UserError(f"the model has no pruning group {name!r}: {nearest(name, graph.by_name)}")
    if counts is None:
        counts = {
            group.name: kept_count(group.size, plan.ratios.get(group.name, 0.0), ranking.round_to)
            for group in graph.groups
        }
    if ranking.scope == "isomorphic":
        return _keep_among_comparable(graph, scores, plan, counts, ranking.round_to)
    return {
        group.name: _highest(mix(_of_group(group, scores), plan.coefficients_of(group)), counts[group.name])
        for group in graph.groups
    }


def comparable_groups(groups: Iterable[Group]) -> dict[str, str]:
    """Group -> the first of the groups that are built alike: the same kinds of layer make and read them.

    Built alike are groups whose members agree in what they are (a layer's weight, a bias, ...), in the axis
    that is pruned and in how often a channel occurs there; coupling groups are so among themselves only.
    """
    first: dict[object, str] = {}
    return {group.name: first.setdefault(_build(group), group.name) for group in groups}


def _build(group: Group) -> object:
    members = sorted(
        (member.parameter.rpartition(".")[2], member.axis, member.indices.shape[1], member.consumes)
        for member in group.members
    )
    return group.is_coupling, tuple(members)


def _keep_among_comparable(
    graph: DependencyGraph,
    scores: Mapping[str, Scores],
    plan: PruningPlan,
    counts: Mapping[str, int],
    round_to: int,
) -> dict[str, Tensor]:
    """Groups that are built alike share out, by their scores, what they would keep one by one.

    Metrics are normalised over all channels that compete, so that their groups differ in the mean.
    """
    kinds: dict[str, list[Group]] = {}
    first = comparable_groups(graph.groups)
    for group in graph.groups:
        kinds.setdefault(first[group.name], []).append(group)
    keep: dict[str, Tensor] = {}
    for groups in kinds.values():
        sizes = [group.size for group in groups]
        by_group = [_of_group(group, scores) for group in groups]
        pooled: dict[str, Sequence[Tensor]] = {}
        for metric in weighted_metrics(plan, groups):
            for of_group in by_group:
                _require(metric, of_group)
            pooled[metric] = torch.split(
                normalise(torch.cat([of_group[metric] for of_group in by_group])), sizes
            )
        mixed = [
            _weighted({metric: parts[i] for metric, parts in pooled.items()}, plan.coefficients_of(group))
            for i, group in enumerate(groups)
        ]
        # Every group keeps its best channel; for the others all compete.
        ahead = [values.clone() for values in mixed]
        for values in ahead:
            values[values.argmax()] = math.inf
        together = _highest(torch.cat(ahead), max(sum(counts[group.name] for group in groups), len(groups)))
        for group, values, chosen in zip(groups, mixed, torch.split(together, sizes), strict=True):
            share = 1.0 - int(chosen.sum()) / group.size
            keep[group.name] = _highest(values, kept_count(group.size, share, round_to))
    return {group.name: keep[group.name] for group in graph.groups}


def _highest(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` highest scores; of equal ones the lower index."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return keep


def _of_group(group: Group, scores: Mapping[str, Scores]) -> dict[str, Tensor]:
    """Metric -> the scores of one group, `(size,)`, on the CPU."""
    of_group = {
        metric: by_group[group.name].cpu() for metric, by_group in scores.items() if group.name in by_group
    }
    for metric, values in of_group.items():
        if values.shape != (group.size,):
            raise UserError(
                f"the {metric!r} scores of group {group.name!r} have to be ({group.size},), "
                f"not {tuple(values.shape)}"
            )
    return of_group


def check_weights(weights: Mapping[str, float], where: str = "") -> None:
    """Refuse coefficients that mix nothing; `where` is what messages add, such as ` of 'latent'`.

    Raises:
        UserError: a weight that is negative, not finite or not a number, or weights that are all zero.
    """
    for metric, weight in weights.items():
        if not _is_number(weight) or not math.isfinite(weight) or weight < 0:
            raise UserError(
                f"the coefficient of metric {metric!r}{where} has to be finite and >= 0, not {weight!r}"
            )
    if not any(weight > 0 for weight in weights.values()):
        raise UserError(
            f"the mixing coefficients{where} are all zero: give at least one metric a positive weight"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
