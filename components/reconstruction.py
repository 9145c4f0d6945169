"""Closed-form repair: refit the layers that read pruned channels by least squares.

Cutting channels breaks the layers that read them. Each is refitted to what the dense model made there, on
calibration data, by ridge regression *towards the sliced weights*, so that nothing changes where nothing is
lost. With x the kept inputs, r = y - W_K x what the sliced weights miss of the dense outputs y, and both
centred, C = E[x x'] and D = E[r x']:

    W' = W_K + D (C + lambda * mean(diag C) * I)^-1        b' = b + mean(r) - (W' - W_K) mean(x)

With dense inputs, r = W_R x_R and D = W_R G_RK, of the Gram matrix G. Lambda is chosen per layer on held-out
rows, and a layer whose sliced weights do better there keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from components.calibration import (
    ConsumerCall,
    Program,
    Recording,
    Watcher,
    coupled_channels,
    evaluation_copy,
    split_rows,
)
from components.dependency import Consumer, DependencyGraph, Keep
from components.errors import UserError, nearest
from components.gram import Gram, Grams, from_weight_matrix, weight_matrix
from components.pruning import KeptIndices, kept_indices

Method = Literal["none", "gram", "sequential"]
METHODS: tuple[Method, ...] = get_args(Method)

RIDGES = (1e-3, 1e-2, 1e-1)
"""The candidates for lambda, in units of the mean diagonal of the inputs' Gram matrix."""

ROUNDING = 1e-10
"""A variance below this share of the squared mean may be rounding: such inputs count as constant."""


def reconstruct(
    graph: DependencyGraph,
    dense_state: Mapping[str, Tensor],
    pruned_model: nn.Module,
    keep: Keep,
    *,
    method: Method = "sequential",
    grams: Grams | None = None,
    recording: Recording | None = None,
    program: Program | None = None,
) -> dict[str, Tensor]:
    """The pruned model's state with the readers of pruned channels refitted. Nothing passed in is modified.

    Grouped convolutions, weights that are used in several ways and layers that the calibration data never
    reach keep their sliced weights.

    Args:
        graph: of the dense model.
        dense_state: the dense model's state.
        pruned_model: built from the pruned widths, with the sliced state loaded.
        keep: the masks it was sliced with.
        method: `none` returns the sliced state. `gram` refits every consumer on the dense model's inputs,
            from their Gram matrices, without any pass over data; needs `grams`. `sequential` runs the pruned
            model on the calibration data and refits in the order of the computation: targets from the dense
            model, inputs from what is already repaired; channels of coupling groups are read as the dense
            model makes them, as every component is repaired on its own; needs `recording` and `program`.
        grams: from `Recording.grams`.
        recording: from `components.calibration.record` of the dense model with the same program.
        program: runs everything on the calibration data, as it did for the recording.

    Raises:
        UserError: an unknown method, one whose data is missing, or a model, Gram matrices or a recording that
            do not fit the graph and the masks.
    """
    if method not in METHODS:
        raise UserError(f"unknown reconstruction {method!r}; {nearest(method, METHODS)}")
    indices = kept_indices(graph, keep)
    _check_shapes(graph, pruned_model.state_dict(), indices)
    if method == "sequential" and indices:
        if recording is None or program is None:
            raise UserError(
                "reconstruction 'sequential' needs the recording of the base and the program to run"
            )
        return _Sequence(graph, indices, recording, pruned_model).run(program)
    state = _copied(pruned_model)
    if method == "gram" and indices:
        if grams is None:
            raise UserError("reconstruction 'gram' needs the Gram matrices of the base")
        for consumer in graph.consumers:
            if consumer.weight in grams and _is_disturbed(indices, consumer):
                fit, held_out = _dense_moments(graph, consumer, grams, dense_state, indices)
                _refit(consumer, state, fit, held_out)
        for alias, name in (graph.aliases or {}).items():
            state[alias] = state[name].clone()
    return state


