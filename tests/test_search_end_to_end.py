"""Whole searches through the command: the run directory, what is printed, and exit codes.

Those on Ray show that the real thing works; the others replace the cluster alone, which has tests of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serial_search import EXPERIMENT, run_serially, search_serially
from test_wandb_logger import offline_runs

from search.cli import main
from search.run_directory import RunDirectory

TESTS = Path(__file__).parent
TOY = Path("runs/toy")


@pytest.fixture(autouse=True)
def _workers_find_the_toy(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(EXPERIMENT)


@pytest.fixture
def serial(monkeypatch):
    """Without Ray."""
    monkeypatch.setattr("search.experiment.run_search", run_serially)


def records(run: Path) -> list[dict]:
    """The trials, without what differs from run to run."""
    volatile = {"timings", "usage", "started", "finished"}
    lines = (run / "trials.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in volatile} for line in lines]


def front(run: Path) -> dict:
    content = json.loads((run / "front.json").read_text())
    del content["base"]["training_seconds"], content["experiment"]
    return content


def optuna_states(run: Path) -> list[str]:
    with sqlite3.connect(run / "study.db") as database:
        return [state for (state,) in database.execute("SELECT state FROM trials ORDER BY number")]


def assert_same_search(first: Path, second: Path) -> None:
    """The same trials in the same order, the same front and the same models, bit for bit."""
    assert records(first) == records(second)
    assert front(first) == front(second)
    for bundle in (first / "models").iterdir():
        for name in ("model.safetensors", "verification.safetensors", "plan.json", "architecture.json"):
            assert (bundle / name).read_bytes() == (second / "models" / bundle.name / name).read_bytes()


def assert_wandb_has_it_all(run: Path, found: dict) -> None:
    """Every run, config key, history row, summary value, table, plot and artifact, from the files alone."""
    trials = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    runs = offline_runs(run)
    assert set(runs) == {run.name, *(f"trial {trial['trial']}" for trial in trials)}
    members = {entry["trial"] for entry in found["trials"]}
    for trial in trials:
        logged = runs[f"trial {trial['trial']}"]
        assert (logged.run.run_group, logged.run.job_type, logged.exit_code) == (run.name, "trial", 0)
        for kind in ("ratio", "coefficient"):
            for name, value in trial[f"{kind}s"].items():
                assert logged.config[f"{kind}/{name.replace('.', '/')}"] == value
        *rungs, measured = logged.history
        assert [[row["fine_tune/updates"], row["fine_tune/performance"]] for row in rungs] == trial["rungs"]
        for name in ("parameters", "size_ratio", "macs", "retention"):
            assert measured[name] == trial[name]
        for name, value in {**trial["objectives"], **trial["performance"]}.items():
            assert value in (measured.get(name), measured.get(f"performance/{name}"))
        for prefix, values in (("size", "component_sizes"), ("seconds", "timings"), ("usage", "usage")):
            assert trial[values], values
            for name, value in trial[values].items():
                assert logged.summary[f"{prefix}/{name}"] == value
        for group, width in trial["widths"].items():
            assert logged.summary[f"width/{group.replace('.', '/')}"] == width
        assert logged.summary["on_front"] == (trial["trial"] in members)
    search = runs[run.name]
    assert search.config["agent/kind"] == "autoencoder"
    rows = [row for row in search.history if "finished" in row]
    assert [row["finished"] for row in rows] == list(range(1, len(trials) + 1))
    assert {"failed", "stopped", "front_size", "hypervolume", "trials_per_minute"} <= set(rows[-1])
    assert rows[-1]["front_size"] == len(members)
    last = search.history[-1]
    for name, kind in {
        **dict.fromkeys(("front", "importance"), "table-file"),
        **dict.fromkeys(("front_plot", "importance_plot", "matters_plot"), "plotly-file"),
        "report": "html-file",
    }.items():
        assert last[f"{name}/_type"] == kind
        assert (search.directory / "files" / last[f"{name}/path"]).is_file()
    assert search.summary["hypervolume"] == found["hypervolume"]
    assert any(name.startswith("matters/") for name in search.summary)
    bundles = [artifact for artifact in search.artifacts if artifact.type == "bundle"]
    assert {json.loads(artifact.metadata)["trial"] for artifact in bundles} == members
    assert all(list(artifact.tags) == ["pareto"] for artifact in bundles)
    assert sum("knee" in artifact.aliases for artifact in bundles) == 1
    for artifact in bundles:
        bundle = run / "models" / str(json.loads(artifact.metadata)["trial"])
        assert {entry.path for entry in artifact.manifest.contents} == {
            str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()
        }


def test_a_search_on_ray_with_optuna_and_offline_wandb_from_the_command_line(capsys):
    overrides = [
        "agent.updates=200",
        "agent.hidden=[48, 24]",
        "pruning.fine_tune.updates=20",
        "wandb.mode=offline",
    ]
    settings = [part for override in overrides for part in ("--set", override)]
    code = main(["search", "autoencoder", "--trials", "24", "--name", "mine", *settings])
    output = capsys.readouterr().out
    assert code == 0
    run = Path("runs/mine")
    for name in ("experiment.yaml", "study.db", "trials.jsonl", "base", "models", "wandb", "front.json"):
        assert (run / name).exists(), name
    trials = records(run)
    assert sorted(trial["trial"] for trial in trials) == list(range(24))
    assert {trial["status"] for trial in trials} == {"complete"}
    assert optuna_states(run) == ["COMPLETE"] * 24
    assert len(list(run.glob("wandb/offline-run-*"))) == 25  # one per trial, one for the search
    found = front(run)
    assert_wandb_has_it_all(run, found)
    assert {entry["trial"] for entry in found["trials"]} == RunDirectory(run).bundles()
    for entry in found["trials"]:
        assert 0 < entry["test_retention"] <= entry["retention"] + 0.2
        assert (run / entry["bundle"] / "architecture.json").is_file()
    for shown in ("Base: ", "hypervolume", "Best retention", "median trial ", "Select:", "to upload:"):
        assert shown in output, shown
    assert "failed" not in output
    # What is printed to paste works.
    select = next(line for line in output.splitlines() if line.startswith("Select:"))
    assert main(["select", *select.split(" select ")[1].split()]) == 0
    assert main(["verify", "selected-mine"]) == 0
    assert "the same, bit for bit" in capsys.readouterr().out


def test_one_trial_at_a_time_on_ray_is_the_same_search_as_without_ray(capsys):
    assert main(["search", "toy.yaml", "--set", "search.concurrency=1", "--trials", "24"]) == 0
    origins = [trial["origin"] for trial in records(TOY)]
    assert origins[0] == "anchor: dense"
    assert origins[-1] == "tpe"
    search_serially(Path("runs/serial"), "search.trials=24")
    assert_same_search(TOY, Path("runs/serial"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shared", "per_trial"])
def test_one_trial_at_a_time_gives_the_same_search_again(mode, capsys):
    arguments = ["search", "toy.yaml", "--set", "search.concurrency=1", "--set", f"base.mode={mode}"]
    for name in ("first", "second"):
        assert main([*arguments, "--name", name, "--trials", "20"]) == 0
    assert_same_search(Path("runs/first"), Path("runs/second"))


def test_every_trial_may_train_its_own_base(capsys):
    assert main(["search", "toy.yaml", "--set", "base.mode=per_trial"]) == 0
    output = capsys.readouterr().out
    assert "train a base in every trial" in output
    trials = records(TOY)
    assert {trial["status"] for trial in trials} == {"complete"}
    assert len({trial["base_performance"]["validation"] for trial in trials}) == len(trials)
    for entry in front(TOY)["trials"]:
        trial = next(trial for trial in trials if trial["trial"] == entry["trial"])
        metrics = json.loads((TOY / entry["bundle"] / "metrics.json").read_text())
        own, trivial = trial["base_performance"]["test"], metrics["base"]["trivial"]["test"]
        expected = (entry["test_reconstruction_error"] - trivial) / (own - trivial)
        assert entry["test_retention"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("serial")
def test_failing_trials_are_counted_shown_and_survived(capsys):
    assert main(["search", "toy.yaml", "--set", "agent.fault=raise", "--trials", "6"]) == 0
    output = capsys.readouterr().out
    assert "trials 6/6, 5 failed" in output
    assert "5 of 6 trials failed:" in output
    assert "fine_tune: RuntimeError: the toy was told to fail" in output
    assert [trial["status"] for trial in records(TOY)].count("failed") == 5
    assert sorted(optuna_states(TOY)) == ["COMPLETE"] + ["FAIL"] * 5
    assert [entry["trial"] for entry in front(TOY)["trials"]] == [0]  # the dense one


@pytest.mark.usefixtures("serial")
def test_a_search_without_a_complete_trial_says_why(capsys):
    arguments = ["search", "toy.yaml", "--set", "agent.fault=nan", "--set", "search.anchors=false"]
    assert main([*arguments, "--trials", "3"]) == 2
    output, error = capsys.readouterr()
    assert "trials 3/3, 3 failed" in output
    assert error.count("\n") == 1
    assert "none of the 3 trials was completed" in error
    assert "evaluate: NonFiniteError: reconstruction_error is nan" in error
    assert len(records(TOY)) == 3
    assert optuna_states(TOY) == ["FAIL"] * 3
    assert main(["front", "toy"]) == 2
    assert "no trial of the search was completed" in capsys.readouterr().err


@pytest.mark.usefixtures("serial")
def test_constraints_that_nothing_meets_leave_an_empty_front(capsys):
    arguments = ["search", "toy.yaml", "--trials", "3", "--set", "search.constraints={retention: '>= 1.03'}"]
    assert main(arguments) == 0
    assert "no complete trial meets the constraints" in capsys.readouterr().out
    assert front(TOY)["trials"] == []
    assert main(["front", "toy"]) == 0
    assert main(["select", "toy", "--knee", "--out", "x"]) == 2
    assert "the front of 'toy' is empty" in capsys.readouterr().err


@pytest.mark.usefixtures("serial")
def test_coefficients_of_every_group_reach_all_that_a_search_leaves(capsys):
    overrides = [
        "pruning.coefficients=per_group",
        "pruning.coefficients_force=true",
        "search.ratios_first=0",
        "wandb.mode=offline",
    ]
    settings = [part for override in overrides for part in ("--set", override)]
    assert main(["search", "toy.yaml", "--trials", "16", *settings]) == 0
    trials = {trial["trial"]: trial for trial in records(TOY)}
    for trial in trials.values():
        assert trial["coefficients"].keys() == trial["widths"].keys()
        for weights in trial["coefficients"].values():
            assert weights.keys() == {"l2", "fisher"}
            assert sum(weights.values()) == pytest.approx(1)
    searched = [trial["coefficients"] for trial in trials.values() if trial["origin"] == "tpe"]
    assert searched
    for groups in searched:
        assert len({weights["l2"] for weights in groups.values()}) == len(groups), "each has its own"
    for entry in front(TOY)["trials"]:
        plan = json.loads((TOY / entry["bundle"] / "plan.json").read_text())
        assert plan["coefficients"] == entry["coefficients"] == trials[entry["trial"]]["coefficients"]
    runs = offline_runs(TOY)
    for number, trial in trials.items():
        logged = runs[f"trial {number}"].config
        for group, weights in trial["coefficients"].items():
            for metric, weight in weights.items():
                assert logged[f"coefficient/{group.replace('.', '/')}/{metric}"] == weight
    assert main(["report", "toy"]) == 0
    assert main(["select", "toy", "--min-retention", "0", "--out", "smallest"]) == 0
    assert main(["verify", "smallest"]) == 0
    page = (TOY / "report.html").read_text()
    for group in trials[0]["widths"]:
        assert f"weight {group} l2" in page


@pytest.mark.usefixtures("serial")
def test_constraints_that_the_trained_base_rules_out_end_the_search_and_keep_the_base(capsys):
    wish = ["--set", "search.constraints={retention: '>= 50'}"]
    assert main(["search", "toy.yaml", "--trials", "3", *wish]) == 2
    assert "search.constraints.retention is '>= 50.0', which no trial can meet" in capsys.readouterr().err
    assert (TOY / "base" / "metrics.json").is_file()
    assert not (TOY / "trials.jsonl").exists() or not records(TOY)
    assert main(["search", "toy.yaml", "--trials", "3"]) == 0
    assert len(records(TOY)) == 3


@pytest.mark.usefixtures("serial")
def test_a_latency_objective_is_measured_again_at_the_end(capsys):
    arguments = ["search", "toy.yaml", "--trials", "3"]
    assert main([*arguments, "--set", "search.objectives=[latency_p99_ms, reconstruction_error]"]) == 0
    assert "latency p99" in capsys.readouterr().out
    entries = front(TOY)["trials"]
    during = {trial["trial"]: trial["objectives"]["latency_p99_ms"] for trial in records(TOY)}
    assert any(entry["latency_p99_ms"] != during[entry["trial"]] for entry in entries)
    assert all(entry["latency_host"] for entry in entries)
    assert main(["select", "toy", "--max-latency", "1000", "--out", "fast"]) == 0


@pytest.mark.usefixtures("serial")
def test_the_front_on_disk_is_true_after_every_trial(monkeypatch, capsys):
    seen = []
    append = RunDirectory.append_trial

    def look(run, result):
        if run.front.exists():
            listed = {entry["trial"] for entry in json.loads(run.front.read_text())["trials"]}
            assert listed <= run.bundles() <= listed | {result.number}, "its own comes before its record"
            assert listed <= {record["trial"] for record in records(run.path)}
            seen.append(listed)
        append(run, result)

    monkeypatch.setattr(RunDirectory, "append_trial", look)
    assert main(["search", "toy.yaml", "--trials", "20"]) == 0
    assert len(seen) == 19
    assert len({frozenset(listed) for listed in seen}) > 5


@pytest.mark.slow
def test_hopeless_trials_are_stopped_early_on_ray(capsys):
    changes = [
        "agent.kind=toy_agents:Ranked",
        "search.early_stopping={reduction: 4}",
        "search.sampler=random",
    ]
    arguments = ["search", "toy.yaml", "--trials", "40"]
    assert main([*arguments, *(word for change in changes for word in ("--set", change))]) == 0
    output = capsys.readouterr().out
    found = records(TOY)
    stopped = [trial for trial in found if trial["status"] == "stopped"]
    complete = [trial for trial in found if trial["status"] == "complete"]
    assert sorted(trial["trial"] for trial in found) == list(range(40))
    assert len(stopped) + len(complete) == 40
    assert len(stopped) >= 5
    assert len(complete) >= 10
    for trial in stopped:
        updates = [updates for updates, _ in trial["rung_losses"]]
        assert updates == [2, 4, 6][: len(updates)]
        assert trial["updates"] == updates[-1]
        assert trial["objectives"] == {}
        assert trial["parameters"] < 300
        assert trial["host"]
    for trial in complete:
        whole = trial["origin"] == "anchor: dense"  # the base itself: nothing to fine-tune
        assert (trial["updates"], len(trial["rung_losses"])) == ((0, 0) if whole else (10, 3))
    assert f"trials 40/40, {len(stopped)} stopped early, front " in output
    assert f"{len(stopped)} of 40 trials were stopped early: " in output
    assert "failed" not in output
    assert not {entry["trial"] for entry in front(TOY)["trials"]} & {trial["trial"] for trial in stopped}
    assert sorted(optuna_states(TOY)) == ["COMPLETE"] * len(complete) + ["PRUNED"] * len(stopped)


@pytest.mark.slow
def test_a_dead_worker_is_a_failed_trial(capsys):
    assert main(["search", "toy.yaml", "--set", "agent.fault=exit", "--trials", "4"]) == 0
    output = capsys.readouterr().out
    assert "3 of 4 trials failed" in output
    assert "worker died" in output


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished():
    command = [sys.executable, "-m", "search.cli", "search", "toy.yaml", "--trials", "5000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    trials = TOY / "trials.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (trials.exists() and trials.read_text().count("\n") >= 8):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    finished = len(RunDirectory(TOY).read_trials())
    assert f"interrupted; the {finished} trials that had finished are kept in runs/toy" in error
    assert "Front of toy" in output
    assert main(["front", "toy"]) == 0
    assert {entry["trial"] for entry in front(TOY)["trials"]} == RunDirectory(TOY).bundles()
