"""Which trials early stopping lets go on: against a naive reading of the rule, and what must never matter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.agent import Objective
from components.plan import PruningPlan
from search.scheduler import EarlyStopping, MultiObjectiveHalving
from search.trial_types import TrialResult

MIN, MAX = "minimize", "maximize"
VALUES = st.integers(1, 6).map(float)  # few, so that ties and duplicates are common
POINTS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=25)
REDUCTIONS = st.sampled_from([1.5, 2, 3, 4.5])


def scheduler(directions: Sequence[str] = (MIN, MIN), reduction: float = 3, **more) -> MultiObjectiveHalving:
    return MultiObjectiveHalving(directions, directions, reduction, **more)


def decisions(
    points: Sequence[Sequence[float]],
    directions: Sequence[str] = (MIN, MIN),
    reduction: float = 3,
    finish: Sequence[int] = (0,),
    logarithmic: Sequence[bool] | None = None,
) -> list[bool]:
    """What trials hear at one rung; those in `finish` that go on end, at once, with what they had there."""
    halving = scheduler(directions, reduction, logarithmic=logarithmic)
    answers = []
    for trial, values in enumerate(points):
        answers.append(halving.report(trial, 10, values))
        if trial in finish and answers[-1]:
            halving.finish(trial, values)
    return answers


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def naive_ranks(points: Sequence[Sequence[float]]) -> list[int]:
    ranks: dict[int, int] = {}
    while len(ranks) < len(points):
        left = [i for i in range(len(points)) if i not in ranks]
        front = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        ranks.update(dict.fromkeys(front, max(ranks.values(), default=-1) + 1))
    return [ranks[i] for i in range(len(points))]


def naive_room(front: Sequence[Sequence[float]], point: Sequence[float]) -> float:
    room = 0.0
    for own, column in zip(point, zip(*front, strict=True), strict=True):
        if min(column) == max(column):
            continue
        below, above = [v for v in column if v < own], [v for v in column if v > own]
        room += (min(above) - max(below)) / (max(column) - min(column)) if below and above else math.inf
    return room


def naive_decisions(points: Sequence[Sequence[float]], reduction: float, finish: Sequence[int]) -> list[bool]:
    """The rule of `MultiObjectiveHalving`, read out."""
    answers: list[bool] = []
    finished: list[Sequence[float]] = []
    for trial, point in enumerate(points):
        seen = points[: trial + 1]
        ranks = naive_ranks(seen)
        peers = [other for other, rank in zip(seen, ranks, strict=True) if rank == ranks[-1]]
        ahead = sum(rank < ranks[-1] for rank in ranks)
        ahead += sum(naive_room(peers, peer) > naive_room(peers, point) for peer in peers)
        front = [other for other in finished if not any(dominates(o, other) for o in finished)]
        is_open = not any(dominates(other, point) for other in front)
        answers.append(ranks[-1] <= 1 or is_open or ahead < len(seen) / reduction)
        if trial in finish and answers[-1]:
            finished.append(point)
    return answers


@given(POINTS, REDUCTIONS, st.sets(st.integers(0, 24)))
def test_decisions_are_those_of_the_rule_read_out(points, reduction, finish) -> None:
    found = decisions(points, reduction=reduction, finish=finish)
    assert found == naive_decisions(points, reduction, finish)


def test_the_rule_stops_most_of_many_trials_and_keeps_the_front() -> None:
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(-5, 0, 300))
    loss = 0.1 / size + rng.exponential(1.0, 300)  # no better than 0.1 / size
    points = [(float(s), float(value)) for s, value in zip(size, loss, strict=True)]
    answers = decisions(points, finish=range(300))
    assert 0.2 < np.mean(answers) < 0.6
    front = [i for i, rank in enumerate(naive_ranks(points)) if rank == 0]
    assert all(answers[i] for i in front)


@given(POINTS, REDUCTIONS)
def test_nothing_on_the_front_is_lost_where_rungs_foretell_the_end(points, reduction) -> None:
    answers = decisions(points, reduction=reduction, finish=range(len(points)))
    assert all(answers[i] for i, rank in enumerate(naive_ranks(points)) if rank == 0)


# --- what must not matter --------------------------------------------------------------------------------


@given(POINTS, REDUCTIONS, st.sets(st.integers(0, 24)), st.tuples(st.booleans(), st.booleans()))
def test_an_objective_may_be_negated_and_turned_round(points, reduction, finish, flipped) -> None:
    signs = [-1.0 if flip else 1.0 for flip in flipped]
    turned = [[sign * value for sign, value in zip(signs, point, strict=True)] for point in points]
    directions = [MAX if flip else MIN for flip in flipped]
    scale = (True, False)
    expected = decisions(points, (MIN, MIN), reduction, finish, scale)
    assert decisions(turned, directions, reduction, finish, scale) == expected


@given(
    st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=20),
    REDUCTIONS,
    st.sets(st.integers(0, 19)),
    st.permutations(range(3)),
)
def test_the_order_of_objectives_does_not_matter(points, reduction, finish, order) -> None:
    directions, scale = [MIN, MAX, MIN], [True, False, False]
    expected = decisions(points, directions, reduction, finish, scale)
    swapped = [[point[i] for i in order] for point in points]
    found = decisions(swapped, [directions[i] for i in order], reduction, finish, [scale[i] for i in order])
    assert found == expected


@given(POINTS, REDUCTIONS, st.sets(st.integers(0, 24)), st.data())
def test_the_order_in_which_the_others_came_does_not_matter(points, reduction, finish, data) -> None:
    def last(order: Sequence[int]) -> bool:
        halving = scheduler(reduction=reduction)
        for trial in order:
            halving.record(trial, 10, points[trial])
        for trial in order:
            if trial in finish:
                halving.finish(trial, points[trial])
        return halving.report(len(points) - 1, 10, points[-1])

    others = list(range(len(points) - 1))
    assert last(data.draw(st.permutations(others))) == last(others)


@given(POINTS, st.sampled_from([np.exp, np.sqrt, lambda values: 2 * values + 1]))
def test_safety_sees_the_order_of_values_only(points, rescale) -> None:
    """Distances decide the rest: a huge reduction leaves nothing to them."""
    rescaled = [(float(rescale(size)), loss) for size, loss in points]
    assert decisions(rescaled, reduction=1e9) == decisions(points, reduction=1e9)


# --- the guards ------------------------------------------------------------------------------------------


def test_only_what_is_below_the_second_front_is_stopped() -> None:
    worse_and_worse = [(float(i), float(i)) for i in range(1, 9)]
    assert decisions(worse_and_worse, reduction=100) == [True, True] + [False] * 6
    assert decisions(worse_and_worse, reduction=2) == [True, True] + [False] * 6
    better_and_better = worse_and_worse[::-1]
    assert decisions(better_and_better, reduction=100) == [True] * 8


def test_after_its_first_rung_a_trial_on_the_second_front_is_no_longer_safe() -> None:
    halving = scheduler(reduction=100)
    for trial, point in enumerate([(1.0, 1.0), (2.0, 2.0)]):
        assert halving.report(trial, 10, point)
    halving.finish(0, (1.0, 1.0))
    assert halving.report(0, 20, (1.0, 1.0)), "the first front is"
    assert not halving.report(1, 20, (2.0, 2.0))
    assert halving.report(2, 20, (2.0, 1.5)), "for this one it is the first"


def test_the_best_share_goes_on_whatever_its_rank() -> None:
    # Three fronts of one point, and one of three: the point in its middle has the least room there.
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 9.0), (9.0, 4.0), (6.0, 6.0)]
    assert decisions(points, reduction=1.1)[-1], "5 ahead, 6 of 6 go on"
    assert not decisions(points, reduction=1.2)[-1], "5 ahead, 5 of 6 go on"
    end = [*points[:3], points[5], points[3], points[4]]
    assert decisions(end, reduction=1.5)[-1], "3 ahead, 4 of 6 go on: both ends have the most room"
    assert not decisions(end, reduction=2.0)[-1], "3 ahead, 3 of 6 go on"


def test_distances_in_size_are_ratios() -> None:
    better = [(0.5, 0.0), (0.6, 0.1)]  # two fronts ahead
    rank = [(1.0, 10.0), (10.0, 6.0), (100.0, 5.0), (1000.0, 1.0)]
    # By ratios (10, 6) has 2/3 + 5/9 and (100, 5) 2/3 + 5/9; by differences (100, 5) has far more.
    arriving = [*better, rank[0], rank[2], rank[3], rank[1]]
    assert decisions(arriving, reduction=1.49, logarithmic=(True, False))[-1], "4 ahead, 5 of 6 go on"
    assert not decisions(arriving, reduction=1.49, logarithmic=(False, False))[-1], "5 ahead"


def test_nothing_is_stopped_before_a_trial_has_finished() -> None:
    assert decisions([(float(i), float(i)) for i in range(9)], reduction=100, finish=()) == [True] * 9


def test_what_no_trial_of_the_finished_front_beat_goes_on() -> None:
    halving = scheduler(reduction=100)
    for trial, point in enumerate([(1.0, 5.0), (1.0, 4.0), (1.0, 3.0), (9.0, 1.0)]):
        assert halving.report(trial, 10, point)
    halving.finish(3, (9.0, 1.0))
    assert halving.report(4, 10, (8.0, 9.0)), "third behind what is still running, but none has proved better"
    assert not halving.report(5, 10, (9.0, 9.0)), "the one that finished was better here"
    halving.finish(2, (1.0, 0.5))  # now the front
    assert not halving.report(6, 10, (8.0, 8.0))
    assert halving.report(7, 10, (0.9, 9.0))


def test_a_trial_that_ended_behind_protects_nothing() -> None:
    halving = scheduler(reduction=100)
    for trial, point in enumerate([(1.0, 1.0), (2.0, 2.0), (5.0, 5.0)]):
        halving.record(trial, 10, point)
    halving.finish(0, (1.0, 9.0))
    halving.finish(1, (0.5, 0.5))  # so that 0, whose rung promised more, is off the front
    assert halving.report(3, 10, (1.5, 6.0)), "only 0, whose promise came to nothing, was better"
    assert not halving.report(4, 10, (6.0, 6.0))


def test_rungs_are_judged_apart() -> None:
    halving = scheduler(reduction=100)
    for trial in range(4):
        assert halving.report(trial, 10, (4.0 - trial, 4.0 - trial))
    halving.finish(3, (1.0, 1.0))
    assert halving.report(0, 20, (9.0, 9.0))
    assert not halving.report(4, 10, (9.0, 9.0))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_stopped_and_nobody_is_ranked_against_it(loss) -> None:
    halving = scheduler(reduction=100)
    assert not halving.report(0, 10, (1.0, loss)), "even as the first"
    halving.report(1, 10, (1.0, 1.0))
    halving.finish(1, (1.0, 1.0))
    assert not halving.report(2, 10, (1.0, loss))
    assert halving.report(3, 10, (2.0, 2.0)), "second"
    assert not halving.report(4, 10, (3.0, 3.0)), "third"
    with pytest.raises(ValueError, match="finite"):
        halving.finish(1, (1.0, loss))


def test_a_trial_that_reports_again_hears_the_same() -> None:
    halving = scheduler(reduction=100)
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert [halving.report(trial, 10, point) for trial, point in enumerate(points)] == [True] * 3
    halving.finish(0, (1.0, 1.0))
    assert halving.report(2, 10, (3.0, 3.0)), "it was told so before"
    assert not halving.report(3, 10, (3.0, 3.0)), "a new one with the same values is not"
    assert not halving.report(3, 10, (0.0, 0.0)), "what was decided stays"
    assert not halving.report(4, 10, (4.0, 4.0)), "and is counted once"


@pytest.mark.parametrize("reduction", [1, 0.5, math.nan])
def test_a_reduction_that_reduces_nothing_is_refused(reduction) -> None:
    with pytest.raises(ValueError, match="reduction must be above 1"):
        scheduler(reduction=reduction)


def test_values_and_scales_must_fit_the_directions() -> None:
    with pytest.raises(ValueError, match="3 values do not fit 2 objectives"):
        scheduler().report(0, 10, (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="1 scales do not fit 2 objectives"):
        scheduler(logarithmic=[True])


# --- trials of a search ----------------------------------------------------------------------------------

PARAMETERS = Objective("parameters", MIN, "parameters")
MACS = Objective("macs", MIN, "multiply-accumulates")
RETURN = Objective("return", MAX, "reward")


def result(number: int, parameters: int, *losses: float, reward: float | None = None, **more) -> TrialResult:
    """A report from a rung, or a complete trial where there is a reward."""
    objectives = {} if reward is None else {"parameters": float(parameters), "return": reward}
    return TrialResult(
        number=number,
        status="stopped" if reward is None else "complete",
        plan=PruningPlan({"l2": 1.0}, {}),
        origin="tpe",
        seed=number,
        objectives=objectives,
        parameters=parameters,
        rung_losses=tuple((10 * (i + 1), loss) for i, loss in enumerate(losses)),
        **more,
    )


def test_trials_are_ranked_on_size_and_rung_loss_and_their_returns_at_the_end() -> None:
    stopping = EarlyStopping([PARAMETERS, RETURN], reduction=100)
    for number, (parameters, loss) in enumerate([(100, 1.0), (110, 6.0), (120, 3.0)]):
        assert stopping.goes_on(result(number, parameters, loss))
    stopping.finish(result(1, 110, 6.0, reward=5.0))
    stopping.finish(result(2, 120, 3.0, reward=1.0))  # larger and worse, whatever its rung promised
    assert stopping.goes_on(result(3, 130, 5.0)), "third at its rung, but better there than the front was"
    stopping.finish(result(0, 100, 1.0, reward=9.0))
    assert not stopping.goes_on(result(4, 130, 5.0))
    assert not stopping.goes_on(result(5, 125, 9.0))
    assert stopping.goes_on(result(6, 99, 9.0))


def test_a_size_that_is_no_objective_does_not_count() -> None:
    def judged(objectives: list[Objective]) -> bool:
        stopping = EarlyStopping(objectives, reduction=100)
        for number in range(3):
            outcome = {"parameters": 9.0, "macs": 1.0 + number, "return": 1.0}
            stopping.goes_on(result(number, 9, 1.0 + number, macs=1 + number))
            stopping.finish(
                TrialResult(
                    **{**vars(result(number, 9, 1.0 + number, macs=1 + number)), "status": "complete"}
                    | {"objectives": outcome}
                )
            )
        return stopping.goes_on(result(7, 1, 9.0, macs=9))  # few parameters, many operations

    assert judged([PARAMETERS, RETURN])
    assert judged([RETURN]), "parameters where no size is an objective"
    assert judged([PARAMETERS, MACS, RETURN])
    assert not judged([MACS, RETURN])


def test_nothing_is_stopped_for_being_worse_than_what_breaks_the_constraints() -> None:
    def judged(**more) -> bool:
        stopping = EarlyStopping([PARAMETERS, RETURN], reduction=100, **more)
        for number in range(3):
            stopping.goes_on(result(number, 10 + number, 1.0))
            stopping.finish(result(number, 10 + number, 1.0, reward=9.0, macs=10**9))
        return stopping.goes_on(result(3, 99, 9.0, macs=10))

    assert not judged()
    assert judged(feasible=lambda found: found.macs <= 1000)


def test_a_trial_without_its_size_is_stopped() -> None:
    assert not EarlyStopping([MACS, RETURN], 3).goes_on(result(0, 9, 1.0))


def test_what_was_learnt_is_learnt_again_from_records() -> None:
    past = [
        result(0, 100, 1.0, 0.9, reward=9.0),
        result(1, 200, 2.0, 1.9, reward=1.0),
        result(2, 300, 3.0),  # stopped at the first rung
        result(3, 400, 4.0, 3.9),
        TrialResult(4, "failed", PruningPlan({"l2": 1.0}, {}), "tpe", 4, reason="mix: no", rung_losses=()),
    ]
    again = EarlyStopping([PARAMETERS, RETURN], reduction=100)
    again.replay(TrialResult.from_record(past_trial.to_record()) for past_trial in past)
    assert not again.goes_on(result(5, 350, 3.5))
    assert not again.goes_on(result(5, 350, 3.5, 3.5))
    assert again.goes_on(result(6, 99, 3.5))
    assert EarlyStopping([PARAMETERS, RETURN], reduction=100).goes_on(result(5, 350, 3.5))
