"""Trials that stand still at rungs: what they report, what stopping leaves behind, what stays as ever."""

from __future__ import annotations

import dataclasses
import json
import logging
import random

import numpy as np
import pytest
import torch
import toy_agents
from serial_search import make_ready, search_serially

from components import UserError
from components.plan import PruningPlan
from search.base import Base, train_base
from search.checked_experiment import check
from search.config import parse_experiment
from search.determinism import deterministic
from search.rungs import SteppedTrial
from search.trial import run_trial
from search.trial_types import TrialResult, TrialSettings, TrialSpec

PLAN = PruningPlan({"l2": 1.0}, {"encoder.0": 0.5, "latent": 0.4, "decoder.0": 0.5})
RANKED = "agent.kind=toy_agents:Ranked"


def note(number: int) -> TrialResult:
    return TrialResult(number, "stopped", PLAN, "test", 0)


# --- stepping --------------------------------------------------------------------------------------------


def test_a_trial_is_stepped_from_rung_to_rung() -> None:
    seen = []

    def run(report):
        for number in range(3):
            seen.append(f"work {number}")
            report(note(number))
        return note(9)

    trial = SteppedTrial(run)
    assert seen == []
    for number in range(3):
        assert not trial.over
        assert trial.step() == note(number)
        assert seen[-1] == f"work {number}", "it stands still at the rung"
    assert not trial.over
    assert trial.step() == note(9)
    assert trial.over
    with pytest.raises(RuntimeError, match="is over"):
        trial.step()
    trial.end()  # nothing is left to end


def test_a_trial_without_rungs_is_one_step() -> None:
    trial = SteppedTrial(lambda report: note(9))
    assert trial.step() == note(9)
    assert trial.over


def test_what_a_trial_raises_comes_out_of_the_step() -> None:
    def run(report):
        report(note(0))
        raise ArithmeticError("no")

    trial = SteppedTrial(run)
    trial.step()
    with pytest.raises(ArithmeticError, match="no"):
        trial.step()
    assert trial.over


def surroundings():
    cudnn = torch.backends.cudnn
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        (cudnn.deterministic, cudnn.benchmark),
        torch.is_grad_enabled(),
    )


def test_ending_a_trial_leaves_its_context_managers() -> None:
    left = []

    def run(report):
        try:
            with deterministic(7, threads=1), torch.no_grad():
                random.random()
                try:
                    report(note(0))
                except Exception:  # as agents have it around what may fail
                    left.append("swallowed")
        finally:
            left.append("finally")
        return note(9)

    before = surroundings()
    trial = SteppedTrial(run)
    trial.step()
    assert surroundings() != before, "it stands inside them"
    assert left == []
    trial.end()
    assert trial.over
    assert left == ["finally"]
    assert surroundings() == before


def test_a_trial_that_was_not_begun_is_never_run() -> None:
    trial = SteppedTrial(lambda report: pytest.fail("it was run"))
    trial.end()
    assert not trial.over


def test_a_trial_that_catches_everything_ends_all_the_same() -> None:
    caught = []

    def run(report):
        for number in range(4):
            try:
                report(note(number))
            except BaseException as error:
                caught.append(type(error).__name__)
        return note(9)

    trial = SteppedTrial(run)
    trial.step()
    trial.end()
    assert trial.over
    assert caught == ["GreenletExit"] * 4


def test_a_fault_while_cleaning_up_is_logged(caplog) -> None:
    def run(report):
        try:
            report(note(0))
        finally:
            raise OSError("no more space")

    trial = SteppedTrial(run)
    trial.step()
    with caplog.at_level(logging.WARNING):
        trial.end()
    assert trial.over
    assert "a stopped trial failed to clean up: OSError: no more space" in caplog.text


# --- a trial's rungs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> Base:
    return train_base("toy_agents:Ranked", {}, seed=0, metrics=("l2",))


