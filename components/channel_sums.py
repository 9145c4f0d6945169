"""From parameters to channels: sum any quantity of single parameters over the channels that own them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

from components.dependency import DependencyGraph, Group, Scores

_RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def scored_parameters(graph: DependencyGraph) -> list[str]:
    """The parameters that belong to any channel, each once; without buffers of running statistics."""
    names = dict.fromkeys(member.parameter for group in graph.groups for member in group.members)
    return [name for name in names if name.rpartition(".")[2] not in _RUNNING_STATISTICS]


def channel_sums(graph: DependencyGraph, per_parameter: Mapping[str, Tensor]) -> Scores:
    """Sum a quantity of every scalar parameter over the parameters Θ_c of each channel.

    A scalar that lies in a channel through two axes of its tensor counts once: for a square recurrent weight,
    the channel's row plus its column minus the element where they cross.

    Args:
        graph: the dependency graph.
        per_parameter: tensors shaped like the parameters, by state_dict name. Those of parameters that are
            not in the graph are not read; parameters that are missing here add nothing.

    Returns:
        For every group `(size,)`, at least float32, on the tensors' device.
    """
    return {
        group.name: _total(group, [values for _, values in _parameter_sums(group, per_parameter)])
        for group in graph.groups
    }


def layer_normalised_sums(graph: DependencyGraph, per_parameter: Mapping[str, Tensor]) -> Scores:
    """`channel_sums`, with the sum over each layer divided by its mean over the group's channels.

    A layer is a weight with its bias, or the parameters of another module, such as a normalisation. A layer
    whose sums are all zero adds nothing.
    """
    return {
        group.name: _total(group, [values / mean for values, mean in layers])
        for group, layers in _layer_sums(graph, per_parameter)
    }


def levelled_sums(graph: DependencyGraph, per_parameter: Mapping[str, Tensor]) -> Scores:
    """`layer_normalised_sums`, those of each group scaled by one factor to the mean of its `channel_sums`.

    Layers weigh alike inside a group, as there, and groups still compare with one another.
    """
    scores = {}
    for group, layers in _layer_sums(graph, per_parameter):
        values = _total(group, [values / mean for values, mean in layers])
        if layers:
            tiny = torch.finfo(values.dtype).tiny
            values *= sum(mean for _, mean in layers) / values.mean().clamp_min(tiny)
        scores[group.name] = values
    return scores


def _layer_sums(
    graph: DependencyGraph, per_parameter: Mapping[str, Tensor]
) -> Iterator[tuple[Group, list[tuple[Tensor, Tensor]]]]:
    """For each group, of every layer the sums over its channels, `(size,)`, and their mean, kept above 0."""
    weights = {consumer.weight for consumer in graph.consumers}
    weight_of_bias = {consumer.bias: consumer.weight for consumer in graph.consumers if consumer.bias}
    for group in graph.groups:
        layers: dict[str, Tensor] = {}
        for name, values in _parameter_sums(group, per_parameter):
            layer = name if name in weights else weight_of_bias.get(name, name.rpartition(".")[0])
            layers[layer] = layers[layer] + values if layer in layers else values
        yield (
            group,
            [(sums, sums.mean().clamp_min(torch.finfo(sums.dtype).tiny)) for sums in layers.values()],
        )


def _parameter_sums(group: Group, per_parameter: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """For each parameter that the group touches, its sum over each channel, `(size,)`."""
    axes_of: dict[str, dict[int, Tensor]] = {}
    for member in group.members:
        if member.parameter in per_parameter:
            axes = axes_of.setdefault(member.parameter, {})
            known = axes.get(member.axis)
            axes[member.axis] = member.indices if known is None else torch.cat([known, member.indices], 1)
    return [(name, _sum_once(per_parameter[name], axes)) for name, axes in axes_of.items()]


def _sum_once(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """Sum a tensor over the union of each channel's slices, by inclusion and exclusion over the axes.

    Args:
        tensor: shaped like the parameter.
        axes: for each axis, `(size, k)`: the positions along it that belong to each channel.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    sums: Tensor | None = None
    for count in range(1, len(axes) + 1):
        for chosen in combinations(sorted(axes), count):
            others = [axis for axis in range(tensor.dim()) if axis not in chosen]
            reduced = tensor.sum(others) if others else tensor  # one axis for each of the chosen
            part = _block_sums(reduced, [axes[axis].to(tensor.device) for axis in chosen])
            part = part if count % 2 else -part
            sums = part if sums is None else sums + part
    assert sums is not None
    return sums


def _block_sums(reduced: Tensor, indices: list[Tensor]) -> Tensor:
    """`(size,)`: the sum over each channel's block, given its indices `(size, k)` along every axis."""
    if len(indices) == 1 and indices[0].shape[1] == 1:
        return reduced.index_select(0, indices[0][:, 0])
    if len(indices) == 1:
        return reduced.index_select(0, indices[0].flatten()).reshape(indices[0].shape).sum(1)
    open_mesh = []
    for axis, index in enumerate(indices):
        shape = [1] * len(indices)
        shape[axis] = -1
        open_mesh.append(index.reshape(index.shape[0], *shape))
    return reduced[tuple(open_mesh)].flatten(1).sum(1)


def _total(group: Group, parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0) if parts else torch.zeros(group.size)
