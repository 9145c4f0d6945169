"""From mixed scores to a decision: which channels to keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from components.dependency import DependencyGraph, Group, Scores
from components.errors import UserError, nearest
from components.mixing import mix, normalise_together, require_metric, weighted, weighted_metrics
from components.plan import PruningPlan


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
        max_ratio: the largest share that a group may lose where it competes with others, in (0, 1]; one
            channel stays in any case. The plan says what a group loses that does not.
    """

    scope: Literal["group", "isomorphic"] = "group"
    round_to: int = 1
    max_ratio: float = 1.0

    def least(self, size: int) -> int:
        """How many channels of a group have to stay."""
        return kept_count(size, self.max_ratio, self.round_to)


PER_GROUP = Ranking()
"""Every group on its own, of any width."""


def choose(
    graph: DependencyGraph,
    scores: Mapping[str, Scores],
    plan: PruningPlan,
    ranking: Ranking = PER_GROUP,
    counts: Mapping[str, int] | None = None,
    least: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The channels to keep: the highest mixed scores, and in every group at least one channel.

    Args:
        graph: the dependency graph.
        scores: for every metric that the plan gives weight to, the scores of all groups.
        plan: mixing coefficients and pruning ratios.
        ranking: which channels compete with one another.
        counts: group -> how many stay, from 1 to its size, instead of what the plan's ratios say.
        least: group -> how many of those that compete have to stay, instead of what the ranking says.

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
        if least is None:
            least = {group.name: ranking.least(group.size) for group in graph.groups}
        return _keep_among_comparable(graph, scores, plan, ranking, counts, least)
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


def competitors(groups: Iterable[Group], ranking: Ranking) -> list[list[Group]]:
    """The groups whose channels compete with one another, together; by the scope `group`, each on its own."""
    groups = tuple(groups)
    if ranking.scope == "group":
        return [[group] for group in groups]
    first = comparable_groups(groups)
    together: dict[str, list[Group]] = {}
    for group in groups:
        together.setdefault(first[group.name], []).append(group)
    return list(together.values())


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
    ranking: Ranking,
    counts: Mapping[str, int],
    least: Mapping[str, int],
) -> dict[str, Tensor]:
    """Groups that are built alike share out, by their scores, what they would keep one by one.

    Metrics are normalised over all channels that compete, so that their groups differ in the mean.
    """
    keep: dict[str, Tensor] = {}
    for groups in competitors(graph.groups, ranking):
        sizes = [group.size for group in groups]
        by_group = [_of_group(group, scores) for group in groups]
        pooled: dict[str, Sequence[Tensor]] = {}
        for metric in weighted_metrics(plan, groups):
            for of_group in by_group:
                require_metric(metric, of_group)
            pooled[metric] = normalise_together([of_group[metric] for of_group in by_group])
        mixed = [
            weighted({metric: parts[i] for metric, parts in pooled.items()}, plan.coefficients_of(group))
            for i, group in enumerate(groups)
        ]
        # Every group keeps the best channels that it must; for the others all compete.
        ahead = [
            values.masked_fill(_highest(values, least[group.name]), math.inf)
            for group, values in zip(groups, mixed, strict=True)
        ]
        wanted = (sum(of[group.name] for group in groups) for of in (counts, least))
        together = _highest(torch.cat(ahead), max(wanted))
        for group, values, chosen in zip(groups, mixed, torch.split(together, sizes), strict=True):
            share = 1.0 - int(chosen.sum()) / group.size
            keep[group.name] = _highest(values, kept_count(group.size, share, ranking.round_to))
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
