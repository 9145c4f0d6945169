"""Closed-form repair against plain least squares on raw rows, written out module by module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from model_families import FAMILIES, Family
from model_families import program as family_program
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from components import calibration, reconstruction
from components.calibration import Program, Recording, record
from components.dependency import DependencyGraph
from components.errors import UserError
from components.gram import Gram, Grams, SplitGram
from components.pruning import prune
from components.reconstruction import METHODS, RIDGES, reconstruct
from components.tracing import trace

Rows = NDArray[np.float64]
Widths = Mapping[str, int]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(tensor: Tensor) -> Rows:
    result: Rows = tensor.detach().double().numpy()
    return result


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the oracle: ridge regression on raw rows by an orthogonal solver --------------------------------------


def slow_fits(
    x: Sequence[Rows], y: Sequence[Rows], weights: Sequence[Rows], biases: Sequence[Rows] | None
) -> tuple[list[Rows], list[Rows] | None, float | None]:
    """Refit a stack of matrices to raw rows; one lambda for all of them, by brute force on held-out rows.

    Args:
        x, y: per matrix the inputs `(n, k)` and the dense outputs without bias `(n, out)`.
        weights, biases: per matrix the sliced `(out, k)` and `(out,)`.

    Returns:
        The new weights and biases, and the lambda (None: the sliced weights were best).
    """
    fit = min(round(0.8 * len(x[0])), len(x[0]) - 1)
    none = [np.zeros(len(w)) for w in weights]
    choices: list[tuple[float, float | None, list[Rows], list[Rows]]] = []
    for ridge in (None, *RIDGES):
        new_weights, new_biases, error = [], [], 0.0
        for inputs, targets, weight, bias in zip(x, y, weights, biases or none, strict=True):
            new_weight, new_bias = weight, bias
            if ridge is not None:
                mean_x = inputs[:fit].mean(0) * (biases is not None)
                mean_y = targets[:fit].mean(0) * (biases is not None)
                centred = (inputs[:fit] - mean_x) / fit**0.5
                missing = (targets[:fit] - mean_y) / fit**0.5 - centred @ weight.T
                damping = np.eye(centred.shape[1]) * (ridge * (centred**2).sum(0).mean()) ** 0.5
                padding = np.zeros((len(damping), missing.shape[1]))
                change = np.linalg.lstsq(np.vstack([centred, damping]), np.vstack([missing, padding]))[0].T
                new_weight = weight + change
                new_bias = bias + mean_y - new_weight @ mean_x
            makes = inputs[fit:] @ new_weight.T + new_bias
            error += ((makes - targets[fit:] - bias) ** 2).sum(1).mean()
            new_weights.append(new_weight)
            new_biases.append(new_bias)
        choices.append((error, ridge, new_weights, new_biases))
    _, ridge, new_weights, new_biases = min(choices, key=lambda choice: choice[0])
    return new_weights, (new_biases if biases is not None else None), ridge


def slow_fit(x: Rows, y: Rows, weight: Rows, bias: Rows | None) -> tuple[Rows, Rows | None, float | None]:
    weights, biases, ridge = slow_fits([x], [y], [weight], None if bias is None else [bias])
    return weights[0], (None if biases is None else biases[0]), ridge


# --- helpers -----------------------------------------------------------------------------------------------


def keep_some(graph: DependencyGraph, share: float = 0.5, seed: int = 0) -> dict[str, Tensor]:
    """A random part of every group."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        kept = torch.randperm(group.size, generator=generator)[: max(1, round(share * group.size))]
        keep[group.name] = torch.zeros(group.size, dtype=torch.bool).index_fill_(0, kept, True)
    return keep


def widths_of(keep: Mapping[str, Tensor]) -> dict[str, int]:
    return {group: int(mask.sum()) for group, mask in keep.items()}


@dataclass(frozen=True, eq=False)
class Case:
    """A dense model, what it runs on, and a pruned one."""

    dense: nn.Module
    pruned: nn.Module
    graph: DependencyGraph
    keep: Mapping[str, Tensor]
    program: Program
    recording: Recording

    @classmethod
    def of(
        cls,
        build: Callable[[Widths | None], nn.Module],
        program: Program,
        *,
        keep: Mapping[str, Tensor] | None = None,
        share: float = 0.5,
        components: Mapping[str, Sequence[str]] | None = None,
        ties: Sequence[tuple[str, str]] = (),
        train: Callable[[nn.Module], None] | None = None,
    ) -> Case:
        torch.manual_seed(0)
        dense = build(None).double()
        if train is not None:
            train(dense)
        graph = trace(dense, program, components=components or {"model": [""]}, ties=ties)
        keep = keep_some(graph, share) if keep is None else keep
        pruned = build(widths_of({**graph.keep_all(), **keep})).double()
        pruned.load_state_dict(prune(graph, dense.state_dict(), keep))
        return cls(dense, pruned, graph, keep, program, record(graph, dense, program))

    def repaired(self, method: str, **changes: Any) -> dict[str, Tensor]:
        needs = {
            "grams": self.recording.grams,
            "recording": self.recording,
            "program": self.program,
            **changes,
        }
        state = self.dense.state_dict()
        return reconstruct(self.graph, state, self.pruned, self.keep, method=method, **needs)  # type: ignore[arg-type]

    def run(self, state: Mapping[str, Tensor], program: Program | None = None) -> dict[str, Tensor]:
        """The outputs of the pruned model with some state."""
        model = calibration.evaluation_copy(self.pruned)
        model.load_state_dict(state)
        with torch.no_grad():
            return dict((program or self.program)(model))

    def error(self, state: Mapping[str, Tensor], program: Program | None = None) -> float:
        """The largest relative error of an output against the dense model."""
        with torch.no_grad():
            dense = (program or self.program)(calibration.evaluation_copy(self.dense))
        made = self.run(state, program)
        return max(
            float((made[n] - y).norm() / y.norm()) for n, y in dense.items() if made[n].shape == y.shape
        )


def assert_same_state(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class Mlp(nn.Module):
    """Linear layers with tanh between them."""

    def __init__(self, sizes: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]


def mlp_case(
    rows: int = 60,
    *,
    hidden: int = 8,
    bias: bool = True,
    layers: int = 1,
    keep: Mapping[str, Tensor] | None = None,
) -> Case:
    x = rand(rows, 5) + 0.3

    def build(widths: Widths | None) -> nn.Module:
        inner = [hidden if widths is None else widths[f"layers.{i}"] for i in range(layers)]
        return Mlp([5, *inner, 4], bias)

    return Case.of(build, lambda m: {"y": m(x)}, keep=keep)


# --- nothing removed, nothing changed ----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_identity_when_nothing_is_removed(family: Family, method: str) -> None:
    dense = family.model()
    graph = trace(dense, family_program, components=family.components, ties=family.ties)
    recording = record(graph, dense, family_program)
    for keep in ({}, graph.keep_all()):
        state = reconstruct(
            graph, dense.state_dict(), dense, keep, method=method,  # type: ignore[arg-type]
            grams=recording.grams, recording=recording, program=family_program,
        )  # fmt: skip
        assert_same_state(state, dense.state_dict())
        no_data = reconstruct(graph, {}, dense, keep, method=method)  # type: ignore[arg-type]
        assert_same_state(no_data, dense.state_dict())


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_is_repaired_into_a_model_that_runs(family: Family) -> None:
    """With as few as four rows; what is not refitted is as it was sliced, and no output gets lost."""
    dense = family.model()
    graph = trace(dense, family_program, components=family.components, ties=family.ties)
    recording, keep = record(graph, dense, family_program), keep_some(graph)
    pruned = family.model(widths_of(keep))
    sliced = prune(graph, dense.state_dict(), keep)
    pruned.load_state_dict(sliced)
    refitted = {c.weight for c in graph.consumers} | {c.bias for c in graph.consumers}
    for method in ("gram", "sequential"):
        state = reconstruct(
            graph, dense.state_dict(), pruned, keep, method=method,  # type: ignore[arg-type]
            grams=recording.grams, recording=recording, program=family_program,
        )  # fmt: skip
        assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in sliced.items()}
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
        assert all(torch.equal(state[name], sliced[name]) for name in set(sliced) - refitted)
        assert_same_state(pruned.state_dict(), sliced)
        again = family.model(widths_of(keep))
        again.load_state_dict(state)
        with torch.no_grad():
            assert all(torch.isfinite(output).all() for output in family_program(again).values())


