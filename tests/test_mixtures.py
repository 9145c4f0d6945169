"""Mixtures: shared, per component, per group, given; what does not exist is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.choosing import choose
from components.dependency import DependencyGraph, Group
from components.errors import UserError
from components.plan import PruningPlan, mixture_of
from search.mixtures import Mixtures
from search.space import SearchSpace
from search.wandb_records import flat

ENCODER, DECODER = frozenset({"encoder"}), frozenset({"decoder"})
GROUPS = (
    Group("encoder.0", ENCODER, 8, ()),
    Group("latent", ENCODER | DECODER, 4, ()),
    Group("decoder.0", DECODER, 8, ()),
    Group("decoder.2", DECODER, 1, ()),
)
METRICS = ("l2", "fisher")
GRAPH = DependencyGraph(GROUPS, {}, {})
GIVEN = {"decoder.0": {"l2": 1}, "coupling": {"l2": 1, "fisher": 3}}


def space_of(coefficients: Any, **more: Any) -> SearchSpace:
    arguments = {"metrics": METRICS, "max_ratio": 0.9, "trials": 64, "force": True} | more
    return SearchSpace.build(GROUPS, coefficients=coefficients, **arguments)


def mixing_dimensions(space: SearchSpace) -> list[str]:
    return [d.name for d in space.dimensions if d.name.startswith("mix/")]


@pytest.mark.parametrize(
    ("coefficients", "keys", "searched"),
    [
        ("shared", [""], [""]),
        ("equal", [""], []),
        ("per_component", ["encoder", "coupling", "decoder"], ["encoder", "coupling", "decoder"]),
        (
            "per_group",
            ["encoder.0", "latent", "decoder.0", "decoder.2"],
            ["encoder.0", "latent", "decoder.0"],  # one channel always stays
        ),
        (GIVEN, ["decoder.0", "coupling", "others"], ["others"]),
        ({"encoder": {"l2": 1}, "coupling": {"l2": 1}, "decoder": {"l2": 1}}, None, []),
        ({"others": {"fisher": 2}}, ["others"], []),
    ],
)
def test_keys_and_what_is_searched(coefficients: Any, keys: list[str] | None, searched: list[str]) -> None:
    space = space_of(coefficients)
    assert list(space.mixtures.keys) == (keys if keys is not None else list(coefficients))
    assert list(space.mixtures.searched) == searched
    assert mixing_dimensions(space) == [
        f"mix/{key + '/' if key else ''}{metric}" for key in searched for metric in METRICS
    ]
    for anchor in space.anchors():
        plan = space.to_plan(anchor.params)
        assert all(plan.coefficients_of(group) for group in GROUPS)


def test_a_groups_own_coefficients_come_before_its_components_and_those_before_the_others() -> None:
    encoder, latent, decoder, last = GROUPS
    keys = {"decoder.0", "decoder", "coupling", "others"}
    assert [mixture_of(group, keys) for group in (encoder, latent, decoder, last)] == [
        "others",
        "coupling",
        "decoder.0",
        "decoder",
    ]
    assert mixture_of(encoder, {"decoder"}) is None


def test_given_coefficients_are_in_every_plan_and_choose_by_them() -> None:
    space = space_of(GIVEN)
    generator = torch.Generator().manual_seed(0)
    scores = {m: {g.name: torch.rand(g.size, generator=generator) for g in GROUPS} for m in METRICS}
    for u in (0.1, 0.9):
        params = dict.fromkeys((d.name for d in space.dimensions), 0.5) | {"mix/others/l2": u}
        plan = space.to_plan(params)
        assert plan.coefficients["decoder.0"] == {"l2": 1.0, "fisher": 0.0}
        assert plan.coefficients["coupling"] == {"l2": 0.25, "fisher": 0.75}
        alone = choose(GRAPH, scores, PruningPlan({"l2": 1.0}, plan.ratios))
        assert torch.equal(choose(GRAPH, scores, plan)["decoder.0"], alone["decoder.0"])
    assert space.to_plan(params).coefficients != space.to_plan(params | {"mix/others/l2": 0.2}).coefficients


@given(st.data())
def test_groups_are_mixed_apart(data: st.DataObject) -> None:
    """A group's coordinates change what it keeps, and nothing else; the way back is exact."""
    space = space_of("per_group")
    drawn = {d.name: data.draw(st.floats(d.low, d.high)) for d in space.dimensions}
    plan = space.to_plan(drawn)
    changed = space.to_plan(drawn | {"mix/latent/l2": data.draw(st.floats(0, 1))})
    for key, weights in plan.coefficients.items():
        assert sum(weights.values()) == pytest.approx(1.0)  # type: ignore[union-attr]
        assert key == "latent" or weights == changed.coefficients[key]
    again = space.to_plan(space.params_of(plan))
    for key, weights in plan.coefficients.items():
        assert again.coefficients[key] == pytest.approx(weights, abs=1e-9)
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_per_group_needs_ten_trials_a_dimension() -> None:
    with pytest.raises(UserError, match=r"'per_group' makes 9 dimensions.*at least 90, not 89"):
        space_of("per_group", trials=89, force=False)
    space_of("per_group", trials=90, force=False)
    space_of(GIVEN, trials=1, force=False)  # one mixture is searched, as where all share


def test_w_and_b_has_a_column_for_every_weight() -> None:
    plan = space_of("per_group").to_plan(space_of("per_group").anchors()[0].params)
    assert flat(plan.coefficients)["encoder/0/l2"] == 0.5


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (
            {"latnet": {"l2": 1}},
            "pruning.coefficients has 'latnet', which is neither a group nor a component of the model: "
            "did you mean 'latent'? allowed: coupling, decoder, decoder.0, decoder.2, encoder, encoder.0, ",
        ),
        (
            {"latent": {"fischer": 1}},
            "pruning.coefficients has 'fischer' for 'latent', which is not among pruning.metrics: did you "
            "mean 'fisher'? allowed: fisher, l2",
        ),
        (
            {"latent": {"l2": -1}},
            "pruning.coefficients: the coefficient of metric 'l2' of 'latent' has to be",
        ),
        ({"latent": {"l2": 0}}, "pruning.coefficients: the mixing coefficients of 'latent' are all zero"),
        (
            {"latent": {"l2": 1}, "coupling": {"fisher": 1}},
            "pruning.coefficients has 'coupling', and every group that it could be for has coefficients of ",
        ),
    ],
)
def test_what_does_not_exist_is_refused(coefficients: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        space_of(coefficients)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_group_named_like_another_component_is_refused() -> None:
    groups = (Group("decoder", ENCODER, 4, ()), Group("decoder.0", DECODER, 4, ()))
    with pytest.raises(UserError, match="group 'decoder' is named like a component"):
        Mixtures.build(groups, METRICS, "per_component")
    Mixtures.build(groups, METRICS, "per_group")


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"l2": 1.0}, "no coefficients for 'decoder.0'"),
        (
            {"decoder.0": {"l2": 1.0}, "coupling": {"l2": 1.0}, "others": {"l2": 1.0}},
            "otherwise for 'coupling'",
        ),
        ({"encoder": {"l2": 1.0}}, "no coefficients for 'decoder.0'"),
    ],
)
def test_plans_of_other_mixtures_do_not_fit(coefficients: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"does not fit this search.*{message}"):
        space_of(GIVEN).params_of(PruningPlan(coefficients, {}))
