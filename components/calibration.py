"""Watch a model run on calibration data: what every consumer reads and what it makes of it.

`record` runs the dense model once. `Watcher` is the dispatch mode below it and below sequential
reconstruction: it recognises the operators that contract an activation with a consumer's weight, whatever
code calls them, because the operand is a view of that parameter's memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from components.dependency import Consumer, DependencyGraph
from components.gram import Gram, Grams, SplitGram, weight_matrix

MAX_ROWS = 20_000
"""Rows of one operator call that are used; a convolution has one per position, far more than it needs."""

HELD_OUT = 0.2
"""The share of the rows (the last ones) that is held out of every fit to choose the ridge by."""

Program = Callable[[nn.Module], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ConsumerCall:
    """One operator call in which a consumer reads an activation.

    Attributes:
        consumer: which parameter reads.
        activation: what it reads, as the operator gets it.
        channel_axis: the axis of `activation` that is contracted.
        run: runs the operator, on `activation` or on another tensor of its shape.
        geometry: of a convolution: stride, padding, dilation, output shape; None for matrix products.
    """

    consumer: Consumer
    activation: Tensor
    channel_axis: int
    run: Callable[[Tensor], Any]
    geometry: Geometry | None

    def rows(self, activation: Tensor) -> Tensor:
        """What the consumer's matrix reads, `(E, n, d)`; at most `MAX_ROWS`, always the same ones."""
        if self.geometry is not None:
            return self.geometry.patches(activation).unsqueeze(0)
        stacked = activation.movedim(self.channel_axis, -1)
        stacked = stacked if stacked.dim() == 3 else stacked.unsqueeze(0)
        chosen = _chosen_rows(stacked.shape[1])
        return stacked if chosen is None else stacked[:, chosen]


@dataclass(frozen=True)
class Geometry:
    """Where a convolution's output positions read, of any number of spatial axes."""

    transposed: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, ...]
    output: tuple[int, ...]

    def patches(self, activation: Tensor) -> Tensor:
        """The input patch of every (chosen) output position, `(n, channels * kernel positions)`."""
        samples, channels = activation.shape[:2]
        total = samples * torch.Size(self.output).numel()
        chosen = _chosen_rows(total)
        flat = torch.arange(total) if chosen is None else chosen
        places = torch.unravel_index(flat.to(activation.device), (samples, *self.output))
        indices, inside = [], torch.ones(1, dtype=torch.bool, device=activation.device)
        axes = len(self.kernel)
        for axis in range(axes):
            offsets = torch.arange(self.kernel[axis], device=activation.device) * self.dilation[axis]
            at = places[axis + 1].unsqueeze(1)  # (n, 1)
            if self.transposed:
                numerator = at + self.padding[axis] - offsets  # (n, kernel)
                position = numerator.div(self.stride[axis], rounding_mode="floor")
                valid = numerator.remainder(self.stride[axis]) == 0
            else:
                position = at * self.stride[axis] - self.padding[axis] + offsets
                valid = torch.ones_like(position, dtype=torch.bool)
            valid = valid & (position >= 0) & (position < activation.shape[2 + axis])
            shape = [len(flat), *(1 for _ in range(axes))]
            shape[1 + axis] = self.kernel[axis]
            indices.append(position.clamp(0, activation.shape[2 + axis] - 1).reshape(shape))
            inside = inside & valid.reshape(shape)
        sample = places[0].reshape(-1, *(1 for _ in range(axes)))
        gathered = activation.movedim(1, -1)[(sample, *indices)]  # (n, *kernel, channels)
        gathered = gathered * inside.unsqueeze(-1)
        return gathered.movedim(-1, 1).reshape(len(flat), channels * torch.Size(self.kernel).numel())


def _chosen_rows(total: int) -> Tensor | None:
    """At most `MAX_ROWS` of the rows, in order; None where all are used. The same for the same total."""
    if total <= MAX_ROWS:
        return None
    return torch.randperm(total, generator=torch.Generator().manual_seed(total))[:MAX_ROWS].sort().values


class Watcher(TorchDispatchMode):
    """Hands every consumer's operator calls to a function, which runs the operator.

    Grouped convolutions are left alone: they keep their sliced weights.
    """

    def __init__(
        self, graph: DependencyGraph, model: nn.Module, handle: Callable[[ConsumerCall], Any]
    ) -> None:
        super().__init__()
        tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()}
        self._consumers = {
            tensors[consumer.weight].data_ptr(): (consumer, tensors[consumer.weight])
            for consumer in graph.consumers
            if consumer.groups == 1
        }
        self._handle = handle

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        place = _OPERANDS.get(str(operator.overloadpacket))
        if place is not None:
            for weight_at, data_at, channel_axis in place:
                known = self._consumers.get(args[weight_at].data_ptr())
                if known is None or known[1].numel() != args[weight_at].numel():
                    continue
                consumer, weight = known

                def run(activation: Tensor, at: int = data_at) -> Any:
                    return operator(*args[:at], activation, *args[at + 1 :], **kwargs)

                geometry = None
                if consumer.kind in ("convolution", "transposed_convolution"):
                    geometry = _geometry(args, weight)
                return self._handle(ConsumerCall(consumer, args[data_at], channel_axis, run, geometry))
        return operator(*args, **kwargs)


