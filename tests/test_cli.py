"""The command: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serial_search import EXPERIMENT, search_serially

import search.commands
from search.cli import main

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "toy"
    search_serially(run)
    return run


@pytest.fixture
def run(searched, tmp_path, monkeypatch) -> Path:
    """A copy of a finished run at runs/toy in the current directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(searched, tmp_path / "runs" / "toy")).relative_to(tmp_path)


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    output, error = capsys.readouterr()
    return code, output, error


def refused(capsys, *arguments: str) -> str:
    """The one sentence of a request that cannot be met."""
    code, output, error = call(capsys, *arguments)
    assert code == 2, output
    assert error.startswith("prunefront: ")
    assert error.count("\n") == 1
    return error


def process(*arguments: str, path: str = "", **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(REPOSITORY)]))}
    command = [sys.executable, "-m", "search.cli", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120, **options
    )


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys, search.cli\n"
        "try: search.cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'optuna', 'wandb', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("search", "train", "front", "select", "verify", "profile", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize("arguments", [
    [], ["serch"], ["search"], ["select", "toy"], ["select", "toy", "--out", "x"],
    ["select", "toy", "--knee", "--trial", "3", "--out", "x"], ["select", "toy", "--knee"],
    ["select", "toy", "--min-retention", "nan", "--out", "x"], ["select", "toy", "--trial", "x"],
    ["search", "autoencoder", "--trials", "many"], ["profile"], ["profile", "autoencoder", "--trials", "x"],
    ["doctor", "--seconds", "0"], ["doctor", "autoencoder"],
])  # fmt: skip
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: prunefront" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["search", "autoencodr"], "unknown experiment 'autoencodr': did you mean 'autoencoder'?"),
    (["search", "./mine.yaml"], "experiment mine.yaml cannot be read: No such file or directory"),
    (["search", "autoencoder", "--set", "serch.trials=3"], "unknown key serch"),
    (["search", "autoencoder", "--trials", "0"], "search.trials is 0: it must be a whole number, at least 1"),
    (["search", "autoencoder", "--name", "a/b"], "name is 'a/b'"),
    (["search", "autoencoder", "--set", "pruning.metrics=[l2, l7]"], "l7"),
    (["search", "autoencoder", "--set", "search.sampler=tpa"], "did you mean 'tpe'"),
    (["search", "autoencoder", "--set", "agent.kind=autoencodr"], "unknown agent 'autoencodr'"),
    (["search", "autoencoder", "--set", "agent.kind=nowhere:Agent"], "there is no module 'nowhere'"),
    (["search", "autoencoder", "--set", "agent.latnt=4"], "did you mean 'latent'?"),
    (["search", "autoencoder", "--set", "pruning.fine_tune.method=superb"], "method is 'superb'"),
    (["search", "autoencoder", "--set", "search.objectives=[parameters, return]"], "'return'"),
    (["search", "autoencoder", "--set", "pruning.coefficients=per_component"], "at least 140, not 64"),
    (["train", "autoencodr"], "unknown experiment 'autoencodr'"),
    (["train", "autoencoder", "--set", "agent.latnt=4"], "did you mean 'latent'?"),
    (["profile", "autoencodr"], "unknown experiment 'autoencodr': did you mean 'autoencoder'?"),
    (["profile", "autoencoder", "--set", "agent.latnt=4"], "did you mean 'latent'?"),
    (["profile", "autoencoder", "--json", "--set", "search.constraints={parameters: '<= 100'}"],
     "search.constraints.parameters is '<= 100.0', which no trial can meet: the smallest possible model has "
     "465 parameters, so the bound must be at least 465"),
    (["search", "autoencoder", "--address", "nowhere"], "neither 'auto' nor of the form 'host:port'"),
    (["search", "autoencoder", "--address", "127.0.0.1:1"], "answers at address '127.0.0.1:1'"),
    (["doctor", "--address", "nowhere"], "address 'nowhere' is neither 'auto' nor of the form 'host:port'"),
    (["doctor", "--json", "--address", "127.0.0.1:1"], "no Ray cluster answers at address '127.0.0.1:1'"),
    (["front", "nowhere"], "there is no run 'nowhere': there are no runs in runs"),
    (["front", "./nowhere"], "there is no run directory nowhere"),
    (["front", "."], "is not a run directory"),
    (["select", "nowhere", "--knee", "--out", "x"], "there is no run 'nowhere'"),
    (["verify", "nowhere"], "there is no bundle nowhere"),
    (["verify", "."], ". is not a bundle"),
])  # fmt: skip
def test_a_request_that_cannot_be_met_is_one_sentence_and_leaves_nothing(
    arguments, sentence, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_exists_is_not_touched(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    Path("toy.yaml").write_text(EXPERIMENT)
    for command in ("search", "train"):
        assert f"{run} exists and is not overwritten" in refused(capsys, command, "toy.yaml")
        assert "exists and is not overwritten" in refused(capsys, command, "autoencoder", "--name", "toy")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_front_prints_tables_or_json(run, capsys):
    code, output, _ = call(capsys, "front", "toy")
    assert code == 0
    front = json.loads((run / "front.json").read_text())
    for trial in front["trials"]:
        assert f"{trial['parameters']:,}" in output
        assert f"{trial['test_retention']:.3f}" in output
    assert f"Hypervolume {front['hypervolume']:.3f} over log size" in output
    assert max(len(line) for line in output.splitlines()) <= 100
    for name in (str(run), str(run.absolute())):
        code, output, _ = call(capsys, "front", name, "--json")
        assert (code, json.loads(output)) == (0, front)


def test_the_nearest_run_is_named(run, capsys):
    assert "there is no run 'toi': did you mean 'toy'?" in refused(capsys, "front", "toi")
    code, _, _ = call(capsys, "front", "toy", "--runs-dir", str(run.parent))
    assert code == 0


def test_a_run_without_a_front_is_one_sentence(run, capsys):
    (run / "front.json").unlink()
    for arguments in (["front", "toy"], ["select", "toy", "--knee", "--out", "x"]):
        assert "has no front yet: no trial of the search was completed" in refused(capsys, *arguments)


def test_a_damaged_front_is_one_sentence(run, capsys):
    content = (run / "front.json").read_bytes()
    for damaged in (content[: len(content) // 2], b"", content.replace(b'"trials"', b'"trails"')):
        (run / "front.json").write_bytes(damaged)
        for arguments in (["front", "toy"], ["select", "toy", "--knee", "--out", "x"]):
            assert "front.json is corrupt" in refused(capsys, *arguments)
    assert not Path("x").exists()


def test_select_copies_the_trial_that_meets_the_wish_and_verify_agrees(run, capsys):
    trials = json.loads((run / "front.json").read_text())["trials"]
    enough = min((t for t in trials if t["retention"] >= 0.9), key=lambda t: t["parameters"])
    code, output, _ = call(capsys, "select", "toy", "--min-retention", "0.9", "--out", "small")
    assert code == 0
    assert f"Trial {enough['trial']} of" in output
    assert json.loads(Path("small/metrics.json").read_text())["trial"] == enough["trial"]
    assert json.loads(Path("small/metrics.json").read_text())["test_retention"] == enough["test_retention"]
    code, output, _ = call(capsys, "verify", "small")
    assert code == 0
    assert "the same, bit for bit" in output
    rows = [line.split() for line in output.splitlines() if "retention" in line]
    assert [row[-1] == row[-2] for row in rows] == [True, True], output
    assert "exists and is not overwritten" in refused(capsys, "select", "toy", "--knee", "--out", "small")
    for wish in (["--knee"], ["--max-parameters", "200"], ["--trial", str(trials[0]["trial"])]):
        assert call(capsys, "select", "toy", *wish, "--out", "-".join(wish).strip("-"))[0] == 0


def test_a_wish_that_no_trial_meets_names_the_closest(run, capsys):
    for wish in (["--min-retention", "7"], ["--max-parameters", "1"]):
        assert "the closest is trial" in refused(capsys, "select", "toy", *wish, "--out", "x")
    assert "all are" in refused(capsys, "select", "toy", "--trial", "999", "--out", "x")
    assert "measured no latency" in refused(capsys, "select", "toy", "--max-latency", "1", "--out", "x")
    assert not Path("x").exists()


def test_a_damaged_bundle_is_neither_selected_nor_verified(run, capsys):
    number = json.loads((run / "front.json").read_text())["trials"][0]["trial"]
    bundle = run / "models" / str(number)
    (bundle / "model.safetensors").write_bytes((bundle / "model.safetensors").read_bytes()[:-5])
    sentence = refused(capsys, "select", "toy", "--trial", str(number), "--out", "x")
    assert "model.safetensors is corrupt" in sentence
    assert "model.safetensors is corrupt" in refused(capsys, "verify", str(bundle))
    shutil.rmtree(bundle)
    assert "there is no bundle" in refused(capsys, "select", "toy", "--trial", str(number), "--out", "x")
    assert not Path("x").exists()


def test_train_stores_a_base_that_a_search_of_the_same_experiment_continues(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(EXPERIMENT)
    code, output, _ = call(capsys, "train", "toy.yaml")
    assert code == 0
    assert "Base: 299 parameters" in output
    assert sorted(entry.name for entry in Path("runs/toy").iterdir()) == [
        "base",
        "experiment.yaml",
        "identity",
        "lock",
    ]
    before = Path("runs/toy/base/model.safetensors").stat().st_mtime_ns
    ready, _ = search_serially(Path("runs/toy"), "search.trials=3")
    assert ready.checked.config.search.trials == 3
    assert "trials: 3" in Path("runs/toy/experiment.yaml").read_text()
    assert Path("runs/toy/base/model.safetensors").stat().st_mtime_ns == before
    code, _, _ = call(capsys, "train", "toy.yaml", "--name", "other")
    assert code == 0
    sentence = refused(capsys, "search", "toy.yaml", "--name", "other", "--set", "agent.latent=4")
    assert "runs/other exists and is not overwritten" in sentence


def test_a_base_that_did_not_learn_leaves_no_run_directory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(EXPERIMENT)
    for command in ("train", "search"):
        sentence = refused(capsys, command, "toy.yaml", "--set", "agent.kind=toy_agents:Untrainable")
        assert "is no better than a trivial agent" in sentence
        assert list(Path("runs").iterdir()) == []


def test_errors_of_the_system_are_one_sentence(run, capsys):
    Path("file").write_text("x")
    sentence = refused(capsys, "train", "autoencoder", "--runs-dir", "file/runs")
    assert "file" in sentence
    sentence = refused(capsys, "select", "toy", "--knee", "--out", "file/x")
    assert "file" in sentence


def test_faults_of_ours_keep_their_traceback(monkeypatch):
    def fail(options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(search.commands, "front", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["front", "toy"])


def test_an_interruption_ends_with_code_130(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(search.commands, "front", interrupt)
    assert call(capsys, "front", "toy") == (130, "", "\nprunefront: interrupted\n")


def test_another_package_called_agents_is_noticed(tmp_path):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("raise ImportError('wrong package')")
    (tmp_path / "agents" / "agent.py").write_text("class Agent: ...")
    done = process("front", "toy", path=str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "agents") in done.stderr
    assert "virtual environment of its own" in done.stderr


def test_a_reader_that_goes_away_is_no_error(run):
    command = f"{sys.executable} -m search.cli front {run} --json | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""
