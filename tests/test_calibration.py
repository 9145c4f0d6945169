"""What `record` sees of a model: every consumer's rows times its matrix are what its operator makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from components import calibration
from components.calibration import (
    HELD_OUT,
    ConsumerCall,
    Watcher,
    coupled_channels,
    evaluation_copy,
    record,
    split_rows,
)
from components.dependency import DependencyGraph
from components.errors import UserError
from components.gram import weight_matrix
from components.tracing import trace


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("one_thread")


class Functional(nn.Module):
    """A model of one weight, one bias and whatever is done with them."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, run: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.weight, self.bias, x)


def traced(
    model: nn.Module, *inputs: Tensor, components: Mapping[str, Sequence[str]] | None = None
) -> DependencyGraph:
    return trace(model, lambda m: {"y": m(*inputs)}, components=components or {"model": [""]})


def calls_of(graph: DependencyGraph, model: nn.Module, *inputs: Tensor) -> list[tuple[ConsumerCall, Tensor]]:
    """Every consumer's call with what its operator makes, in the order of the program."""
    seen = []

    def handle(call: ConsumerCall) -> Any:
        made = call.run(call.activation)
        seen.append((call, made))
        return made

    with torch.no_grad(), Watcher(graph, model, handle):
        model(*inputs)
    return seen


# --- the rows of every operator ----------------------------------------------------------------------------


def channels_last(made: Tensor) -> Tensor:
    return made.movedim(1, -1).reshape(-1, made.shape[1])


def stack_of_groups(made: Tensor, groups: int) -> Tensor:
    rows = channels_last(made)
    return rows.reshape(len(rows), groups, -1).movedim(1, 0)


LINEAR: dict[str, tuple[nn.Module, Tensor]] = {
    "matrix": (nn.Linear(4, 3), rand(6, 4)),
    "sequence": (nn.Linear(4, 3), rand(2, 5, 4)),
    "batch of sequences": (nn.Linear(4, 3), rand(2, 3, 5, 4)),
    "not contiguous": (nn.Linear(4, 3), rand(4, 5, 2).movedim(0, 2)),
    "vector": (nn.Linear(4, 3), rand(4)),
    "no bias": (nn.Linear(4, 3, bias=False), rand(2, 5, 4)),
    "square": (nn.Linear(4, 4), rand(6, 4)),
    "x @ W": (Functional(rand(4, 4), None, lambda w, b, x: x @ w), rand(6, 4)),
    "x @ W + b": (Functional(rand(4, 4), rand(4), lambda w, b, x: x @ w + b), rand(2, 5, 4)),
    "addmm": (Functional(rand(4, 4), rand(4), lambda w, b, x: torch.addmm(b, x, w)), rand(6, 4)),
    "inference mode": (
        Functional(rand(3, 4), rand(3), torch.inference_mode()(lambda w, b, x: functional.linear(x, w, b))),
        rand(2, 5, 4),
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_rows_of_matrix_products(name: str) -> None:
    model, x = LINEAR[name]
    model = model.double()
    graph = traced(model, x)
    [(call, made)] = calls_of(graph, model, x)
    rows = call.rows(call.activation)
    assert rows.shape == (1, x.numel() // 4, 4)
    product = rows @ weight_matrix(call.consumer, model.weight).mT
    expected = model(x).reshape(1, -1, product.shape[2])
    if model.bias is not None:
        expected = expected - model.bias
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)
    assert made.numel() == expected.numel()


def test_rows_of_a_weight_on_the_left() -> None:
    """`W x` for columns x: rows of the consumer are columns of x."""
    for bias in (None, rand(3, 1)):
        model = Functional(rand(3, 4), bias, lambda w, b, x: w @ x if b is None else torch.addmm(b, w, x))
        x = rand(4, 6, seed=1)
        [(call, _)] = calls_of(traced(model, x), model, x)
        torch.testing.assert_close(call.rows(call.activation), x.T.unsqueeze(0), rtol=0, atol=0)
        product = call.rows(call.activation) @ weight_matrix(call.consumer, model.weight).mT
        torch.testing.assert_close(product[0].T, model.weight @ x, rtol=1e-12, atol=1e-12)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(2, 3, 3), (4, 2, 9)),
    "1d stride padding dilation": (nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (4, 2, 9)),
    "2d": (nn.Conv2d(2, 3, 3), (4, 2, 6, 5)),
    "2d stride padding": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (4, 2, 6, 5)),
    "2d all different": (nn.Conv2d(2, 3, (3, 2), (2, 1), (2, 1), (1, 3), bias=False), (4, 2, 6, 5)),
    "2d same": (nn.Conv2d(2, 3, 3, padding="same"), (4, 2, 6, 5)),
    "2d unbatched": (nn.Conv2d(2, 3, 3), (2, 6, 5)),
    "2d grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4, 6, 5)),
    "3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 1)), (2, 2, 3, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, stride=2), (4, 2, 5)),
    "transposed 2d": (nn.ConvTranspose2d(2, 3, 3), (4, 2, 4, 5)),
    "transposed 2d padding": (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), (4, 2, 4, 5)),
    "transposed 2d output padding": (
        nn.ConvTranspose2d(2, 3, 3, stride=3, padding=1, output_padding=2),
        (4, 2, 4, 5),
    ),
    "transposed 2d all different": (
        nn.ConvTranspose2d(2, 3, (3, 2), (2, 3), (2, 1), (1, 2), bias=False, dilation=(2, 3)),
        (4, 2, 4, 5),
    ),
    "transposed 2d grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 4, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_of_convolutions(name: str) -> None:
    model, shape = CONVOLUTIONS[name]
    model = model.double()
    x = rand(*shape)
    graph = traced(model, x)
    [(call, made)] = calls_of(graph, model, x)
    product = call.rows(call.activation) @ weight_matrix(call.consumer, model.weight).mT
    bias = 0.0 if model.bias is None else model.bias.reshape(-1, *(1 for _ in made.shape[2:]))
    expected = stack_of_groups(made - bias, call.consumer.groups)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.reshape(model(x).shape), model(x), rtol=1e-12, atol=1e-12)


