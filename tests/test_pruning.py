"""Slicing states: the right indices, nothing shared, nothing modified, mistakes named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import components
from components import DependencyGraph, Group, Member, UserError
from components.pruning import kept_indices


def member(parameter: str, axis: int, indices: list[list[int]], consumes: bool = False) -> Member:
    return Member(parameter, axis, torch.tensor(indices), consumes)


def by_hand() -> DependencyGraph:
    """Two layers read by a third through `cat([b, data, a, a])`, and a table that nothing touches."""
    a = Group(
        "a",
        frozenset({"left"}),
        3,
        (
            member("a.weight", 0, [[0], [1], [2]]),
            member("a.bias", 0, [[0], [1], [2]]),
            member("c.weight", 1, [[3, 6], [4, 7], [5, 8]], consumes=True),
        ),
    )
    b = Group(
        "b",
        frozenset({"left", "right"}),
        2,
        (
            member("b.weight", 0, [[1], [0]]),
            member("b.weight", 1, [[0], [1]]),
            member("c.weight", 1, [[1], [0]], consumes=True),
        ),
    )
    shapes = {
        "a.weight": (3, 4),
        "a.bias": (3,),
        "b.weight": (2, 2),
        "c.weight": (2, 9),
        "table": (5,),
        "n": (),
    }
    return DependencyGraph(
        groups=(a, b),
        components={"left": ("a", "b"), "right": ("c", "table", "n")},
        shapes={name: torch.Size(shape) for name, shape in shapes.items()},
        aliases={"again.weight": "a.weight"},
    )


def counted(graph: DependencyGraph) -> dict[str, Tensor]:
    """Every element of every tensor is a different number."""
    state, start = {}, 0
    for name, shape in graph.shapes.items():
        state[name] = torch.arange(start, start + shape.numel(), dtype=torch.float64).reshape(shape)
        start += shape.numel()
    return state


def test_takes_the_slices_of_every_axis() -> None:
    graph = by_hand()
    state = counted(graph)
    keep = {"a": torch.tensor([True, False, True]), "b": torch.tensor([False, True])}
    pruned = components.prune(graph, state, keep)
    assert torch.equal(pruned["a.weight"], state["a.weight"][[0, 2]])
    assert torch.equal(pruned["a.bias"], state["a.bias"][[0, 2]])
    assert torch.equal(pruned["b.weight"], state["b.weight"][:1, 1:])  # channel 1 is row 0 and column 1
    assert torch.equal(pruned["c.weight"], state["c.weight"][:, [0, 2, 3, 5, 6, 8]])
    assert torch.equal(pruned["table"], state["table"])
    assert torch.equal(pruned["n"], state["n"])
    assert list(pruned) == list(state)


def test_groups_that_are_not_named_stay_whole() -> None:
    graph = by_hand()
    state = counted(graph)
    pruned = components.prune(graph, state, {"b": torch.tensor([True, False])})
    assert torch.equal(pruned["a.weight"], state["a.weight"])
    assert torch.equal(pruned["c.weight"], state["c.weight"][:, [1, 2, 3, 4, 5, 6, 7, 8]])


def test_kept_indices_name_only_what_loses_something() -> None:
    graph = by_hand()
    assert kept_indices(graph, graph.keep_all()) == {}
    indices = kept_indices(graph, {"a": torch.tensor([False, True, True])})
    assert indices.keys() == {"a.weight", "a.bias", "c.weight"}
    rows, columns = indices["a.weight"]
    assert rows is not None
    assert rows.tolist() == [1, 2]
    assert columns is None
    assert indices["c.weight"][0] is None


@pytest.mark.parametrize("mask", [[True, False, True], [True, True, True]])
def test_is_pure_and_shares_no_memory(mask: list[bool]) -> None:
    graph = by_hand()
    state = {name: tensor.requires_grad_() for name, tensor in counted(graph).items()}
    keep = {"a": torch.tensor(mask)}
    before = copy.deepcopy(state), copy.deepcopy(keep)
    pruned = components.prune(graph, state, keep)
    for name, tensor in pruned.items():
        assert tensor.untyped_storage().data_ptr() != state[name].untyped_storage().data_ptr()
        assert not tensor.requires_grad
        tensor.fill_(-1)
    assert all(torch.equal(state[name], tensor) for name, tensor in before[0].items())
    assert all(tensor.requires_grad for tensor in state.values())
    assert torch.equal(keep["a"], before[1]["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_keeps_the_dtype_and_any_layout(dtype: torch.dtype) -> None:
    graph = by_hand()
    state = {name: tensor.to(dtype) for name, tensor in counted(graph).items()}
    state["c.weight"] = state["c.weight"].t().contiguous().t()
    pruned = components.prune(graph, state, {"a": torch.tensor([False, True, False])})
    for name, tensor in pruned.items():
        assert tensor.dtype == dtype
        if name == "c.weight":
            assert torch.equal(tensor, state[name][:, [0, 1, 2, 4, 7]])


def test_states_that_mirror_a_part_of_the_model() -> None:
    """Optimizer moments have no buffers; a target network has another's names and values."""
    graph = by_hand()
    state = counted(graph)
    keep = {"a": torch.tensor([True, False, False])}
    whole = components.prune(graph, state, keep)
    assert components.prune(graph, {}, keep) == {}
    for name in state:
        part = components.prune(graph, {name: -state[name]}, keep)
        assert list(part) == [name]
        assert torch.equal(part[name], -whole[name])


