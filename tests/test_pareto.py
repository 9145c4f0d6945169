"""Fronts, hypervolumes, knees and selections against brute force and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search import pareto

# Few distinct values, so that ties and duplicates are common.
COARSE = st.integers(-2, 2).map(float)
SIZES = st.floats(0.001, 1.5)
RETENTIONS = st.floats(-1.0, 1.5)
TRIALS = st.lists(st.tuples(SIZES, RETENTIONS), max_size=12)


def dominates(one: tuple[float, ...], other: tuple[float, ...], directions: list[str]) -> bool:
    gains = [(b - a) if d == "minimize" else (a - b) for a, b, d in zip(one, other, directions, strict=True)]
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[tuple[float, ...]], list[str]]:
    objectives = draw(st.integers(1, 4))
    directions = draw(
        st.lists(st.sampled_from(["minimize", "maximize"]), min_size=objectives, max_size=objectives)
    )
    return draw(st.lists(st.tuples(*[COARSE] * objectives), max_size=20)), directions


@given(problems())
def test_non_dominated_equals_brute_force(problem: tuple[list[tuple[float, ...]], list[str]]) -> None:
    points, directions = problem
    expected = [not any(dominates(other, point, directions) for other in points) for point in points]
    assert pareto.non_dominated(points, directions).tolist() == expected


def peeled(points: list[tuple[float, ...]], directions: list[str]) -> list[int]:
    """Non-dominated ranks by their definition."""
    found, remaining, rank = {}, set(range(len(points))), 0
    while remaining:
        front = {
            i for i in remaining if not any(dominates(points[j], points[i], directions) for j in remaining)
        }
        found.update(dict.fromkeys(front, rank))
        remaining, rank = remaining - front, rank + 1
    return [found[i] for i in range(len(points))]


@given(problems())
def test_ranks_equal_brute_force(problem: tuple[list[tuple[float, ...]], list[str]]) -> None:
    points, directions = problem
    assert pareto.ranks(points, directions).tolist() == peeled(points, directions)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_ranks_equal_brute_force_on_many_points(objectives: int) -> None:
    values = np.random.default_rng(objectives).integers(0, 40, size=(150, objectives)).astype(float)
    directions = ["maximize", "minimize", "maximize"][:objectives]
    found = pareto.ranks(values, directions)
    assert found.tolist() == peeled([tuple(row) for row in values], directions)
    np.testing.assert_array_equal(found == 0, pareto.non_dominated(values, directions))


@given(problems(), st.data())
def test_ranks_see_the_order_of_values_only(
    problem: tuple[list[tuple[float, ...]], list[str]], data: st.DataObject
) -> None:
    points, directions = problem
    expected = pareto.ranks(points, directions)
    for index in range(len(directions)):
        rescale = data.draw(st.sampled_from([np.exp, np.cbrt, lambda v: 3 * v - 1]))
        changed = np.array(points, dtype=float).reshape(-1, len(directions))
        changed[:, index] = rescale(changed[:, index])
        np.testing.assert_array_equal(pareto.ranks(changed, directions), expected)


def room_of(values: np.ndarray, index: int) -> float:
    """Crowding distance by its definition, one point at a time."""
    total = 0.0
    for column in values.T:
        below, above = column[column < column[index]], column[column > column[index]]
        if column.min() == column.max():
            continue
        if not len(below) or not len(above):
            return math.inf
        total += (above.min() - below.max()) / (column.max() - column.min())
    return total


@given(problems())
def test_crowding_distances_equal_brute_force(
    problem: tuple[list[tuple[float, ...]], list[str]],
) -> None:
    points, directions = problem
    values = np.array(points, dtype=float).reshape(-1, len(directions))
    expected = [room_of(values, index) for index in range(len(values))]
    np.testing.assert_allclose(pareto.crowding_distances(values), expected, rtol=1e-12)


def test_crowding_distances_of_known_points() -> None:
    values = [[0.0, 10.0], [1.0, 4.0], [3.0, 2.0], [4.0, 0.0]]
    assert pareto.crowding_distances(values).tolist() == [math.inf, 3 / 4 + 8 / 10, 3 / 4 + 4 / 10, math.inf]
    assert pareto.crowding_distances([[1.0, 2.0]]).tolist() == [0.0]


@pytest.mark.parametrize("objectives", [2, 3])
def test_non_dominated_equals_brute_force_on_many_points(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    values = rng.integers(0, 30, size=(400, objectives)).astype(float)
    directions = ["minimize", "maximize", "minimize"][:objectives]
    signs = np.array([1.0, -1.0, 1.0])[:objectives]
    losses = values * signs
    no_worse = (losses[:, None, :] <= losses[None, :, :]).all(-1)
    better = (losses[:, None, :] < losses[None, :, :]).any(-1)
    np.testing.assert_array_equal(pareto.non_dominated(values, directions), ~(no_worse & better).any(0))


def test_ten_thousand_points_on_a_known_front() -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, math.pi / 2, 10_000)
    radius = np.where(np.arange(10_000) % 10 == 0, 1.0, rng.uniform(1.5, 2.0, 10_000))
    values = np.stack([1 - np.cos(angle) / radius, 1 - np.sin(angle) / radius], axis=1)
    mask = pareto.non_dominated(values, ["minimize", "minimize"])
    np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(0, 10_000, 10))


def test_duplicates_stay_together() -> None:
    values = [[1.0, 2.0], [0.0, 3.0], [1.0, 2.0], [1.0, 3.0]]
    assert pareto.non_dominated(values, ["minimize", "minimize"]).tolist() == [True, True, True, False]
    assert pareto.front(values, ["minimize", "minimize"]).tolist() == [1, 0, 2]


def test_signed_zeros_are_equal() -> None:
    assert pareto.non_dominated([[0.0, 1.0], [-0.0, 1.0]], ["minimize", "maximize"]).all()


@given(problems(), st.data())
def test_front_is_the_sorted_feasible_non_dominated_points(
    problem: tuple[list[tuple[float, ...]], list[str]], data: st.DataObject
) -> None:
    points, directions = problem
    feasible = data.draw(st.lists(st.booleans(), min_size=len(points), max_size=len(points)))
    rivals = list(itertools.compress(points, feasible))
    members = [
        index
        for index, point in enumerate(points)
        if feasible[index] and not any(dominates(rival, point, directions) for rival in rivals)
    ]
    signs = [1 if direction == "minimize" else -1 for direction in directions]
    members.sort(key=lambda index: (*[s * v for s, v in zip(signs, points[index], strict=True)], index))
    assert pareto.front(points, directions, feasible).tolist() == members


def best_at(trials: list[tuple[float, float]], size: float) -> float:
    """The definition, read out: the best retention at or below a size, clipped to [0, 1]; else 0."""
    return max((min(max(retention, 0.0), 1.0) for own, retention in trials if own <= size), default=0.0)


def integrate(trials: list[tuple[float, float]], low: float, high: float, *, log: bool) -> float:
    """The mean of `best_at`, interval by interval: between neighbouring sizes it is constant."""
    inside = [size for size, _ in trials if low < size < high]
    edges = sorted({low, high, *inside})
    scale = math.log if log else float
    pieces = [(scale(b) - scale(a)) * best_at(trials, (a + b) / 2) for a, b in itertools.pairwise(edges)]
    return math.fsum(pieces) / (scale(high) - scale(low))


@given(TRIALS)
def test_hypervolumes_equal_their_definition(trials: list[tuple[float, float]]) -> None:
    sizes, retentions = [size for size, _ in trials], [retention for _, retention in trials]
    log = integrate(trials, 0.005, 1.0, log=True)
    assert pareto.hypervolume_log(sizes, retentions) == pytest.approx(log, abs=1e-12)
    linear = integrate(trials, 0.0, 1.0, log=False)
    assert pareto.hypervolume_linear(sizes, retentions) == pytest.approx(linear, abs=1e-12)


def test_hypervolumes_of_one_trial_in_closed_form() -> None:
    assert pareto.hypervolume_log([0.05], [0.8]) == pytest.approx(0.8 * math.log(0.05) / math.log(0.005))
    assert pareto.hypervolume_linear([0.05], [0.8]) == pytest.approx(0.8 * 0.95)
    assert pareto.hypervolume_log([0.001], [2.0]) == pytest.approx(1.0)
    assert pareto.hypervolume_log([1.0], [1.0]) == 0.0
    assert pareto.hypervolume_log([], []) == pareto.hypervolume_linear([], []) == 0.0


@given(TRIALS, st.tuples(SIZES, RETENTIONS))
def test_one_trial_more_never_lowers_a_hypervolume(
    trials: list[tuple[float, float]], more: tuple[float, float]
) -> None:
    for measure in (pareto.hypervolume_log, pareto.hypervolume_linear):
        before = measure([size for size, _ in trials], [retention for _, retention in trials])
        after = measure(
            [size for size, _ in [*trials, more]], [retention for _, retention in [*trials, more]]
        )
        assert 0.0 <= before <= after + 1e-12 <= 1.0 + 2e-12


def test_retention_at_thresholds() -> None:
    table = pareto.retention_at([0.009, 0.02, 0.3, 0.04], [-0.1, 0.5, 0.9, 0.4])
    assert table == {0.01: -0.1, 0.02: 0.5, 0.05: 0.5, 0.10: 0.5, 0.25: 0.5}
    assert pareto.retention_at([0.5], [1.0]) == dict.fromkeys(pareto.SIZE_THRESHOLDS)


def test_knee_of_a_bent_front() -> None:
    # In (log size, retention), scaled: (0, 0), (1/3, 0.9), (2/3, 0.95), (1, 1); the second is highest.
    assert pareto.knee([1.0, 0.001, 0.1, 0.01], [1.0, 0.0, 0.95, 0.9]) == 3


def test_knee_ignores_dominated_trials() -> None:
    assert pareto.knee([0.011, 0.01, 0.001, 1.0], [0.5, 0.9, 0.0, 1.0]) == 1


@pytest.mark.parametrize(
    ("sizes", "retentions", "expected"),
    [([0.3], [0.2], 0), ([0.1, 1.0], [0.2, 1.0], 1), ([0.001, 0.1, 1.0], [0.0, 0.1, 1.0], 2)],
    ids=["one", "two", "nothing above the chord"],
)
def test_knee_without_a_bend_is_the_best_retention(
    sizes: list[float], retentions: list[float], expected: int
) -> None:
    assert pareto.knee(sizes, retentions) == expected


@given(TRIALS.filter(bool))
def test_knee_is_on_the_front(trials: list[tuple[float, float]]) -> None:
    assert pareto.knee(*np.array(trials).T) in pareto.front(trials, ["minimize", "maximize"])


@given(TRIALS.filter(bool), RETENTIONS)
def test_smallest_retaining_equals_brute_force(trials: list[tuple[float, float]], minimum: float) -> None:
    chosen = pareto.smallest_retaining(*np.array(trials).T, minimum)
    enough = [trial for trial in trials if trial[1] >= minimum]
    assert chosen.satisfied == bool(enough)
    if enough:
        expected = min(enough, key=lambda trial: (trial[0], -trial[1]))
    else:
        expected = max(trials, key=lambda trial: (trial[1], -trial[0]))
    assert trials[chosen.index] == expected
    assert chosen.index == trials.index(expected)


@given(TRIALS.filter(bool), SIZES)
def test_best_within_equals_brute_force(trials: list[tuple[float, float]], limit: float) -> None:
    chosen = pareto.best_within(*np.array(trials).T, limit)
    affordable = [trial for trial in trials if trial[0] <= limit]
    assert chosen.satisfied == bool(affordable)
    if affordable:
        expected = max(affordable, key=lambda trial: (trial[1], -trial[0]))
    else:
        expected = min(trials, key=lambda trial: (trial[0], -trial[1]))
    assert chosen.index == trials.index(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_refused_everywhere(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        pareto.non_dominated([[1.0, bad]], ["minimize", "minimize"])
    with pytest.raises(ValueError, match="finite"):
        pareto.front([[1.0, bad], [0.0, 0.0]], ["minimize", "minimize"], [False, True])
    for function in (pareto.hypervolume_log, pareto.hypervolume_linear, pareto.retention_at, pareto.knee):
        for sizes, retentions in (([0.5, bad], [1.0, 1.0]), ([0.5, 0.5], [1.0, bad])):
            with pytest.raises(ValueError, match="finite"):
                function(sizes, retentions)
    for select in (pareto.smallest_retaining, pareto.best_within):
        with pytest.raises(ValueError, match="finite"):
            select([0.5, 1.0], [1.0, bad], 0.5)


def test_impossible_shapes_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        pareto.non_dominated([[1.0, 2.0, 3.0]], ["minimize", "minimize"])
    with pytest.raises(ValueError, match="direction 'up'"):
        pareto.non_dominated([[1.0]], ["up"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="feasible"):
        pareto.front([[1.0]], ["minimize"], [True, False])
    with pytest.raises(ValueError, match="parallel"):
        pareto.hypervolume_log([0.5, 0.6], [1.0])
    with pytest.raises(ValueError, match="positive"):
        pareto.hypervolume_log([0.0], [1.0])
    for function in (pareto.knee, lambda sizes, kept: pareto.best_within(sizes, kept, 1.0)):
        with pytest.raises(ValueError, match="no trials"):
            function([], [])


def test_inputs_are_not_modified() -> None:
    sizes, retentions = np.array([0.5, 0.1, 0.9]), np.array([0.9, -0.5, 1.2])
    values = np.stack([sizes, retentions], axis=1)
    copies = sizes.copy(), retentions.copy(), values.copy()
    pareto.front(values, ["minimize", "maximize"])
    pareto.hypervolume_log(sizes, retentions)
    pareto.knee(sizes, retentions)
    for array, copy in zip((sizes, retentions, values), copies, strict=True):
        np.testing.assert_array_equal(array, copy)
