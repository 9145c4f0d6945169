"""Importance metrics: what each channel is worth. One function per metric; higher means keep.

Every function returns one `(group.size,)` float tensor per group, never below 0, and modifies nothing. Where
a metric sums over the parameters Θ_c of a channel c, every scalar counts once, even one that lies in the
channel through two axes of its tensor (a square recurrent weight). Buffers such as the running statistics of
a BatchNorm belong to a channel but are not scored.

The definitions are this project's own, each after the standard source that its docstring cites. The texts of
arXiv 2507.14882 (soft coefficients) and 2601.19794 (importance during training) were available only as
abstracts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from components.channel_sums import channel_sums, layer_normalised_sums, scored_parameters
from components.dependency import Consumer, DependencyGraph, Group, Member, Scores
from components.elimination import Reader, elimination_order, inverse_moments
from components.errors import UserError, nearest
from components.gram import Grams, columns_of, weight_matrix

if TYPE_CHECKING:
    from components.tracker import GradientStatistics

__all__ = [
    "METRICS",
    "Metric",
    "MissingStatisticsError",
    "bayesian",
    "channel_sums",
    "fisher",
    "gate_fisher",
    "gradient",
    "l1",
    "l2",
    "random",
    "reconstruction",
    "score",
    "taylor",
]

RIDGE = 1e-6
"""What `reconstruction` adds to the diagonal of a Gram matrix, relative to the diagonal's mean."""

VARIANCE_FLOOR = 1e-3
"""The ε of `bayesian`, relative to the mean variance of the group's channels."""


class MissingStatisticsError(UserError):
    """A metric needs something that was not gathered; the message names what, and how to gather it."""


# --- metrics that read the parameters ----------------------------------------------------------------------


def l1(graph: DependencyGraph, state: Mapping[str, Tensor]) -> Scores:
    """The sum of absolute values (Li et al., 2017, 1608.08710), over groups as in DepGraph (2301.12900).

    `score(c) = Σ_layers (Σ_{θ in Θ_c of the layer} |θ|) / s_layer`, with s_layer the mean of the inner sum
    over the group's channels, so that layers of different scale weigh alike. A layer is a weight with its
    bias, or the affine parameters of a normalisation. Returns `(group.size,)` per group.

    Raises:
        UserError: the state lacks a parameter of the graph.
    """
    return layer_normalised_sums(graph, _each(graph, state, torch.abs))


def l2(graph: DependencyGraph, state: Mapping[str, Tensor]) -> Scores:
    """The Euclidean norm (Li et al., 2017, arXiv 1608.08710), over groups as in DepGraph (2301.12900).

    `score(c) = (Σ_layers (Σ_{θ in Θ_c of the layer} θ²) / s_layer²)^½`, with s_layer² the mean of the inner
    sum over the group's channels: the norm after dividing each layer by its root mean square, so that layers
    of different scale weigh alike. Returns `(group.size,)` per group.

    Raises:
        UserError: the state lacks a parameter of the graph.
    """
    squares = layer_normalised_sums(graph, _each(graph, state, torch.square))
    return {name: sums.sqrt() for name, sums in squares.items()}


# --- metrics that read what was gathered during training ---------------------------------------------------


def gradient(graph: DependencyGraph, statistics: GradientStatistics) -> Scores:
    """Accumulated gradient magnitude, after 2601.19794 and SNIP (Lee et al., 2019, arXiv 1810.02340).

    `score(c) = Σ_{Θ_c} EMA_t |g_t|`, each layer divided by its mean over the group as in `l1`; g_t is the
    gradient at step t over the running RMS gradient of its loss. Returns `(group.size,)` per group.

    Raises:
        MissingStatisticsError: the tracker never saw a parameter of the graph.
    """
    return layer_normalised_sums(graph, _tracked(graph, statistics, "gradient"))


def taylor(graph: DependencyGraph, statistics: GradientStatistics) -> Scores:
    """First-order Taylor importance (Molchanov et al., 2019, arXiv 1906.10771), of absolute values.

    `score(c) = Σ_{Θ_c} EMA_t |θ_t g_t|`. The signed sum, which is the first-order change of the loss, ranks
    worse against ablation. Returns `(group.size,)` per group.

    Raises:
        MissingStatisticsError: the tracker never saw a parameter of the graph.
    """
    return channel_sums(graph, _tracked(graph, statistics, "taylor"))


