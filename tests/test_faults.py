"""What a user is told when a disk is full or read-only, or a run in use: one sentence, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from serial_search import EXPERIMENT, run_serially
from test_resume import lines

from search.cli import main
from search.run_directory import RunDirectory

TESTS = Path(__file__).resolve().parent
TOY = Path("runs/toy")


@pytest.fixture(autouse=True)
def _serial_and_in_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("search.experiment.run_search", run_serially)
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(EXPERIMENT)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command says when it ends with code 2."""
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("prunefront: ")


def test_a_full_disk_stops_the_search_and_it_goes_on_where_there_is_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["search", "toy.yaml", "--name", "whole", "--trials", "8"]) == 0
    sync = os.fsync

    def full(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.name == "trials.jsonl" and path.read_text().count("\n") > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        sentence = refused(capsys, "search", "toy.yaml", "--trials", "8")
    assert sentence == "No space left on device: runs/toy/trials.jsonl"
    assert [result.number for result in RunDirectory(TOY).read_trials()] == [0, 1, 2, 3, 4]
    assert main(["search", "toy.yaml", "--trials", "8", "--resume"]) == 0
    assert lines(TOY) == lines(Path("runs/whole"))


def test_a_run_in_use_is_refused_and_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "toy.yaml", "--trials", "2"]) == 0
    before = lines(TOY)
    other = RunDirectory.open(TOY)
    other.claim()
    sentence = refused(capsys, "search", "toy.yaml", "--trials", "4", "--resume")
    assert sentence.startswith(f"runs/toy is in use by another search (process {os.getpid()} on ")
    other.release()
    assert lines(TOY) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resume", "--name", "other"], "there is no run directory runs/other"),
        ([], "runs/toy exists and is not overwritten: go on with it by --resume, choose another name"),
        (["--resume", "--set", "agent.latent=4"], "agent.latent was null and is now 4"),
        (["--resume", "--hours", "0"], "search.hours is 0"),
        (
            ["--name", "b", "--set", "search.warm_start=x"],
            "search.warm_start is 'x': there is no",
        ),
        (
            ["--name", "b", "--set", "search.warm_start=toy", "--set", "search.sampler=nsga2"],
            "search.warm_start has nothing to teach the sampler 'nsga2': choose one of tpe, gp",
        ),
        (
            ["--name", "b", "--set", "agent.hidden=13", "--set", "storage=sqlite:///x"],
            "storage is 'sqlite:…': it must be the URL",
        ),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["search", "toy.yaml", "--trials", "2"]) == 0
    capsys.readouterr()
    assert sentence in refused(capsys, "search", "toy.yaml", "--trials", "2", *arguments)
    assert [entry.name for entry in Path("runs").iterdir()] == ["toy"]


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ("resources.cpus=4096", "a trial needs 4096 CPUs and 0 GPUs, but this machine has "),
        ("resources={cpus: 1, gpus: 99}", "a trial needs 1 CPUs and 99 GPUs, but this machine has "),
    ],
)
def test_a_trial_that_fits_nowhere_is_refused_before_a_base_is_trained(
    capsys: pytest.CaptureFixture[str], wish: str, sentence: str
) -> None:
    assert sentence in refused(capsys, "search", "toy.yaml", "--set", wish)
    assert not TOY.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_of_the_last_test_loses_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    assert main(["search", "toy.yaml", "--name", "whole", "--trials", "8"]) == 0

    def interrupt(candidate: object, data: object) -> float:
        os.kill(os.getpid(), number)
        time.sleep(5)  # Python runs the handler between two instructions
        raise AssertionError("nothing was interrupted")

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("search.remeasurement.performance_on_test", interrupt)
        assert main(["search", "toy.yaml", "--trials", "8"]) == 130
    assert capsys.readouterr().err == (
        "prunefront: interrupted; the 8 trials that had finished are kept in runs/toy; the same command with "
        "--resume goes on from there\n"
    )
    assert main(["search", "toy.yaml", "--trials", "8", "--resume"]) == 0
    assert lines(TOY) == lines(Path("runs/whole"))
    found, expected = (json.loads((run / "front.json").read_text()) for run in (TOY, Path("runs/whole")))
    assert [t["test_retention"] for t in found["trials"]] == [t["test_retention"] for t in expected["trials"]]


def test_another_base_than_that_of_the_trials_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "toy.yaml", "--trials", "2"]) == 0
    assert main(["search", "toy.yaml", "--trials", "2", "--name", "other", "--set", "base.seed=1"]) == 0
    shutil.rmtree(TOY / "base")
    resume = ("search", "toy.yaml", "--trials", "3", "--resume")
    capsys.readouterr()
    assert refused(capsys, *resume).startswith(
        "runs/toy/base is gone, which the trials of runs/toy were pruned"
    )
    shutil.copytree("runs/other/base", TOY / "base")
    sentence = refused(capsys, *resume)
    assert sentence.startswith("runs/toy/base reaches ")
    assert "and the base that trial 0 was pruned from" in sentence
    assert len(lines(TOY)) == 2


def test_another_search_starts_warm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "toy.yaml", "--trials", "12"]) == 0
    settings = ["--trials", "3", "--set", "search.anchors=false"]
    assert main(["search", "toy.yaml", "--name", "cold", *settings]) == 0
    assert main(["search", "toy.yaml", "--name", "warm", *settings, "--set", "search.warm_start=toy"]) == 0
    cold, warm = ([record["ratios"] for record in lines(Path("runs", name))] for name in ("cold", "warm"))
    assert len(warm) == 3
    assert cold != warm


def test_a_read_only_run_directory_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "toy.yaml", "--trials", "2"]) == 0
    command = [sys.executable, "-m", "search.cli", "search", "toy.yaml", "--trials", "3", "--resume"]
    run = shlex.quote(str(tmp_path / TOY))
    script = f"mount --bind {run} {run} && mount -o remount,bind,ro {run} && exec {shlex.join(command)}"
    environment: dict[str, Any] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    told = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    if "unshare" in told.stderr or "mount:" in told.stderr:
        pytest.skip("namespaces are not allowed here")
    assert told.returncode == 2, told.stderr
    assert told.stderr == "prunefront: Read-only file system: runs/toy/lock\n"