def vmapped(w: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
    if b is None:
        return torch.vmap(functional.linear)(x, w)
    return torch.vmap(functional.linear)(x, w, b)


STACKS: dict[str, nn.Module] = {
    "bmm": Functional(rand(3, 4, 5), None, lambda w, b, x: torch.bmm(x, w)),
    "square bmm": Functional(rand(3, 4, 4), None, lambda w, b, x: torch.bmm(x, w)),
    "transposed bmm": Functional(rand(3, 4, 4), None, lambda w, b, x: torch.bmm(x, w.mT)),
    "weight on the left": Functional(rand(3, 4, 4), None, lambda w, b, x: torch.bmm(w, x.mT).mT),
    "bmm and add": Functional(rand(3, 4, 5), rand(3, 5), lambda w, b, x: torch.bmm(x, w) + b[:, None]),
    "baddbmm": Functional(rand(3, 4, 5), rand(3, 1, 5), lambda w, b, x: torch.baddbmm(b, x, w)),
    "vmap": Functional(rand(3, 5, 4), rand(3, 5), vmapped),
    "vmap without bias": Functional(rand(3, 5, 4), None, vmapped),
}


@pytest.mark.parametrize("name", STACKS)
def test_rows_of_stacks(name: str) -> None:
    model, x = STACKS[name], rand(3, 6, 4, seed=1)
    [(call, _)] = calls_of(traced(model, x), model, x)
    assert call.consumer.kind == "batched"
    rows = call.rows(call.activation)
    torch.testing.assert_close(rows, x, rtol=0, atol=0)
    expected = model(x) if model.bias is None else model(x) - model.bias.reshape(3, 1, -1)
    product = rows @ weight_matrix(call.consumer, model.weight).mT
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


def test_running_on_another_activation() -> None:
    model, x, other = nn.Conv2d(2, 3, 3).double(), rand(4, 2, 6, 5), rand(4, 2, 6, 5, seed=1)
    [(call, _)] = calls_of(traced(model, x), model, x)
    torch.testing.assert_close(call.run(other), model(other), rtol=1e-12, atol=1e-12)


# --- at most MAX_ROWS --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "deconv", "linear", "stack"])
def test_many_rows_are_thinned_out_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows of dense and pruned activations, in order, from all over the data."""
    model, x = {
        "conv": (nn.Conv2d(2, 3, 3).double(), rand(7, 2, 8, 8)),
        "deconv": (nn.ConvTranspose2d(2, 3, 3).double(), rand(7, 2, 8, 8)),
        "linear": (nn.Linear(2, 3).double(), rand(50, 6, 2)),
        "stack": (STACKS["bmm"], rand(3, 200, 4)),
    }[name]
    [(call, _)] = calls_of(traced(model, x), model, x)
    activation = call.activation
    whole = call.rows(activation)
    monkeypatch.setattr(calibration, "MAX_ROWS", 40)
    thinned = call.rows(activation)
    assert thinned.shape[1] == 40
    index = {tuple(row): number for number, row in enumerate(whole[0].tolist())}
    chosen = [index[tuple(row)] for row in thinned[0].tolist()]
    assert chosen == sorted(set(chosen))
    assert chosen[0] < whole.shape[1] * 0.2
    assert chosen[-1] > whole.shape[1] * 0.8
    torch.testing.assert_close(thinned, whole[:, chosen], rtol=0, atol=0)

    axis = call.channel_axis
    fewer = activation.narrow(axis, 0, 1)  # what a pruned model reads there: fewer channels
    monkeypatch.setattr(calibration, "MAX_ROWS", 10**6)
    all_fewer = call.rows(fewer)
    monkeypatch.setattr(calibration, "MAX_ROWS", 40)
    torch.testing.assert_close(call.rows(fewer), all_fewer[:, chosen], rtol=0, atol=0)


# --- record ------------------------------------------------------------------------------------------------


class Coder(nn.Module):
    """Encoder and decoder around a latent; the decoder is called on two latents."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor, extra: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        return {
            "z": z,
            "first": self.decoder(torch.cat([extra, z], -1)),
            "second": self.decoder(torch.cat([extra[:7], z[:7] ** 2], -1)),
        }


