"""The search space: dimensions, plans from points and back, anchors, budgets."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.choosing import kept_count
from components.dependency import Group
from components.errors import UserError
from components.plan import PruningPlan
from search.space import OptionRange, SearchSpace

ENCODER, DECODER = frozenset({"encoder"}), frozenset({"decoder"})
GROUPS = (
    Group("encoder.0", ENCODER, 64, ()),
    Group("latent", ENCODER | DECODER, 8, ()),
    Group("decoder.0", DECODER, 64, ()),
    Group("decoder.2", DECODER, 1, ()),
)
METRICS = ("l2", "fisher", "reconstruction")


def build(**changes: Any) -> SearchSpace:
    arguments = {"metrics": METRICS, "max_ratio": 0.98, "trials": 64} | changes
    return SearchSpace.build(arguments.pop("groups", GROUPS), **arguments)


def names(space: SearchSpace) -> list[str]:
    return [dimension.name for dimension in space.dimensions]


def points(space: SearchSpace) -> st.SearchStrategy[dict[str, float]]:
    return st.fixed_dictionaries({d.name: st.floats(d.low, d.high) for d in space.dimensions})


def test_dimensions_are_kept_shares_and_mixing_coordinates() -> None:
    space = build()
    assert names(space) == [
        "keep/encoder.0",
        "keep/latent",
        "keep/decoder.0",
        "mix/l2",
        "mix/fisher",
        "mix/reconstruction",
    ]
    for dimension in space.dimensions:
        if dimension.name.startswith("keep/"):
            assert (dimension.low, dimension.high, dimension.log) == (pytest.approx(0.02), 1.0, True)
        else:
            assert (dimension.low, dimension.high, dimension.log) == (0.0, 1.0, False)


def test_one_metric_needs_no_mixing() -> None:
    space = build(metrics=("l2",))
    assert names(space) == ["keep/encoder.0", "keep/latent", "keep/decoder.0"]
    plan = space.to_plan({"keep/encoder.0": 0.25, "keep/latent": 1.0, "keep/decoder.0": 0.5})
    assert plan == PruningPlan(
        {"l2": 1.0}, {"encoder.0": 0.75, "latent": 0.0, "decoder.0": 0.5, "decoder.2": 0.0}
    )


@given(points(build()))
def test_coefficients_follow_the_cubed_logarithm(params: dict[str, float]) -> None:
    plan = build().to_plan(params)
    cubes = [abs(math.log(max(params[f"mix/{metric}"], sys.float_info.min))) ** 3 for metric in METRICS]
    weights = [plan.coefficients[metric] for metric in METRICS]
    assert math.fsum(weights) == pytest.approx(1.0)  # type: ignore[arg-type]
    if sum(cubes) > 0:
        expected = [cube / sum(cubes) for cube in cubes]
        assert weights == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for group, share in (("encoder.0", params["keep/encoder.0"]), ("latent", params["keep/latent"])):
        assert plan.ratios[group] == 1.0 - share


@pytest.mark.parametrize("coefficients", ["equal", "shared", "per_component"])
@given(st.data())
def test_params_of_inverts_to_plan(coefficients: str, data: st.DataObject) -> None:
    space = build(coefficients=coefficients, trials=10_000)
    plan = space.to_plan(data.draw(points(space)))
    params = space.params_of(plan)
    assert set(params) == set(names(space))
    assert all(d.low <= params[d.name] <= d.high for d in space.dimensions)
    again = space.to_plan(params)
    assert again.ratios == pytest.approx(plan.ratios, abs=1e-15)
    for key in plan.coefficients:
        assert again.coefficients[key] == pytest.approx(plan.coefficients[key], abs=1e-9)


def test_per_component_mixes_every_component_and_the_coupling_groups() -> None:
    extra = Group("head.0", frozenset({"head"}), 1, ())
    space = build(groups=(*GROUPS, extra), coefficients="per_component", trials=200)
    mixtures = ["encoder", "coupling", "decoder"]
    expected = [f"mix/{mixture}/{metric}" for mixture in mixtures for metric in METRICS]
    assert names(space)[3:] == expected
    params = dict.fromkeys(names(space), 0.5) | {"mix/coupling/l2": 1.0, "mix/coupling/fisher": 1.0}
    plan = space.to_plan(params)
    assert plan.coefficients["coupling"] == {"l2": 0.0, "fisher": 0.0, "reconstruction": 1.0}
    third = pytest.approx(1 / 3)
    assert plan.coefficients["encoder"] == {"l2": third, "fisher": third, "reconstruction": third}
    for group in (*GROUPS, extra):  # the plan can score every group, also those that are not searched
        assert plan.coefficients_of(group)


def test_per_component_needs_ten_trials_a_dimension() -> None:
    dimensions = len(names(build(coefficients="per_component", trials=1, force=True)))
    assert dimensions == 12
    with pytest.raises(UserError, match=r"12 dimensions.* at least 120, not 119.*coefficients_force"):
        build(coefficients="per_component", trials=119)
    build(coefficients="per_component", trials=120)
    build(coefficients="shared", trials=1)


def test_groups_may_share_a_kept_share() -> None:
    twins = tuple(Group(f"q{n}.0", frozenset({f"q{n}"}), size, ()) for n, size in ((1, 32), (2, 16)))
    space = build(groups=twins, metrics=("l2",), shared={"q2.0": "q1.0"})
    assert names(space) == ["keep/q1.0"]
    assert space.to_plan({"keep/q1.0": 0.25}).ratios == {"q1.0": 0.75, "q2.0": 0.75}
    named = build(groups=twins, metrics=("l2",), shared={"q1.0": "q", "q2.0": "q"})
    assert names(named) == ["keep/q"]
    assert named.params_of(PruningPlan({"l2": 1.0}, {"q1.0": 0.75, "q2.0": 0.75})) == {"keep/q": 0.25}
    with pytest.raises(UserError, match=r"'q3\.0'.*did you mean 'q2\.0'"):
        build(groups=twins, shared={"q3.0": "q1.0"})


OPTIONS = {"samples": OptionRange(32, 256, own=512), "iterations": OptionRange(2, 6, own=4)}


@pytest.mark.parametrize("metrics", [METRICS, ("l2",)])
@given(st.data())
def test_options_are_whole_numbers_beside_the_plan(metrics: tuple[str, ...], data: st.DataObject) -> None:
    plain, space = build(metrics=metrics), build(metrics=metrics, options=OPTIONS)
    assert names(space) == [*names(plain), "option/samples", "option/iterations"]
    assert not any(dimension.whole for dimension in plain.dimensions)
    samples, iterations = space.dimensions[-2:]
    assert (samples.low, samples.high, samples.log, samples.whole) == (32, 256, True, True)
    assert (iterations.low, iterations.high, iterations.log, iterations.whole) == (2, 6, True, True)
    chosen = {
        "samples": data.draw(st.integers(32, 256)),
        "iterations": data.draw(st.integers(2, 6)),
    }
    params = data.draw(points(plain)) | {f"option/{name}": value for name, value in chosen.items()}
    assert space.to_options(params) == chosen
    assert space.to_plan(params) == plain.to_plan(params)
    found = space.params_of(space.to_plan(params), chosen)
    assert set(found) == set(names(space))
    assert space.to_options(found) == chosen


def test_options_that_are_not_given_are_the_agents_own_within_the_bounds() -> None:
    space = build(options=OPTIONS)
    for anchor in space.anchors():
        assert list(anchor.params) == names(space)
        assert space.to_options(anchor.params) == {"samples": 256, "iterations": 4}
    params = space.params_of(PruningPlan(dict.fromkeys(METRICS, 1.0), {}), {"iterations": 100})
    assert (params["option/samples"], params["option/iterations"]) == (256, 6)
    assert [anchor.label for anchor in space.anchors()] == [anchor.label for anchor in build().anchors()]
    assert build().to_options({}) == {}
    with pytest.raises(KeyError):
        space.to_options({"option/samples": 64})


def test_options_are_part_of_the_decision() -> None:
    space = build(options=OPTIONS)
    for anchor in space.anchors()[:2]:  # the dense one decides by sizes and options alone
        plan = space.to_plan(anchor.params)
        choices = [{"samples": n, "iterations": i} for n in (32, 33) for i in (2, 4)]
        assert len({space.decision(plan, choice) for choice in choices}) == 4
        own = {"samples": 512, "iterations": 4}
        assert space.decision(plan) == space.decision(plan, own) != space.decision(plan, choices[0])


def test_options_count_as_dimensions() -> None:
    with pytest.raises(UserError, match=r"14 dimensions.* at least 140, not 139"):
        build(coefficients="per_component", trials=139, options=OPTIONS)
    build(coefficients="per_component", trials=140, options=OPTIONS)


def test_nothing_to_prune_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to prune"):
        build(groups=(Group("only", ENCODER, 1, ()),))


def test_anchors() -> None:
    space = build()
    anchors = {anchor.label: space.to_plan(anchor.params) for anchor in space.anchors()}
    assert list(anchors) == [
        "dense",
        "uniform 50 %",
        "uniform 75 %",
        "uniform 90 %",
        "uniform 96 %",
        "pure l2",
        "pure fisher",
        "pure reconstruction",
    ]
    searched = ("encoder.0", "latent", "decoder.0")
    for label, ratio in (("dense", 0.0), ("uniform 50 %", 0.5), ("uniform 96 %", 0.96)):
        assert [anchors[label].ratios[group] for group in searched] == pytest.approx([ratio] * 3)
        assert anchors[label].coefficients == dict.fromkeys(METRICS, 1 / 3)
    assert set(anchors["dense"].ratios.values()) == {0.0}
    assert anchors["pure fisher"].coefficients == {"l2": 0.0, "fisher": 1.0, "reconstruction": 0.0}
    assert anchors["pure fisher"].ratios == anchors["uniform 90 %"].ratios


@pytest.mark.parametrize("coefficients", ["equal", "shared", "per_component"])
@pytest.mark.parametrize("max_ratio", [0.98, 0.96, 0.9, 0.3])
def test_anchors_lie_inside_the_space_and_their_params_give_their_plans(
    coefficients: str, max_ratio: float
) -> None:
    space = build(coefficients=coefficients, max_ratio=max_ratio, trials=200)
    plans = []
    for anchor in space.anchors():
        assert list(anchor.params) == names(space)
        assert all(d.low <= anchor.params[d.name] <= d.high for d in space.dimensions)
        plans.append(space.to_plan(anchor.params))
        assert space.to_plan(space.params_of(plans[-1])) == plans[-1]
    assert len({plan.to_json() for plan in plans}) == len(plans)


def test_where_all_metrics_count_alike_only_ratios_are_searched() -> None:
    space = build(coefficients="equal", trials=1)
    assert names(space) == names(build(metrics=("l2",)))
    plans = [space.to_plan(anchor.params) for anchor in space.anchors()]
    assert len(plans) == 5  # no metric alone
    for plan in plans:
        assert plan.coefficients == dict.fromkeys(METRICS, 1 / 3)
    with pytest.raises(UserError, match=r"otherwise: pruning\.coefficients is 'equal' here$"):
        space.params_of(replace(plans[1], coefficients={"l2": 0.5, "fisher": 0.5}))


def test_anchors_beyond_the_largest_ratio_are_clipped_and_proposed_once() -> None:
    labels = [anchor.label for anchor in build(max_ratio=0.7, metrics=("l2",)).anchors()]
    assert labels == ["dense", "uniform 50 %", "uniform 70 %"]


def test_anchors_of_one_metric_have_no_pure_one_beside_the_uniform() -> None:
    assert [anchor.label for anchor in build(metrics=("l2",)).anchors()][-1] == "uniform 96 %"
    other = build(metrics=("l2",)).anchors(uniform_ratios=(0.2,), pure_ratio=0.8)
    assert [anchor.label for anchor in other] == ["dense", "uniform 20 %", "pure l2"]


def test_plans_from_elsewhere_are_clipped_into_the_space() -> None:
    space = build(max_ratio=0.9, metrics=("l2",))
    params = space.params_of(PruningPlan({"l2": 2.0}, {"encoder.0": 0.999, "latent": 0.5}))
    low = space.dimensions[0].low
    assert params == {"keep/encoder.0": low, "keep/latent": 0.5, "keep/decoder.0": 1.0}


def test_equal_decisions_are_recognised() -> None:
    space = build()
    params = space.anchors()[1].params
    nearly = params | {"keep/latent": params["keep/latent"] + 0.01}
    fewer = params | {"keep/latent": params["keep/latent"] - 0.1}
    remixed = params | {"mix/l2": 0.9}

    def decide(point: dict[str, float]) -> tuple[object, ...]:
        return space.decision(space.to_plan(point))

    assert kept_count(8, 0.5) == kept_count(8, 0.49) != kept_count(8, 0.6)
    assert decide(params) == decide(nearly)
    assert len({decide(params), decide(fewer), decide(remixed)}) == 3
    dense = space.anchors()[0].params
    assert decide(dense) == decide(dense | {"mix/l2": 0.9})  # coefficients decide nothing there


def test_plans_that_do_not_fit_are_refused() -> None:
    shared = PruningPlan({"l2": 1.0}, {})
    each = PruningPlan({"encoder": {"l2": 1.0}}, {})
    with pytest.raises(UserError, match="does not fit"):
        build(coefficients="per_component", trials=200).params_of(shared)
    with pytest.raises(UserError, match="does not fit"):
        build().params_of(each)
    with pytest.raises(KeyError):
        build().to_plan({"keep/latent": 0.5})
