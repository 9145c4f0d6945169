"""Channels that are kept in part, so that what a model loses by pruning has a gradient.

A soft mask weights every channel by a number in [0, 1]: a sigmoid of its mixed score minus a threshold. Where
all masks are 0 or 1, the masked model computes what the sliced one does and counts its parameters exactly; in
between both are differentiable, in what the scores are mixed by and in how much is kept.

arXiv 2507.14882 finds its soft coefficients by grid search or gradient descent; only its abstract was
available, so what is here is this project's own definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from components.dependency import DependencyGraph, Member

Masks = Mapping[str, Tensor]
"""For every group name, a float tensor of shape `(group.size,)` in [0, 1]: how much of a channel is kept."""

Run = Callable[[nn.Module], Mapping[str, Tensor]]
"""Runs a model on fixed inputs and returns its named outputs."""


def soft_mask(scores: Tensor, share: Tensor, width: float) -> Tensor:
    """sigmoid((s - t) / temperature) for every channel of a group: about share * size of it in all.

    The threshold t is what a share of the channels lies above, between two scores: share * size is rounded
    to the number of channels whose mask is above 1/2, the count that `choose` keeps. The temperature
    is as many scores wide as `width` says, by how densely the scores lie around t, so that it means the same
    to a group of sixteen channels and to one whose scores span decades.

    Args:
        scores: `(size,)` mixed scores, float64; gradients reach what they were mixed by.
        share: scalar, the share of the channels that is kept, in (0, 1]; below one channel it counts as one.
        width: > 0, in channels: so many lie about t with masks between 0.27 and 0.73. Well below 1, all
            masks are practically 0 or 1.

    Returns:
        `(size,)` float64.
    """
    size = len(scores)
    ordered = scores.sort(descending=True).values
    lowest = ordered[-1:] - (ordered[:1] - ordered[-1:]).detach() / size  # so that all can lie above t
    ordered = torch.cat([ordered, lowest])  # (size + 1,)
    place = (share * size).clamp(1, size) - 0.5  # of t among the ordered scores, the highest being 0
    at = place.item()
    reach = max(width, 1.0)
    first, last = max(0, math.floor(at - reach)), min(size, math.ceil(at + reach))
    slope = ((ordered[first] - ordered[last]).detach() / (last - first)).clamp(min=1e-12)  # a channel's
    below = min(math.floor(at), size - 1)
    threshold = torch.lerp(ordered[below], ordered[below + 1], at - below)
    threshold = threshold - slope * (place - at)  # no change, but the gradient: a smooth one
    return torch.sigmoid((scores - threshold) / (slope * width))


class SoftModel:
    """A trained model some of whose channels are kept in part.

    The columns of every parameter that reads a channel are multiplied by its mask, and the statistics of
    layer and group normalisation are weighted by the masks. What else mixes the channels of a group without
    a parameter, such as `normalize`, is not masked: compare with a sliced model before relying on it.

    Args:
        graph: of the model.
        model: in evaluation mode; neither it nor its parameters are changed.
    """

    def __init__(self, graph: DependencyGraph, model: nn.Module) -> None:
        self._graph = graph
        self._model = model
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}
        starts, start = {}, 0
        for group in graph.groups:
            starts[group.name], start = start, start + group.size
        # For every axis of every parameter, where the mask of each index is among all masks, one behind the
        # other; the last is the 1 of what belongs to no channel.
        everywhere: dict[tuple[str, int], Tensor] = {}
        reading: dict[tuple[str, int], Tensor] = {}
        for group in graph.groups:
            channels = starts[group.name] + torch.arange(group.size)
            for member in group.members:
                if member.parameter in self._parameters:
                    for places in (everywhere, *([reading] if member.consumes else [])):
                        _enter(places, member, channels, start, graph)
        device = next(iter(self._parameters.values())).device
        self._everywhere = {key: places.to(device) for key, places in everywhere.items()}
        self._reading = {key: places.to(device) for key, places in reading.items()}
        self._total = sum(p.numel() for p in self._parameters.values())

    def outputs(self, masks: Masks, run: Run) -> Mapping[str, Tensor]:
        """What the masked model makes of the inputs of `run`; differentiable in the masks."""
        state = self.state(masks)
        with self.statistics(masks, state):
            made: Mapping[str, Tensor] = torch.func.functional_call(
                _Program(self._model, run), {f"model.{name}": tensor for name, tensor in state.items()}, ()
            )
        return made

    def state(self, masks: Masks) -> dict[str, Tensor]:
        """The parameters by name, their reading columns multiplied by the masks."""
        flat = self._flat(masks)
        state = dict(self._parameters)
        for (name, axis), places in self._reading.items():
            tensor = state[name]
            shape = [1] * tensor.dim()
            shape[axis] = -1
            state[name] = tensor * flat[places].to(tensor.dtype).reshape(shape)
        return state

    def statistics(self, masks: Masks, state: Mapping[str, Tensor]) -> TorchFunctionMode:
        """Inside it, layer and group normalisation weight their statistics by the masks.

        Args:
            masks: of all groups.
            state: the tensors that the model has for parameters there: normalisations are known by those.
        """
        flat = self._flat(masks)
        weights = {
            id(state[name]): flat[places].to(state[name].dtype)
            for (name, axis), places in self._everywhere.items()
            if axis == 0 and state[name].dim() == 1
        }
        return _MaskedStatistics(weights)

    def expected_size(self, masks: Masks) -> Tensor:
        """The share of its parameters that the model keeps, in (0, 1]: for every parameter the product over
        its axes of the kept share of each, which binary masks make exact."""
        flat = self._flat(masks)
        kept = {name: flat.new_ones(()) * tensor.numel() for name, tensor in self._parameters.items()}
        for (name, axis), places in self._everywhere.items():
            kept[name] = kept[name] * (flat[places].sum() / self._graph.shapes[name][axis])
        return torch.stack(list(kept.values())).sum() / self._total

    def _flat(self, masks: Masks) -> Tensor:
        """All masks, one behind the other, and a 1."""
        parts = [masks[group.name] for group in self._graph.groups]
        return torch.cat([*parts, parts[0].new_ones(1)])


class _Program(nn.Module):
    """What a program does with a model, as a module: only those can be called with other parameters."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self) -> Mapping[str, Tensor]:
        return self.run(self.model)


