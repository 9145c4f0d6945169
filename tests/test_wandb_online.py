"""The real W&B client against a server on loopback: what arrives, and what is kept where that misbehaves."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_run_directory import result
from test_wandb_logger import FAILED, IMPORTANCE, offline_runs, record
from wandb_server import WandbServer, wandb_server

from components.errors import UserError
from search import wandb_logger
from search.cli import main
from search.run_directory import RunDirectory
from search.wandb_logger import WandbLogger, require_account

pytestmark = pytest.mark.slow
TRIALS = 3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with wandb_server() as running:
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory, as far as `sync` looks at it."""
    path = tmp_path / "runs" / "digits"
    path.mkdir(parents=True)
    (path / "experiment.yaml").write_text("agent: {kind: autoencoder}\n")
    return path


def log(logger: WandbLogger, number: int) -> None:
    logger.log_trial(record(number, **(FAILED if number == 1 else {})), on_front=number == 0)
    logger.log_search({"finished": number + 1, "failed": int(number >= 1), "hypervolume": 0.25})


def check(server: WandbServer, prefix: str, what_came: dict[int, str]) -> None:
    """Every run of the search is on the server, whole."""
    whole = {run_id for run_id, found in server.runs.items() if found.complete}
    assert {f"{prefix}-search", *(f"{prefix}-{number:05d}" for number in what_came)} <= whole
    search = server.runs[f"{prefix}-search"]
    assert (search.name, search.job_type, search.group) == ("digits", "search", "digits")
    rows = [row["finished"] for row in search.history.values() if "finished" in row]
    assert rows == list(range(1, TRIALS + 1))
    for number, status in what_came.items():
        trial = server.runs[f"{prefix}-{number:05d}"]
        assert (trial.name, trial.job_type, trial.group) == (f"trial {number}", "trial", "digits")
        assert trial.config["trial"] == number
        assert trial.config["ratio/latent"] == 0.75
        assert trial.summary["status"] == status
        assert trial.exit_code == int(status == "failed")
        assert len(trial.history) == (0 if status == "failed" else 3)


def prefix_of(run: Path) -> str:
    return (run / "wandb" / "search-id").read_text()


def test_everything_arrives(server: WandbServer, run: Path, tmp_path: Path) -> None:
    require_account("online", "control-team")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "report.html").write_text("<p>all of it</p>")
    front = [{"trial": 0, "parameters": 10, "size_ratio": 0.125, "retention": 0.875}]
    warnings: list[str] = []
    with WandbLogger(run, experiment="digits", mode="auto", warn=warnings.append) as logger:
        for number in range(TRIALS):
            log(logger, number)
        logger.log_front(front)
        logger.finish(
            front,
            {"hypervolume": 0.5},
            bundles={0: bundle},
            aliases={0: ["knee", "smallest-95"]},
            importance=IMPORTANCE,
            report=tmp_path / "report.html",
        )
    assert (logger.mode, warnings) == ("online", [])
    assert logger.address == f"{server.url}/us/prunefront/runs/{prefix_of(run)}-search"
    prefix = prefix_of(run)
    check(server, prefix, {0: "complete", 1: "failed", 2: "complete"})
    assert server.runs[f"{prefix}-search"].summary["hypervolume"] == 0.5
    kinds = {artifact.name: artifact.type for artifact in server.artifacts.values()}
    assert kinds[f"{prefix}-models"] == "bundle"
    tables = ("live_front", "front", "importance")
    assert {f"run-{prefix}-search-{name}" for name in tables} <= set(kinds)
    [found] = [artifact for artifact in server.artifacts.values() if artifact.type == "bundle"]
    assert {"trial-00000", "knee", "smallest-95"} <= found.aliases
    assert found.tags == {"pareto"}
    assert all(artifact.committed for artifact in server.artifacts.values())
    assert b"weights" in server.files.values()
    assert b"<p>all of it</p>" in server.files.values()
    link = f"{server.url}/us/prunefront/runs/{prefix}-00000"
    assert any(f'"{link}"'.encode() in content for content in server.files.values())


