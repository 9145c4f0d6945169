"""Closed-form repair: refit the layers that read pruned channels by least squares.

Cutting channels breaks the layers that read them. Each is refitted to what the dense model made there, on
calibration data, by ridge regression *towards the sliced weights*, so that nothing changes where nothing is
lost. With x the kept (centred) inputs, y the (centred) dense outputs, and C = E[x x'], D = E[y x']:

    W' = W_K + (D - W_K C) (C + lambda * mean(diag C) * I)^-1        b' = b + mean(y) - W' mean(x)

With dense inputs, y = W x and this is `W_K + W_R G_RK (G_KK + ...)^-1` of the Gram matrix G. Lambda is chosen
per layer on held-out rows, and a layer whose sliced weights do better there keeps them.
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
    fit_rows,
)
from components.dependency import Consumer, DependencyGraph, Keep
from components.errors import UserError, nearest
from components.gram import Gram, Grams, from_weight_matrix, weight_matrix
from components.pruning import KeptIndices, kept_indices

Method = Literal["none", "gram", "sequential"]
METHODS: tuple[Method, ...] = get_args(Method)

RIDGES = (1e-3, 1e-2, 1e-1)
"""The candidates for lambda, in units of the mean diagonal of the inputs' Gram matrix."""


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

    Args:
        graph: of the dense model.
        dense_state: the dense model's state.
        pruned_model: built from the pruned widths, with the sliced state loaded.
        keep: the masks it was sliced with.
        method: `none` returns the sliced state. `gram` refits every consumer on the dense model's inputs,
            from their Gram matrices, without any pass over data; needs `grams`. `sequential` runs the pruned
            model on the calibration data and refits in the order of the computation: targets from the dense
            model, inputs from what is already repaired; channels of coupling groups are read from the dense
            model, as their own component has yet to be repaired towards them; needs `recording` and `program`.
        grams: from `Recording.grams`.
        recording: from `components.calibration.record` of the dense model with the same program.
        program: runs everything on the calibration data.

    Raises:
        UserError: an unknown method, or one whose data is missing.
    """
    state = {name: tensor.detach().clone() for name, tensor in pruned_model.state_dict().items()}
    if method not in METHODS:
        raise UserError(f"unknown reconstruction {method!r}; {nearest(method, METHODS)}")
    indices = kept_indices(graph, keep)
    if method == "none" or not indices:
        return state
    if method == "gram":
        if grams is None:
            raise UserError("reconstruction 'gram' needs the Gram matrices of the base")
        for consumer in graph.consumers:
            if consumer.weight in grams and _lost(indices, consumer.weight, consumer.input_axis):
                moments = _dense_moments(graph, consumer, grams, dense_state, indices)
                _refit(consumer, state, moments)
        return state
    if recording is None or program is None:
        raise UserError("reconstruction 'sequential' needs the recording of the base and the program to run")
    return _Sequence(graph, indices, recording, pruned_model).run(program)


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of inputs and targets, centred: all that least squares needs.

    Attributes:
        xx: `(E, k, k)` inputs with inputs.
        xy: `(E, out, k)` targets with inputs.
        yy: `(E,)` squared targets, summed over the outputs.
        x: `(E, k)` mean input. y: `(E, out)` mean target.
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> Moments:
        """From rows `(E, n, k)` and `(E, n, out)`."""
        inputs, targets = inputs.double(), targets.double()
        x, y = inputs.mean(1), targets.mean(1)
        inputs, targets = inputs - x.unsqueeze(1), targets - y.unsqueeze(1)
        rows = inputs.shape[1]
        return cls(inputs.mT @ inputs / rows, targets.mT @ inputs / rows, targets.square().sum((1, 2)) / rows, x, y)

    def about(self, x: Tensor, y: Tensor) -> Moments:
        """The same moments about another centre."""
        dx, dy = self.x - x, self.y - y
        return Moments(
            self.xx + dx.unsqueeze(2) * dx.unsqueeze(1),
            self.xy + dy.unsqueeze(2) * dx.unsqueeze(1),
            self.yy + dy.square().sum(1),
            x,
            y,
        )

    def uncentred(self) -> Moments:
        """The moments about zero, for a layer without a bias."""
        return self.about(torch.zeros_like(self.x), torch.zeros_like(self.y))

    def error(self, matrix: Tensor) -> Tensor:
        """Mean squared error, summed over outputs, of `y = matrix @ x` about this centre: `(E,)`."""
        return self.yy - 2 * (self.xy * matrix).sum((1, 2)) + ((matrix @ self.xx) * matrix).sum((1, 2))


@dataclass(frozen=True, eq=False)
class Split:
    """Moments on the rows to fit on and on the rows held out."""

    fit: Moments
    held_out: Moments


def _dense_moments(
    graph: DependencyGraph,
    consumer: Consumer,
    grams: Grams,
    dense_state: Mapping[str, Tensor],
    indices: KeptIndices,
) -> Split:
    """The moments of the kept dense inputs with the dense outputs, from Gram matrices alone."""
    weight = dense_state[consumer.weight].detach().cpu()
    matrix = weight_matrix(consumer, weight).double()  # (E, out, d)
    kept_inputs = _kept(indices, consumer.weight, consumer.input_axis, weight.shape[consumer.input_axis])
    columns = _columns(consumer, kept_inputs, weight.shape)
    kept_outputs = _kept(indices, consumer.weight, consumer.output_axis, weight.shape[consumer.output_axis])
    stack = _kept(indices, consumer.weight, 0, weight.shape[0]) if consumer.kind == "batched" else torch.arange(1)
    matrix = matrix[stack][:, kept_outputs]

    def moments(gram: Gram) -> Moments:
        second, mean = gram.gram[stack], gram.mean[stack]
        xy = matrix @ second[:, :, columns]
        yy = ((matrix @ second) * matrix).sum((1, 2))
        y = (matrix @ mean.unsqueeze(2)).squeeze(2)
        return Moments(second[:, columns][:, :, columns], xy, yy, mean[:, columns], y)

    split = grams[consumer.weight]
    return Split(moments(split.fit), moments(split.held_out))


def _refit(consumer: Consumer, state: dict[str, Tensor], split: Split) -> bool:
    """Refit one consumer in `state`, in place; False where its sliced weights do better on held-out rows."""
    weight = state[consumer.weight]
    bias = None if consumer.bias is None else state[consumer.bias]
    sliced = weight_matrix(consumer, weight).double().cpu()
    fit, held_out = (split.fit, split.held_out) if bias is not None else (split.fit.uncentred(), split.held_out.uncentred())
    centred = held_out.about(fit.x, fit.y)
    best, least = sliced, split.held_out.uncentred().error(sliced).sum()
    scale = fit.xx.diagonal(dim1=1, dim2=2).mean(1)
    if not bool((scale > 0).all()):
        return False  # the kept inputs never vary: there is nothing to fit with
    residual = fit.xy - sliced @ fit.xx
    for ridge in RIDGES:
        candidate = sliced + _solve(fit.xx, ridge * scale, residual)
        error = centred.error(candidate).sum()
        if error < least:
            best, least = candidate, error
    if best is sliced:
        return False
    weight.copy_(from_weight_matrix(consumer, best, weight.shape).to(weight))
    if bias is not None:
        shift = fit.y - (best @ fit.x.unsqueeze(2)).squeeze(2)  # (E, out)
        bias.add_(shift.reshape(bias.shape).to(bias))
    return True


def _solve(gram: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """`right @ (gram + ridge * I)^-1` for symmetric positive (semi-)definite `gram`, `(E, k, k)`."""
    damped = gram + torch.diag_embed(ridge.unsqueeze(1).expand(gram.shape[:2]))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if not bool(failed.any()):
        return torch.cholesky_solve(right.mT, factor).mT
    values, vectors = torch.linalg.eigh(damped)  # rounding made it indefinite: leave out what is not positive
    floor = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    inverse = torch.where(values > floor, 1 / values, torch.zeros_like(values))
    return (right @ vectors * inverse.unsqueeze(1)) @ vectors.mT


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
        self._state = dict(self._model.state_dict(keep_vars=True))
        self._coupled = coupled_channels(graph)
        self._waiting = self._disturbed()

    def run(self, program: Program) -> dict[str, Tensor]:
        """Refit everything that has to be; returns the repaired state."""
        with torch.no_grad():
            while self._waiting:
                before = len(self._waiting)
                self._calls: dict[str, int] = {}
                self._inputs: list[Tensor] = []
                self._stale = False
                with Watcher(self._graph, self._model, self._handle):
                    program(self._model)
                if len(self._waiting) == before:  # this pass never called it: it stays as it is
                    self._waiting.pop(0)
        return {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}

    def _disturbed(self) -> list[Consumer]:
        """The consumers whose inputs differ from the dense model's, in the order of the computation."""
        disturbed: set[str] = set()
        waiting = []
        for consumer in self._graph.consumers:
            component = self._graph.component_of(consumer.weight)
            lost = _lost(self._indices, consumer.weight, consumer.input_axis)
            if (lost or component in disturbed) and consumer.weight in self._recording.outputs:
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
            self._inputs.append(call.rows(activation))
            calls = len(self._recording.outputs[weight])
            if len(self._inputs) == calls:
                self._refit(call.consumer)
                self._stale = calls > 1
        return call.run(activation)

    def _with_dense_coupling(self, call: ConsumerCall, number: int) -> Tensor:
        """The activation with the channels of coupling groups as the dense model has them."""
        coupled = self._coupled.get(call.consumer.weight)
        dense = self._recording.coupled.get(call.consumer.weight)
        if coupled is None or dense is None:
            return call.activation
        axis, source = call.channel_axis, dense[number]
        kept = _kept(self._indices, call.consumer.weight, call.consumer.input_axis, source.shape[axis])
        if len(kept) == int(torch.isin(kept, coupled).sum()):
            return source.index_select(axis, kept)
        replaced = call.activation.clone()
        places = torch.isin(kept, coupled).nonzero().flatten()
        return replaced.index_copy_(axis, places, source.index_select(axis, kept[places]))

    def _refit(self, consumer: Consumer) -> None:
        inputs = torch.cat(self._inputs, dim=1)
        targets = self._targets(consumer)
        split = fit_rows(inputs.shape[1])
        moments = Split(
            Moments.of(inputs[:, :split], targets[:, :split]),
            Moments.of(inputs[:, split:], targets[:, split:]),
        )
        _refit(consumer, self._state, moments)
        self._waiting.pop(0)
        self._inputs = []

    def _targets(self, consumer: Consumer) -> Tensor:
        """What the dense model made here, for the kept outputs, without the bias: `(E, n, out)`."""
        outputs = torch.cat(list(self._recording.outputs[consumer.weight]), dim=1)
        shape = self._graph.shapes[consumer.weight]
        if consumer.kind == "batched":
            outputs = outputs[_kept(self._indices, consumer.weight, 0, shape[0])]
        outputs = outputs[:, :, _kept(self._indices, consumer.weight, consumer.output_axis, shape[consumer.output_axis])]
        return outputs


def _lost(indices: KeptIndices, parameter: str, axis: int) -> bool:
    """True where a parameter loses channels along an axis."""
    return parameter in indices and indices[parameter][axis] is not None


def _kept(indices: KeptIndices, parameter: str, axis: int, size: int) -> Tensor:
    """The kept indices of a parameter's axis."""
    kept = indices[parameter][axis] if parameter in indices else None
    return torch.arange(size) if kept is None else kept


def _columns(consumer: Consumer, channels: Tensor, shape: torch.Size) -> Tensor:
    """The columns of a consumer's matrix that belong to some of its input channels."""
    if consumer.kind not in ("convolution", "transposed_convolution"):
        return channels
    positions = shape[2:].numel()
    return (channels.unsqueeze(1) * positions + torch.arange(positions)).flatten()