def spec(rungs=(8, 13), **settings) -> TrialSpec:
    given = {"objectives": ("parameters", "reconstruction_error"), "fine_tune_updates": 40, **settings}
    return TrialSpec(3, PLAN, "test", 11, TrialSettings(metrics=("l2",), rungs=rungs, **given))


def reports_of(trial_spec: TrialSpec, base: Base) -> tuple[list[TrialResult], TrialResult]:
    reports: list[TrialResult] = []
    return reports, run_trial(trial_spec, base, "cpu", reports.append)


def stopped_at(rung: int, trial_spec: TrialSpec, base: Base) -> TrialResult:
    trial = SteppedTrial(lambda report: run_trial(trial_spec, base, "cpu", report))
    for _ in range(rung):
        result = trial.step()
    trial.end()
    return result


def as_measured(result: TrialResult) -> dict:
    """The record without what rungs and clocks may change."""
    record = result.to_record()
    return {
        k: v for k, v in record.items() if k not in ("timings", "usage", "started", "finished", "rung_losses")
    }


def test_rungs_are_reached_exactly_and_change_nothing_else(base) -> None:
    plain = run_trial(spec(rungs=()), base)
    reports, result = reports_of(spec(), base)
    assert plain.complete
    assert plain.rung_losses == ()
    assert as_measured(result) == as_measured(plain)
    for name, array in plain.state.items():
        np.testing.assert_array_equal(result.state[name], array)
    # The toy's learning rate is constant: after 8 of 40 updates it is where a fine-tuning of 8 ends.
    expected = tuple(
        (updates, run_trial(spec(rungs=(), fine_tune_updates=updates), base).rungs[1][1])
        for updates in (8, 13)
    )
    assert [report.rung_losses for report in reports] == [expected[:1], expected]
    assert result.rung_losses == expected
    assert "report" in result.timings
    assert "report" not in plain.timings


def test_a_report_is_the_result_of_a_trial_that_is_stopped_there(base) -> None:
    complete = run_trial(spec(rungs=()), base)
    for rung, updates in ((1, 8), (2, 13)):
        result = stopped_at(rung, spec(), base)
        assert result.status == "stopped"
        assert (result.complete, result.stopped, result.failed) == (False, True, False)
        assert result.updates == updates
        assert [reached for reached, _ in result.rung_losses] == [8, 13][:rung]
        for name in ("number", "plan", "origin", "seed", "parameters", "size_ratio", "widths", "kept"):
            assert getattr(result, name) == getattr(complete, name), name
        assert result.component_sizes == complete.component_sizes
        assert (result.objectives, result.performance, result.retention) == ({}, {}, None)
        assert (result.reason, result.state, result.repaired_by, result.macs) == (None, None, "", None)
        assert "fine_tune" in result.timings
        assert "evaluate" not in result.timings, "a stopped trial pays for no evaluation"
        assert result.started
        assert result.finished
        assert result.host
        again = TrialResult.from_record(json.loads(json.dumps(result.to_record(), allow_nan=False)))
        assert again == result
    assert complete.updates == 40


def test_operations_are_counted_before_the_end_only_where_they_are_ranked(base) -> None:
    objectives = ("macs", "reconstruction_error")
    result = stopped_at(1, spec(objectives=objectives), base)
    assert result.macs == run_trial(spec(rungs=(), objectives=objectives), base).macs


def test_stopping_leaves_the_process_as_it_was(base) -> None:
    before = surroundings()
    trial = SteppedTrial(lambda report: run_trial(spec(), base, "cpu", report))
    trial.step()
    trial.end()
    assert surroundings() == before
    assert as_measured(run_trial(spec(), base)) == as_measured(reports_of(spec(), base)[1])


def test_nothing_is_reported_without_a_rung_loss() -> None:
    base = train_base("toy_agents:Toy", {}, seed=0, metrics=("l2",))
    reports, result = reports_of(spec(), base)
    assert (reports, result.rung_losses, result.updates) == ([], (), 40)
    assert result.complete


