"""The prediction against counting by hand and against a simulated search."""

from __future__ import annotations

import heapq

import pytest

from search.cost import FRONT_SHARE, START_SECONDS, MeasuredTrials, Setting, predict, settings_of

MEASURED = MeasuredTrials(
    smallest={"slice": 1.0, "evaluate": 2.0},
    middle={"slice": 2.0, "fine_tune": 3.0, "evaluate": 4.0},
    largest={"slice": 3.0, "fine_tune": 12.0, "evaluate": 6.0},
    set_up=1.5,
    test=0.5,
    by_threads={1: 9.0, 2: 4.5},
    threads=1,
)


def test_the_mean_trial_is_simpsons_rule_stage_by_stage() -> None:
    mean = MEASURED.mean
    assert mean == {"slice": 12 / 6, "fine_tune": 24 / 6, "evaluate": 24 / 6}
    assert list(mean) == ["slice", "fine_tune", "evaluate"]
    assert MEASURED.trial_seconds(1) == pytest.approx(10.0)
    assert MEASURED.trial_seconds(2) == pytest.approx(5.0)


def simulated(trials: int, workers: int, seconds: float, propose: float) -> float:
    """When the last of a number of trials ends; a proposal is made for every worker that gets free."""
    free = [0.0] * workers
    driver = 0.0
    for _ in range(trials):
        driver = max(driver, heapq.heappop(free)) + propose
        heapq.heappush(free, driver + seconds)
    return max(free)


@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_cheap_proposals_leave_the_time_to_the_workers(workers: int) -> None:
    setting = Setting(workers, cpus=1.0, threads=1, here=workers <= 16)
    cost = predict(setting, MEASURED, trials=160, propose=0.0, train=60.0, cores=16)
    assert cost.trials == pytest.approx(simulated(160, workers, 10.0, 0.0))
    assert cost.limit == "trials"
    assert cost.start == START_SECONDS + 1.5
    assert cost.test == 0.5 * round(160 * FRONT_SHARE)
    assert cost.total == pytest.approx(cost.start + 60.0 + cost.trials + cost.test)
    shared = predict(setting, MEASURED, trials=160, propose=0.0, train=60.0, cores=16, testers=4)
    assert shared.test == cost.test / 4


@pytest.mark.parametrize("workers", [4, 16, 64])
def test_the_driver_limits_many_workers(workers: int) -> None:
    setting = Setting(workers, cpus=1.0, threads=1, here=False)
    cost = predict(setting, MEASURED, trials=400, propose=400 * 4.0, train=0.0, cores=2)
    exact = simulated(400, workers, 10.0, 4.0)
    assert cost.trials == pytest.approx(exact, rel=0.05)
    assert cost.limit == "proposals"


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_few_workers_wait_for_their_proposals(workers: int) -> None:
    setting = Setting(workers, cpus=1.0, threads=1, here=False)
    cost = predict(setting, MEASURED, trials=400, propose=400 * 1.0, train=0.0, cores=2)
    assert cost.trials == pytest.approx(simulated(400, workers, 10.0, 1.0), rel=0.03)
    assert cost.limit == "trials"


def test_a_fraction_of_a_core_is_no_faster_than_the_cores_there_are() -> None:
    crowded = Setting(4, cpus=0.5, threads=1, here=True)
    cost = predict(crowded, MEASURED, trials=10, propose=6.0, train=0.0, cores=2)
    assert cost.trials == pytest.approx((10 * 10.0 + 6.0) / 2)


def test_training_is_left_out_where_it_is_not_known_and_done_in_every_trial_where_asked() -> None:
    setting = Setting(2, cpus=1.0, threads=1, here=True)
    unknown = predict(setting, MEASURED, trials=10, propose=0.0, train=None, cores=2)
    assert unknown.train is None
    assert unknown.total == pytest.approx(unknown.start + unknown.trials + unknown.test)
    each = predict(setting, MEASURED, trials=10, propose=0.0, train=0.0, cores=2, train_each=30.0)
    assert each.train == 0.0
    assert each.trials == pytest.approx(10 * 40.0 / 2)


def test_settings_double_and_include_what_a_search_takes_by_itself() -> None:
    settings = settings_of(1.0, [1, 2, 4], trials=64, cores=6, own=6)
    first = [setting.at_once for setting in settings if setting.cpus == 1.0]
    assert first == [1, 2, 4, 6, 8, 16, 32]
    assert [setting.here for setting in settings if setting.cpus == 1.0] == [True] * 4 + [False] * 3
    assert [(s.at_once, s.cpus) for s in settings if s.cpus > 1] == [(1, 2.0), (2, 2.0), (1, 4.0)]
    assert all(s.at_once <= 3 for s in settings_of(1.0, [1], trials=3, cores=6, own=3))
    assert [s.total_cpus for s in settings_of(0.5, [1], trials=4, cores=2, own=4)] == [0.5, 1.0, 2.0]