@pytest.mark.parametrize("behaviour", ["refuse", "stall", "limit", "drop"])
def test_what_a_misbehaving_server_does_not_take_is_kept_and_uploaded_later(
    behaviour: Any, server: WandbServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model.safetensors").write_bytes(b"weights")
    front = [{"trial": 2, "parameters": 10, "size_ratio": 0.125, "retention": 0.875}]
    warnings: list[str] = []
    logger = WandbLogger(run, experiment="digits", mode="online", warn=warnings.append)
    with contextlib.closing(logger):
        log(logger, 0)
        while len(server.runs) < 2:  # until the first has begun
            assert logger._process is not None
            assert logger._process.poll() is None
        server.behaviour = behaviour
        for number in range(1, TRIALS):
            log(logger, number)
        logger.log_members([2])
        logger.log_front(front)
        logger.finish(front, {"hypervolume": 0.5}, bundles={2: bundle})
        logger.close(timeout=90)
    assert len(warnings) == 1, "it is said, once"
    server.behaviour = "fine"
    monkeypatch.chdir(run.parent.parent)
    assert main(["sync", "digits"]) == 0
    found = {number: "failed" if number == 1 else "complete" for number in range(TRIALS)}
    names = {received.name: run_id for run_id, received in server.runs.items()}
    assert len(names) == len(server.runs), "each is there once"
    assert all(received.complete for received in server.runs.values())
    assert set(names) == {"digits", *(f"trial {number}" for number in found)}
    for number, status in found.items():
        received = server.runs[names[f"trial {number}"]]
        assert received.summary["status"] == status
        assert received.config["trial"] == number
    rows = [row["finished"] for row in server.runs[names["digits"]].history.values() if "finished" in row]
    assert rows == list(range(1, TRIALS + 1))
    assert server.runs[names["trial 0"]].summary["on_front"] is False
    search = server.runs[names["digits"]]
    assert search.summary["hypervolume"] == 0.5
    assert search.summary["front_plot"]["_type"] == "plotly-file"
    [found] = [artifact for artifact in server.artifacts.values() if artifact.type == "bundle"]
    assert (found.aliases >= {"trial-00002"}, found.tags, found.committed) == (True, {"pareto"}, True)


def test_offline_runs_are_uploaded_by_sync(
    server: WandbServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbLogger(run, experiment="digits", mode="offline") as logger:
        for number in range(TRIALS):
            log(logger, number)
    assert server.runs == {}
    assert len(offline_runs(run)) == TRIALS + 1
    monkeypatch.chdir(run.parent.parent)
    assert main(["sync", "digits"]) == 0
    check(server, prefix_of(run), {0: "complete", 1: "failed", 2: "complete"})


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_search_continues_its_run(
    mode: Any, server: WandbServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (range(2), range(2, TRIALS)):
        with WandbLogger(run, experiment="digits", mode=mode, warn=pytest.fail) as logger:
            for number in part:
                log(logger, number)
            logger.finish([], {"hypervolume": 0.1 * part.stop})
        time.sleep(1.1)  # folders of runs are told apart by the second
    monkeypatch.chdir(run.parent.parent)
    main(["sync", "digits"])  # which online has nothing to add
    check(server, prefix_of(run), {0: "complete", 1: "failed", 2: "complete"})
    assert len(server.runs) == TRIALS + 1
    assert server.runs[f"{prefix_of(run)}-search"].summary["hypervolume"] == pytest.approx(0.1 * TRIALS)


def test_a_server_that_is_too_slow_loses_nothing(
    server: WandbServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 80
    warnings: list[str] = []
    server.behaviour = "slow"
    with WandbLogger(run, experiment="digits", mode="online", warn=warnings.append) as logger:
        for number in range(count):
            logger.log_trial(record(number))
            logger.log_search({"finished": number + 1})
        logger.finish([], {"hypervolume": 0.5})
    assert warnings == ["W&B runs are kept offline: its server is slower than the search"]
    server.behaviour = "fine"
    monkeypatch.chdir(run.parent.parent)
    assert main(["sync", "digits"]) == 0
    assert {received.name for received in server.runs.values()} == {
        "digits",
        *(f"trial {number}" for number in range(count)),
    }
    search = server.runs[f"{prefix_of(run)}-search"]
    assert {row["finished"] for row in search.history.values() if "finished" in row} == {*range(1, count + 1)}
    assert search.summary["hypervolume"] == 0.5


def test_a_trial_that_is_logged_again_is_there_once(server: WandbServer, run: Path) -> None:
    for _ in range(2):
        with WandbLogger(run, experiment="digits", mode="online", warn=pytest.fail) as logger:
            logger.log_trial(record(0), on_front=True)
            logger.log_members([])
        time.sleep(1.1)
    trial = server.runs[f"{prefix_of(run)}-00000"]
    assert len(trial.history) == 3
    assert trial.summary["on_front"] is False


def test_an_entity_of_others_is_said_before_anything_is_done(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_account("online", "us")
    monkeypatch.setenv("WANDB_ENTITY", "other-team")
    with pytest.raises(UserError, match="'other-team' is none of its account's: us, control-team"):
        require_account("online")
    with pytest.raises(UserError, match="'acme' is none of its account's: us, control-team"):
        require_account("online", "acme")
    assert server.runs == {}


def test_a_dashboard_shows_the_front_first(server: WandbServer, run: Path) -> None:
    with WandbLogger(run, experiment="digits", mode="online", warn=pytest.fail) as logger:
        log(logger, 0)
        while logger.address is None:
            time.sleep(0.05)
        for _ in range(2):
            logger.begin_dashboard(lambda: record(0))
        end = time.monotonic() + 60
        while logger.dashboard is None and time.monotonic() < end:
            time.sleep(0.05)
    [(name, view)] = server.views.items()
    assert logger.dashboard == f"{server.url}/us/prunefront?nw={name.removeprefix('nw-').removesuffix('-v')}"
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("us", "prunefront", "digits")
    section = json.loads(view["spec"])["section"]
    [filtered] = section["runSets"][0]["filters"]["filters"]
    assert (filtered["key"]["name"], filtered["value"]) == ("group", "digits")
    sections = section["panelBankConfig"]["sections"]
    assert [part["name"] for part in sections] == ["Front", "Search", "What matters", "Trials", "Report"]
    assert sections[0]["isOpen"]
    assert sections[0]["panels"][0]["config"]["mediaKeys"] == ["front_plot"]
    shown = json.dumps(sections)
    for name in ("live_front", "hypervolume", "importance_plot", "matters_plot", "report"):
        assert f'"{name}"' in shown
    for name in ("config:ratio/latent.value", "config:coefficient/fisher.value", "summary:retention"):
        assert f'"{name}"' in shown


def test_a_dashboard_is_made_anew_in_its_place(
    server: WandbServer, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", str(run)]) == 2
    assert "has no trials yet" in capsys.readouterr().err
    RunDirectory(run).append_trial(result())
    monkeypatch.chdir(run.parent.parent)
    assert main(["dashboard", "digits"]) == 2
    assert "no W&B run of a search" in capsys.readouterr().err
    with WandbLogger(run, experiment="digits", mode="offline", warn=pytest.fail) as logger:
        log(logger, 0)
    assert main(["dashboard", "digits"]) == 2
    assert "`prunefront sync` uploads what is on the disk only" in capsys.readouterr().err
    assert main(["sync", "digits"]) == 0
    capsys.readouterr()
    assert main(["dashboard", "digits"]) == 0
    first = capsys.readouterr().out
    assert main(["dashboard", "digits"]) == 0
    assert capsys.readouterr().out == first
    assert len(server.views) == 1
    server.views.clear()  # its owner has deleted it
    assert main(["dashboard", "digits"]) == 0
    assert capsys.readouterr().out != first
    server.behaviour = "refuse"
    monkeypatch.setattr(wandb_logger, "_CLOSE_TIMEOUT", 3.0)
    assert main(["dashboard", "digits"]) == 2
    assert "prunefront: there is no dashboard in W&B: " in capsys.readouterr().err
