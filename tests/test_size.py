"""Sizes against counting by hand."""

from __future__ import annotations

import dataclasses
import platform
import time

import pytest
import torch
from torch import nn

from components.dependency import DependencyGraph
from components.errors import UserError
from components.size import Latency, component_macs, component_sizes, latency, macs, parameter_count


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),  # 40 + 8, and buffers
            "decoder": nn.Linear(4, 6),  # 30
        }
    )


GRAPH = DependencyGraph((), {"encoder": ("encoder",), "decoder": ("decoder",)}, {})


def test_parameters_are_counted_and_buffers_are_not() -> None:
    assert parameter_count(model()) == 78


def test_frozen_parameters_count() -> None:
    assert parameter_count(model().requires_grad_(False)) == 78


def test_named_parameters_count_like_the_model() -> None:
    assert parameter_count(dict(model().named_parameters())) == 78
    assert parameter_count({name: p.detach() for name, p in model().named_parameters()}) == 78
    assert parameter_count({}) == 0


def test_shared_parameter_counts_once() -> None:
    shared = model()
    shared["again"] = shared["decoder"]
    assert parameter_count(shared) == 78
    assert parameter_count(dict(shared.named_parameters(remove_duplicate=False))) == 78
    assert component_sizes(GRAPH, shared) == {"encoder": 48, "decoder": 30}


def test_empty_parameters_are_no_duplicates() -> None:
    assert parameter_count({"a": torch.empty(0), "b": torch.empty(0), "c": torch.ones(2)}) == 2


def test_components_add_up() -> None:
    assert component_sizes(GRAPH, model()) == {"encoder": 48, "decoder": 30}
    partly = dataclasses.replace(GRAPH, components={"decoder": ("decoder",)})
    assert component_sizes(partly, model()) == {"decoder": 30, "other": 48}
    assert component_sizes(GRAPH, dict(model().named_parameters())) == {"encoder": 48, "decoder": 30}


def test_macs_of_products_and_convolutions() -> None:
    linear, convolution, up = nn.Linear(7, 5), nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 2, stride=2)
    assert macs(lambda: linear(torch.ones(4, 7))) == 4 * 7 * 5
    assert macs(lambda: convolution(torch.ones(1, 2, 6, 6))) == 2 * 3 * 9 * 4 * 4
    assert macs(lambda: up(torch.ones(1, 3, 4, 4))) == 3 * 2 * 4 * 4 * 4
    assert macs(lambda: torch.ones(3) + 1) == 0


def test_macs_record_no_gradients() -> None:
    outputs = []
    layer = nn.Linear(2, 2)
    macs(lambda: outputs.append(layer(torch.ones(1, 2))))
    assert not outputs[0].requires_grad


def test_macs_belong_to_the_component_whose_weights_are_multiplied() -> None:
    nets = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 5), "c": nn.Linear(4, 5)})
    a, b, c = (nets[name] for name in "abc")
    components = {"first": ["a"], "second": ["b"], "third": ["c"]}
    rows = torch.ones(2, 3)

    def plainly() -> None:
        hidden = a(rows)
        b(hidden), c(hidden), c(hidden)

    def by_copies() -> None:
        hidden = rows.double() @ a.weight.double().t() + a.bias
        stacked = torch.stack([b.weight.t(), c.weight.t()]).double()
        torch.bmm(hidden.expand(2, 2, 4), stacked)
        hidden @ hidden.t()  # of no component
        torch.zeros_like(a.weight) @ rows.t()  # of no component: only its shape is a weight's

    assert component_macs(plainly, nets, components) == {"first": 24, "second": 40, "third": 80}
    found = component_macs(by_copies, nets, components)
    assert found == {"first": 24, "second": 40, "third": 40, "other": 16 + 24}
    assert sum(found.values()) == macs(by_copies)
    partly = component_macs(plainly, nets, {"first": ["a"]})
    assert partly == {"first": 24, "other": 120}
    with torch.inference_mode():
        assert component_macs(plainly, nets, components) == {"first": 24, "second": 40, "third": 80}


def test_macs_of_a_stack_are_shared_out_without_rest() -> None:
    nets = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in "abc"})

    def call() -> None:
        torch.stack([net.weight for net in nets.values()]).sum(0) @ torch.ones(1, 1)

    found = component_macs(call, nets, {name: [name] for name in "abc"})
    assert sum(found.values()) == macs(call) == 1


def test_latency_orders_its_figures_and_names_the_host() -> None:
    calls = []

    def call() -> None:
        calls.append(torch.is_grad_enabled())
        time.sleep(0.001)

    found = latency(call, repeats=7, warmup=2)
    assert calls == [False] * 9
    assert isinstance(found, Latency)
    assert 1.0 <= found.median_ms <= found.p99_ms
    assert (found.host, found.repeats) == (platform.node(), 7)


def test_latency_leaves_the_warmup_out() -> None:
    calls = iter([0.05, 0.0, 0.0, 0.0, 0.0])
    assert latency(lambda: time.sleep(next(calls)), repeats=4, warmup=1).p99_ms < 50


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_latency_needs_calls(repeats: int, warmup: int) -> None:
    with pytest.raises(UserError, match="repeats >= 1 and warmup >= 0"):
        latency(lambda: None, repeats=repeats, warmup=warmup)