_OPERANDS: dict[str, tuple[tuple[int, int, int], ...]] = {
    # operator: (position of the weight, of the activation, contracted axis of the activation)
    "aten.mm": ((1, 0, 1), (0, 1, 0)),
    "aten.addmm": ((2, 1, 1), (1, 2, 0)),
    "aten.bmm": ((1, 0, 2), (0, 1, 1)),
    "aten.baddbmm": ((2, 1, 2), (1, 2, 1)),
    "aten.convolution": ((1, 0, 1),),
}


def _geometry(args: tuple[Any, ...], weight: Tensor) -> Geometry:
    data, stride, padding, dilation, transposed, extra = args[0], *args[3:8]
    kernel = tuple(weight.shape[2:])
    axes = range(len(kernel))
    stride, padding, dilation, extra = (
        tuple(value[axis if len(value) > 1 else 0] for axis in axes) for value in (stride, padding, dilation, extra)
    )
    spans = [dilation[a] * (kernel[a] - 1) for a in axes]
    if transposed:
        output = [(data.shape[2 + a] - 1) * stride[a] - 2 * padding[a] + spans[a] + extra[a] + 1 for a in axes]
    else:
        output = [(data.shape[2 + a] + 2 * padding[a] - spans[a] - 1) // stride[a] + 1 for a in axes]
    return Geometry(transposed, stride, padding, dilation, kernel, tuple(output))


@dataclass(frozen=True, eq=False)
class Recording:
    """The dense model on calibration data, for sequential reconstruction.

    Attributes:
        outputs: per consumer what it made of its rows, `(E, n, out)` without bias, one tensor per call in the
            program.
        coupled: per consumer that reads a coupling group, its whole input, one tensor per call.
        grams: the second moments of what every consumer reads, over all calls.
    """

    outputs: Mapping[str, tuple[Tensor, ...]]
    coupled: Mapping[str, tuple[Tensor, ...]]
    grams: Grams


def record(graph: DependencyGraph, model: nn.Module, program: Program) -> Recording:
    """Run the dense model on calibration data and keep what reconstruction needs. The model is not changed.

    Args:
        graph: from `trace`.
        model: the dense model; it runs in evaluation mode.
        program: runs everything on the calibration data; the same operators as the traced program.
    """
    dense = evaluation_copy(model)
    state = dense.state_dict()
    outputs: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}
    coupled: dict[str, list[Tensor]] = {}
    couplings = coupled_channels(graph)

    def handle(call: ConsumerCall) -> Any:
        weight = call.consumer.weight
        rows = call.rows(call.activation)
        inputs.setdefault(weight, []).append(rows)
        outputs.setdefault(weight, []).append(rows @ weight_matrix(call.consumer, state[weight]).mT)
        if weight in couplings:
            coupled.setdefault(weight, []).append(call.activation.clone())
        return call.run(call.activation)

    with torch.no_grad(), Watcher(graph, dense, handle):
        program(dense)
    return Recording(
        outputs={weight: tuple(rows) for weight, rows in outputs.items()},
        coupled={weight: tuple(tensors) for weight, tensors in coupled.items()},
        grams=Grams({weight: split_gram(torch.cat(rows, dim=1)) for weight, rows in inputs.items()}),
    )


def split_gram(rows: Tensor) -> SplitGram:
    """The moments of rows `(E, n, d)`, the last of them held out."""
    fit = fit_rows(rows.shape[1])
    return SplitGram(Gram.of(rows[:, :fit]), Gram.of(rows[:, fit:]))


def fit_rows(total: int) -> int:
    """How many of the rows are fitted on; at least one row is on either side."""
    return min(max(1, round(total * (1 - HELD_OUT))), total - 1)


def coupled_channels(graph: DependencyGraph) -> dict[str, Tensor]:
    """Per consumer, which channels of its input belong to coupling groups: their indices on its input axis."""
    found: dict[str, list[Tensor]] = {}
    axes = {consumer.weight: consumer.input_axis for consumer in graph.consumers}
    for group in graph.groups:
        for member in group.members:
            if group.is_coupling and member.consumes and axes.get(member.parameter) == member.axis:
                found.setdefault(member.parameter, []).append(member.indices.flatten())
    return {weight: torch.cat(parts).sort().values for weight, parts in found.items()}


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode, so that running it changes nothing of the original."""
    return copy.deepcopy(model).eval()
