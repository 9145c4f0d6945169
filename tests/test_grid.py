"""The optimisers that plan ahead: an order from coarse to fine, quasi-random points, the grid of a budget."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.agent import Objective
from components.choosing import kept_count
from components.dependency import Group
from components.errors import UserError
from search.config import GridConfig
from search.grid import Grid, Resolution, best_resolution, grid_for, lattice
from search.optimisers import QuasiRandom, coarse_to_fine
from search.space import OptionRange, SearchSpace
from search.study import Study

ENCODER, DECODER = frozenset({"encoder"}), frozenset({"decoder"})
GROUPS = (
    Group("encoder.0", ENCODER, 400, ()),
    Group("latent", ENCODER | DECODER, 300, ()),
    Group("decoder.0", DECODER, 500, ()),
)
METRICS = ("l2", "fisher", "reconstruction")


def space_of(metrics: int = 3, coefficients: Any = "shared", **more: Any) -> SearchSpace:
    arguments = {"groups": GROUPS, "max_ratio": 0.98, "trials": 1, "force": True} | more
    return SearchSpace.build(
        arguments.pop("groups"), metrics=METRICS[:metrics], coefficients=coefficients, **arguments
    )


spaces = st.builds(
    space_of,
    metrics=st.integers(1, 3),
    coefficients=st.sampled_from(["equal", "shared", "per_component", "per_group", {"latent": {"l2": 1.0}}]),
    max_ratio=st.floats(0.3, 0.99),
)


def proposals(grid: Grid, space: SearchSpace, first: int) -> list[dict[str, float]]:
    found = [grid.propose(first + index) for index in range(len(grid))]
    assert grid.propose(first - 1) is None
    assert grid.propose(first + len(grid)) is None
    return [params for params in found if params is not None]


@given(st.integers(0, 300))
def test_coarse_to_fine_is_an_order_whose_beginnings_are_spread(count: int) -> None:
    order = coarse_to_fine(count)
    assert sorted(order) == list(range(count))
    for some in (n for n in (3, 5, 9, 17, 33, 65) if n <= count):
        places = sorted(order[:some])
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert (places[0], places[-1]) == (0, count - 1)
        assert max(gaps) <= 2 * min(gaps) + 1


def test_quasi_random_points_are_inside_and_the_same_again() -> None:
    space = space_of(options={"samples": OptionRange(32, 256, own=64)})
    one, again, other = (QuasiRandom(space.dimensions, seed) for seed in (1, 1, 2))
    points = [one.propose(number) for number in range(16)]
    assert all(space.holds(point) for point in points)
    assert [again.propose(number) for number in reversed(range(16))] == points[::-1]
    assert other.propose(3) != points[3]


@given(st.integers(1, 4), st.integers(1, 6))
def test_the_lattice_is_every_composition_once_and_pure_metrics_come_first(metrics: int, steps: int) -> None:
    points = list(lattice(metrics, steps))
    brute = {
        tuple(part / steps for part in parts)
        for parts in itertools.product(range(steps + 1), repeat=metrics)
        if sum(parts) == steps
    }
    assert {tuple(point) for point in points} == brute
    assert len(points) == len(brute)
    assert all(max(point) == 1.0 for point in points[:metrics])


@settings(max_examples=60)
@given(spaces, st.integers(1, 300), st.integers(0, 9))
def test_a_grid_fits_its_budget_and_its_points_the_space(space: SearchSpace, left: int, anchors: int) -> None:
    if best_resolution(space, left) is None:
        with pytest.raises(UserError, match=f"{left} of {left + anchors} trials are left"):
            grid_for(space, left + anchors, anchors)
        return
    grid = grid_for(space, left + anchors, anchors)
    assert 2 <= len(grid) <= left
    points = proposals(grid, space, anchors)
    assert points == proposals(grid_for(space, left + anchors, anchors), space, anchors)
    decisions = set()
    low = 1.0 - space.max_ratio
    for params in points:
        assert space.holds(params)
        plan = space.to_plan(params)
        kept = {kept_count(space.sizes[group], ratio) for group, ratio in plan.ratios.items() if ratio > 0}
        assert all(count >= 1 for count in kept)
        assert len({round(ratio, 12) for ratio in plan.ratios.values()}) == 1  # all groups alike
        assert all(low - 1e-12 <= 1.0 - ratio <= 1.0 for ratio in plan.ratios.values())
        for weights in space.mixtures.weights(plan).values():
            assert sum(weights) == pytest.approx(1.0, abs=1e-12)
            assert min(weights) >= 0
        decisions.add(space.decision(plan))
    assert len(decisions) == len(points)  # no point is wasted


@given(spaces, st.integers(1, 400), st.integers(1, 100))
def test_a_larger_budget_never_makes_a_coarser_grid(space: SearchSpace, budget: int, more: int) -> None:
    small, large = best_resolution(space, budget), best_resolution(space, budget + more)
    if small is None:
        return
    assert large is not None
    balance = [min(found.mixtures(space), found.ratios - 1) for found in (small, large)]
    assert balance[0] <= balance[1]
    assert small.points(space) <= budget


def test_the_grid_is_the_product_of_its_parts() -> None:
    space = space_of()
    grid = grid_for(space, 64, 8)
    assert best_resolution(space, 56) == Resolution(coefficients=2, ratios=10)
    points = proposals(grid, space, 8)
    assert len(points) == 6 * 9 + 1
    plans = [space.to_plan(params) for params in points]
    shares = {round(1 - plan.ratios["latent"], 9) for plan in plans}
    assert sorted(shares) == pytest.approx([0.02 ** (1 - place / 9) for place in range(10)])
    mixtures = {tuple(round(w, 9) for w in plan.coefficients.values()) for plan in plans}
    assert mixtures == {tuple(point) for point in lattice(3, 2)}


def test_an_interrupted_grid_has_seen_all_sizes_and_several_mixtures() -> None:
    space = space_of()
    beginning = proposals(grid_for(space, 64, 0), space, 0)[:9]
    assert len({params["keep/latent"] for params in beginning}) == 9
    mixtures = {tuple(space.to_plan(params).coefficients.values()) for params in beginning}
    assert len(mixtures) >= 5
    ends = sorted(params["keep/latent"] for params in beginning[:2])
    assert ends == pytest.approx([0.02, max(params["keep/latent"] for params in beginning)])


def test_levels_that_keep_the_same_channels_are_one() -> None:
    space = space_of(1, groups=(Group("a", ENCODER, 4, ()),))
    grid = grid_for(space, 100, 0)
    kept = [kept_count(4, 1 - params["keep/a"]) for params in proposals(grid, space, 0)]
    assert sorted(kept) == [1, 2, 3, 4]


def test_options_stay_the_agents_own() -> None:
    space = space_of(options={"samples": OptionRange(32, 256, own=512)})
    assert {p["option/samples"] for p in proposals(grid_for(space, 20, 0), space, 0)} == {256}


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (GridConfig(coefficients=1), Resolution(1, 19)),
        (GridConfig(ratios=4), Resolution(4, 4)),
        (GridConfig(coefficients=3, ratios=5), Resolution(3, 5)),
    ],
)
def test_a_resolution_may_be_given_in_whole_or_in_part(wish: GridConfig, expected: Resolution) -> None:
    found = best_resolution(space_of(), 56, wish.coefficients, wish.ratios)
    assert found == expected
    assert len(grid_for(space_of(), 64, 8, wish)) == expected.points(space_of())


@pytest.mark.parametrize(
    ("coefficients", "trials", "wish", "message"),
    [
        (
            "shared",
            64,
            GridConfig(coefficients=4, ratios=10),
            "has 136 points, with coefficients in steps of 1/4 and 10 ratios, and 56 of 64 trials are left "
            "after 8 anchors: search.grid {coefficients: 2, ratios: 10} fits",
        ),
        (
            "per_group",
            30,
            None,
            "has 28 points, with coefficients in steps of 1/1 and 2 ratios, and 22 of 30 trials are left "
            "after 8 anchors: the smallest grid has 28, so use more trials, shared coefficients or another "
            "sampler",
        ),
        (
            "equal",
            64,
            GridConfig(coefficients=2),
            "search.grid.coefficients is 2, and no coefficients are searched here: leave it out",
        ),
        ("shared", 8, None, "0 of 8 trials are left after 8 anchors: the smallest grid has 4, so use more "),
    ],
)
def test_grids_that_do_not_fit_are_refused(
    coefficients: str, trials: int, wish: GridConfig | None, message: str
) -> None:
    with pytest.raises(UserError) as raised:
        grid_for(space_of(coefficients=coefficients), trials, 8, wish)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# --- in a study --------------------------------------------------------------------------------------------

OBJECTIVES = (Objective("parameters", "minimize", "parameters"), Objective("score", "maximize", "points"))


def study_of(space: SearchSpace, trials: int, seed: int = 0) -> Study:
    grid = grid_for(space, trials, len(space.anchors()))
    return Study(space, OBJECTIVES, "grid", seed, trials=trials, optimiser=grid)


def test_a_study_proposes_the_grid_and_then_quasi_random_points() -> None:
    space = space_of()
    study = study_of(space, 64)
    proposals = [study.ask(number) for number in range(64)]
    origins = [proposal.origin for proposal in proposals]
    assert origins[8:62] == ["grid"] * 54
    assert origins[62:] == ["qmc"] * 2  # what keeps everything was an anchor
    assert len({space.decision(proposal.plan) for proposal in proposals}) == 64
    assert all(space.holds(proposal.params) for proposal in proposals)


def test_the_grid_follows_from_the_number_alone() -> None:
    """Neither from the seed nor from results, nor from what was asked for before."""
    space = space_of()
    for number in (63, 30, 8):
        asked = [study_of(space, 64, seed).ask(number) for seed in (0, 0, 5)]
        assert asked[0] == asked[1]
        assert (asked[0] == asked[2]) == (number != 63)
