"""Constraints along a whole search: trials, sampler, front, selection, report, W&B, resume and warm start."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import optuna
import pytest
from rich.console import Console
from serial_search import finish, make_ready, search_serially

from components import UserError
from search.cli import main
from search.commands import print_front
from search.constraints import Constraint, parse_all
from search.front import Front, feasible
from search.report.content import gather
from search.run_directory import RunDirectory
from search.selection import Wish, select
from search.verification import verify_bundle
from search.wandb_records import trial_run

STEADY = 'agent.kind="toy_agents:Steady"'
BOUNDED = "search.constraints={stability: '>= 0.3, <= 0.97', smoothness: '<= 0.5', latency_p99_ms: '<= 900'}"


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search whose front is bounded by what is no objective."""
    path = tmp_path_factory.mktemp("runs") / "bounded"
    ready, front = search_serially(path, STEADY, BOUNDED, "search.trials=16")
    return ready, front, path


def test_the_front_is_that_of_the_trials_within_the_bounds(searched) -> None:
    ready, front, _ = searched
    results = ready.keeper.results
    assert all(result.complete for result in results)
    within = [r for r in results if 0.3 <= r.performance["stability"] <= 0.97]
    assert 0 < len(within) < len(results), "the bound has to cut"
    assert all(set(r.latencies) == {"latency_median_ms", "latency_p99_ms"} for r in results)

    def beaten(one, others) -> bool:
        pairs = [(one.objectives[n], [o.objectives[n] for o in others]) for n in one.objectives]
        return any(
            all(values[i] <= own for own, values in pairs) and any(values[i] < own for own, values in pairs)
            for i in range(len(others))
        )

    expected = {r.number for r in within if not beaten(r, within)}
    assert {trial.trial for trial in front.trials} == expected
    assert front.constraints == parse_all(
        {"stability": ">= 0.3, <= 0.97", "smoothness": "<= 0.5", "latency_p99_ms": "<= 900"}
    )


def test_the_sampler_is_told_each_bound_of_each_trial(searched) -> None:
    ready, _, path = searched
    study = optuna.load_study(study_name=path.name, storage=f"sqlite:///{RunDirectory(path).study}")
    by_number = {result.number: result for result in ready.keeper.results}
    assert len(study.trials) == len(by_number)
    for trial in study.trials:
        result = by_number[trial.user_attrs["trial"]]
        assert set(trial.constraints) == {
            "stability >= 0.3",
            "stability <= 0.97",
            "smoothness <= 0.5",
            "latency_p99_ms <= 900.0",
        }
        assert trial.constraints["stability >= 0.3"] == 0.3 - result.performance["stability"]
        assert trial.constraints["stability <= 0.97"] == result.performance["stability"] - 0.97
        assert trial.user_attrs["latency_p99_ms"] == result.latencies["latency_p99_ms"]


def test_what_was_measured_is_in_front_json_the_table_the_report_and_wandb(searched, capsys) -> None:
    ready, front, path = searched
    run = RunDirectory(path)
    content = run.read_front()
    assert Front.from_json(run.front, content) == front
    for entry in content["trials"]:
        assert {"stability", "stability_low", "smoothness", "latency_p99_ms"} <= set(entry["measured"])
        assert entry["latency_host"]
    assert content["constraints"]["stability"] == ">= 0.3, <= 0.97"
    print_front(front, Console(width=140))
    printed = capsys.readouterr().out
    assert "smoothness" in printed
    assert "latency" in printed
    low, high = (f"{front.trials[0].measured[f'stability_{end}']:.2f}" for end in ("low", "high"))
    assert f"{low[1:]}–{high[1:]}" in printed
    assert "Stability, empirical and no certificate" in printed
    report = gather(run)
    assert "stability >= 0.3" in report["constraints"]
    assert report["trials"]["measured"]["stability"][0] == pytest.approx(
        ready.keeper.results[0].performance["stability"], rel=1e-4
    )
    assert report["stability"] == content["stability"]["words"]
    _, rows, _ = trial_run(ready.keeper.results[0].to_record())
    assert rows[-1]["performance/stability"] == ready.keeper.results[0].performance["stability"]
    assert rows[-1]["latency_p99_ms"] == ready.keeper.results[0].latencies["latency_p99_ms"]


def test_a_bundle_of_it_verifies_without_its_base(searched) -> None:
    _, front, path = searched
    report = verify_bundle(path / front.trials[0].bundle)
    assert report.passed
    assert report.not_measured is None


def test_selections_keep_to_the_bounds_by_what_was_measured_at_the_end(searched) -> None:
    _, front, _ = searched
    assert len(front.trials) > 1
    *rest, last = front.trials

    def slow(trial, latency: float = 1e6):
        return replace(trial, measured={**trial.measured, "latency_p99_ms": latency})

    best = Wish("min_retention", last.retention)
    assert select(front, best).trial == last.trial
    missed = replace(front, trials=(*rest, slow(last)))
    assert str(missed.missed(missed.trials[-1])) == "<= 900.0"
    for kind in ("knee", "max_parameters", "max_latency"):
        assert select(missed, Wish(kind, 1e9)).trial != last.trial
    with pytest.raises(UserError, match="no trial of the front retains"):
        select(missed, best)
    with pytest.raises(UserError) as refused:
        select(missed, Wish("trial", last.trial))
    assert str(refused.value) == (
        f"trial {last.trial} misses latency_p99_ms <= 900.0, its latency_p99_ms is 1e+06, "
        "by what was measured at the end of the search"
    )
    with pytest.raises(UserError, match="no trial of the front of 'bounded' meets the constraints by what"):
        select(replace(front, trials=tuple(slow(trial) for trial in front.trials)), Wish("knee"))
    unmeasured = replace(front, trials=tuple(replace(trial, measured={}) for trial in front.trials))
    with pytest.raises(UserError, match="is not measured"):
        select(unmeasured, Wish("knee"))