def test_nothing_is_reported_where_fine_tuning_tells_no_progress(base) -> None:
    reports, result = reports_of(spec(fine_tune_method="nothing"), base)
    assert (reports, result.rung_losses, result.updates) == ([], (), 40)


def test_what_diverges_spares_the_other_updates_and_keeps_the_reconstructed_model(base) -> None:
    diverging = dataclasses.replace(base, options={**base.options, "fault": "diverge"})
    reports, result = reports_of(spec(), diverging)
    repaired = run_trial(spec(rungs=(), fine_tune_updates=0), base)
    assert reports == []
    assert (result.status, result.repaired_by) == ("complete", "reconstruction")
    assert (result.updates, result.fine_tuning) == (8, {"diverged": 1.0})
    assert result.objectives == repaired.objectives
    for name, array in repaired.state.items():
        np.testing.assert_array_equal(result.state[name], array)


def test_a_failure_says_how_many_updates_it_made(base, monkeypatch) -> None:
    def fail(self):
        raise RuntimeError("no loss today")

    monkeypatch.setattr(toy_agents.Ranked, "rung_loss", fail)
    result = run_trial(spec(), base)
    assert (result.status, result.updates) == ("failed", 8)
    assert result.reason == "fine_tune: RuntimeError: no loss today"


# --- a search with early stopping ------------------------------------------------------------------------


def test_a_search_with_early_stopping_in_one_process(tmp_path) -> None:
    overrides = (RANKED, "search.trials=40", "search.sampler=random", "pruning.fine_tune.updates=30")
    ready, front = search_serially(tmp_path / "toy", *overrides, "search.early_stopping={reduction: 4}")
    results = ready.run.read_trials()
    stopped = [result for result in results if result.stopped]
    assert ready.checked.trial_settings().rungs == (6, 11, 18)
    assert len(stopped) >= 5
    assert {result.updates for result in stopped} <= {6, 11, 18}
    made = {result.number: result.updates for result in results if result.complete}
    assert made == {number: 0 if number == 0 else 30 for number in made}  # the first is the base itself
    assert {result.number for result in results} == set(range(40))
    assert not {trial.trial for trial in front.trials} & {result.number for result in stopped}
    assert ready.run.bundles() == {trial.trial for trial in front.trials}
    # What did complete is what it is without early stopping: random proposals do not learn.
    plain, _ = search_serially(tmp_path / "plain", *overrides)
    whole = {result.number: result for result in plain.run.read_trials()}
    for result in results:
        if result.complete:
            assert as_measured(result) == as_measured(whole[result.number])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            (),
            "search.early_stopping ranks trials by a rung loss, which toy_agents:Toy does not have when it "
            "is fine-tuned by 'supervised': choose null",
        ),
        (
            ("agent={kind: tdmpc, task: cartpole-swingup}", "pruning.fine_tune.method=td"),
            "search.early_stopping ranks trials by a rung loss, which tdmpc does not have when it is "
            "fine-tuned by 'td': choose one of distill, distill_td, or null",
        ),
        (
            ("agent={kind: autoencoder}", "search.objectives=[latency_p99_ms, reconstruction_error]"),
            "search.early_stopping cannot tell how a trial will do in latency_p99_ms, which is measured "
            "at its end: take that out of search.objectives, or choose null",
        ),
    ],
)
def test_an_agent_without_a_rung_loss_is_refused(tmp_path, overrides, sentence) -> None:
    config = """
agent: {kind: "toy_agents:Toy"}
search: {early_stopping: {}}
"""
    with pytest.raises(UserError) as caught:
        check(parse_experiment(config, name="toy", overrides=overrides), tmp_path / "toy")
    assert str(caught.value) == sentence


def test_no_rungs_without_early_stopping(tmp_path) -> None:
    assert make_ready(tmp_path / "toy", RANKED).checked.trial_settings().rungs == ()