def test_none_is_the_sliced_state_in_memory_of_its_own() -> None:
    case = mlp_case()
    state = case.repaired("none", grams=None, recording=None, program=None)
    assert_same_state(state, case.pruned.state_dict())
    for name, tensor in case.pruned.state_dict().items():
        assert state[name].data_ptr() != tensor.data_ptr()


# --- the formula -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_gram_is_the_formula(seed: int) -> None:
    """W' = W_K + W_R G_RK (G_KK + λ mean(diag) I)⁻¹ and b' = b + W μ − W' μ_K, λ from held-out raw rows."""
    keep = {"layers.0": torch.rand(8, generator=torch.Generator().manual_seed(seed)) < 0.6}
    case = mlp_case(keep=keep)
    kept, removed = keep["layers.0"].numpy(), ~keep["layers.0"].numpy()
    weight, bias = (array(case.dense.state_dict()[f"layers.1.{name}"]) for name in ("weight", "bias"))
    h = array(torch.tanh(case.dense.layers[0](rand(60, 5) + 0.3)))  # type: ignore[index]
    _, _, ridge = slow_fit(h[:, kept], h @ weight.T, weight[:, kept], bias)
    assert ridge is not None
    gram, mean = np.cov(h[:48].T, bias=True), h[:48].mean(0)
    within = gram[np.ix_(kept, kept)]
    inverse = np.linalg.inv(within + ridge * np.diag(within).mean() * np.eye(len(within)))
    expected = weight[:, kept] + weight[:, removed] @ gram[np.ix_(removed, kept)] @ inverse
    state = case.repaired("gram", recording=None, program=None)
    np.testing.assert_allclose(state["layers.1.weight"], expected, rtol=1e-9, atol=1e-12)
    expected_bias = bias + weight @ mean - expected @ mean[kept]
    np.testing.assert_allclose(state["layers.1.bias"], expected_bias, rtol=1e-9, atol=1e-12)
    for name in ("layers.0.weight", "layers.0.bias"):
        assert torch.equal(state[name], case.pruned.state_dict()[name])