def fisher(graph: DependencyGraph, statistics: GradientStatistics) -> Scores:
    """Diagonal second-order importance (LeCun et al., 1990; Theis et al., 2018, arXiv 1801.05787).

    `score(c) = ½ Σ_{Θ_c} θ² EMA_t[g_t²]`, with θ at the end of the statistics. g_t is the gradient of a batch
    mean, so its square is the squared mean plus the variance over the batch size, and a TD loss is no
    log-likelihood: this is a squared-gradient score, not the exact Fisher information. Returns
    `(group.size,)` per group.

    Raises:
        MissingStatisticsError: the tracker never saw a parameter of the graph.
    """
    squares, weights = (_tracked(graph, statistics, field) for field in ("square", "weight"))
    sums = channel_sums(graph, {name: weights[name].square().mul_(squares[name]) for name in squares})
    return {name: 0.5 * values for name, values in sums.items()}


def bayesian(graph: DependencyGraph, statistics: GradientStatistics) -> Scores:
    """Signal to noise of the weights (Graves, 2011; Blundell et al., 2015), by SWAG's diagonal (1902.02476).

    `score(c) = Σ_{Θ_c} p μ² / (Σ_{Θ_c} p σ² + ε)`, with μ and σ² the mean and variance of θ_t over the
    training's tail, and p the share of the tail in which the scalar received a gradient: those of a dead unit
    stand still, but not for being certain, and are left out. ε is a thousandth of the group's mean Σ p σ².
    Returns `(group.size,)` per group.

    Raises:
        MissingStatisticsError: the tracker never saw a parameter of the graph, or tracked one step only.
    """
    if statistics.steps < 2:
        raise MissingStatisticsError(
            f"metric 'bayesian' needs at least two tracked steps, not {statistics.steps}: train longer or "
            "track more often"
        )
    means, variances, activity = (_tracked(graph, statistics, f) for f in ("mean", "variance", "activity"))
    signal = channel_sums(graph, {name: means[name].square() * share for name, share in activity.items()})
    noise = channel_sums(graph, {name: variances[name] * share for name, share in activity.items()})
    scores = {}
    for name, variance in noise.items():
        floor = VARIANCE_FLOOR * variance.mean() + torch.finfo(variance.dtype).tiny
        scores[name] = signal[name] / (variance + floor)
    return scores


def gate_fisher(graph: DependencyGraph, statistics: GradientStatistics) -> Scores:
    """Fisher information of a gate on every channel (Theis et al., 2018; Liu et al., 2021, arXiv 2108.00708).

    `score(c) = mean over samples of (Σ over positions of a_c ∂L/∂a_c)²`, a_c what the group's consumers read:
    the squared derivative of each sample's loss by a factor on the channel, which the tracker gathers from
    activations. Returns `(group.size,)` per group.

    Raises:
        MissingStatisticsError: no consumer of a group was seen inside `ImportanceTracker.capture()`.
    """
    scores = {}
    for group in graph.groups:
        gate = statistics.gates.get(group.name)
        if gate is None:
            raise MissingStatisticsError(
                f"metric 'gate_fisher' has no activations of group {group.name!r}: run its consumers and the "
                "backward pass inside tracker.capture()"
            )
        scores[group.name] = gate.clone()
    return scores


# --- the metric that reads calibration data ----------------------------------------------------------------


def reconstruction(
    graph: DependencyGraph, state: Mapping[str, Tensor], grams: Grams, ridge: float = RIDGE
) -> Scores:
    """The order in which greedy OBS with closed-form repair removes channels (Hassibi 1993; 2203.07259).

    Again and again, the channel goes whose removal costs least *after* its consumers are refitted:

    `cost(c) = Σ_consumers tr(W_B ([G⁻¹]_BB)⁻¹ W_Bᵀ) / tr(W₀ G W₀ᵀ)`

    for the columns B that it owns in a consumer's matrix W, with G the Gram matrix of the consumer's input
    (plus `ridge` times its mean diagonal), centred if a bias can take over the mean: the output error over
    the output's variance. Then `W ← W − W_B ([G⁻¹]_BB)⁻¹ [G⁻¹]_B,:` and G⁻¹ is downdated in the same way.
    Ranking all channels at once would ignore redundancy: of two equal channels, both look free.

    Each group is treated on its own, with all others whole. Computed in float64.

    Args:
        graph: the dependency graph.
        state: the dense model's state.
        grams: the second moments of what every consumer reads.
        ridge: the stabiliser, relative to the mean diagonal; > 0.

    Returns:
        For every group `(size,)` with the numbers 1 (first to go) to size (never removed), each once; all
        ones where no consumer reads the group.

    Raises:
        MissingStatisticsError: a consumer has no Gram matrix.
        UserError: a weight or a Gram matrix is not finite, or does not fit the graph.
    """
    inverses: dict[str, Tensor] = {}
    scores = {}
    for group in graph.groups:
        readers = []
        for consumer, members in consumers_of(graph, group):
            name = consumer.weight
            if name not in grams:
                raise MissingStatisticsError(
                    f"metric 'reconstruction' has no Gram matrix of {name!r}, which reads group "
                    f"{group.name!r}: gather Gram matrices of this model from calibration data"
                )
            gram = grams[name].pooled()
            if name not in inverses:
                inverses[name] = inverse_moments(name, gram, consumer.bias is not None, ridge)
            weight = _get(state, name).detach()
            columns = torch.cat([columns_of(consumer, member, weight.shape) for member in members], dim=1)
            matrix = weight_matrix(consumer, weight)
            readers.append(Reader.of(name, matrix, gram, inverses[name], columns))
        scores[group.name] = elimination_order(readers, group.size)
    return scores


