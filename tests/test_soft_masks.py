"""Soft masks: slicing where they are 0 and 1, smooth in between; thresholds that keep what they say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from hand_made_graphs import FAMILIES as HAND_MADE
from hand_made_graphs import make
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import FAMILIES, Family, program
from torch import Tensor, nn

import components
from agents.agent import agent_class
from components import DependencyGraph
from components.choosing import choose, kept_count
from components.plan import PruningPlan
from components.size import component_sizes, parameter_count
from components.soft_masks import SoftModel, soft_mask
from search.base import trace_agent

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-10

UNREACHED = ("normalised", "vmap_ensemble")
"""Families that mix channels where no mask reaches: without a parameter, and under `vmap`."""


def random_keep(graph: DependencyGraph, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        count = max(1, int(group.size * torch.rand(1, generator=generator)))
        keep[group.name] = torch.zeros(group.size, dtype=torch.bool)
        keep[group.name][torch.randperm(group.size, generator=generator)[:count]] = True
    return keep


def as_masks(keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {group: mask.double() for group, mask in keep.items()}


@cache
def traced(family: Family) -> tuple[nn.Module, DependencyGraph]:
    graph = components.trace(family.model(), program, components=family.components, ties=family.ties)
    return family.model(), graph


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(
        float((found[name].detach() - output).abs().max() / output.abs().max())
        for name, output in expected.items()
    )


def of_family(family: Family, seed: int) -> float:
    """How far the masked model is from the sliced one."""
    model, graph = traced(family)
    keep = random_keep(graph, seed)
    sliced = family.empty({group: int(mask.sum()) for group, mask in keep.items()})
    sliced.load_state_dict(components.prune(graph, model.state_dict(), keep))
    with torch.no_grad():
        found = SoftModel(graph, model).outputs(as_masks(keep), program)
        return difference(family.external(found), family.external(sliced.run()))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in UNREACHED], ids=str)
def test_binary_masks_are_slicing(family: Family) -> None:
    assert max(of_family(family, seed) for seed in range(3)) < TOLERANCE


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in UNREACHED], ids=str)
def test_what_no_mask_reaches_is_seen_in_the_outputs(family: Family) -> None:
    """It is by this difference that the optimiser refuses such a model."""
    assert max(of_family(family, seed) for seed in range(3)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_expected_size_is_that_of_the_sliced_model(family: Family) -> None:
    model, graph = traced(family)
    soft = SoftModel(graph, model)
    for seed in range(3):
        keep = random_keep(graph, seed)
        state = components.prune(graph, model.state_dict(), keep)
        kept = sum(state[name].numel() for name, _ in model.named_parameters())
        size = float(soft.expected_size(as_masks(keep)))
        assert size == pytest.approx(kept / parameter_count(model), abs=1e-12)


@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made_graphs(name: str) -> None:
    """The gates of these models multiply activations; their LayerNorm is left out by keeping its channels."""
    model, graph, shape = make(name)
    model.eval()
    x = torch.randn(5, *shape, dtype=torch.float64)
    keep = random_keep(graph, 1)
    if name == "mlp":
        keep["first"] = torch.ones(7, dtype=torch.bool)
    with torch.no_grad():
        found = SoftModel(graph, model).outputs(as_masks(keep), lambda m: {"y": m(x)})
        assert difference(found, {"y": model(x, as_masks(keep))}) < TOLERANCE


def agents() -> list[Any]:
    shapes = [(shape, norm) for shape in ("mlp", "conv") for norm in ("none", "layer", "batch")]
    cases = [
        pytest.param("autoencoder", {"shape": s, "normalization": n, "hidden": [12, 8]}, id=f"{s}-{n}")
        for s, n in shapes
    ]
    small = {"task": "gymnasium:Pendulum-v1", "encoder_width": 16, "mlp_width": 12, "latent": 6}
    return [*cases, pytest.param("tdmpc", small, id="tdmpc")]


@pytest.mark.parametrize(("kind", "options"), agents())
def test_the_built_in_agents(kind: str, options: dict[str, Any]) -> None:
    dense = agent_class(kind)(options)
    inputs = dense.calibration_inputs(6, 0)
    graph = trace_agent(dense, inputs)
    model = dense.model.double()
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        tensor.data.add_(0.2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    inputs = {name: rows.double() for name, rows in inputs.items()}
    internal = {name for tie in dense.ties for name in tie}
    for seed in range(2):
        keep = random_keep(graph, seed)
        small = agent_class(kind)(options, {group: int(mask.sum()) for group, mask in keep.items()})
        small.model.double().load_state_dict(components.prune(graph, model.state_dict(), keep))
        soft = SoftModel(graph, model)
        with torch.no_grad():
            found = soft.outputs(as_masks(keep), lambda m: dense.program(m, inputs))
            expected = small.program(small.model, inputs)
        assert difference(found, {n: o for n, o in expected.items() if n not in internal}) < TOLERANCE
        kept = sum(component_sizes(graph, small.model).values())
        assert float(soft.expected_size(as_masks(keep))) * parameter_count(model) == pytest.approx(kept)


def test_nothing_is_changed_and_gradients_are_those_of_finite_differences() -> None:
    model, graph, shape = make("mlp")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, *shape, dtype=torch.float64)
    soft = SoftModel(graph, model)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        masks = {"first": first, "second": second}
        made = soft.outputs(masks, lambda m: {"y": m(x)})["y"]
        return made.square().sum() + soft.expected_size(masks)

    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(n, generator=generator, dtype=torch.float64).requires_grad_() for n in (7, 5)]
    assert torch.autograd.gradcheck(loss, masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- thresholds --------------------------------------------------------------------------------------------

scores_strategy = st.lists(st.floats(0.01, 100.0), min_size=2, max_size=40, unique=True).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
distinct = scores_strategy.filter(lambda scores: float(scores.sort().values.diff().min()) > 1e-6)


def masked(scores: Tensor, share: float, width: float = 0.5) -> Tensor:
    return soft_mask(scores, torch.tensor(share, dtype=torch.float64), width)


@given(distinct, st.floats(0.001, 1.0), st.sampled_from([0.05, 1.0, 5.0]))
def test_masks_above_one_half_are_the_channels_that_a_trial_keeps(
    scores: Tensor, share: float, width: float
) -> None:
    size = len(scores)
    if abs((share * size) % 1 - 0.5) < 1e-6:
        return  # the threshold lies on a score
    graph = DependencyGraph((components.Group("g", frozenset({"c"}), size, ()),), {}, {})
    keep = choose(graph, {"l2": {"g": scores}}, PruningPlan({"l2": 1.0}, {"g": 1.0 - share}))["g"]
    kept = masked(scores / scores.mean(), share, width) > 0.5
    assert torch.equal(kept, keep)
    assert int(kept.sum()) == kept_count(size, 1.0 - share)


@given(distinct, st.floats(0.05, 0.9), st.floats(0.02, 0.1), st.sampled_from([0.1, 2.0]))
def test_masks_grow_with_the_score_and_narrow_ones_with_the_share(
    scores: Tensor, share: float, more: float, width: float
) -> None:
    masks = masked(scores, share, width)
    assert bool(((masks >= 0) & (masks <= 1)).all())
    ordered = masks[scores.argsort()]
    assert bool((ordered.diff() >= 0).all())
    kept, larger = masked(scores, share, 0.1) > 0.5, masked(scores, share + more, 0.1) > 0.5
    assert bool((kept <= larger).all())


@given(distinct, st.floats(0.05, 0.95), st.floats(0.1, 10.0))
def test_masks_know_no_unit(scores: Tensor, share: float, unit: float) -> None:
    assert torch.allclose(masked(scores, share), masked(unit * scores, share), atol=1e-6)


def test_narrow_masks_are_binary_and_wide_ones_are_not() -> None:
    scores = torch.arange(1.0, 101.0, dtype=torch.float64)
    narrow, wide = masked(scores, 0.3, 0.05), masked(scores, 0.3, 10.0)
    assert float((narrow - (scores > 70.5).double()).abs().max()) < 1e-3
    assert int(((wide > 0.27) & (wide < 0.73)).sum()) == 20


def test_a_larger_share_raises_the_masks_by_as_many_channels() -> None:
    """Along evenly spread scores, d(sum of masks) / d(share) is the number of channels."""
    scores = torch.arange(1.0, 201.0, dtype=torch.float64)
    share = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    soft_mask(scores, share, 3.0).sum().backward()
    assert share.grad is not None
    assert float(share.grad) == pytest.approx(200, rel=0.01)


def test_equal_scores_make_finite_masks_and_gradients() -> None:
    scores = torch.ones(8, dtype=torch.float64, requires_grad=True)
    share = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    masks = soft_mask(scores, share, 0.1)
    masks.sum().backward()
    assert bool(torch.isfinite(masks).all())
    assert share.grad is not None
    assert bool(torch.isfinite(share.grad))


@settings(max_examples=20)
@given(distinct)
def test_at_least_one_channel_is_kept_and_a_whole_group_whole(scores: Tensor) -> None:
    assert int((masked(scores, 1e-9, 0.1) > 0.5).sum()) == 1
    assert int((masked(scores, 1.0, 0.1) > 0.5).sum()) == len(scores)