def test_second_names_of_shared_parameters() -> None:
    graph = by_hand()
    weight = counted(graph)["a.weight"]
    keep = {"a": torch.tensor([False, False, True])}
    pruned = components.prune(graph, {"again.weight": weight, "a.weight": weight}, keep)
    assert torch.equal(pruned["again.weight"], weight[2:])
    assert torch.equal(pruned["a.weight"], weight[2:])


def test_a_module_held_twice_is_sliced_under_both_names() -> None:
    first, shared = nn.Linear(3, 4), nn.Linear(4, 4)
    net = nn.Sequential(first, shared, shared, nn.Linear(4, 2))
    x = torch.randn(5, 3)
    graph = components.trace(net, lambda m: {"y": m(x)}, components={"all": [""]})
    assert graph.widths == {"0": 4}
    assert graph.aliases == {"2.weight": "1.weight", "2.bias": "1.bias"}
    pruned = components.prune(graph, net.state_dict(), {"0": torch.tensor([True, False, True, True])})
    assert pruned.keys() == net.state_dict().keys()
    assert pruned["2.weight"].shape == (3, 3)
    assert torch.equal(pruned["2.weight"], pruned["1.weight"])


HALF = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"aa": HALF}, "unknown pruning group 'aa'; did you mean 'a'\\? allowed: a, b"),
        ({"a": HALF.float()}, r"mask of group 'a' is torch.float32 of shape \(3,\); it has to be torch.bool"),
        ({"a": HALF[:2]}, r"of shape \(2,\); it has to be torch.bool of shape \(3,\)"),
        ({"a": HALF[None]}, r"of shape \(1, 3\); it has to be"),
        ({"a": [True, False, True]}, r"is \[True, False, True\]; it has to be torch.bool"),
        ({"a": ~(HALF | True)}, "keeps nothing; at least one of 3 has to stay"),
    ],
)
def test_wrong_masks(keep: dict[str, Any], message: str) -> None:
    graph = by_hand()
    with pytest.raises(UserError, match=message) as raised:
        components.prune(graph, counted(graph), keep)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.wieght": torch.zeros(3, 4)}, "the state has 'a.wieght', which the traced model does not have"),
        (
            {"a.weight": torch.zeros(2, 4)},
            r"'a.weight' has shape \(2, 4\) in the state and \(3, 4\) in the traced",
        ),
        ({"a.weight": torch.zeros(12)}, r"'a.weight' has shape \(12,\)"),
        ({"a.weight": 1.0}, "'a.weight' is float in the state; it has to be a tensor"),
    ],
)
def test_wrong_states(state: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        components.prune(by_hand(), state, {"a": HALF})
    assert "\n" not in str(raised.value)


def test_an_already_pruned_state_is_refused() -> None:
    graph = by_hand()
    once = components.prune(graph, counted(graph), {"a": HALF})
    with pytest.raises(UserError, match="in the traced model"):
        components.prune(graph, once, {"a": HALF})
