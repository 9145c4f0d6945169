"""What samplers go on learning from: checked against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_study import finish, make, run

from search import study as study_module
from search.constraints import Constraint
from search.history import worth_keeping
from search.pareto import crowding_distances

BOTH = ("minimize", "maximize")


def dominators(values: np.ndarray) -> np.ndarray:
    """How many points beat each one, the first objective low and the second high; by brute force."""
    losses = values * [1, -1]
    return np.array(
        [sum(bool((other <= mine).all() and (other < mine).any()) for other in losses) for mine in losses]
    )


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_half_are_the_best_and_the_others_the_latest(count: int, limit: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 8, (count, 2)).astype(float)
    kept = worth_keeping(values, BOTH, limit)
    assert kept == sorted(set(kept))
    assert len(kept) == min(count, limit)
    if count <= limit:
        return
    best = _best(values, limit)
    others = sorted(set(range(count)) - set(best), reverse=True)
    assert kept == sorted([*best, *others[: limit - len(best)]])


def _best(values: np.ndarray, limit: int) -> list[int]:
    """Peeled front after front, those with the most room first, then the latest."""
    left, order = list(range(len(values))), []
    while left:
        beaten = dominators(values[left])
        front = [index for index, count in zip(left, beaten, strict=True) if count == 0]
        room = dict(zip(front, crowding_distances(values[front]), strict=True))
        order += sorted(front, key=lambda index: (-room[index], -index))
        left = [index for index in left if index not in front]
    return order[: limit // 2]


def test_trials_without_values_are_kept_as_the_latest_only() -> None:
    values = np.array([[1.0, 9.0], [np.nan, np.nan], [3.0, 1.0], [np.nan, np.nan]])
    assert worth_keeping(values, BOTH, 2) == [0, 3]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_sampler_learns_from_so_many_trials(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study_module.HISTORY, sampler, 12)
    study = make(sampler)
    results = run(study, 40, parallel=3)
    running = [study.ask(number) for number in (40, 41)]
    known = [trial.values[1] for trial in study._optuna.trials if trial.values]
    assert 12 <= len(known) < 18
    assert max(result.objectives["score"] for result in results) in known
    for number, proposal in zip((40, 41), running, strict=True):
        study.tell(finish(number, proposal))
    assert study.ask(42).origin == sampler


def test_feasible_trials_are_remembered_before_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study_module.HISTORY, "tpe", 12)
    study = make(constraints=(Constraint("score", "<=", 0.2),))
    results = run(study, 40)
    feasible = [result.objectives["score"] for result in results if result.objectives["score"] <= 0.2]
    known = [trial.values[1] for trial in study._optuna.trials if trial.values]
    assert max(feasible) in known


def test_forgetting_does_not_depend_on_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study_module.HISTORY, "tpe", 12)
    whole, resumed = make(), make()
    proposals = {}
    results = []
    for number in range(30):
        proposals[number] = whole.ask(number)
        results.append(finish(number, proposals[number]))
        whole.tell(results[-1])
    resumed.replay(results, proposals)
    assert resumed.ask(30) == whole.ask(30)
