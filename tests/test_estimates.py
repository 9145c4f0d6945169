"""What stopped trials would have measured, and that the Gaussian process hears of it and nobody else does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from components.plan import PruningPlan
from search.estimates import Estimates
from search.trial_types import TrialResult


def result(number: int, *losses: float, error: float | None = None, parameters: int = 50) -> TrialResult:
    """Stopped, or complete where it has an error; rungs are at 10, 20 ... updates."""
    return TrialResult(
        number=number,
        status="stopped" if error is None else "complete",
        plan=PruningPlan({"l2": 1.0}, {}),
        origin="tpe",
        seed=0,
        objectives={} if error is None else {"parameters": 50.0, "error": error},
        parameters=parameters,
        rung_losses=tuple((10 * (i + 1), loss) for i, loss in enumerate(losses)),
    )


def estimates(*results: TrialResult) -> Estimates:
    made = Estimates()
    for each in results:
        made.learn(each)
    return made


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(1.0, 0.1), (2.0, 0.2), (1.5, 0.15), (3.0, 0.4), (0.1, 0.1), (9.0, 0.6)],
)
def test_an_estimate_lies_between_those_whose_rungs_were_alike(loss: float, expected: float) -> None:
    made = estimates(result(0, 4.0, error=0.6), result(1, 1.0, error=0.1), result(2, 2.0, error=0.2))
    assert made.of(result(7, loss), "error") == pytest.approx(expected)


def test_a_latency_is_estimated_by_size_and_not_by_loss() -> None:
    def fast(number: int, loss: float, parameters: int, latency: float) -> TrialResult:
        made = result(number, loss, error=0.1, parameters=parameters)
        return replace(made, latencies={"latency_p99_ms": latency})

    made = estimates(fast(0, 9.0, 100, 1.0), fast(1, 1.0, 300, 3.0))
    for loss in (0.1, 5.0, 20.0):
        assert made.of(result(7, loss, parameters=200), "latency_p99_ms") == pytest.approx(2.0)
    assert made.of(result(7, 1.0, parameters=10), "latency_p99_ms") == pytest.approx(1.0)


def test_what_is_measured_is_not_estimated() -> None:
    made = estimates(result(0, 4.0, error=0.6))
    assert made.of(result(7, 1.0, parameters=13), "parameters") == 13.0


def test_only_the_last_rung_counts_and_only_trials_that_reached_it() -> None:
    made = estimates(
        result(0, 1.0, 0.5, error=0.1), result(1, 2.0, 0.25, error=0.3), result(2, 5.0, error=9.0)
    )
    assert made.of(result(7, 1.0, 0.25), "error") == pytest.approx(0.3)
    assert made.of(result(7, 1.0), "error") == pytest.approx(0.1)


def test_without_a_complete_trial_at_its_rung_there_is_none() -> None:
    assert estimates().of(result(7, 1.0), "error") is None
    assert estimates(result(0, 1.0)).of(result(7, 1.0), "error") is None
    assert estimates(result(0, 1.0, error=0.1)).of(result(7, 1.0, 1.0), "error") is None
    assert estimates(result(0, 1.0, error=0.1)).of(result(7), "error") is None
    assert estimates(result(0, 1.0, error=0.1)).of(result(7, 1.0), "nothing") is None


def test_an_estimate_is_finite_where_losses_are_equal() -> None:
    made = estimates(result(0, 1.0, error=0.1), result(1, 1.0, error=0.3))
    assert math.isfinite(made.of(result(7, 1.0), "error") or math.nan)
