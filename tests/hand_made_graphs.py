"""Small models whose dependency graphs are written by hand, so that tests of their users need no tracing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.dependency import Consumer, DependencyGraph, Group, Member


def one_each(size: int) -> Tensor:
    return torch.arange(size).unsqueeze(1)


def group(name: str, size: int, members: Iterable[Member], *components: str) -> Group:
    return Group(name, frozenset(components or ("net",)), size, tuple(members))


def graph_of(model: nn.Module, groups: Iterable[Group], consumers: Iterable[Consumer]) -> DependencyGraph:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    components = (
        {name: (name,) for name in ("encoder", "decoder")} if hasattr(model, "encoder") else {"net": ("",)}
    )
    return DependencyGraph(tuple(groups), components, shapes, tuple(consumers))


class Mlp(nn.Module):
    """6 -> 7 (LayerNorm) -> 5 -> two heads of 4 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 5)
        self.left = nn.Linear(5, 4)
        self.right = nn.Linear(5, 3, bias=False)

    def hidden(self, x: Tensor, gates: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        gates = gates or {"first": torch.ones(7), "second": torch.ones(5)}
        a = torch.tanh(self.norm(self.first(x))) * gates["first"]
        return a, torch.tanh(self.second(a)) * gates["second"]

    def forward(self, x: Tensor, gates: dict[str, Tensor] | None = None) -> Tensor:
        _, b = self.hidden(x, gates)
        return torch.cat([self.left(b), self.right(b)], dim=-1)

    def graph(self) -> DependencyGraph:
        a, b = one_each(7), one_each(5)
        first = [
            Member("first.weight", 0, a, False),
            Member("first.bias", 0, a, False),
            Member("norm.weight", 0, a, False),
            Member("norm.bias", 0, a, False),
            Member("second.weight", 1, a, True),
        ]
        second = [
            Member("second.weight", 0, b, False),
            Member("second.bias", 0, b, False),
            Member("left.weight", 1, b, True),
            Member("right.weight", 1, b, True),
        ]
        consumers = [
            Consumer("first.weight", "linear", 1, 0, "first.bias"),
            Consumer("second.weight", "linear", 1, 0, "second.bias"),
            Consumer("left.weight", "linear", 1, 0, "left.bias"),
            Consumer("right.weight", "linear", 1, 0, None),
        ]
        return graph_of(self, [group("first", 7, first), group("second", 5, second)], consumers)


class Convolutional(nn.Module):
    """(2, 4, 4) -> convolution to 3 (BatchNorm) -> strided convolution to 4 at 2 x 2 -> flatten -> 5.

    A channel of the second convolution owns four columns of the linear layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.b = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor, gates: dict[str, Tensor] | None = None) -> Tensor:
        gates = gates or {"a": torch.ones(3), "b": torch.ones(4)}
        a = torch.tanh(self.norm(self.a(x))) * gates["a"].reshape(-1, 1, 1)
        b = torch.tanh(self.b(a)) * gates["b"].reshape(-1, 1, 1)
        return self.out(b.flatten(1))

    def graph(self) -> DependencyGraph:
        a, b = one_each(3), one_each(4)
        first = [
            *(Member(name, 0, a, False) for name in ("a.weight", "a.bias", "norm.weight", "norm.bias")),
            *(Member(name, 0, a, False) for name in ("norm.running_mean", "norm.running_var")),
            Member("b.weight", 1, a, True),
        ]
        second = [
            Member("b.weight", 0, b, False),
            Member("b.bias", 0, b, False),
            Member("out.weight", 1, torch.arange(16).reshape(4, 4), True),
        ]
        consumers = [
            Consumer("a.weight", "convolution", 1, 0, "a.bias"),
            Consumer("b.weight", "convolution", 1, 0, "b.bias"),
            Consumer("out.weight", "linear", 1, 0, "out.bias"),
        ]
        return graph_of(self, [group("a", 3, first), group("b", 4, second)], consumers)


class Recurrent(nn.Module):
    """A state of 5 made from 3 inputs and fed back three times through `[state, input]`: both axes tied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.step = nn.Linear(8, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor, gates: dict[str, Tensor] | None = None) -> Tensor:
        gate = gates["state"] if gates else torch.ones(5)
        state = torch.tanh(self.inner(x))
        for _ in range(3):
            state = torch.tanh(self.step(torch.cat([state * gate, x], dim=-1)))
        return self.out(state * gate)

    def graph(self) -> DependencyGraph:
        index = one_each(5)
        members = [
            *(
                Member(f"{layer}.{kind}", 0, index, False)
                for layer in ("inner", "step")
                for kind in ("weight", "bias")
            ),
            Member("step.weight", 1, index, True),
            Member("out.weight", 1, index, True),
        ]
        consumers = [
            Consumer("inner.weight", "linear", 1, 0, "inner.bias"),
            Consumer("step.weight", "linear", 1, 0, "step.bias"),
            Consumer("out.weight", "linear", 1, 0, "out.bias"),
        ]
        return graph_of(self, [group("state", 5, members)], consumers)


class Functional(nn.Module):
    """Bare parameters in every layout: `x @ A`, a stack by baddbmm, `B @ x`, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 6))  # (in, out)
        self.stack = nn.Parameter(torch.randn(3, 6, 5))  # (E, in, out)
        self.shift = nn.Parameter(torch.randn(3, 1, 5))
        self.b = nn.Parameter(torch.randn(8, 5))  # (out, in), used from the left
        self.up = nn.Parameter(torch.randn(2, 3, 2, 2))  # (in, out, *kernel)

    def forward(self, x: Tensor, gates: dict[str, Tensor] | None = None) -> Tensor:
        gates = gates or {"a": torch.ones(6), "stack": torch.ones(5), "b": torch.ones(2)}
        a = torch.tanh(x @ self.a) * gates["a"]  # (batch, 6)
        h = torch.tanh(torch.baddbmm(self.shift, a.expand(3, -1, -1), self.stack)) * gates["stack"]
        b = torch.tanh(torch.matmul(self.b, h.mean(0).t())).t()  # (batch, 8)
        image = b.reshape(-1, 2, 2, 2) * gates["b"].reshape(-1, 1, 1)
        return functional.conv_transpose2d(image, weight=self.up).flatten(1)

    def graph(self) -> DependencyGraph:
        a, stack, b = one_each(6), one_each(5), one_each(2)
        groups = [
            group("a", 6, [Member("a", 1, a, False), Member("stack", 1, a, True)]),
            group(
                "stack",
                5,
                [
                    Member("stack", 2, stack, False),
                    Member("shift", 2, stack, False),
                    Member("b", 1, stack, True),
                ],
            ),
            group("b", 2, [Member("b", 0, torch.arange(8).reshape(2, 4), False), Member("up", 0, b, True)]),
        ]
        consumers = [
            Consumer("a", "linear", 0, 1, None),
            Consumer("stack", "batched", 1, 2, "shift"),
            Consumer("b", "linear", 1, 0, None),
            Consumer("up", "transposed_convolution", 0, 1, None),
        ]
        return graph_of(self, groups, consumers)


FAMILIES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (6,)),
    "convolutional": (Convolutional, (2, 4, 4)),
    "recurrent": (Recurrent, (3,)),
    "functional": (Functional, (4,)),
}
"""Name -> model and the shape of one input."""


def make(family: str, seed: int = 0) -> tuple[nn.Module, DependencyGraph, tuple[int, ...]]:
    """A model in float64 with non-degenerate parameters and statistics, its graph, and its input shape."""
    torch.manual_seed(seed)
    kind, shape = FAMILIES[family]
    model = kind().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, model.graph(), shape  # type: ignore[operator]
