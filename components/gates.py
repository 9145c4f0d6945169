"""Per-sample derivatives of the loss by a gate on every channel, taken from activations during training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.overrides import TorchFunctionMode

from components.dependency import Consumer, DependencyGraph
from components.importance import consumers_of

# Operator -> (position, keyword) of its two operands; the data comes first where a weight comes second.
_OPERANDS: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    "linear": ((0, "input"), (1, "weight")),
    "matmul": ((0, "input"), (1, "other")),
    "__matmul__": ((0, "self"), (1, "other")),
    "mm": ((0, "input"), (1, "mat2")),
    "bmm": ((0, "input"), (1, "mat2")),
    "mv": ((0, "input"), (1, "vec")),
    "addmm": ((1, "mat1"), (2, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
}
_CONVOLUTIONS = [f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3)]
_OPERANDS.update(dict.fromkeys(_CONVOLUTIONS, ((0, "input"), (1, "weight"))))


@dataclass(frozen=True, eq=False)
class GateReader:
    """A consumer of channels, and where they lie in what it reads.

    Attributes:
        consumer: the consumer.
        weight: its parameter.
        channels: for every group it reads, `(size, k)`: the input features of each channel; None where
            channel c is feature c and there are no others.
    """

    consumer: Consumer
    weight: Tensor
    channels: Mapping[str, Tensor | None]


def gate_readers(graph: DependencyGraph, model: nn.Module) -> list[GateReader]:
    """The consumers of a graph's groups, with the parameters of a model of that graph."""
    parameters = dict(model.named_parameters())
    consumers: dict[str, Consumer] = {}
    channels: dict[str, dict[str, Tensor | None]] = defaultdict(dict)
    for group in graph.groups:
        for consumer, members in consumers_of(graph, group):
            indices = torch.cat([member.indices for member in members], dim=1)
            features = graph.shapes[consumer.weight][consumer.input_axis]
            if consumer.kind == "convolution" and consumer.groups > 1:  # the same place in each of its groups
                indices = torch.cat([indices + i * features for i in range(consumer.groups)], dim=1)
                features *= consumer.groups
            consumers[consumer.weight] = consumer
            in_order = torch.equal(indices.flatten(), torch.arange(features)) and group.size == features
            channels[consumer.weight][group.name] = None if in_order else indices
    return [
        GateReader(consumer, parameters[name], channels[name])
        for name, consumer in consumers.items()
        if name in parameters
    ]