def test_a_latency_limit_needs_no_objective(searched) -> None:
    _, front, _ = searched
    best = max(front.trials, key=lambda trial: trial.retention)
    assert select(front, Wish("max_latency", 900)).trial == best.trial


def test_an_empty_front_says_which_constraints_it_was(tmp_path: Path, capsys) -> None:
    bounds = "search.constraints={stability: '>= 0.9999', retention: '>= 0.1, <= 7'}"
    _, front = search_serially(tmp_path / "empty", STEADY, bounds, "search.trials=3")
    assert front.trials == ()
    sentence = "no complete trial meets the constraints stability >= 0.9999, retention >= 0.1, <= 7.0"
    with pytest.raises(UserError, match=sentence):
        select(front, Wish("knee"))
    for wish in (["--knee"], ["--min-retention", "0.5"], ["--trial", "0"]):
        assert main(["select", str(tmp_path / "empty"), *wish, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert len(error.splitlines()) == 1
    assert main(["front", str(tmp_path / "empty")]) == 0
    assert sentence in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_records_that_lack_a_bounded_measurement_are_infeasible_when_resumed(tmp_path: Path) -> None:
    path = tmp_path / "old"
    settings = (STEADY, "search.constraints={stability: '>= 0.0', latency_p99_ms: '<= 900'}")
    _, front = search_serially(path, *settings, "search.trials=4")
    assert front.trials
    lines = [json.loads(line) for line in RunDirectory(path).trials.read_text().splitlines()]
    for number, line in enumerate(lines):  # as before these were measured
        if number % 2:
            del line["latencies"]
        else:
            line["performance"] = {"reconstruction_error": line["performance"]["reconstruction_error"]}
    RunDirectory(path).trials.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ready = make_ready(path, *settings, "search.trials=6", resume=True)
    assert ready.keeper.members == []
    front = finish(ready)
    assert {trial.trial for trial in front.trials} <= {4, 5}
    assert len(front.trials) > 0


def test_a_warm_start_from_trials_that_lack_a_bounded_measurement_is_one_sentence(tmp_path: Path) -> None:
    search_serially(tmp_path / "plain", "search.trials=3")
    with pytest.raises(UserError) as refused:
        make_ready(
            tmp_path / "new",
            "search.warm_start=plain",
            "search.constraints={latency_p99_ms: '<= 900'}",
        )
    assert str(refused.value) == (
        "search.warm_start is 'plain': trial 0 of the other search is of no use: "
        "constraint latency_p99_ms is missing"
    )
    assert not (tmp_path / "new").exists()


def test_a_warm_start_learns_from_trials_that_measured_it(tmp_path: Path) -> None:
    bounds = "search.constraints={latency_p99_ms: '<= 900'}"
    search_serially(tmp_path / "first", bounds, "search.trials=3")
    ready, _ = search_serially(tmp_path / "second", bounds, "search.trials=3", "search.warm_start=first")
    assert len(ready.checked.earlier) == 3


def test_trials_are_stopped_early_under_a_latency_constraint(tmp_path: Path) -> None:
    settings = (
        STEADY,
        "search.constraints={latency_p99_ms: '<= 900', macs: '<= 1e9'}",
        "search.early_stopping={rungs: 2, reduction: 4}",
        "pruning.fine_tune.updates=40",
        "search.sampler=random",
    )
    ready, front = search_serially(tmp_path / "early", *settings, "search.trials=20")
    stopped = [result for result in ready.keeper.results if result.stopped]
    complete = [result for result in ready.keeper.results if result.complete]
    assert stopped
    assert front.trials
    assert all(result.latencies == {} and result.macs for result in stopped)
    assert all("latency_p99_ms" in result.latencies for result in complete)


@pytest.mark.parametrize(
    ("bounds", "sentence"),
    [
        ("{stabillity: '>= 0.5'}", "is not measured: did you mean 'stability'?"),
        ("{retention: '>= 0.9, <= 0.5'}", "nothing is at least 0.9 and at most 0.5"),
        ("{stability_low: '>= 0.9', stability: '<= 0.5'}", "stability_low is never above stability"),
        ("{stability: '>= 1.5'}", "stability is never above 1"),
        ("{parameters: '<= 100', size_ratio: '>= 0.9'}", "which no trial can meet together"),
    ],
)
def test_unknown_and_contradictory_constraints_are_one_sentence(
    bounds: str, sentence: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("steady.yaml").write_text('agent: {kind: "toy_agents:Steady"}\nwandb: {mode: disabled}\n')
    assert main(["search", "steady.yaml", "--set", f"search.constraints={bounds}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "search.constraints" in error
    assert len(error.splitlines()) == 1
    assert not Path("runs").exists()


def test_feasible_means_every_bound(searched) -> None:
    ready, _, _ = searched
    result = ready.keeper.results[0]
    for low, high in product((0.0, 2.0), (-1.0, 1.0)):
        bounds = (Constraint("stability", ">=", low), Constraint("stability", "<=", high))
        assert feasible(bounds, result) == (low <= result.performance["stability"] <= high)
    assert not feasible((Constraint("nothing", "<=", 1e9),), result)
