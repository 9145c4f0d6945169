"""Which channels stay, against sorting and brute force."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hand_made_graphs import group
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from components.choosing import Ranking, choose, comparable_groups, kept_count
from components.dependency import DependencyGraph, Group, Member
from components.errors import UserError
from components.mixing import mix
from components.plan import PruningPlan

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


def scores_of(seed: int, *metrics: str) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {m: {name: torch.rand(size, generator=generator) for name, size in SIZES.items()} for m in metrics}


def kept(keep: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in keep.items()}


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


def test_isomorphic_ranking_takes_no_more_from_a_group_than_the_largest_ratio():
    graph = alike({"x": 10, "y": 10})
    scores = {"l2": {"x": torch.full((10,), 9.0), "y": torch.arange(10.0) / 100}}
    plan = PruningPlan({"l2": 1.0}, dict.fromkeys("xy", 0.5))
    keep = choose(graph, scores, plan, Ranking("isomorphic", max_ratio=0.8))
    assert {name: int(mask.sum()) for name, mask in keep.items()} == {"x": 8, "y": 2}
    assert keep["y"].tolist() == [False] * 8 + [True] * 2
    keep = choose(graph, scores, plan, Ranking("isomorphic"))
    assert {name: int(mask.sum()) for name, mask in keep.items()} == {"x": 9, "y": 1}


def test_isomorphic_ranking_takes_from_the_group_that_matters_less():
    graph = alike({"x": 4, "y": 4, "z": 4}, coupling=frozenset({"z"}))
    scores = {"l2": {"x": torch.full((4,), 9.0), "y": torch.full((4,), 1.0), "z": torch.arange(4.0)}}
    keep = choose(graph, scores, PruningPlan({"l2": 1.0}, dict.fromkeys("xyz", 0.5)), ISOMORPHIC)
    assert {name: int(mask.sum()) for name, mask in keep.items()} == {"x": 3, "y": 1, "z": 2}