def coder() -> tuple[Coder, DependencyGraph, Callable[[nn.Module], dict[str, Tensor]]]:
    torch.manual_seed(0)
    model, x, extra = Coder().double(), rand(30, 5), rand(30, 2)

    def program(m: nn.Module) -> dict[str, Tensor]:
        return m(x, extra)

    components = {"encoder": ["encoder"], "decoder": ["decoder"]}
    return model, trace(model, program, components=components, ties=[("z", "z")]), program


def test_recording_of_a_model_called_twice() -> None:
    """Rows, outputs and moments against what a few lines of plain code make."""
    model, graph, program = coder()
    recording = record(graph, model, program)
    made = program(model)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    extra = rand(30, 2)
    z = made["z"].detach()
    reads = [torch.cat([extra, z], -1), torch.cat([extra[:7], z[:7] ** 2], -1)]
    assert set(recording.outputs) == {f"{part}.{i}.weight" for part in ("encoder", "decoder") for i in (0, 2)}
    assert len(recording.outputs["encoder.0.weight"]) == 1

    outputs, coupled = recording.outputs["decoder.0.weight"], recording.coupled["decoder.0.weight"]
    assert set(recording.coupled) == {"decoder.0.weight"}
    assert len(outputs) == len(coupled) == 2
    for x, y, whole in zip(reads, outputs, coupled, strict=True):
        torch.testing.assert_close(whole, x, rtol=1e-12, atol=1e-12)
        expected = x @ state["decoder.0.weight"].T
        torch.testing.assert_close(y, expected.T.unsqueeze(0), rtol=1e-12, atol=1e-12)

    split = recording.grams["decoder.0.weight"]
    fit = np.concatenate([reads[0][:24], reads[1][:6]])
    held_out = np.concatenate([reads[0][24:], reads[1][6:]])
    for gram, rows in ((split.fit, fit), (split.held_out, held_out)):
        np.testing.assert_allclose(gram.gram[0], np.cov(rows.T, bias=True), rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(gram.mean[0], rows.mean(0), rtol=1e-11, atol=1e-13)
        assert gram.rows == len(rows)


def test_what_is_recorded_shares_no_memory_with_the_activations() -> None:
    """A program may overwrite its tensors."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    graph = traced(model, rand(9, 3), components={"a": ["0"], "b": ["2"]})

    def program(m: nn.Module) -> dict[str, Tensor]:
        x = rand(9, 3)
        h = m[:2](x)  # type: ignore[index]
        y = m[2](h)  # type: ignore[index]
        return {"y": y, "spoilt": x.zero_(), "too": h.zero_()}

    recording = record(graph, model, program)
    h = model[:2](rand(9, 3)).detach()
    torch.testing.assert_close(recording.coupled["2.weight"], (h,), rtol=1e-12, atol=1e-12)
    fitted = round(9 * (1 - HELD_OUT))
    for weight, rows in (("0.weight", rand(9, 3)), ("2.weight", h)):
        np.testing.assert_allclose(recording.grams[weight].fit.mean[0], rows[:fitted].mean(0), rtol=1e-12)


def test_gram_matrices_are_made_only_if_wanted() -> None:
    model, graph, program = coder()
    bare, full = record(graph, model, program, with_grams=False), record(graph, model, program)
    assert len(bare.grams) == 0
    assert list(full.grams) == list(bare.outputs)
    for weight, outputs in bare.outputs.items():
        assert all(map(torch.equal, outputs, full.outputs[weight]))


def test_stacks_and_grouped_convolutions_have_a_gram_for_each() -> None:
    stack, x = STACKS["bmm"], rand(3, 6, 4, seed=1)
    grams = record(traced(stack, x), stack, lambda m: {"y": m(x)}).grams
    assert grams["weight"].fit.gram.shape == (3, 4, 4)
    grouped, x = nn.Conv2d(4, 6, 3, groups=2).double(), rand(4, 4, 6, 5)
    grams = record(traced(grouped, x), grouped, lambda m: {"y": m(x)}).grams
    assert grams["weight"].fit.gram.shape == (2, 18, 18)
    patches = functional.unfold(x[:, 2:], 3).movedim(1, 2).reshape(-1, 18)  # of the second group
    whole = grams["weight"].pooled()
    np.testing.assert_allclose(whole.gram[1], np.cov(patches.numpy().T, bias=True), rtol=1e-10, atol=1e-13)


def test_recording_changes_nothing_and_runs_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x = rand(40, 4) + 3
    model(x)  # running statistics that are neither the data's nor the initial ones
    graph = traced(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recording = record(graph, model, lambda m: {"y": m(x)})
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    expected = (evaluation_copy(model)[:3](x) @ model[3].weight.T).detach()
    torch.testing.assert_close(recording.outputs["3.weight"][0][0].T, expected, rtol=1e-12, atol=1e-12)
    assert not recording.outputs["3.weight"][0].requires_grad


def test_consumers_of_one_row_are_left_out() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(rand(1, 3))
            self.on_token, self.on_data = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.on_data(x)) + self.on_token(self.token * 2)

    model, x = Conditioned().double(), rand(9, 4)
    recording = record(traced(model, x), model, lambda m: {"y": m(x)})
    assert list(recording.outputs) == list(recording.grams) == ["on_data.weight"]


def test_too_little_data_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    graph = traced(model, rand(2, 3))
    for program in (lambda m: {"y": m(rand(1, 3))}, lambda m: {}):
        with pytest.raises(UserError, match=r"no layer two rows or more; give it more calibration data$"):
            record(graph, model, program)


# --- held-out rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "fit", "held_out"),
    [
        ((10,), range(8), (8, 9)),
        ((2,), (0,), (1,)),
        ((3,), (0, 1), (2,)),
        ((5,), range(4), (4,)),
        ((10, 5), (*range(8), *range(10, 14)), (8, 9, 14)),
        ((2, 2, 2), (0, 2, 4), (1, 3, 5)),
        ((1, 1, 1, 1, 1), range(4), (4,)),
        ((1, 9), range(8), (8, 9)),
    ],
)
def test_the_last_rows_of_every_call_are_held_out(
    sizes: tuple[int, ...], fit: Sequence[int], held_out: Sequence[int]
) -> None:
    rows = torch.arange(sum(sizes) * 6).reshape(2, sum(sizes), 3)
    for axis, tensor in ((1, rows), (2, rows.mT)):
        parts = split_rows(tensor.split(sizes, dim=axis), axis)
        for part, expected in zip(parts, (fit, held_out), strict=True):
            assert torch.equal(part, tensor.index_select(axis, torch.tensor(list(expected))))


# --- coupling ----------------------------------------------------------------------------------------------


def test_coupled_channels_are_those_that_another_component_makes() -> None:
    _, graph, _ = coder()
    coupled = coupled_channels(graph)
    assert list(coupled) == ["decoder.0.weight"]
    assert coupled["decoder.0.weight"].tolist() == [2, 3, 4, 5]  # the first two columns read `extra`


def test_grouped_convolutions_have_no_coupled_channels() -> None:
    """Their channels share an index along the weight's input axis."""
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 2, 1)
    ).double()
    graph = traced(model, rand(3, 2, 5), components={"a": ["0"], "b": ["2"], "c": ["3"]})
    assert any(
        group.is_coupling and any(m.parameter == "2.weight" for m in group.members) for group in graph.groups
    )
    assert list(coupled_channels(graph)) == ["3.weight"]