@pytest.mark.parametrize("method", ["gram", "sequential"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [2, 3, 7, 60])
def test_one_layer_is_ridge_regression(rows: int, bias: bool, method: str) -> None:
    """Without a bias the moments are those about zero; two rows are enough."""
    case = mlp_case(rows, bias=bias)
    kept = case.keep["layers.0"].numpy()
    dense, sliced = case.dense.state_dict(), case.pruned.state_dict()
    h = array(torch.tanh(case.dense.layers[0](rand(rows, 5) + 0.3)))  # type: ignore[index]
    weight, shift, _ = slow_fit(
        h[:, kept],
        h @ array(dense["layers.1.weight"]).T,
        array(sliced["layers.1.weight"]),
        array(sliced["layers.1.bias"]) if bias else None,
    )
    state = case.repaired(method)
    np.testing.assert_allclose(state["layers.1.weight"], weight, rtol=1e-9, atol=1e-11)
    if shift is not None:
        np.testing.assert_allclose(state["layers.1.bias"], shift, rtol=1e-9, atol=1e-11)


def test_the_ridge_is_the_best_on_held_out_rows() -> None:
    """Every candidate wins somewhere, and each time the result is the brute-force choice."""
    chosen = set()
    for rows, noise in ((6, 0.0), (12, 3.0), (15, 3.0), (60, 0.0), (200, 0.0)):
        x = rand(rows, 5)
        x[round(rows * 0.8) :] += noise  # the held-out rows are another distribution

        def build(widths: Widths | None) -> nn.Module:
            return Mlp([5, 8 if widths is None else widths["layers.0"], 4])

        for share in (0.25, 0.5, 0.75):
            case = Case.of(build, lambda m, x=x: {"y": m(x)}, share=share)
            sliced, h = case.pruned.state_dict(), torch.tanh(case.dense.layers[0](x))  # type: ignore[index]
            y = h @ case.dense.state_dict()["layers.1.weight"].T
            h = h[:, case.keep["layers.0"]]
            weight, bias = sliced["layers.1.weight"], sliced["layers.1.bias"]
            expected, _, ridge = slow_fit(array(h), array(y), array(weight), array(bias))
            chosen.add(ridge)
            for method in ("gram", "sequential"):
                state = case.repaired(method)
                np.testing.assert_allclose(state["layers.1.weight"], expected, rtol=1e-8, atol=1e-10)
    assert chosen >= {1e-3, 1e-2, 1e-1} == set(RIDGES)


def test_sliced_weights_stay_where_they_do_better_on_held_out_rows() -> None:
    """The removed channel follows a kept one, except on the held-out rows, where it is silent."""
    x = rand(50, 2)
    x[:, 1] = x[:, 0]
    x[40:, 1] = 0.0

    def build(widths: Widths | None) -> nn.Module:
        return Mlp([2, 2 if widths is None else widths["layers.0"], 3])

    def transparent(model: nn.Module) -> None:
        model.layers[0].weight.data = torch.eye(2).double()  # type: ignore[index]
        model.layers[0].bias.data.zero_()  # type: ignore[index]

    keep = {"layers.0": torch.tensor([True, False])}
    case = Case.of(build, lambda m: {"y": m(x)}, keep=keep, train=transparent)
    for method in ("gram", "sequential"):
        assert_same_state(case.repaired(method), case.pruned.state_dict())
    y = x.clone()
    y[40:, 1] = y[40:, 0]  # the same without the surprise
    case = Case.of(build, lambda m: {"y": m(y)}, keep=keep, train=transparent)
    for method in ("gram", "sequential"):
        assert case.error(case.repaired(method)) < 0.05 * case.error(case.pruned.state_dict())


# --- redundancy --------------------------------------------------------------------------------------------


def redundant(model: nn.Module) -> None:
    """Channels 4..7 of the hidden layer, which is linear, are combinations of channels 0..3."""
    mixing = rand(4, 4, seed=7)
    first = model.first  # type: ignore[union-attr]
    first.weight.data[4:] = mixing @ first.weight.data[:4]
    first.bias.data[4:] = mixing @ first.bias.data[:4] + 0.7


class LinearPair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["gram", "sequential"])
def test_redundant_channels_are_removed_without_loss(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly as far as the ridge allows: the error falls with it, to rounding."""
    x, fresh = rand(80, 5), rand(30, 5, seed=9)
    case = Case.of(
        lambda w: LinearPair(8 if w is None else w["first"]),
        lambda m: {"y": m(x)},
        keep={"first": torch.arange(8) < 4},
        train=redundant,
    )
    on_fresh: Program = lambda m: {"y": m(fresh)}  # noqa: E731
    sliced = case.error(case.pruned.state_dict(), on_fresh)
    assert sliced > 0.3
    assert case.error(case.repaired(method), on_fresh) < 0.03 * sliced
    for ridge, limit in ((1e-6, 1e-4), (1e-9, 1e-7), (1e-12, 1e-9)):
        monkeypatch.setattr(reconstruction, "RIDGES", (ridge,))
        assert case.error(case.repaired(method), on_fresh) < limit


# --- every kind of consumer --------------------------------------------------------------------------------


class Reader(nn.Module):
    """A layer whose channels are pruned, an activation, and a consumer of them: `read(weight, bias, a)`."""

    def __init__(
        self,
        first: nn.Module,
        between: Callable[[Tensor], Tensor],
        weight: Sequence[int],
        bias: Sequence[int] | None,
        read: Callable[[Tensor, Tensor | None, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.first, self.between, self.read = first, between, read
        self.weight = nn.Parameter(torch.randn(*weight))
        self.bias = None if bias is None else nn.Parameter(torch.randn(*bias))

    def before(self, x: Tensor) -> Tensor:
        return torch.tanh(self.between(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.weight, self.bias, self.before(x))


class Stack(nn.Module):
    """Three matrices side by side."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, inputs, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.matrices)


def conv(stride: int = 1, padding: int = 0, dilation: int = 1, axes: int = 2) -> Callable[..., Tensor]:
    function = functional.conv1d if axes == 1 else functional.conv2d
    return lambda w, b, a: function(a, w, b, stride, padding, dilation)


def deconv(**options: int) -> Callable[..., Tensor]:
    return lambda w, b, a: functional.conv_transpose2d(a, w, b, **options)


def same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Kind:
    """A kind of consumer of `n` channels.

    Attributes:
        first: makes the layer whose channels are pruned, for n.
        weight: the shape of the consumer's weight, for n.
        bias: the shape of its bias.
        read: what the consumer does.
        x: the shape of the inputs.
        output_axis: of the weight.
        made_axis: the axis of the result that the outputs are on.
        between: from the pruned layer to the consumer, before the activation.
    """

    first: Callable[[int], nn.Module]
    weight: Callable[[int], tuple[int, ...]]
    bias: tuple[int, ...] | None
    read: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    x: tuple[int, ...]
    output_axis: int = 0
    made_axis: int = -1
    between: Callable[[Tensor], Tensor] = same

    def build(self, n: int) -> Reader:
        return Reader(self.first(n), self.between, self.weight(n), self.bias, self.read)


def linear(w: Tensor, b: Tensor | None, a: Tensor) -> Tensor:
    return functional.linear(a, w, b)


def dense(n: int) -> nn.Module:
    return nn.Linear(4, n)


def image(n: int) -> nn.Module:
    return nn.Conv2d(2, n, 3)


def stack(n: int) -> nn.Module:
    return Stack(4, n)


ON_STACK: dict[str, Any] = {"first": stack, "weight": lambda n: (3, n, 2), "x": (3, 50, 4), "output_axis": 2}
TO_IMAGE: dict[str, Any] = {"first": image, "made_axis": 1}
KINDS: dict[str, Kind] = {
    "linear": Kind(dense, lambda n: (3, n), (3,), linear, (50, 4)),
    "linear on sequences": Kind(dense, lambda n: (3, n), (3,), linear, (10, 6, 4)),
    "separate bias": Kind(dense, lambda n: (n, 3), (3,), lambda w, b, a: a @ w + b, (10, 6, 4), 1),
    "no bias": Kind(dense, lambda n: (n, 3), None, lambda w, b, a: a @ w, (50, 4), 1),
    "weight on the left": Kind(
        dense, lambda n: (3, n), (3, 1), lambda w, b, a: torch.addmm(b, w, a.T).T, (50, 4)
    ),
    "conv1d": Kind(
        lambda n: nn.Conv1d(2, n, 3),
        lambda n: (3, n, 3),
        (3,),
        conv(2, 2, 2, axes=1),
        (6, 2, 15),
        made_axis=1,
    ),
    "conv2d": Kind(weight=lambda n: (3, n, 3, 2), bias=(3,), read=conv(), x=(4, 2, 8, 7), **TO_IMAGE),
    "conv2d stride padding": Kind(
        weight=lambda n: (3, n, 3, 3), bias=(3,), read=conv(2, 1), x=(6, 2, 9, 8), **TO_IMAGE
    ),
    "conv2d dilation no bias": Kind(
        weight=lambda n: (3, n, 2, 3), bias=None, read=conv(1, 2, 2), x=(4, 2, 8, 7), **TO_IMAGE
    ),
    "transposed": Kind(
        weight=lambda n: (n, 3, 3, 2),
        bias=(3,),
        read=deconv(stride=2, padding=1),
        x=(4, 2, 6, 7),
        output_axis=1,
        **TO_IMAGE,
    ),
    "transposed output padding dilation": Kind(
        weight=lambda n: (n, 3, 3, 3),
        bias=(3,),
        read=deconv(stride=3, padding=2, output_padding=1, dilation=2),
        x=(4, 2, 5, 6),
        output_axis=1,
        **TO_IMAGE,
    ),
    "transposed no bias": Kind(
        weight=lambda n: (n, 3, 2, 2), bias=None, read=deconv(), x=(4, 2, 6, 7), output_axis=1, **TO_IMAGE
    ),
    "flattened": Kind(
        image, lambda n: (3, 4 * n), (3,), linear, (200, 2, 4, 4), between=lambda a: a.flatten(1)
    ),
    "unflattened": Kind(
        first=lambda n: nn.Linear(4, 4 * n),
        weight=lambda n: (n, 3, 3, 3),
        bias=(3,),
        read=deconv(stride=2),
        x=(20, 4),
        output_axis=1,
        made_axis=1,
        between=lambda a: a.unflatten(1, (-1, 2, 2)),
    ),
    "bmm": Kind(bias=None, read=lambda w, b, a: torch.bmm(a, w), **ON_STACK),
    "bmm and add": Kind(bias=(3, 2), read=lambda w, b, a: torch.bmm(a, w) + b.unsqueeze(1), **ON_STACK),
    "baddbmm": Kind(bias=(3, 1, 2), read=lambda w, b, a: torch.baddbmm(b, a, w), **ON_STACK),
    "vmap": Kind(
        stack,
        lambda n: (3, 2, n),
        (3, 2),
        lambda w, b, a: torch.vmap(functional.linear)(a, w, b),
        (3, 50, 4),
        1,
    ),
}


def design_matrix(model: Reader, kind: Kind, a: Tensor) -> Tensor:
    """What the columns of the weight read, `(E, n, d)`: the operator applied to every unit weight in turn."""
    weight = model.weight
    stacked = weight.dim() == 3 and isinstance(model.first, Stack)
    shape = list(weight.shape)
    shape[kind.output_axis] = 1
    units = torch.eye(
        weight[0].numel() // weight.shape[kind.output_axis] if stacked else np.prod(shape).item()
    )
    columns = []
    for unit in units.double():
        one = unit.reshape(shape[1:]).expand(shape) if stacked else unit.reshape(shape)
        columns.append(as_rows(model.read(one, no_bias(model, kind), a), kind, stacked))
    return torch.cat(columns, dim=2)


def no_bias(model: Reader, kind: Kind) -> Tensor | None:
    """A zero bias for one output."""
    if model.bias is None:
        return None
    outputs = model.weight.shape[kind.output_axis]
    return torch.zeros([1 if size == outputs and axis == widest(model.bias, outputs) else size
                        for axis, size in enumerate(model.bias.shape)]).double()  # fmt: skip


def widest(bias: Tensor, outputs: int) -> int:
    """The axis of a bias that runs over the outputs: the last one of that size."""
    return max(axis for axis, size in enumerate(bias.shape) if size == outputs)


def as_rows(made: Tensor, kind: Kind, stacked: bool) -> Tensor:
    rows = made.movedim(kind.made_axis, -1)
    return rows if stacked else rows.reshape(1, -1, rows.shape[-1])


@pytest.mark.parametrize("method", ["gram", "sequential"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_consumer_is_ridge_regression(name: str, method: str) -> None:
    """Rows from unit weights, least squares in NumPy; compared by what the result makes of new inputs."""
    kind = KINDS[name]
    x = rand(*kind.x) + 0.2
    case = Case.of(lambda w: kind.build(6 if w is None else next(iter(w.values()))), lambda m: {"y": m(x)})
    dense, pruned = case.dense, case.pruned
    assert isinstance(dense, Reader)
    assert isinstance(pruned, Reader)
    stacked = isinstance(dense.first, Stack)
    inputs = design_matrix(pruned, kind, pruned.before(x))
    bias = 0.0 if dense.bias is None else dense.bias.reshape(-1, 1, dense.weight.shape[kind.output_axis])
    targets = as_rows(dense(x), kind, stacked) - bias
    outputs = targets.shape[2]
    sliced = pruned.weight.movedim(kind.output_axis, 1 if stacked else 0).reshape(len(inputs), outputs, -1)
    weights, biases, ridge = slow_fits(
        list(array(inputs)),
        list(array(targets)),
        list(array(sliced)),
        None if pruned.bias is None else list(array(pruned.bias.reshape(len(inputs), outputs))),
    )
    assert ridge is not None
    state = case.repaired(method)
    assert not torch.equal(state["weight"], pruned.state_dict()["weight"])
    fresh = rand(*pruned.before(x).shape, seed=5)
    made = as_rows(pruned.read(state["weight"], state.get("bias"), fresh), kind, stacked)
    for e, columns in enumerate(array(design_matrix(pruned, kind, fresh))):
        expected = columns @ weights[e].T + (0.0 if biases is None else biases[e])
        np.testing.assert_allclose(array(made)[e], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("bias", [(50, 2), (1,), (2,), (1, 1, 2)])
def test_a_bias_that_outputs_share_is_left_alone(bias: tuple[int, ...]) -> None:
    """It cannot take over what each output misses: the fit is the one without a bias."""
    x = rand(3, 50, 4) + 0.2
    case = Case.of(
        lambda w: Reader(
            Stack(4, 6 if w is None else w["first"]),
            same,
            (3, 6 if w is None else w["first"], 2),
            bias,
            lambda w, b, a: torch.baddbmm(b, a, w),
        ),
        lambda m: {"y": m(x)},
    )
    assert isinstance(case.dense, Reader)
    h = case.dense.before(x)
    weights, _, ridge = slow_fits(
        list(array(h[:, :, case.keep["first"]])),
        list(array(h @ case.dense.weight)),
        list(array(case.pruned.weight.mT)),  # type: ignore[union-attr,operator]
        None,
    )
    assert ridge is not None
    for method in ("gram", "sequential"):
        state = case.repaired(method)
        np.testing.assert_allclose(state["weight"].mT, weights, rtol=1e-9, atol=1e-11)
        assert torch.equal(state["bias"], case.pruned.state_dict()["bias"])


class Grouped(nn.Module):
    """A grouped and a depthwise convolution between plain ones."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv1d(2, 2 * first, 1), nn.Conv1d(2 * first, 6, 3, groups=2)
        self.second, self.depthwise = nn.Conv1d(6, second, 1), nn.Conv1d(second, second, 3, groups=second)
        self.last = nn.Conv1d(second, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.grouped, self.second, self.depthwise):
            x = torch.tanh(layer(x))
        return self.last(x)  # type: ignore[no-any-return]


def test_grouped_and_depthwise_convolutions_are_left_alone() -> None:
    x = rand(20, 2, 9)
    keep = {"first": torch.tensor([True, False, True]), "second": torch.arange(4) < 2}
    case = Case.of(
        lambda w: Grouped(3, 4) if w is None else Grouped(w["first"], w["second"]),
        lambda m: {"y": m(x)},
        keep=keep,
    )
    sliced = case.pruned.state_dict()
    for method in ("gram", "sequential"):
        state = case.repaired(method)
        changed = {name for name, tensor in state.items() if not torch.equal(tensor, sliced[name])}
        by_sequence = {"second.weight", "second.bias"} if method == "sequential" else set()
        assert changed == {"last.weight", "last.bias"} | by_sequence
        assert case.error(state) < case.error(sliced)


def test_a_layer_under_two_names_is_repaired_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, width), nn.Linear(width, 3)
            self.same = self.second

        def forward(self, x: Tensor) -> Tensor:
            return self.same(torch.tanh(self.first(x)))  # type: ignore[no-any-return]

    x = rand(60, 5)
    case = Case.of(lambda w: Twice(8 if w is None else w["first"]), lambda m: {"y": m(x)})
    for method in ("gram", "sequential"):
        state = case.repaired(method)
        assert not torch.equal(state["second.weight"], case.pruned.state_dict()["second.weight"])
        assert torch.equal(state["second.weight"], state["same.weight"])
        assert torch.equal(state["second.bias"], state["same.bias"])


# --- sequential reconstruction, module by module -----------------------------------------------------------


class Coder(nn.Module):
    """Encoder, latent, decoder, with layer normalisation in both; the decoder reads `[extra, latent]`."""

    def __init__(self, widths: Widths | None) -> None:
        super().__init__()
        w = widths or {"encoder.0": 9, "encoder.3": 8, "latent": 6, "decoder.0": 9, "decoder.3": 7}
        self.encoder = nn.Sequential(
            nn.Linear(5, w["encoder.0"]), nn.LayerNorm(w["encoder.0"]), nn.ELU(),
            nn.Linear(w["encoder.0"], w["encoder.3"]), nn.ELU(), nn.Linear(w["encoder.3"], w["latent"]),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(2 + w["latent"], w["decoder.0"]), nn.LayerNorm(w["decoder.0"]), nn.Tanh(),
            nn.Linear(w["decoder.0"], w["decoder.3"], bias=False), nn.ELU(), nn.Linear(w["decoder.3"], 4),
        )  # fmt: skip

    def forward(self, x: Tensor, extra: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        return {"latent": z, "y": self.decoder(torch.cat([extra, z], -1))}


def unlike_initial(model: nn.Module) -> None:
    """Normalisation weights and biases that hide nothing."""
    for number, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:
            parameter.data = rand(len(parameter), seed=number) + 0.5


def coder_case(rows: int = 70, keep: Mapping[str, Tensor] | None = None) -> Case:
    x, extra = rand(rows, 5), rand(rows, 2, seed=1)
    return Case.of(
        Coder,
        lambda m: m(x, extra),
        keep=keep,
        components={"encoder": ["encoder"], "decoder": ["decoder"]},
        ties=[("latent", "latent")],
        train=unlike_initial,
    )


def slow_sequence(case: Case, x: Rows, extra: Rows) -> dict[str, Rows]:
    """The coder repaired layer by layer; NumPy, loops, and nothing of the package but the sliced weights."""
    dense = {name: array(tensor) for name, tensor in case.dense.state_dict().items()}
    new = {name: array(tensor).copy() for name, tensor in case.pruned.state_dict().items()}
    kept = {name: mask.numpy() for name, mask in case.keep.items()}

    def normalised(h: Rows, weights: Mapping[str, Rows], name: str) -> Rows:
        mean, variance = h.mean(1, keepdims=True), h.var(1, keepdims=True)
        return (h - mean) / np.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def elu(h: Rows) -> Rows:
        return np.where(h > 0, h, np.expm1(np.minimum(h, 0)))

    latent: Rows | None = None
    for part, groups in (
        ("encoder", ("encoder.0", "encoder.3", "latent")),
        ("decoder", ("decoder.0", "decoder.3", None)),
    ):
        reads = x if part == "encoder" else np.hstack([extra, latent])
        small = x if part == "encoder" else np.hstack([extra, latent[:, kept["latent"]]])  # type: ignore[index]
        for number, group in zip((0, 3, 5), groups, strict=True):
            weight, bias = f"{part}.{number}.weight", f"{part}.{number}.bias"
            targets = reads @ dense[weight].T
            made = targets + dense.get(bias, np.zeros(1))
            targets = targets if group is None else targets[:, kept[group]]
            if (part, number) != ("encoder", 0):  # it reads the data: nothing is lost there
                new[weight], shift, _ = slow_fit(small, targets, new[weight], new.get(bias))
                if shift is not None:
                    new[bias] = shift
            small = small @ new[weight].T + new.get(bias, np.zeros(1))
            if number == 0:
                made, small = (normalised(h, w, f"{part}.1") for h, w in ((made, dense), (small, new)))
                reads, small = (
                    (elu(made), elu(small)) if part == "encoder" else (np.tanh(made), np.tanh(small))
                )
            else:
                reads, small = (elu(made), elu(small)) if number == 3 else (made, small)
        latent = reads
    return new


@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
def test_sequential_is_layer_by_layer_least_squares(share: float) -> None:
    whole = coder_case()
    case = coder_case(keep=keep_some(whole.graph, share, seed=3))
    expected = slow_sequence(case, array(rand(70, 5)), array(rand(70, 2, seed=1)))
    state = case.repaired("sequential", grams=None)
    assert list(state) == list(expected)
    for name, tensor in state.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-7, atol=1e-9, err_msg=name)
    changed = [name for name, t in state.items() if not torch.equal(t, case.pruned.state_dict()[name])]
    assert "decoder.5.weight" in changed
    assert "encoder.0.weight" not in changed


def test_coupling_channels_are_read_from_the_dense_model() -> None:
    """The decoder's repair does not depend on what happened to the encoder."""
    graph = coder_case().graph
    latent = keep_some(graph)["latent"]
    alone, both = ({"latent": latent}, {"latent": latent, "encoder.0": torch.arange(9) < 2})
    states = [coder_case(keep=keep).repaired("sequential") for keep in (alone, both)]
    for name, tensor in states[0].items():
        if name.startswith("decoder"):
            assert torch.equal(tensor, states[1][name]), name
    assert not torch.equal(states[0]["encoder.5.weight"], states[1]["encoder.5.weight"])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_components_that_lose_nothing_are_untouched(part: str) -> None:
    case = coder_case(keep={f"{part}.0": torch.arange(9) < 4})
    state = case.repaired("sequential")
    changed = {name for name, t in case.pruned.state_dict().items() if not torch.equal(state[name], t)}
    assert changed >= {f"{part}.3.weight", f"{part}.5.weight", f"{part}.5.bias"}
    assert all(name.startswith((f"{part}.3", f"{part}.5")) for name in changed)


def test_components_behind_a_repaired_one_are_untouched() -> None:
    """Each component is repaired towards its own dense outputs, not around another's errors."""
    x = rand(60, 5)

    def build(widths: Widths | None) -> nn.Module:
        inner = [8, 8] if widths is None else [widths["0.layers.0"], widths["1.layers.0"]]
        return nn.Sequential(Mlp([5, inner[0], 3]), Mlp([3, inner[1], 2]))

    def program(model: nn.Module) -> dict[str, Tensor]:
        shown = model[0](x)  # type: ignore[index]
        return {"shown": shown, "y": model[1](shown)}  # type: ignore[index]

    keep = {"0.layers.0": torch.arange(8) < 4}
    case = Case.of(build, program, keep=keep, components={"a": ["0"], "b": ["1"]})
    state = case.repaired("sequential")
    changed = {name for name, t in case.pruned.state_dict().items() if not torch.equal(state[name], t)}
    assert changed == {"0.layers.1.weight", "0.layers.1.bias"}


class TwoCalls(nn.Module):
    """The decoder reads `[what it prepares itself, latent]`, twice, with 40 and 25 rows."""

    def __init__(self, widths: Widths | None) -> None:
        super().__init__()
        w = widths or {"encoder.0": 8, "latent": 5, "prepare.0": 6, "prepare.2": 3, "decoder.0": 7}
        self.encoder = nn.Sequential(
            nn.Linear(5, w["encoder.0"]), nn.Tanh(), nn.Linear(w["encoder.0"], w["latent"])
        )
        self.prepare = nn.Sequential(
            nn.Linear(2, w["prepare.0"]), nn.Tanh(), nn.Linear(w["prepare.0"], w["prepare.2"])
        )
        self.decoder = nn.Sequential(nn.Linear(w["prepare.2"] + w["latent"], w["decoder.0"]), nn.Tanh())
        self.decoder.append(nn.Linear(w["decoder.0"], 3))

    def forward(self, x: Tensor, extra: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        first = self.decoder(torch.cat([self.prepare(extra), z], -1))
        second = self.decoder(torch.cat([self.prepare(2 * extra[:25]), (z + z**2)[:25]], -1))
        return {"latent": z, "first": first, "second": second}


def held_out_last(calls: Sequence[Rows]) -> Rows:
    """All rows, in an order whose last fifth is the last fifth of every call."""
    cuts = [round(0.8 * len(rows)) for rows in calls]
    fit = [rows[:cut] for rows, cut in zip(calls, cuts, strict=True)]
    return np.vstack(fit + [rows[cut:] for rows, cut in zip(calls, cuts, strict=True)])


def test_coupling_channels_are_those_of_each_call() -> None:
    """The latent is read as the dense model makes it in that call, what the decoder prepares as repaired."""
    x, extra = rand(40, 5), rand(40, 2, seed=1)
    case = Case.of(
        TwoCalls,
        lambda m: m(x, extra),
        components={"encoder": ["encoder"], "decoder": ["prepare", "decoder"]},
        ties=[("latent", "latent")],
    )
    dense = {name: array(t) for name, t in case.dense.state_dict().items()}
    new = {name: array(t) for name, t in case.pruned.state_dict().items()}
    kept = {name: mask.numpy() for name, mask in case.keep.items()}
    everything = slice(None)

    def layer(weights: Mapping[str, Rows], name: str, rows: Rows) -> Rows:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def refit(name: str, small: Rows, whole: Rows, out: Any) -> None:
        weight, bias = f"{name}.weight", f"{name}.bias"
        targets = (whole @ dense[weight].T)[:, out]
        new[weight], shift, _ = slow_fit(small, targets, new[weight], new[bias])
        assert shift is not None
        new[bias] = shift

    z = layer(dense, "encoder.2", np.tanh(layer(dense, "encoder.0", array(x))))
    latents = [z, (z + z**2)[:25]]
    extras = [array(extra), array(2 * extra[:25])]
    hidden = np.tanh(layer(new, "encoder.0", array(x)))
    refit("encoder.2", hidden, np.tanh(layer(dense, "encoder.0", array(x))), kept["latent"])

    inner = [[np.tanh(layer(w, "prepare.0", e)) for e in extras] for w in (new, dense)]
    refit("prepare.2", held_out_last(inner[0]), held_out_last(inner[1]), kept["prepare.2"])
    reads = [
        [np.hstack([layer(w, "prepare.2", h), z[:, of]]) for h, z in zip(inner[number], latents, strict=True)]
        for number, (w, of) in enumerate(((new, kept["latent"]), (dense, everything)))
    ]
    refit("decoder.0", held_out_last(reads[0]), held_out_last(reads[1]), kept["decoder.0"])
    hidden_parts = [
        [np.tanh(layer(w, "decoder.0", rows)) for rows in reads[number]]
        for number, w in enumerate((new, dense))
    ]
    refit("decoder.2", held_out_last(hidden_parts[0]), held_out_last(hidden_parts[1]), everything)
    for name, tensor in case.repaired("sequential").items():
        np.testing.assert_allclose(tensor, new[name], rtol=1e-7, atol=1e-9, err_msg=name)


class Recurrent(nn.Module):
    """A cell of three steps, a layer called after each on fewer and fewer rows, and one at the end."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.start, self.cell = nn.Linear(3, width), nn.Linear(width, width)
        self.middle, self.head = nn.Linear(width, inner), nn.Linear(inner, 2, bias=False)

    def forward(self, x: Tensor, steps: int = 3) -> Tensor:
        h, total = torch.tanh(self.start(x)), torch.zeros((), dtype=torch.float64)
        for step in range(steps):
            h = torch.tanh(self.cell(h))
            total = total + torch.tanh(self.middle(h[: len(h) - 10 * step]))[:20]
        return self.head(total)  # type: ignore[no-any-return]


def recurrent_case() -> Case:
    x = rand(50, 3)
    return Case.of(
        lambda w: Recurrent(8, 5) if w is None else Recurrent(w["start"], w["middle"]),
        lambda m: {"y": m(x)},
    )


def test_layers_called_several_times_are_refitted_to_all_their_calls() -> None:
    """All inputs of a layer are from the model as repaired before it; calls of 50, 40 and 30 rows."""
    case = recurrent_case()
    dense = {name: array(t) for name, t in case.dense.state_dict().items()}
    new = {name: array(t) for name, t in case.pruned.state_dict().items()}
    x = array(rand(50, 3))

    def reads(weights: Mapping[str, Rows]) -> dict[str, list[Rows]]:
        """What each layer reads at each of its calls."""
        h = np.tanh(x @ weights["start.weight"].T + weights["start.bias"])
        found: dict[str, list[Rows]] = {"cell": [], "middle": [], "head": [np.zeros(1)]}
        for step in range(3):
            found["cell"].append(h)
            h = np.tanh(h @ weights["cell.weight"].T + weights["cell.bias"])
            found["middle"].append(h[: 50 - 10 * step])
            inner = np.tanh(found["middle"][-1] @ weights["middle.weight"].T + weights["middle.bias"])
            found["head"][0] = found["head"][0] + inner[:20]
        return found

    outputs = {"cell": case.keep["start"].numpy(), "middle": case.keep["middle"].numpy(), "head": slice(None)}
    for name, out in outputs.items():
        weight, bias = f"{name}.weight", f"{name}.bias"
        targets = held_out_last(reads(dense)[name]) @ dense[weight].T
        fitted, shift, _ = slow_fit(
            held_out_last(reads(new)[name]), targets[:, out], new[weight], new.get(bias)
        )
        new = {**new, weight: fitted, **({} if shift is None else {bias: shift})}
    state = case.repaired("sequential")
    for name, tensor in state.items():
        np.testing.assert_allclose(tensor, new[name], rtol=1e-7, atol=1e-9, err_msg=name)
    assert case.error(state) < case.error(case.pruned.state_dict())


def test_a_program_may_overwrite_its_tensors() -> None:
    class Overwriting(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second, self.scale = nn.Linear(3, width), nn.Linear(width, 2), 1.0

        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(2, dtype=torch.float64)
            for number in range(2):
                h = torch.tanh(self.first(x + number))
                total = total + self.second(h)
                h.mul_(self.scale)
            return total

    x = rand(50, 3)
    states = []
    for scale in (1.0, -5.0):

        def build(widths: Widths | None, scale: float = scale) -> nn.Module:
            model = Overwriting(8 if widths is None else widths["first"])
            model.scale = scale
            return model

        case = Case.of(build, lambda m: {"y": m(x)})
        states.append([case.repaired("gram"), case.repaired("sequential")])
    for first, second in zip(*states, strict=True):
        assert_same_state(first, second)


# --- many rows ---------------------------------------------------------------------------------------------


def test_thinned_rows_are_the_same_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redundant channel of a convolution with many positions: only with matching rows is nothing lost."""

    class Pair(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, width, 3), nn.Conv2d(width, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))  # type: ignore[no-any-return]

    def twins(model: nn.Module) -> None:
        model.first.weight.data[3:] = 2 * model.first.weight.data[:3]  # type: ignore[union-attr]
        model.first.bias.data[3:] = 2 * model.first.bias.data[:3]  # type: ignore[union-attr]

    x = rand(6, 1, 12, 12)
    monkeypatch.setattr(calibration, "MAX_ROWS", 150)
    monkeypatch.setattr(reconstruction, "RIDGES", (1e-12,))
    case = Case.of(
        lambda w: Pair(6 if w is None else w["first"]),
        lambda m: {"y": m(x)},
        keep={"first": torch.arange(6) < 3},
        train=twins,
    )
    assert case.recording.outputs["second.weight"][0].shape == (1, 2, 150)
    assert case.recording.grams["second.weight"].pooled().rows == 150
    for method in ("gram", "sequential"):
        assert case.error(case.repaired(method)) < 1e-8


# --- degenerate data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gram", "sequential"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_never_vary_move_the_bias_alone(method: str, dtype: torch.dtype) -> None:
    """What constant channels made is a constant; weights fitted to rounding would be arbitrary."""
    x = torch.full((40, 5), 0.1, dtype=dtype)
    torch.manual_seed(0)
    dense, pruned = Mlp([5, 8, 4]).to(dtype), Mlp([5, 4, 4]).to(dtype)
    program: Program = lambda m: {"y": m(x)}  # noqa: E731
    graph = trace(dense, program, components={"model": [""]})
    keep = keep_some(graph)
    pruned.load_state_dict(prune(graph, dense.state_dict(), keep))
    case = Case(dense, pruned, graph, keep, program, record(graph, dense, program))
    state, sliced = case.repaired(method), pruned.state_dict()
    torch.testing.assert_close(state["layers.1.weight"], sliced["layers.1.weight"], rtol=1e-4, atol=1e-4)
    assert case.error(sliced) > 0.05
    assert case.error(state) < 1e-6


@pytest.mark.parametrize("method", ["gram", "sequential"])
def test_silent_channels_move_the_bias_alone(method: str) -> None:
    """All kept channels are dead: the Gram matrix is zero, and no Cholesky factor exists."""
    x = rand(40, 5)

    class Relu(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](torch.relu(self.layers[0](x)))  # type: ignore[no-any-return]

    def deaden(model: nn.Module) -> None:
        model.layers[0].bias.data[:3] = -100.0  # type: ignore[index]

    case = Case.of(
        lambda w: Relu([5, 6 if w is None else w["layers.0"], 4]),
        lambda m: {"y": m(x)},
        keep={"layers.0": torch.arange(6) < 3},
        train=deaden,
    )
    state, sliced = case.repaired(method), case.pruned.state_dict()
    assert torch.equal(state["layers.1.weight"], sliced["layers.1.weight"])
    mean = case.program(case.dense)["y"][:32].mean(0).detach()
    torch.testing.assert_close(state["layers.1.bias"], mean, rtol=1e-10, atol=1e-12)


def test_partly_constant_inputs_keep_their_weights() -> None:
    """A channel without variance says nothing: its column stays, the others are refitted."""
    x = rand(60, 5)

    def freeze(model: nn.Module) -> None:
        model.layers[0].weight.data[0] = 0.0  # type: ignore[index]

    case = Case.of(
        lambda w: Mlp([5, 8 if w is None else w["layers.0"], 4]),
        lambda m: {"y": m(x)},
        keep={"layers.0": torch.arange(8) < 4},
        train=freeze,
    )
    for method in ("gram", "sequential"):
        change = case.repaired(method)["layers.1.weight"] - case.pruned.state_dict()["layers.1.weight"]
        assert change[:, 0].abs().max() < 1e-12
        assert change[:, 1:].abs().min() > 1e-6


def test_more_channels_than_rows() -> None:
    """The Gram matrix has rank 5 of 20; the ridge makes the fit the oracle's all the same."""
    case = mlp_case(6, hidden=40)
    kept, sliced = case.keep["layers.0"].numpy(), case.pruned.state_dict()
    h = array(torch.tanh(case.dense.layers[0](rand(6, 5) + 0.3)))  # type: ignore[index]
    y = h @ array(case.dense.state_dict()["layers.1.weight"]).T
    expected, _, ridge = slow_fit(
        h[:, kept], y, array(sliced["layers.1.weight"]), array(sliced["layers.1.bias"])
    )
    assert ridge is not None
    for method in ("gram", "sequential"):
        np.testing.assert_allclose(case.repaired(method)["layers.1.weight"], expected, rtol=1e-8, atol=1e-10)


def test_solving_without_a_cholesky_factor() -> None:
    """A Gram matrix of low rank and no ridge: the least-norm solution, also of the regular one beside it."""
    rows = rand(2, 4, 9)
    rows = torch.cat([rows, rand(1, 30, 9)[:, :4]])  # (3, 4, 9): rank 4 of 9
    gram = rows.mT @ rows
    gram[2] = torch.eye(9).double() * 2
    right = rand(3, 5, 9, seed=3) @ gram
    rounded = gram.clone()
    rounded[1] -= 1e-13 * torch.eye(9)
    assert torch.linalg.cholesky_ex(rounded)[1].any()
    assert ((torch.linalg.eigvalsh(rounded[0]) > 0).sum() > 4).all()  # zero, up to rounding
    solved = reconstruction._solve(rounded, torch.zeros(3).double(), right)
    expected = right @ torch.linalg.pinv(gram, rtol=1e-9, hermitian=True)
    torch.testing.assert_close(solved, expected, rtol=1e-8, atol=1e-9)
    regular = gram + torch.eye(9).double()
    solved = reconstruction._solve(gram, torch.ones(3).double(), right)
    torch.testing.assert_close(solved, right @ torch.linalg.inv(regular), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["gram", "sequential"])
@pytest.mark.parametrize("row", [0, -1])
def test_data_that_is_not_finite_leaves_the_sliced_weights(method: str, row: int) -> None:
    x = rand(40, 5)
    x[row, 0] = float("nan")
    case = Case.of(lambda w: Mlp([5, 8 if w is None else w["layers.0"], 4]), lambda m: {"y": m(x)})
    assert_same_state(case.repaired(method), case.pruned.state_dict())


@pytest.mark.parametrize("method", ["gram", "sequential"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_single_precision_agrees_with_double(method: str, offset: float) -> None:
    """Rows are multiplied in the model's own precision, after centring, and solved in double."""
    states = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        dense, pruned = LinearPair(20).double(), LinearPair(10).to(dtype)
        x = (rand(200, 5) + offset).to(dtype)
        program: Program = lambda m, x=x: {"y": m(x)}  # noqa: E731
        graph = trace(dense.to(dtype), program, components={"model": [""]})
        keep = keep_some(graph)
        pruned.load_state_dict(prune(graph, dense.state_dict(), keep))
        state = Case(dense, pruned, graph, keep, program, record(graph, dense, program)).repaired(method)
        assert all(tensor.dtype == dtype for tensor in state.values())
        states.append(state)
    change = states[0]["second.weight"] - pruned.state_dict()["second.weight"]
    assert change.abs().max() > 0.05
    torch.testing.assert_close(
        states[1]["second.weight"].double(), states[0]["second.weight"], rtol=0, atol=1e-3 + offset * 1e-5
    )


# --- quality -----------------------------------------------------------------------------------------------


def test_repair_of_a_trained_autoencoder() -> None:
    """On digits it never saw: slicing is the worst, dense inputs are better, repaired inputs are best."""
    digits = torch.tensor(load_digits().data / 16)
    train, held_out = digits[:1300], digits[1300:]

    def build(widths: Widths | None) -> nn.Module:
        w = widths or {"encoder.0": 48, "encoder.3": 32, "latent": 10, "decoder.0": 32, "decoder.2": 48}
        return nn.ModuleDict({
            "encoder": nn.Sequential(
                nn.Linear(64, w["encoder.0"]), nn.LayerNorm(w["encoder.0"]), nn.ELU(),
                nn.Linear(w["encoder.0"], w["encoder.3"]), nn.ELU(), nn.Linear(w["encoder.3"], w["latent"]),
            ),
            "decoder": nn.Sequential(
                nn.Linear(w["latent"], w["decoder.0"]), nn.ELU(),
                nn.Linear(w["decoder.0"], w["decoder.2"]), nn.ELU(), nn.Linear(w["decoder.2"], 64),
            ),
        })  # fmt: skip

    def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        latent = model["encoder"](x)  # type: ignore[index]
        return {"latent": latent, "y": model["decoder"](latent)}  # type: ignore[index]

    def learn(model: nn.Module) -> None:
        if trained:
            model.load_state_dict(trained)
            return
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(200):
            x = train[(step * 64) % 1200 :][:64]
            optimizer.zero_grad()
            functional.mse_loss(outputs(model, x)["y"], x).backward()
            optimizer.step()
        trained.update(model.state_dict())

    trained: dict[str, Tensor] = {}
    for share in (0.7, 0.4, 0.2):
        case = Case.of(
            build,
            lambda m: outputs(m, train[:600]),
            share=share,
            components={"encoder": ["encoder"], "decoder": ["decoder"]},
            ties=[("latent", "latent")],
            train=learn,
        )
        states = {method: case.repaired(method) for method in METHODS}
        losses = {}
        for method, state in states.items():
            made = case.run(state, lambda m: outputs(m, held_out))["y"]
            losses[method] = float(functional.mse_loss(made, held_out))
        assert losses["sequential"] < losses["gram"] < 0.7 * losses["none"]


# --- nothing passed in is touched --------------------------------------------------------------------------


class Noisy(nn.Module):
    """Batch normalisation and dropout: in training mode it gives other outputs and moves its statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, width), nn.BatchNorm1d(width)
        self.dropout, self.second = nn.Dropout(0.5), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))  # type: ignore[no-any-return]


def noisy_case() -> Case:
    x = rand(60, 5) + 1

    def train(model: nn.Module) -> None:
        for _ in range(5):
            model(x)

    return Case.of(lambda w: Noisy(8 if w is None else w["first"]), lambda m: {"y": m(x)}, train=train)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_passed_in_is_modified(method: str) -> None:
    case = noisy_case()
    dense_state = {name: tensor.clone() for name, tensor in case.dense.state_dict().items()}
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (case.dense, case.pruned)]
    keep = {name: mask.clone() for name, mask in case.keep.items()}
    tensors = case.recording.grams.to_tensors()
    grams = {name: tensor.clone() for name, tensor in tensors.items()}
    outputs = [tensor.clone() for calls in case.recording.outputs.values() for tensor in calls]
    modes = [module.training for module in case.pruned.modules()]
    state = case.repaired(method)
    for model, old in zip((case.dense, case.pruned), before, strict=True):
        assert_same_state(model.state_dict(), old)
    assert_same_state(dense_state, case.dense.state_dict())
    assert_same_state(case.keep, keep)
    assert_same_state(case.recording.grams.to_tensors(), grams)
    recorded = [tensor for calls in case.recording.outputs.values() for tensor in calls]
    assert all(map(torch.equal, outputs, recorded))
    assert [module.training for module in case.pruned.modules()] == modes
    assert all(modes)
    assert all(p.requires_grad and p.grad is None for p in case.pruned.parameters())
    for name, tensor in case.pruned.state_dict().items():
        assert state[name].data_ptr() != tensor.data_ptr()
        assert not state[name].requires_grad
    assert_same_state(case.repaired(method), state)  # the same again


@pytest.mark.parametrize("method", ["gram", "sequential"])
def test_batch_norm_and_dropout_run_in_evaluation_mode(method: str) -> None:
    case = noisy_case()
    assert case.pruned.training
    kept, sliced = case.keep["first"], case.pruned.state_dict()
    model = calibration.evaluation_copy(case.dense)
    h = torch.tanh(model.norm(model.first(rand(60, 5) + 1)))  # type: ignore[union-attr,operator]
    y = h @ case.dense.state_dict()["second.weight"].T
    weight, bias, ridge = slow_fit(
        array(h[:, kept]), array(y), array(sliced["second.weight"]), array(sliced["second.bias"])
    )
    assert ridge is not None
    state = case.repaired(method)
    np.testing.assert_allclose(state["second.weight"], weight, rtol=1e-9, atol=1e-11)
    assert bias is not None
    np.testing.assert_allclose(state["second.bias"], bias, rtol=1e-9, atol=1e-11)
    assert torch.equal(state["norm.running_mean"], sliced["norm.running_mean"])


# --- bad input ---------------------------------------------------------------------------------------------


def raises(pattern: str) -> Any:
    return pytest.raises(UserError, match=pattern)


def test_unknown_methods_name_the_nearest() -> None:
    case = mlp_case()
    with raises(
        r"^unknown reconstruction 'sequentail'; did you mean 'sequential'\? allowed: gram, none, sequential$"
    ):
        case.repaired("sequentail")


@pytest.mark.parametrize(
    ("method", "missing", "pattern"),
    [
        ("gram", "grams", r"^reconstruction 'gram' needs the Gram matrices of the base$"),
        ("sequential", "recording", r"^reconstruction 'sequential' needs the recording of the base and the "),
        ("sequential", "program", r"^reconstruction 'sequential' needs .* and the program to run$"),
    ],
)
def test_data_that_is_missing_is_named(method: str, missing: str, pattern: str) -> None:
    with raises(pattern):
        mlp_case().repaired(method, **{missing: None})


def test_masks_that_do_not_fit_are_refused() -> None:
    case = mlp_case()
    for method in METHODS:
        with raises("unknown pruning group 'nothing'"):
            reconstruct(case.graph, {}, case.pruned, {"nothing": torch.ones(2) > 0}, method=method)
        other = {"layers.0": torch.arange(8) < 3}
        with raises(
            r"^'layers.0.weight' has shape \(4, 5\) in the pruned model, and the masks leave \(3, 5\)$"
        ):
            reconstruct(case.graph, case.dense.state_dict(), case.pruned, other, method=method)
        with raises(r"^the pruned model has 'layers.2.weight', which the traced model does not have$"):
            reconstruct(case.graph, {}, mlp_case(layers=2).pruned, case.keep, method=method)


def test_gram_matrices_of_another_model_are_refused() -> None:
    case = mlp_case()
    other = Grams({"layers.1.weight": SplitGram(Gram.of(rand(9, 7)), Gram.of(rand(4, 7)))})
    with raises(
        r"^the Gram matrix of 'layers.1.weight' is of 7 inputs, which does not fit its weight of shape "
    ):
        case.repaired("gram", grams=other)


def test_layers_without_a_gram_matrix_keep_their_sliced_weights() -> None:
    case = mlp_case(layers=2)
    grams = Grams({"layers.1.weight": case.recording.grams["layers.1.weight"]})
    state = case.repaired("gram", grams=grams)
    changed = [name for name, t in state.items() if not torch.equal(t, case.pruned.state_dict()[name])]
    assert changed == ["layers.1.weight", "layers.1.bias"]


class EinsumStack(nn.Module):
    """Two networks in one; where a width is 1, einsum multiplies instead of contracting."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(rand(2, 4, width))
        self.second = nn.Parameter(rand(2, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eij->ebj", x, self.first).tanh()
        return torch.einsum("ebj,ejo->ebo", hidden, self.second)


def test_a_layer_whose_operator_changes_at_width_one_keeps_its_sliced_weights() -> None:
    dense, x = EinsumStack(5), rand(40, 4)

    def program(model: nn.Module) -> dict[str, Tensor]:
        return {"y": model(x)}

    graph = trace(dense, program, components={"all": [""]})
    keep = {group.name: torch.arange(group.size) < 1 for group in graph.groups}
    assert keep
    small = EinsumStack(1)
    small.load_state_dict(prune(graph, dense.state_dict(), keep))
    recording = record(graph, dense, program)
    repaired = reconstruct(graph, dense.state_dict(), small, keep, recording=recording, program=program)
    for name, tensor in small.state_dict().items():
        assert repaired[name].shape == tensor.shape
        assert torch.isfinite(repaired[name]).all()


def test_programs_that_differ_from_the_recorded_one_are_refused() -> None:
    case, x = recurrent_case(), rand(50, 3)
    with raises(
        r"^the program calls 'cell.weight' 2 times, and 3 times in the recording; both have to be alike$"
    ):
        case.repaired("sequential", program=lambda m: {"y": m(x, 2)})
    with raises(
        r"^the program gives 'cell.weight' 40 rows and 50 in the recording; both have to come from the"
    ):
        case.repaired("sequential", program=lambda m: {"y": m(x[:40])})
    coder, extra = coder_case(keep={"decoder.0": torch.arange(9) < 4}), rand(30, 2)
    with raises(
        r"^'decoder.0.weight' reads \(30, 8\) where the recording and the masks make it \(70, 8\); both"
    ):
        coder.repaired("sequential", program=lambda m: m(rand(30, 5), extra))


def test_extra_calls_of_a_repaired_layer_are_harmless() -> None:
    """A program that goes on after what was recorded."""
    case, x, extra = coder_case(), rand(70, 5), rand(70, 2, seed=1)
    state = case.repaired("sequential", program=lambda m: m(x, extra) | m(x[:9] + 1, extra[:9]))
    assert_same_state(state, case.repaired("sequential"))