@dataclass(frozen=True, eq=False)
class Moments:
    """What least squares needs of the kept inputs x and of what is missing, r; float64.

    Attributes:
        xx: `(E, k, k)` centred inputs with inputs.
        rx: `(E, out, k)` what is missing with centred inputs.
        x: `(E, k)` mean input.
        r: `(E, out)` mean of what is missing.
    """

    xx: Tensor
    rx: Tensor
    x: Tensor
    r: Tensor

    @classmethod
    def of(cls, inputs: Tensor, missing: Tensor) -> Moments:
        """From `(E, n, k)` and `(E, out, n)`, n rows each, multiplied in their own precision."""
        rows = inputs.shape[1]
        x, r = inputs.mean(1, dtype=torch.float64), missing.mean(2, dtype=torch.float64)
        inputs = inputs - x.to(inputs.dtype).unsqueeze(1)
        missing = missing - r.to(missing.dtype).unsqueeze(2)
        return cls(xx=(inputs.mT @ inputs).double() / rows, rx=(missing @ inputs).double() / rows, x=x, r=r)

    def uncentred(self) -> Moments:
        """The moments about zero, for a layer without a bias."""
        return Moments(
            xx=self.xx + self.x.unsqueeze(2) * self.x.unsqueeze(1),
            rx=self.rx + self.r.unsqueeze(2) * self.x.unsqueeze(1),
            x=torch.zeros_like(self.x),
            r=torch.zeros_like(self.r),
        )

    def error(self, change: Tensor, shift: Tensor) -> Tensor:
        """How much of r is still missing after adding `change @ x + shift` to what the sliced weights make.

        Returns:
            The squared error, the mean over rows and the sum over outputs, less the variance of r, which no
            choice of change and shift alters: `()`.
        """
        offset = self.r - shift - (change @ self.x.unsqueeze(2)).squeeze(2)  # (E, out)
        return ((change @ self.xx - 2 * self.rx) * change).sum() + offset.square().sum()


def _dense_moments(
    graph: DependencyGraph,
    consumer: Consumer,
    grams: Grams,
    dense_state: Mapping[str, Tensor],
    indices: KeptIndices,
) -> tuple[Moments, Moments]:
    """The moments of the kept dense inputs with what the removed ones made, from Gram matrices alone."""
    name = consumer.weight
    weight = dense_state[name].detach()
    kept, removed = (
        _columns(consumer, channels, weight.shape).to(weight.device)
        for channels in _kept_and_removed(
            indices[name][consumer.input_axis], graph.shapes[name][consumer.input_axis]
        )
    )
    matrix = _of_kept_outputs(indices, consumer, weight_matrix(consumer, weight))
    matrix = matrix[:, :, removed].double()  # (E, out, removed)

    def moments(gram: Gram) -> Moments:
        second, mean = gram.gram.to(weight.device), gram.mean.to(weight.device)
        if consumer.kind == "batched" and indices[name][0] is not None:
            second, mean = second[indices[name][0]], mean[indices[name][0]]
        second = second[:, :, kept]  # (E, d, k)
        return Moments(
            xx=second[:, kept],
            rx=matrix @ second[:, removed],
            x=mean[:, kept],
            r=(matrix @ mean[:, removed].unsqueeze(2)).squeeze(2),
        )

    split = grams[name]
    if split.fit.mean.shape[1] != len(kept) + len(removed):
        raise UserError(
            f"the Gram matrix of {name!r} is of {split.fit.mean.shape[1]} inputs, which does not fit its "
            f"weight of shape {tuple(weight.shape)}"
        )
    return moments(split.fit), moments(split.held_out)


def _refit(consumer: Consumer, state: Mapping[str, Tensor], fit: Moments, held_out: Moments) -> None:
    """Refit one consumer in `state`, in place, unless its sliced weights do better on held-out rows."""
    weight = state[consumer.weight]
    bias = None if consumer.bias is None else state[consumer.bias]
    if bias is None or bias.numel() != fit.r.numel():  # none, or one that several outputs share
        bias, fit = None, fit.uncentred()
    if not bool(torch.isfinite(fit.xx.sum() + fit.rx.sum())):
        return
    best, best_shift, least = None, fit.r, held_out.r.square().sum()
    variance = fit.xx.diagonal(dim1=1, dim2=2).mean(1)  # (E,)
    scale = torch.maximum(variance, ROUNDING * fit.x.square().mean(1))
    for ridge in RIDGES:
        change = _solve(fit.xx, ridge * scale, fit.rx)  # (E, out, k)
        shift = fit.r - (change @ fit.x.unsqueeze(2)).squeeze(2)  # (E, out)
        error = held_out.error(change, shift)
        if error < least:
            best, best_shift, least = change, shift, error
    if best is None:
        return
    weight.add_(from_weight_matrix(consumer, best, weight.shape))
    if bias is not None:
        bias.add_(best_shift.reshape(bias.shape))