def consumers_of(graph: DependencyGraph, group: Group) -> list[tuple[Consumer, list[Member]]]:
    """The consumers that read a group, each with the group's members on its input axis."""
    members: dict[tuple[str, int], list[Member]] = {}
    for member in group.members:
        if member.consumes:
            members.setdefault((member.parameter, member.axis), []).append(member)
    return [
        (consumer, members[consumer.weight, consumer.input_axis])
        for consumer in graph.consumers
        if (consumer.weight, consumer.input_axis) in members
    ]


# --- the control -------------------------------------------------------------------------------------------


def random(graph: DependencyGraph, seed: int) -> Scores:
    """Uniform scores in [0, 1): the control that every comparison needs. The same seed, the same scores."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in graph.groups}


# --- metrics by name ---------------------------------------------------------------------------------------

Need = Literal["state", "statistics", "grams", "seed"]


@dataclass(frozen=True)
class Metric:
    """An importance metric.

    Attributes:
        needs: what it reads: the model's `state`, the tracker's `statistics`, `grams` (and the state), or a
            `seed`.
        function: called with the graph and what it needs.
    """

    needs: Need
    function: Callable[..., Scores]


METRICS: Mapping[str, Metric] = {
    "l1": Metric("state", l1),
    "l2": Metric("state", l2),
    "gradient": Metric("statistics", gradient),
    "taylor": Metric("statistics", taylor),
    "fisher": Metric("statistics", fisher),
    "gate_fisher": Metric("statistics", gate_fisher),
    "bayesian": Metric("statistics", bayesian),
    "reconstruction": Metric("grams", reconstruction),
    "random": Metric("seed", random),
}
"""Every metric by the name that plans and experiments use."""

_HOW_TO_GET = {
    "state": "the model's state: pass state=model.state_dict()",
    "statistics": "gradient statistics: pass statistics=tracker.statistics() of a tracker used in training",
    "grams": "Gram matrices: pass grams=..., gathered from calibration data",
    "seed": "a seed: pass seed=...",
}


def score(
    name: str,
    graph: DependencyGraph,
    *,
    state: Mapping[str, Tensor] | None = None,
    statistics: GradientStatistics | None = None,
    grams: Grams | None = None,
    seed: int | None = None,
) -> Scores:
    """The scores of a metric, by name; give at least what `METRICS[name].needs` says.

    Raises:
        UserError: there is no such metric.
        MissingStatisticsError: what the metric needs was not given, or lacks something.
    """
    if name not in METRICS:
        raise UserError(f"there is no importance metric {name!r}: {nearest(name, METRICS)}")
    given: dict[str, Any] = {"state": state, "statistics": statistics, "grams": grams, "seed": seed}
    metric = METRICS[name]
    needs = ("state", "grams") if metric.needs == "grams" else (metric.needs,)
    for need in needs:
        if given[need] is None:
            raise MissingStatisticsError(f"metric {name!r} needs {_HOW_TO_GET[need]}")
    return metric.function(graph, *(given[need] for need in needs))


# --- reading what was given --------------------------------------------------------------------------------


def _each(
    graph: DependencyGraph, state: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    return {name: function(_get(state, name).detach()) for name in scored_parameters(graph)}


def _get(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UserError(f"the state has no parameter {name!r}, which the dependency graph names")
    return state[name]


def _tracked(graph: DependencyGraph, statistics: GradientStatistics, field: str) -> dict[str, Tensor]:
    """One field of the statistics, for every scored parameter."""
    values: Mapping[str, Tensor] = getattr(statistics, field)
    for name in scored_parameters(graph):
        if name not in values:
            raise MissingStatisticsError(
                f"the tracker never saw parameter {name!r}: make the tracker for this model and graph, and "
                "update it during training"
            )
    return {name: values[name] for name in scored_parameters(graph)}