class _MaskedStatistics(TorchFunctionMode):
    """Normalises over kept channels, as far as they are kept.

    Args:
        weights: address of a normalisation's weight -> the mask of every channel it normalises, `(size,)`.
    """

    def __init__(self, weights: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is functional.group_norm:
            return self._group_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _layer_norm(
        self,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        masks = self._weights.get(id(weight))
        if masks is None:
            return functional.layer_norm(x, shape, weight, bias, eps)
        normal = masked_normal(x, masks, (-1,), eps)
        assert weight is not None
        return normal * weight + (0 if bias is None else bias)

    def _group_norm(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        masks = self._weights.get(id(weight))
        if masks is None:
            return functional.group_norm(x, groups, weight, bias, eps)
        grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)  # (batch, groups, channels, *)
        normal = masked_normal(grouped, masks.reshape(groups, -1, 1), (-2, -1), eps).reshape(x.shape)
        each = (-1, *[1] * (x.dim() - 2))
        assert weight is not None
        return normal * weight.reshape(each) + (0 if bias is None else bias.reshape(each))


def masked_normal(x: Tensor, masks: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """x with mean 0 and variance 1 over some axes, every entry counted as far as its mask says.

    Args:
        x: what is normalised.
        masks: in [0, 1], of a shape that broadcasts to x.
        axes: over which.
        eps: added to the variance.
    """
    weights = masks.expand_as(x)
    count = weights.sum(axes, keepdim=True)
    mean = (x * weights).sum(axes, keepdim=True) / count
    variance = ((x - mean).square() * weights).sum(axes, keepdim=True) / count
    return (x - mean) / (variance + eps).sqrt()


def _enter(
    places: dict[tuple[str, int], Tensor], member: Member, channels: Tensor, none: int, graph: DependencyGraph
) -> None:
    """Note which channel owns every index of a member's axis."""
    key = member.parameter, member.axis
    if key not in places:
        places[key] = torch.full((graph.shapes[member.parameter][member.axis],), none)
    places[key][member.indices] = channels.unsqueeze(1).expand_as(member.indices)