def _solve(gram: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """`right @ (gram + ridge * I)^-1` for symmetric positive (semi-)definite `gram`, `(E, k, k)`."""
    damped = gram.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if not bool(failed.any()):
        return torch.cholesky_solve(right.mT, factor).mT
    # Rounding made it indefinite: leave out the directions that are not positive.
    values, vectors = torch.linalg.eigh(damped)
    floor = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    inverse = torch.where(values > floor, 1 / values, 0.0)
    solved: Tensor = (right @ vectors * inverse.unsqueeze(1)) @ vectors.mT
    return solved


class _Sequence:
    """Sequential reconstruction: run the pruned model, refitting each consumer just before it is used.

    A consumer that the program calls once is refitted on the spot, and the same pass goes on with its new
    weights. One that is called several times needs all its inputs first, so a new pass starts after it.
    """

    def __init__(
        self, graph: DependencyGraph, indices: KeptIndices, recording: Recording, pruned_model: nn.Module
    ) -> None:
        self._graph = graph
        self._indices = indices
        self._recording = recording
        self._model = evaluation_copy(pruned_model)
        self._state = self._model.state_dict(keep_vars=True)
        self._coupled = coupled_channels(graph)
        self._dense: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._waiting = self._disturbed()

    def run(self, program: Program) -> dict[str, Tensor]:
        """Refit everything that has to be; returns the repaired state."""
        with torch.no_grad():
            while self._waiting:
                first = self._waiting[0].weight
                self._calls: dict[str, int] = {}
                self._inputs: list[Tensor] = []
                self._stale = False
                with Watcher(self._graph, self._model, self._handle):
                    program(self._model)
                if not self._waiting or self._waiting[0].weight != first:
                    continue
                if first not in self._calls:  # at width 1, einsum multiplies where it contracted before
                    self._waiting.pop(0)  # this one keeps its sliced weights
                    continue
                raise UserError(
                    f"the program calls {first!r} {self._calls[first]} times, and "
                    f"{len(self._recording.outputs[first])} times in the recording; both have to be alike"
                )
        return _copied(self._model)

    def _disturbed(self) -> list[Consumer]:
        """The consumers whose inputs differ from the dense model's, in the order of the computation."""
        disturbed: set[str] = set()
        waiting = []
        for consumer in self._graph.consumers:
            component = self._graph.component_of(consumer.weight)
            reads = _is_disturbed(self._indices, consumer) or (
                component in disturbed and consumer.groups == 1
            )
            if reads and consumer.weight in self._recording.outputs:
                waiting.append(consumer)
            if consumer.weight in self._indices:
                disturbed.add(component)
        return waiting

    def _handle(self, call: ConsumerCall) -> Any:
        weight = call.consumer.weight
        number = self._calls.get(weight, 0)
        self._calls[weight] = number + 1
        activation = self._with_dense_coupling(call, number)
        if self._waiting and weight == self._waiting[0].weight and not self._stale:
            calls = len(self._recording.outputs[weight])
            rows = call.rows(activation)
            self._inputs.append(rows if calls == 1 else rows.clone())  # the program may overwrite its tensors
            if len(self._inputs) == calls:
                self._refit(call.consumer)
                self._stale = calls > 1
        return call.run(activation)

    def _with_dense_coupling(self, call: ConsumerCall, number: int) -> Tensor:
        """The activation with the channels of coupling groups as the dense model has them."""
        recorded = self._recording.coupled.get(call.consumer.weight, ())
        if number >= len(recorded):
            return call.activation
        key = call.consumer.weight, number
        if key not in self._dense:
            self._dense[key] = self._dense_channels(call, recorded[number])
        is_coupled, dense = self._dense[key]
        if dense.shape != call.activation.shape:
            raise UserError(
                f"{call.consumer.weight!r} reads {tuple(call.activation.shape)} where the recording and the "
                f"masks make it {tuple(dense.shape)}; both have to come from the same program and data"
            )
        return torch.where(is_coupled, dense, call.activation)

    def _dense_channels(self, call: ConsumerCall, source: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the kept channels are coupled, shaped like the activation, and all of them, dense."""
        consumer = call.consumer
        axis, size = call.channel_axis, source.shape[call.channel_axis]
        kept = _kept(self._indices, consumer.weight, consumer.input_axis)
        channels = torch.arange(size) if kept is None else kept
        shape = [1] * source.dim()
        shape[axis] = len(channels)
        is_coupled = torch.isin(channels, self._coupled[consumer.weight]).reshape(shape).to(source.device)
        dense = source if kept is None else source.index_select(axis, kept.to(source.device))
        if consumer.kind == "batched":
            stack = _kept(self._indices, consumer.weight, 0)
            dense = dense if stack is None else dense.index_select(0, stack.to(source.device))
        return is_coupled, dense

    def _refit(self, consumer: Consumer) -> None:
        sliced = weight_matrix(consumer, self._state[consumer.weight])  # (E, out, k)
        missing = []
        for inputs, outputs in zip(self._inputs, self._recording.outputs[consumer.weight], strict=True):
            targets = _of_kept_outputs(self._indices, consumer, outputs)  # (E, out, n)
            if inputs.shape[1] != targets.shape[2]:
                raise UserError(
                    f"the program gives {consumer.weight!r} {inputs.shape[1]} rows and {targets.shape[2]} in "
                    "the recording; both have to come from the same data"
                )
            missing.append(torch.baddbmm(targets, sliced, inputs.mT, alpha=-1))
        parts = zip(split_rows(self._inputs), split_rows(missing, axis=2), strict=True)
        fit, held_out = (Moments.of(inputs, lost) for inputs, lost in parts)
        _refit(consumer, self._state, fit, held_out)
        self._waiting.pop(0)
        self._inputs = []


def _check_shapes(graph: DependencyGraph, state: Mapping[str, Tensor], indices: KeptIndices) -> None:
    """Raise UserError where a state is not the graph's, sliced to the kept indices."""
    aliases = graph.aliases or {}
    for name, tensor in state.items():
        known = aliases.get(name, name)
        if known not in graph.shapes:
            raise UserError(f"the pruned model has {name!r}, which the traced model does not have")
        axes = indices.get(known, (None,) * len(graph.shapes[known]))
        expected = [
            n if kept is None else len(kept) for n, kept in zip(graph.shapes[known], axes, strict=True)
        ]
        if list(tensor.shape) != expected:
            raise UserError(
                f"{name!r} has shape {tuple(tensor.shape)} in the pruned model, and the masks leave "
                f"{tuple(expected)}"
            )


def _copied(model: nn.Module) -> dict[str, Tensor]:
    """A model's state in memory of its own."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _is_disturbed(indices: KeptIndices, consumer: Consumer) -> bool:
    """True where a consumer that can be refitted loses inputs."""
    return consumer.groups == 1 and _kept(indices, consumer.weight, consumer.input_axis) is not None


def _kept(indices: KeptIndices, parameter: str, axis: int) -> Tensor | None:
    """The kept indices of a parameter's axis; None for all of them."""
    return indices[parameter][axis] if parameter in indices else None


def _kept_and_removed(kept: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[slice(None) if kept is None else kept] = True
    return mask.nonzero().flatten(), (~mask).nonzero().flatten()


def _of_kept_outputs(indices: KeptIndices, consumer: Consumer, tensor: Tensor) -> Tensor:
    """A tensor `(E, out, ...)` for the outputs that a consumer keeps, of the kept part of the stack."""
    outputs = _kept(indices, consumer.weight, consumer.output_axis)
    stack = _kept(indices, consumer.weight, 0) if consumer.kind == "batched" else None
    for axis, kept in ((1, outputs), (0, stack)):
        if kept is not None:
            tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor


def _columns(consumer: Consumer, channels: Tensor, shape: torch.Size) -> Tensor:
    """The columns of a consumer's matrix that belong to some of its input channels."""
    if consumer.kind not in ("convolution", "transposed_convolution"):
        return channels
    positions = shape[2:].numel()
    return (channels.unsqueeze(1) * positions + torch.arange(positions)).flatten()
