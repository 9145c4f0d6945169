"""Mixing against a plain-Python oracle, and its invariances."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.errors import UserError
from components.mixing import mix, normalise, simplex

unit = st.floats(0.0, 1.0)
scores = st.lists(st.floats(0.0, 1e12, allow_subnormal=False), min_size=1, max_size=12)


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
