"""The same channels as Torch-Pruning finds, where that library is right; and two cases where it is not.

The cases where it is silently wrong are why the pruning core is our own; if one of those tests fails after an
upgrade, the library has been mended.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, nn

import components
from components import DependencyGraph

Channel = frozenset[tuple[str, int, int]]
"""What goes together: (parameter, axis, index)."""


def slices(graph: torch_pruning.DependencyGraph, dependency: Any) -> list[tuple[str, int]]:
    """The tensors and axes that a step of the library slices."""
    module = dependency.target.module
    if isinstance(module, nn.BatchNorm2d):
        return [(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return []
    depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
    if depthwise or graph.is_out_channel_pruning_fn(dependency.handler):
        return [("weight", 0), ("bias", 0)]
    return [("weight", 1)]


def theirs(model: nn.Module, x: Tensor) -> set[Channel]:
    """Every channel that Torch-Pruning would remove, as slices of the state_dict."""
    names = {module: name for name, module in model.named_modules()}
    graph = torch_pruning.DependencyGraph().build_dependency(model, x)
    last = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    state = model.state_dict()
    found = set()
    for layer in model.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or layer is last:
            continue
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        for index in range(layer.weight.shape[0]):
            channel = set()
            for dependency, indices in graph.get_pruning_group(layer, prune, [index]):
                for name, axis in slices(graph, dependency):
                    parameter = f"{names[dependency.target.module]}.{name}"
                    channel |= {(parameter, axis, int(i)) for i in indices if parameter in state}
            found.add(frozenset(channel))
    return found


def ours(graph: DependencyGraph) -> set[Channel]:
    return {
        frozenset(
            (member.parameter, member.axis, index)
            for member in group.members
            for index in member.indices[channel].tolist()
        )
        for group in graph.groups
        for channel in range(group.size)
    }


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = h + self.outer(torch.relu(self.inner(h)))
        return self.head(torch.relu(h).mean((2, 3)))


class Skip(nn.Module):
    """Concatenation of two layers' channels, which the library follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        return self.head(torch.cat([torch.relu(self.b(a)), a], 1))


def image() -> Tensor:
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def vector() -> Tensor:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


AGREED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.Linear(6, 3)),
        vector,
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)
        ),
        image,
    ),
    "flatten": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 3)
        ),
        image,
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 3, 1)
        ),
        image,
    ),
    "residual": (Residual, image),
    "skip": (Skip, vector),
}


@pytest.mark.parametrize("name", AGREED)
def test_same_channels(name: str) -> None:
    make, data = AGREED[name]
    model, x = make(), data()
    expected = theirs(model.eval(), x)
    graph = components.trace(model, lambda m: {"y": m(x)}, components={"all": [""]})
    assert ours(graph) == expected
    assert len(expected) == sum(graph.widths.values())


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.double()


class WithAction(nn.Module):
    """The dynamics of a world model: latents behind input data in a concatenation."""

    def __init__(self, latent: int = 6) -> None:
        super().__init__()
        self.encoder, self.dynamics = nn.Linear(5, latent), nn.Linear(3 + latent, 4)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        return self.dynamics(torch.cat([action, torch.tanh(self.encoder(x))], -1))


def test_it_prunes_the_wrong_columns_behind_data() -> None:
    """`cat([action, latent])`: it removes the action's columns; the shapes match, the result does not."""
    model, x, action = randomised(WithAction()), vector().double(), vector()[:, :3].double()
    removed = [0, 2]
    their = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(their, {"x": x, "action": action})
    graph.get_pruning_group(their.encoder, torch_pruning.prune_linear_out_channels, removed).prune()

    keep = torch.ones(6, dtype=torch.bool)
    keep[removed] = False
    our_graph = components.trace(model, lambda m: {"y": m(x, action)}, components={"all": [""]})
    our = WithAction(latent=4).double()
    our.load_state_dict(components.prune(our_graph, model.state_dict(), {"encoder": keep}))

    with torch.no_grad():
        latent = torch.tanh(model.encoder(x)) * keep
        expected = model.dynamics(torch.cat([action, latent], -1))
        assert torch.allclose(our(x, action), expected, rtol=0, atol=1e-12)
        assert their.dynamics.weight.shape == our.dynamics.weight.shape
        assert not torch.allclose(their(x, action), expected, atol=0.1)


def test_it_reorders_layer_norm() -> None:
    """What it keeps of a LayerNorm comes in another order than what it keeps of the layer before."""
    model, x = nn.Sequential(nn.Linear(5, 64), nn.LayerNorm(64), nn.Linear(64, 3)), vector().double()
    model = randomised(model)
    removed = [i for i in range(64) if i % 5]
    their = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(their, x)
    graph.get_pruning_group(their[0], torch_pruning.prune_linear_out_channels, removed).prune()

    keep = torch.ones(64, dtype=torch.bool)
    keep[removed] = False
    our_graph = components.trace(model, lambda m: {"y": m(x)}, components={"all": [""]})
    our = nn.Sequential(nn.Linear(5, 13), nn.LayerNorm(13), nn.Linear(13, 3)).double()
    our.load_state_dict(components.prune(our_graph, model.state_dict(), {"0": keep}))

    assert torch.equal(our[1].weight, model[1].weight[keep])
    assert their[1].weight.shape == our[1].weight.shape
    assert torch.equal(their[0].weight, our[0].weight)
    assert not torch.equal(their[1].weight, our[1].weight)
    assert torch.equal(their[1].weight.sort().values, our[1].weight.sort().values)
