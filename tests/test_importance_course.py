"""The course of importance: ranks, shifts, kinds and agreement against brute force and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from search.importance_course import EARLY, SPECIFIC, TOP, CourseGroup, ImportanceCourse, spearman
from search.importance_table import COLUMNS, csv_lines, importance_tables, notes, to_json

GROUPS = (
    CourseGroup("encoder.0", ("encoder",), 6),
    CourseGroup("latent", ("encoder", "decoder"), 3),
    CourseGroup("decoder.0", ("decoder",), 8),
    CourseGroup("decoder.2", ("decoder",), 1),
)


def made_up(steps: int = 10, groups: tuple[CourseGroup, ...] = GROUPS, seed: int = 0) -> ImportanceCourse:
    """Random scores that drift, after 7, 14, ... steps."""
    rng = np.random.default_rng(seed)
    scores = {
        metric: {
            group.name: rng.gamma(1.0, rng.uniform(1, 9), (steps, group.channels)).cumsum(axis=0)
            for group in groups
        }
        for metric in ("fisher", "taylor")
    }
    final = {"l2": {group.name: rng.uniform(size=group.channels) for group in groups}}
    return ImportanceCourse(7 * np.arange(1, steps + 1), groups, scores, final)


def constant(steps: int = 4) -> ImportanceCourse:
    """All scores of one metric the same, zero by another, those of each group by a third."""
    shape = {group.name: (steps, group.channels) for group in GROUPS}
    layers = {"encoder.0": 2.0, "latent": 5.0, "decoder.0": 3.0, "decoder.2": 2.0}
    rng = np.random.default_rng(0)
    scores = {
        "ones": {name: np.ones(size) for name, size in shape.items()},
        "zeros": {name: np.zeros(size) for name, size in shape.items()},
        # As a metric that divides each layer by its mean: channels move, means do not.
        "layers": {
            name: layers[name] * (drawn := rng.uniform(1, 2, size)) / drawn.mean(axis=1, keepdims=True)
            for name, size in shape.items()
        },
    }
    return ImportanceCourse(np.arange(1, steps + 1), GROUPS, scores, {})


few = arrays(np.float64, st.integers(2, 9), elements=st.integers(0, 4).map(float))


@given(st.data())
def test_rank_correlation_is_scipys(data) -> None:
    one = data.draw(few)
    other = data.draw(arrays(np.float64, len(one), elements=st.integers(0, 4).map(float)))
    found = spearman(one, other)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)


def test_rank_correlation_of_what_cannot_be_ranked_is_none() -> None:
    assert spearman(np.array([1.0]), np.array([1.0])) is None
    assert spearman(np.array([1.0, np.nan, 2.0]), np.array([1.0, 2.0, 3.0])) is None


def test_relative_importance_is_a_channels_over_the_average_channels() -> None:
    course = made_up()
    for metric, by_group in course.scores.items():
        for place in range(len(course.steps)):
            everything = [score for s in by_group.values() for score in s[place].tolist()]
            average = sum(everything) / len(everything)
            for group in GROUPS:
                mine = by_group[group.name][place].tolist()
                assert course.relative(metric, [group])[place] == pytest.approx(
                    sum(mine) / len(mine) / average
                )
            specific = [s for g in ("encoder.0", "decoder.0", "decoder.2") for s in by_group[g][place]]
            kinds = course.kinds[SPECIFIC]
            assert course.relative(metric, kinds)[place] == pytest.approx(
                sum(specific) / len(specific) / average
            )
            assert course.share(metric, kinds)[place] == pytest.approx(sum(specific) / sum(everything))


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_scale_does_not_matter_and_shares_are_of_one_whole(seed: int, scale: float) -> None:
    course = made_up(seed=seed)
    scaled = {m: {g: scale * s for g, s in found.items()} for m, found in course.scores.items()}
    other = ImportanceCourse(course.steps, GROUPS, scaled, course.final)
    for metric in course.metrics:
        np.testing.assert_allclose(other.by_group(metric), course.by_group(metric), rtol=1e-9)
        for sets in (course.parts, course.kinds):
            total = sum(course.share(metric, groups) for groups in sets.values())
            np.testing.assert_allclose(total, 1.0)


def test_parts_and_kinds_hold_every_group_once() -> None:
    course = made_up()
    for sets in (course.parts, course.kinds):
        assert sorted(g.name for groups in sets.values() for g in groups) == sorted(g.name for g in GROUPS)
    assert [g.name for g in course.parts["decoder"]] == ["decoder.0", "decoder.2"]
    assert [g.name for g in course.kinds["coupling"]] == ["latent"]
    unknown = made_up(groups=tuple(CourseGroup(g.name, (), g.channels) for g in GROUPS))
    assert (unknown.parts, unknown.kinds) == ({}, {})


def test_ranks_are_one_for_the_most_important_and_shared_by_equals() -> None:
    groups = tuple(CourseGroup(name, ("a",), 1) for name in "abcd")
    scores = {
        "m": {name: np.array([[value]]) for name, value in zip("abcd", [3.0, 9.0, 3.0, 1.0], strict=True)}
    }
    course = ImportanceCourse(np.array([5]), groups, scores, {})
    assert course.ranks("m")[:, 0].tolist() == [2.5, 1.0, 2.5, 4.0]
    assert course.shifts("m") == (), "there is no earlier snapshot"


def test_shifts_are_from_the_nearest_snapshot_to_the_last() -> None:
    course = made_up(steps=30)
    for share in EARLY:
        shift = course.shift("fisher", share)
        assert shift is not None
        assert abs(shift.step - share * 210) == min(abs(s - share * 210) for s in course.steps)
        place = course.steps.tolist().index(shift.step)
        means = [course.scores["fisher"][g.name].mean(axis=1) for g in GROUPS]
        expected = stats.spearmanr([m[place] for m in means], [m[-1] for m in means]).statistic
        assert shift.groups == pytest.approx(expected)
        by_group = {}
        for group in GROUPS[:3]:
            early, late = course.scores["fisher"][group.name][[place, -1]]
            by_group[group.name] = stats.spearmanr(early, late).statistic
            assert shift.channels[group.name] == pytest.approx(by_group[group.name])
            for top in TOP:
                count = max(1, round(top * group.channels))
                best = [set(sorted(range(len(s)), key=lambda c, s=s: -s[c])[:count]) for s in (early, late)]
                assert shift.overlap[top][group.name] == len(best[0] & best[1]) / count
        assert shift.channels["decoder.2"] is None, "one channel has no order"
        assert all(found["decoder.2"] is None for found in shift.overlap.values())
        weights = [6, 3, 8]
        assert shift.mean_channels == pytest.approx(np.average(list(by_group.values()), weights=weights))


def test_what_stands_still_has_not_shifted_and_what_turns_round_has() -> None:
    order = np.arange(1.0, 21.0)
    groups = (CourseGroup("a", ("x",), 20), CourseGroup("b", ("y",), 20))
    scores = {
        "still": {"a": np.stack([order, order]), "b": 2 * np.stack([order, order + 1])},
        "turned": {"a": np.stack([order, order[::-1]]), "b": 2 * np.stack([order, order[::-1] / 9])},
    }
    course = ImportanceCourse(np.array([10, 100]), groups, scores, {})
    still, turned = (course.shift(metric, 0.1) for metric in ("still", "turned"))
    assert still is not None
    assert turned is not None
    assert (still.groups, still.mean_channels) == (pytest.approx(1.0), pytest.approx(1.0))
    assert dict(still.mean_overlap) == {0.1: 1.0, 0.25: 1.0, 0.5: 1.0}
    assert (turned.groups, turned.mean_channels) == (pytest.approx(-1.0), pytest.approx(-1.0))
    assert dict(turned.mean_overlap) == {0.1: 0.0, 0.25: 0.0, 0.5: 0.0}


def test_agreement_is_of_channels_inside_groups_by_their_sizes() -> None:
    course = made_up()
    last = {m: {g: s[-1] for g, s in found.items()} for m, found in course.scores.items()}
    last |= course.final
    assert list(course.agreement) == ["fisher", "taylor", "l2"]
    for one, row in course.agreement.items():
        for other, value in row.items():
            parts = [stats.spearmanr(last[one][g.name], last[other][g.name]).statistic for g in GROUPS[:3]]
            assert value == pytest.approx(np.average(parts, weights=[6, 3, 8]))
            assert value == course.agreement[other][one]
        assert row[one] == pytest.approx(1.0)


def test_a_metric_that_cannot_compare_groups_says_so_and_only_that() -> None:
    course = constant()
    assert [metric for metric in course.metrics if course.compares_groups(metric)] == []
    shift = course.shift("layers", 0.25)
    assert shift is not None
    assert shift.groups is None
    assert shift.mean_channels is not None
    ones = course.shift("ones", 0.25)
    assert ones is not None
    assert ones.mean_channels is None
    assert set(ones.mean_overlap.values()) == {None}
    assert course.agreement["ones"] == {"ones": None, "zeros": None, "layers": None}
    assert made_up().compares_groups("fisher")
    assert made_up(steps=1).compares_groups("fisher")


def test_thinning_keeps_the_ends() -> None:
    course = made_up(steps=50)
    thinned = course.thinned(7)
    assert len(thinned.steps) == 7
    assert (thinned.steps[0], thinned.steps[-1]) == (course.steps[0], course.steps[-1])
    for step, row in zip(thinned.steps, thinned.scores["taylor"]["latent"], strict=True):
        assert (row == course.scores["taylor"]["latent"][course.steps.tolist().index(step)]).all()
    assert made_up(steps=3).thinned(7).steps.tolist() == [7, 14, 21]


# --- as data and as tables ---------------------------------------------------------------------------------


def test_json_has_everything_and_nothing_that_is_not_json() -> None:
    course = made_up()
    found = to_json(course)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["steps"] == course.steps.tolist()
    assert found["groups"][1] == {
        "group": "latent",
        "components": ["encoder", "decoder"],
        "coupling": True,
        "channels": 3,
    }
    fisher = found["metrics"]["fisher"]
    for row, group in enumerate(GROUPS):
        np.testing.assert_allclose(
            fisher["scores"][group.name], course.scores["fisher"][group.name], rtol=1e-5
        )
        assert fisher["groups"][group.name]["rank"] == course.ranks("fisher")[row].tolist()
    assert [shift["step"] for shift in fisher["shifts"]] == [s.step for s in course.shifts("fisher")]
    assert fisher["kinds"]["coupling"]["relative"] == pytest.approx(
        course.relative("fisher", [GROUPS[1]]).tolist(), rel=1e-5
    )
    assert set(found["final_scores"]) == {"l2"}
    assert found["agreement"]["l2"]["taylor"] == pytest.approx(course.agreement["l2"]["taylor"], rel=1e-5)


@pytest.mark.parametrize("course", [constant(), made_up(steps=1), made_up(groups=GROUPS[3:])])
def test_json_and_tables_of_degenerate_courses(course: ImportanceCourse) -> None:
    json.dumps(to_json(course), allow_nan=False)
    assert importance_tables(course)
    assert any("one snapshot only" in line for line in notes(course)) == (len(course.steps) == 1)
    assert len(list(csv_lines(course))) > 1


def test_scores_that_are_not_finite_are_left_out_everywhere() -> None:
    course = made_up()
    course.scores["fisher"]["latent"][2, 1] = math.inf
    course.scores["taylor"]["latent"][-1, 1] = math.nan
    found = json.loads(json.dumps(to_json(course), allow_nan=False))
    assert found["metrics"]["fisher"]["scores"]["latent"][2][1] is None
    assert found["metrics"]["fisher"]["groups"]["encoder.0"]["rank"][2] is None
    assert found["metrics"]["fisher"]["groups"]["encoder.0"]["rank"][3] is not None
    assert found["metrics"]["taylor"]["shifts"][0]["channels_by_group"]["latent"] is None
    assert any(line.endswith(",latent,true,1,") for line in csv_lines(course))


def test_csv_has_a_line_for_every_score() -> None:
    course = made_up()
    heading, *lines = csv_lines(course)
    assert heading == ",".join(COLUMNS)
    rows = {tuple(line.split(",")[:6]): float(line.split(",")[6]) for line in lines}
    assert len(rows) == len(lines) == 10 * 2 * sum(group.channels for group in GROUPS)
    expected = course.scores["taylor"]["latent"][3, 2]
    assert rows["28", "taylor", "encoder+decoder", "latent", "true", "2"] == pytest.approx(expected, rel=1e-5)
    expected = course.scores["fisher"]["decoder.0"][0, 7]
    assert rows["7", "fisher", "decoder", "decoder.0", "false", "7"] == pytest.approx(expected, rel=1e-5)
