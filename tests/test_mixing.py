"""Mixing against a plain-Python oracle, and its invariances."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hand_made_graphs import group
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from components.dependency import DependencyGraph, Group, Member
from components.errors import UserError
from components.mixing import (
    PruningPlan,
    Ranking,
    choose,
    comparable_groups,
    kept_count,
    mix,
    normalise,
    simplex,
)

ISOMORPHIC = Ranking("isomorphic")

GRAPH = DependencyGraph(
    (
        group("encoder.0", 6, [], "encoder"),
        group("latent", 4, [], "encoder", "decoder"),
        group("decoder.0", 5, [], "decoder"),
    ),
    {"encoder": ("encoder",), "decoder": ("decoder",)},
    {},
)
SIZES = GRAPH.widths

unit = st.floats(0.0, 1.0)
names = st.text('ab.\\u00e9"', min_size=1, max_size=4)
scores = st.lists(st.floats(0.0, 1e12, allow_subnormal=False), min_size=1, max_size=12)


def scores_of(seed: int, *metrics: str) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {m: {name: torch.rand(size, generator=generator) for name, size in SIZES.items()} for m in metrics}


def kept(keep: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in keep.items()}


# --- simplex -----------------------------------------------------------------------------------------------


@given(st.lists(unit, min_size=1, max_size=9))
def test_simplex_is_on_the_simplex_and_ordered(u: list[float]) -> None:
    weights = simplex(u)
    assert len(weights) == len(u)
    assert all(0.0 <= weight <= 1.0 for weight in weights)
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-12)
    pairs = sorted(zip(u, weights, strict=True))
    for (_, larger), (_, smaller) in pairwise(pairs):
        assert larger >= smaller - 1e-15


@given(st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=9))
def test_simplex_is_proportional_to_cubed_logarithms(u: list[float]) -> None:
    cubes = [(-math.log(value)) ** 3 for value in u]
    assert simplex(u) == pytest.approx([cube / sum(cubes) for cube in cubes], rel=1e-9)


@pytest.mark.parametrize(
    ("u", "expected"),
    [
        ([0.0, 1.0, 1.0], [1.0, 0.0, 0.0]),
        ([1.0, 0.3], [0.0, 1.0]),
        ([1.0, 1.0], [0.5, 0.5]),
        ([0.0, 0.0], [0.5, 0.5]),
        ([5e-324, 0.0], [0.5, 0.5]),
        ([0.7], [1.0]),
    ],
)
def test_simplex_at_its_corners(u: list[float], expected: list[float]) -> None:
    assert simplex(u) == expected


def test_simplex_comes_near_the_corners() -> None:
    """A tenth of uniform draws give one of five metrics more than 90 %; Dirichlet(1) does so in 0.05 %."""
    u = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = sum(max(simplex(row)) > 0.9 for row in u.tolist())
    assert near > 400


@pytest.mark.parametrize("u", [[], [1.1], [-0.1, 0.5], [float("nan")], [True]])
def test_simplex_refuses_what_is_not_in_the_unit_interval(u: list[float]) -> None:
    with pytest.raises(UserError, match="coordinate"):
        simplex(u)


# --- normalising and mixing --------------------------------------------------------------------------------


@given(scores)
def test_normalised_scores_have_mean_one(values: list[float]) -> None:
    normal = normalise(torch.tensor(values, dtype=torch.float64))
    assert float(normal.mean()) == pytest.approx(1.0)
    if any(values):
        total = math.fsum(values) / len(values)
        assert normal.tolist() == pytest.approx([value / total for value in values])


@given(scores, st.integers(-200, 200))
def test_scale_of_a_metric_does_not_matter(values: list[float], exponent: int) -> None:
    exact = torch.tensor([float(round(value)) for value in values], dtype=torch.float64)
    assert torch.equal(normalise(exact * 2.0**exponent), normalise(exact))


def test_scores_of_any_finite_size_are_normalised() -> None:
    assert normalise(torch.tensor([1.7e308, 1.7e308, 0.0], dtype=torch.float64)).tolist() == [1.5, 1.5, 0.0]
    assert normalise(torch.tensor([5e-324, 0.0], dtype=torch.float64)).tolist() == [2.0, 0.0]
    assert normalise(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_are_no_scores_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match=f"finite and >= 0, not {bad}"):
        normalise(torch.tensor([1.0, bad, 2.0]))


@given(
    st.lists(st.tuples(unit, scores.map(lambda v: (v * 3)[:3])), min_size=1, max_size=4), st.integers(-9, 9)
)
def test_mix_is_the_weighted_sum(parts: list[tuple[float, list[float]]], exponent: int) -> None:
    weights = {str(i): weight + 0.01 for i, (weight, _) in enumerate(parts)}
    values = {str(i): torch.tensor(v, dtype=torch.float64) for i, (_, v) in enumerate(parts)}
    expected = [0.0, 0.0, 0.0]
    for name, tensor in values.items():
        mean = sum(tensor.tolist()) / 3
        for c in range(3):
            relative = float(tensor[c]) / mean if mean else 1.0
            expected[c] += weights[name] / sum(weights.values()) * relative
    assert mix(values, weights).tolist() == pytest.approx(expected)
    scaled = {name: weight * 2.0**exponent for name, weight in weights.items()}
    assert mix(values, scaled).tolist() == pytest.approx(expected)


def test_metric_without_weight_is_not_read() -> None:
    bad = torch.tensor([float("nan"), 1.0])
    good = torch.tensor([1.0, 3.0])
    assert mix({"l2": good, "fisher": bad}, {"l2": 2.0, "fisher": 0.0, "taylor": 0.0}).tolist() == [0.5, 1.5]


# --- choosing ----------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.lists(st.floats(0.0, 0.999), min_size=3, max_size=3), unit)
def test_choice_equals_sorting(seed: int, ratios: list[float], weight: float) -> None:
    metrics = scores_of(seed, "l2", "fisher")
    coefficients = {"l2": weight, "fisher": 1.0 - weight}
    plan = PruningPlan(coefficients, dict(zip(SIZES, ratios, strict=True)))
    found = choose(GRAPH, metrics, plan)
    for (name, size), ratio in zip(SIZES.items(), ratios, strict=True):
        mixed = mix({metric: by_group[name] for metric, by_group in metrics.items()}, coefficients).tolist()
        best = sorted(range(size), key=lambda c: (-mixed[c], c))[: max(1, round((1 - ratio) * size))]
        assert found[name].dtype == torch.bool
        assert found[name].nonzero().flatten().tolist() == sorted(best)


def test_equal_scores_keep_the_lower_index() -> None:
    ones = {"l2": {name: torch.ones(size) for name, size in SIZES.items()}}
    plan = PruningPlan({"l2": 1.0}, dict.fromkeys(SIZES, 0.5))
    assert kept(choose(GRAPH, ones, plan)) == {"encoder.0": [0, 1, 2], "latent": [0, 1], "decoder.0": [0, 1]}


def test_group_without_ratio_keeps_everything() -> None:
    found = choose(GRAPH, scores_of(0, "l2"), PruningPlan({"l2": 1}, {"latent": 0.75}))
    assert {name: int(mask.sum()) for name, mask in found.items()} == {
        "encoder.0": 6,
        "latent": 1,
        "decoder.0": 5,
    }


@pytest.mark.parametrize(
    ("size", "ratio", "count"), [(10, 0.98, 1), (1, 0.9, 1), (10, 0.9, 1), (10, 0.0, 10), (3, 0.4, 2)]
)
def test_at_least_one_channel_stays(size: int, ratio: float, count: int) -> None:
    assert kept_count(size, ratio) == count


def test_coefficients_per_component_reach_their_groups() -> None:
    metrics = scores_of(1, "l2", "fisher", "taylor")
    ratios = dict.fromkeys(SIZES, 0.5)
    plan = PruningPlan(
        {"encoder": {"l2": 1.0}, "coupling": {"fisher": 0.5}, "decoder": {"taylor": 2.0, "l2": 0.0}}, ratios
    )
    found = choose(GRAPH, metrics, plan)
    for name, metric in (("encoder.0", "l2"), ("latent", "fisher"), ("decoder.0", "taylor")):
        pure = choose(GRAPH, metrics, PruningPlan({metric: 1.0}, ratios))
        assert torch.equal(found[name], pure[name])


def test_choice_needs_known_groups_metrics_and_shapes() -> None:
    with pytest.raises(UserError, match="no pruning group 'latents': did you mean 'latent'"):
        choose(GRAPH, scores_of(0, "l2"), PruningPlan({"l2": 1.0}, {"latents": 0.5}))
    with pytest.raises(UserError, match="no scores of metric 'fischer': did you mean 'fisher'"):
        choose(GRAPH, scores_of(0, "fisher"), PruningPlan({"fischer": 1.0}, {}))
    with pytest.raises(UserError, match="no coefficients for 'coupling', which group 'latent' needs"):
        choose(GRAPH, scores_of(0, "l2"), PruningPlan({"encoder": {"l2": 1.0}, "decoder": {"l2": 1.0}}, {}))
    wrong = {"l2": {**scores_of(0, "l2")["l2"], "latent": torch.ones(9)}}
    with pytest.raises(UserError, match=r"'l2' scores of group 'latent' have to be \(4,\), not \(9,\)"):
        choose(GRAPH, wrong, PruningPlan({"l2": 1.0}, {}))


# --- plans -------------------------------------------------------------------------------------------------


@given(
    st.one_of(
        st.dictionaries(names, st.floats(0.001, 1e6), min_size=1, max_size=5),
        st.dictionaries(
            st.text(min_size=1),
            st.dictionaries(st.text(min_size=1), st.floats(0.001, 1.0), min_size=1),
            min_size=1,
        ),
    ),
    st.dictionaries(names, st.floats(0.0, 1.0, exclude_max=True), max_size=5),
)
def test_plan_survives_json_and_pickle(coefficients: dict[str, float], ratios: dict[str, float]) -> None:
    plan = PruningPlan(coefficients, ratios)
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert json.loads(plan.to_json()) == {"coefficients": coefficients, "ratios": ratios}


@pytest.mark.parametrize(
    ("coefficients", "ratios", "message"),
    [
        ({}, {}, "no mixing coefficients"),
        ({"l2": 0.0}, {}, "all zero"),
        ({"l2": -1.0}, {}, "metric 'l2' has to be finite and >= 0, not -1.0"),
        ({"l2": float("nan")}, {}, "metric 'l2' has to be finite and >= 0, not nan"),
        ({"l2": float("inf")}, {}, "not inf"),
        ({"l2": "1"}, {}, "not '1'"),
        ({"l2": True}, {}, "not True"),
        ({"encoder": {"l2": -1.0}}, {}, "metric 'l2' of 'encoder'"),
        ({"encoder": {}}, {}, "of 'encoder' are all zero"),
        ({"encoder": {"l2": 1.0}, "l1": 1.0}, {}, "either shared or separate, not both: 'l1'"),
        ({"l2": 1.0}, {"latent": 1.0}, r"group 'latent' has to be in \[0, 1\), not 1.0"),
        ({"l2": 1.0}, {"latent": -0.1}, "not -0.1"),
        ({"l2": 1.0}, {"latent": float("nan")}, "not nan"),
        ({"l2": 1.0}, {"latent": None}, "not None"),
    ],
)
def test_plan_refuses_what_makes_no_sense(coefficients: dict, ratios: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PruningPlan(coefficients, ratios)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"coefficients": {}}', '{"coefficients": 1, "ratios": 2}', "3"]
)
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="pruning plan"):
        PruningPlan.from_json(text)


@given(st.integers(1, 300), st.floats(0, 0.99), st.integers(1, 32))
def test_rounded_widths_are_the_nearest_that_are_allowed(size, ratio, round_to):
    allowed = {*range(round_to, size, round_to), size} if round_to > 1 else set(range(1, size + 1))
    wanted = (1.0 - ratio) * size
    distance = min(abs(width - wanted) for width in allowed)
    found = kept_count(size, ratio, round_to)
    assert found in allowed
    assert abs(found - wanted) == pytest.approx(distance)


def alike(names: dict[str, int], coupling: frozenset[str] = frozenset()) -> DependencyGraph:
    """Groups of one build each: a linear layer makes them and the next reads them."""
    groups = tuple(
        Group(
            name,
            frozenset({"a", "b"}) if name in coupling else frozenset({"a"}),
            size,
            (
                Member(f"{name}.weight", 0, torch.arange(size).unsqueeze(1), False),
                Member(f"next.{name}.weight", 1, torch.arange(size).unsqueeze(1), True),
            ),
        )
        for name, size in names.items()
    )
    return DependencyGraph(groups, {"a": ("",)}, {})


def test_groups_that_are_built_alike_are_comparable():
    graph = alike({"x": 4, "y": 6, "z": 5}, coupling=frozenset({"z"}))
    assert comparable_groups(graph.groups) == {"x": "x", "y": "x", "z": "z"}
    with_norm = replace(
        graph.groups[1],
        members=(*graph.groups[1].members, Member("n.bias", 0, torch.arange(6).unsqueeze(1), False)),
    )
    assert comparable_groups([graph.groups[0], with_norm]) == {"x": "x", "y": "y"}


@given(st.data())
def test_isomorphic_ranking_keeps_the_best_of_all_that_compete(data):
    sizes = {"x": data.draw(st.integers(1, 6)), "y": data.draw(st.integers(1, 6))}
    total = sum(sizes.values())
    values = data.draw(st.permutations([1.0 + i for i in range(total)]))
    scores = {"x": torch.tensor(values[: sizes["x"]]), "y": torch.tensor(values[sizes["x"] :])}
    ratio = data.draw(st.floats(0, 0.95))
    keep = choose(
        alike(sizes), {"l2": scores}, PruningPlan({"l2": 1.0}, dict.fromkeys(sizes, ratio)), ISOMORPHIC
    )
    count = sum(kept_count(size, ratio) for size in sizes.values())
    # By brute force: of all ways to keep so many, one at least in each group, that of the highest sum.
    best = max(
        (
            chosen
            for chosen in itertools.combinations(range(total), count)
            if any(i < sizes["x"] for i in chosen) and any(i >= sizes["x"] for i in chosen)
        ),
        key=lambda chosen: sum(values[i] for i in chosen),
    )
    found = torch.cat([keep["x"], keep["y"]]).nonzero().flatten().tolist()
    assert found == list(best)


def test_isomorphic_ranking_takes_from_the_group_that_matters_less():
    graph = alike({"x": 4, "y": 4, "z": 4}, coupling=frozenset({"z"}))
    scores = {"l2": {"x": torch.full((4,), 9.0), "y": torch.full((4,), 1.0), "z": torch.arange(4.0)}}
    keep = choose(graph, scores, PruningPlan({"l2": 1.0}, dict.fromkeys("xyz", 0.5)), ISOMORPHIC)
    assert {name: int(mask.sum()) for name, mask in keep.items()} == {"x": 3, "y": 1, "z": 2}
