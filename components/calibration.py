"""Watch a model run on calibration data: what every consumer reads and what it makes of it.

`record` runs the dense model once. `Watcher` is the dispatch mode below it and below sequential
reconstruction: it recognises the operators that contract an activation with a consumer's weight, whatever
code calls them, because the operand is a view of that parameter's memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from components.dependency import Consumer, DependencyGraph
from components.errors import UserError
from components.gram import Gram, Grams, SplitGram, weight_matrix

MAX_ROWS = 20_000
"""Rows of one operator call that are used; a convolution has one per position, far more than it needs."""

HELD_OUT = 0.2
"""The share of the rows (the last ones of every call) that is held out of a fit to choose the ridge by."""

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
            patches = self.geometry.patches(activation)
            return patches.reshape(len(patches), self.consumer.groups, -1).movedim(1, 0)
        stacked = activation.movedim(self.channel_axis, -1)
        if self.consumer.kind != "batched":
            stacked = stacked.reshape(1, -1, stacked.shape[-1])
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


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every consumer's operator calls to a function, which runs the operator."""

    def __init__(
        self, graph: DependencyGraph, model: nn.Module, handle: Callable[[ConsumerCall], Any]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = model.state_dict(keep_vars=True)
        self._consumers = {
            tensors[consumer.weight].data_ptr(): (consumer, tensors[consumer.weight])
            for consumer in graph.consumers
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
    "aten.linear": ((1, 0, -1),),
    "aten.convolution": ((1, 0, 1),),
}


def _geometry(args: tuple[Any, ...], weight: Tensor) -> Geometry:
    data, stride, padding, dilation, transposed, extra = args[0], *args[3:8]
    kernel = tuple(weight.shape[2:])
    axes = range(len(kernel))
    stride, padding, dilation, extra = (
        tuple(value[axis if len(value) > 1 else 0] for axis in axes)
        for value in (stride, padding, dilation, extra)
    )
    spans = [dilation[a] * (kernel[a] - 1) for a in axes]
    if transposed:
        output = [
            (data.shape[2 + a] - 1) * stride[a] - 2 * padding[a] + spans[a] + extra[a] + 1 for a in axes
        ]
    else:
        output = [(data.shape[2 + a] + 2 * padding[a] - spans[a] - 1) // stride[a] + 1 for a in axes]
    return Geometry(transposed, stride, padding, dilation, kernel, tuple(output))


@dataclass(frozen=True, eq=False)
class Recording:
    """The dense model on calibration data, for sequential reconstruction.

    Consumers that read fewer than two rows are left out: nothing can be fitted and checked on those.

    Attributes:
        outputs: per consumer what it made of its rows, `(E, out, n)` without bias, one tensor per call in the
            program. Outputs come first, so that picking the kept ones is fast.
        coupled: per consumer that reads a coupling group, its whole input, one tensor per call.
        grams: the second moments of what every consumer reads, over all calls; empty if not asked for.
    """

    outputs: Mapping[str, tuple[Tensor, ...]]
    coupled: Mapping[str, tuple[Tensor, ...]]
    grams: Grams


def record(
    graph: DependencyGraph, model: nn.Module, program: Program, *, with_grams: bool = True
) -> Recording:
    """Run the dense model on calibration data and keep what reconstruction needs. The model is not changed.

    Args:
        graph: from `trace`.
        model: the dense model; it runs in evaluation mode.
        program: runs everything on the calibration data; the same operators as the traced program, and the
            same calls with the same inputs every time it runs.
        with_grams: False saves the Gram matrices, which sequential reconstruction does without.

    Raises:
        UserError: no layer reads two rows or more.
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
        outputs.setdefault(weight, []).append(weight_matrix(call.consumer, state[weight]) @ rows.mT)
        if with_grams:
            inputs.setdefault(weight, []).append(rows.clone())  # the program may overwrite its tensors
        if weight in couplings:
            coupled.setdefault(weight, []).append(call.activation.clone())
        return call.run(call.activation)

    with torch.no_grad(), Watcher(graph, dense, handle):
        program(dense)
    enough = [weight for weight, made in outputs.items() if sum(rows.shape[2] for rows in made) > 1]
    if graph.consumers and not enough:
        raise UserError(
            "the calibration program gives no layer two rows or more; give it more calibration data"
        )
    grams = {}
    for weight in enough if with_grams else ():
        fit, held_out = split_rows(inputs.pop(weight))
        grams[weight] = SplitGram(Gram.of(fit), Gram.of(held_out))
    return Recording(
        outputs={weight: tuple(outputs[weight]) for weight in enough},
        coupled={weight: tuple(tensors) for weight, tensors in coupled.items()},
        grams=Grams(grams),
    )


def split_rows(calls: Sequence[Tensor], axis: int = 1) -> tuple[Tensor, Tensor]:
    """The rows to fit on and the rows held out, at least one of each.

    The last rows of *every* call are held out: the calls of a rollout see the same samples at different
    times, so both sides see every time, and no sample is on both.

    Args:
        calls: one tensor per call of a consumer; together they have two rows or more.
        axis: of the rows.
    """
    if min(rows.shape[axis] for rows in calls) < 2:
        calls = [torch.cat(list(calls), dim=axis)]
    fit, held_out = [], []
    for rows in calls:
        total = rows.shape[axis]
        fitted = min(max(1, round(total * (1 - HELD_OUT))), total - 1)
        fit.append(rows.narrow(axis, 0, fitted))
        held_out.append(rows.narrow(axis, fitted, total - fitted))
    if len(calls) == 1:
        return fit[0], held_out[0]
    return torch.cat(fit, dim=axis), torch.cat(held_out, dim=axis)


def coupled_channels(graph: DependencyGraph) -> dict[str, Tensor]:
    """Per consumer, which channels of its input belong to coupling groups: their indices on its input axis.

    Grouped convolutions are left out: several of their channels share an index.
    """
    found: dict[str, list[Tensor]] = {}
    axes = {consumer.weight: consumer.input_axis for consumer in graph.consumers if consumer.groups == 1}
    for group in graph.groups:
        for member in group.members:
            if group.is_coupling and member.consumes and axes.get(member.parameter) == member.axis:
                found.setdefault(member.parameter, []).append(member.indices.flatten())
    return {weight: torch.cat(parts).sort().values for weight, parts in found.items()}


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode, so that running it changes nothing of the original."""
    return copy.deepcopy(model).eval()