class GateMode(TorchFunctionMode):
    """Watches the inputs of consumers, known by their weights, whatever module or function runs them.

    An input is replaced by an alias of itself, so that the gradient seen is the part that flows through this
    consumer, not through others that read the same tensor. Values and gradients stay the same, bit for bit.

    The weight may be used as it is, transposed, or mapped over by one `vmap`; a weight that was computed from
    the parameter is not recognised.
    """

    def __init__(self, readers: list[GateReader]) -> None:
        super().__init__()
        self._readers = {id(reader.weight): reader for reader in readers}
        self._sums: dict[tuple[str, int], Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, with its data watched if it is a consumer."""
        kwargs = kwargs or {}
        operator = getattr(func, "__name__", "")
        if operator in _OPERANDS:
            arguments = {**dict(enumerate(args)), **kwargs}
            left, right = (key if key in arguments else name for key, name in _OPERANDS[operator])
            if self._watch(operator, arguments, left, right):
                args = tuple(arguments[index] for index in range(len(args)))
                kwargs = {name: arguments[name] for name in kwargs}
        return func(*args, **kwargs)

    def _watch(
        self, operator: str, arguments: dict[int | str, Any], left: int | str, right: int | str
    ) -> bool:
        """Replace a consumer's data among the arguments by a watched alias; False where there is none."""
        if not (isinstance(arguments.get(left), Tensor) and isinstance(arguments.get(right), Tensor)):
            return False
        for data, weight, contracted, feature in _roles(operator, left, right, arguments):
            reader = self._reader(arguments[weight], contracted)
            if reader is not None:
                alias = arguments[data].view_as(arguments[data])
                seen, mapped = _unmapped(alias)
                if not seen.requires_grad:
                    return False
                axis = _physical(feature, alias.dim(), mapped)
                samples = _sample_axis(reader, seen, axis, mapped)
                hook = partial(self._receive, reader, seen.detach(), axis, samples)
                seen.register_hook(hook)  # type: ignore[no-untyped-call]
                arguments[data] = alias
                return True
        return False

    def _reader(self, weight: Tensor, contracted: int) -> GateReader | None:
        """The consumer whose weight this is, or a transpose of, if its input axis is contracted here."""
        seen, mapped = _unmapped(weight)
        reader = self._readers.get(id(seen))
        if reader is None and seen._is_view():
            reader = self._readers.get(id(seen._base))
        if reader is None or seen.numel() != reader.weight.numel():
            return None
        if mapped is not None and reader.consumer.kind != "batched":
            return None
        axis, expected = _physical(contracted, weight.dim(), mapped), reader.consumer.input_axis
        same_size = seen.shape[axis] == reader.weight.shape[expected]
        return reader if same_size and seen.stride(axis) == reader.weight.stride(expected) else None

    def _receive(
        self, reader: GateReader, data: Tensor, feature: int, samples: int | None, gradient: Tensor
    ) -> None:
        product = (data * gradient.detach()).movedim(feature, -1)
        if samples is None:
            product = product.unsqueeze(0)
        else:
            product = product.movedim(samples - (samples > feature), 0)  # (samples, ..., features)
        rows = product.flatten(1, -2).sum(1) if product.dim() > 2 else product
        for group, indices in reader.channels.items():
            channels = rows  # (samples, size)
            if indices is not None:
                index = indices.to(rows.device)
                channels = rows[:, index.flatten()].reshape(-1, *index.shape).sum(2)
            key = (group, len(rows))
            self._sums[key] = self._sums[key] + channels if key in self._sums else channels

    def gates(self) -> dict[str, Tensor]:
        """For every group that was read, `(size,)`: the mean over samples of the squared gate derivatives.

        Derivatives through all consumers of a group, and all their calls, are summed for each sample before
        squaring; calls with another number of samples are squared apart and added. A loss is taken as a mean
        over its samples: derivatives are multiplied by their number, so that they are of one sample's loss.
        """
        gates: dict[str, Tensor] = {}
        for (group, samples), sums in self._sums.items():
            squared = (sums * samples).square().mean(0)
            gates[group] = gates[group] + squared if group in gates else squared
        return gates


def _roles(
    operator: str, left: int | str, right: int | str, arguments: Mapping[int | str, Tensor]
) -> list[tuple[int | str, int | str, int, int]]:
    """Which operand may be the data and which the weight: (data, weight, contracted axis, feature axis)."""
    if operator == "linear":
        return [(left, right, 1, -1)]
    if operator in _CONVOLUTIONS:
        return [(left, right, int("transpose" not in operator), 1 - arguments[right].dim())]
    column = -2 if arguments[right].dim() > 1 else -1
    return [(left, right, column, -1), (right, left, -1, column)]


def _unmapped(tensor: Tensor) -> tuple[Tensor, int | None]:
    """The tensor that `vmap` maps over, and along which axis; outside `vmap` the tensor itself and None."""
    if not functorch.is_batchedtensor(tensor):
        return tensor, None
    return functorch.get_unwrapped(tensor), functorch.maybe_get_bdim(tensor)


def _physical(axis: int, dimensions: int, mapped: int | None) -> int:
    """Where an axis is once the one that `vmap` hides is counted."""
    axis %= dimensions
    return axis if mapped is None or axis < mapped else axis + 1


def _sample_axis(reader: GateReader, data: Tensor, feature: int, mapped: int | None) -> int | None:
    """The first axis of the data that is neither its features nor a stack's, or None for a lone sample."""
    if reader.consumer.kind.endswith("convolution"):
        return 0 if data.dim() == reader.weight.dim() else None
    stack = 0 if mapped is None and reader.consumer.kind == "batched" and data.dim() > 2 else mapped
    return next((axis for axis in range(data.dim()) if axis not in (feature, stack)), None)
