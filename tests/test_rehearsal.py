"""A base that has barely trained: what it is good for, and what is said of the training."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from toy_agents import Toy

from agents.agent import Rehearsal, agent_class, rehearsal
from components.plan import PruningPlan
from search import rehearsal as rehearsing
from search.base import Base, train_base
from search.rehearsal import TrainingTime, rehearse
from search.trial import run_trial
from search.trial_types import TrialSettings, TrialSpec

METRICS = ("l2", "fisher", "reconstruction", "bayesian", "gate_fisher")

TINY = {
    "task": "gymnasium:toy_environments:Point-v0",
    "steps": 60_000,
    "seed_decisions": 5000,
    "encoder_width": 24,
    "mlp_width": 24,
    "latent": 8,
    "batch_size": 32,
    "samples": 24,
    "iterations": 3,
    "horizon": 3,
    "validation_episodes": 2,
    "test_episodes": 2,
    "distillation_sequences": 64,
    "distillation_batch_size": 32,
    "on_policy_episodes": 1,
}


class Steady(Toy):
    """A toy whose every update takes a millisecond at least."""

    def _descend(self, updates: int, seed: int, tracker: Any, progress: Any) -> None:
        def slowly(done: int, total: int, note: str) -> None:
            time.sleep(0.001)
            progress(done, total, note)

        super()._descend(updates, seed, tracker, slowly)


class Silent(Toy):
    """A toy that does not report its progress."""

    def _descend(self, updates: int, seed: int, tracker: Any, progress: Any) -> None:
        super()._descend(updates, seed, tracker, lambda done, total, note: None)


class Broken(Toy):
    """A toy that cannot be trained."""

    def train(self, seed: int, tracker: Any, progress: Any) -> None:
        raise RuntimeError("no such luck")


def rehearsed(kind: str, options: dict[str, Any], **changed: Any) -> tuple[Base, TrainingTime]:
    agent = agent_class(kind)(options)
    chosen = {"seed": 0, "metrics": METRICS, "reconstruction": "sequential", **changed}
    return rehearse(kind, agent, **chosen)


def runs_a_trial(base: Base, objectives: tuple[str, ...]) -> None:
    plan = PruningPlan(dict.fromkeys(METRICS, 1.0), dict.fromkeys(base.widths, 0.5))
    settings = TrialSettings(metrics=METRICS, objectives=objectives, fine_tune_updates=5)
    result = run_trial(TrialSpec(0, plan, "", 0, settings), base)
    assert result.complete, result.reason


def test_a_training_that_ends_is_measured_in_full() -> None:
    base, training = rehearsed("toy_agents:Toy", {})
    assert training.basis == "trained in full"
    assert training.seconds is not None
    assert training.seconds > 0
    real = train_base("toy_agents:Toy", {}, seed=0, metrics=METRICS)
    for name, array in real.states["model"].items():  # the same training, bit for bit
        assert (array == base.states["model"][name]).all()
    runs_a_trial(base, ("parameters", "reconstruction_error"))


def test_a_long_training_is_stopped_and_extrapolated(monkeypatch) -> None:
    monkeypatch.setattr(rehearsing, "REHEARSAL_SECONDS", 0.1)
    heard = []
    base, training = rehearsed(
        "test_rehearsal:Steady", {"updates": 100_000}, progress=lambda *report: heard.append(report)
    )
    last = heard[-1][0]
    assert 2 <= last < 100_000
    assert training.basis == f"estimated from {last:,} of 100,000 steps"
    assert training.seconds is not None
    assert training.seconds > 100.0  # a millisecond each
    assert base.options["updates"] == 100_000
    runs_a_trial(base, ("parameters", "reconstruction_error"))


def test_a_training_that_reports_nothing_is_stopped_at_a_step_and_not_extrapolated(monkeypatch) -> None:
    monkeypatch.setattr(rehearsing, "SILENT_SECONDS", 0.1)
    base, training = rehearsed("test_rehearsal:Silent", {"updates": 10_000_000})
    assert training == TrainingTime(None, "not measured: the training does not report its progress")
    runs_a_trial(base, ("parameters", "reconstruction_error"))


def test_retention_on_it_is_finite_even_where_it_has_learnt_nothing() -> None:
    base, _ = rehearsed("toy_agents:Untrainable", {}, metrics=("l2",))
    assert base.retention(base.trivial["validation"]) == 0.0


def test_most_agents_can_be_stopped_anywhere() -> None:
    assert rehearsal(Toy({})) is None


def test_tdmpc_rehearses_with_experience_that_trials_can_use(monkeypatch) -> None:
    agent = agent_class("tdmpc")(TINY)
    how = rehearsal(agent)
    assert isinstance(how, Rehearsal)
    assert how.steps == TINY["steps"]
    heard: list[tuple[int, int, str]] = []
    base, training = rehearsed("tdmpc", TINY, progress=lambda *report: heard.append(report))
    assert 2 <= len(heard) <= 10
    assert heard[-1][0] == heard[-1][1] == how.options["steps"]
    assert training.basis == f"estimated from {heard[-1][1]:,} of 60,000 steps"
    assert base.options == agent.options
    assert len(base.data["replay.rewards"]) >= 10
    assert all(torch.isfinite(torch.tensor(array)).all() for array in base.states["model"].values())
    runs_a_trial(base, ("parameters", "return"))


def test_what_the_training_raises_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        rehearsed("test_rehearsal:Broken", {})
