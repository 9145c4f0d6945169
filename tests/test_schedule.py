"""Schedules of gradual pruning: from nothing to everything, never back, and what they refuse."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components import UserError
from components.choosing import kept_count
from components.schedule import PruningSchedule

curves = st.sampled_from(["cosine", "cubic"])


@st.composite
def schedules(draw: st.DrawFn) -> PruningSchedule:
    start = draw(st.integers(0, 300))
    return PruningSchedule(draw(curves), start, start + draw(st.integers(0, 500)), draw(st.integers(1, 200)))


@given(schedules(), st.integers(1, 600), st.floats(0, 0.99), st.integers(1, 16))
def test_widths_never_grow_and_end_where_the_plan_says(schedule, size, ratio, round_to) -> None:
    widths = [kept_count(size, ratio * schedule.share(step), round_to) for step in range(schedule.end + 3)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == size or schedule.end == 0
    assert widths[schedule.end] == kept_count(size, ratio, round_to)


@given(schedules())
def test_it_changes_at_its_steps_only(schedule) -> None:
    assert schedule.steps == tuple(sorted(set(schedule.steps)))
    assert schedule.steps[-1] == schedule.end
    changed = [
        step for step in range(1, schedule.end + 2) if schedule.share(step) != schedule.share(step - 1)
    ]
    assert set(changed) <= set(schedule.steps)
    assert schedule.share(schedule.end) == 1.0
    assert schedule.share(schedule.start) == 0.0 or schedule.start == schedule.end


@pytest.mark.parametrize(
    ("curve", "shares"),
    [
        ("cubic", [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1.0]),
        ("cosine", [(1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1.0]),
    ],
)
def test_the_curves_are_those_of_the_literature(curve, shares) -> None:
    schedule = PruningSchedule(curve, 100, 500, 100)
    assert schedule.steps == (200, 300, 400, 500)
    assert [schedule.share(step) for step in schedule.steps] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("linear", 0, 1, 1), "'cosine' or 'cubic'"),
        (("cubic", 5, 4, 1), "start <= end"),
        (("cubic", 0, 4, 0), "not 0"),
    ],
)
def test_what_it_refuses(arguments, words) -> None:
    with pytest.raises(UserError, match=words):
        PruningSchedule(*arguments)
