"""What a whole search logs to W&B, read back from the files of its offline runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serial_search import EXPERIMENT, run_serially
from test_wandb_logger import offline_runs

from search.cli import main

TRIALS = 24


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("search.experiment.run_search", run_serially)
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(EXPERIMENT)
    return tmp_path / "runs" / "toy"


def search(*overrides: str) -> int:
    settings = [part for override in overrides for part in ("--set", override)]
    return main(["search", "toy.yaml", "--trials", str(TRIALS), "--set", "wandb.mode=offline", *settings])


def of_front(run: Path) -> set[int]:
    return {trial["trial"] for trial in json.loads((run / "front.json").read_text())["trials"]}


def test_every_trial_and_what_the_search_came_to(toy: Path) -> None:
    assert search() == 0
    runs = offline_runs(toy)
    assert set(runs) == {"toy", *(f"trial {number}" for number in range(TRIALS))}
    whole = runs["toy"]
    rows = [row for row in whole.history if "finished" in row]
    assert [row["finished"] for row in rows] == list(range(1, TRIALS + 1))
    assert all(row["trials_per_minute"] > 0 for row in rows)
    front = json.loads((toy / "front.json").read_text())
    assert rows[-1]["hypervolume"] == pytest.approx(front["hypervolume"])
    assert any("live_front/nrows" in row for row in whole.history)
    last = whole.history[-1]
    assert last["front/nrows"] == len(front["trials"])
    assert (toy / "report.html").read_bytes() == (
        whole.directory / "files" / last["report/path"]
    ).read_bytes()
    assert last["importance/nrows"] > 0
    assert any(name.startswith("matters/parameters/share ") for name in whole.summary)
    bundles = [artifact for artifact in whole.artifacts if artifact.type == "bundle"]
    assert {json.loads(artifact.metadata)["trial"] for artifact in bundles} == of_front(toy)
    assert len({artifact.name for artifact in bundles}) == 1
    assert sum("knee" in artifact.aliases for artifact in bundles) == 1
    plot = json.loads((whole.directory / "files" / last["front_plot/path"]).read_text())
    points = {trace["name"]: len(trace["x"]) for trace in plot["data"] if trace["mode"] == "markers"}
    assert points["front"] == len(front["trials"])
    assert points["front"] + points["other trials"] + points["baselines"] >= TRIALS
    assert {last["importance_plot/_type"], last["matters_plot/_type"]} == {"plotly-file"}
    for number in range(TRIALS):
        summary = runs[f"trial {number}"].summary
        assert summary["status"] == "complete"
        assert summary["usage/memory_mb"] > 0
        assert summary["usage/cpu_seconds"] >= 0
        assert summary["on_front"] == (number in of_front(toy))


def test_a_large_search_has_runs_for_itself_and_its_front_only(toy: Path) -> None:
    assert search(f"wandb.trial_runs={TRIALS - 1}") == 0
    assert set(offline_runs(toy)) == {"toy", *(f"trial {number}" for number in of_front(toy))}


def test_sync_uploads_what_is_on_the_disk(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search() == 0
    calls: list[list[str]] = []
    files = list(toy.glob("wandb/*run-*/*.wandb"))  # not once more through `latest-run`, which is a link

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        for file in files[len(calls) == 1 :]:
            file.with_suffix(".wandb.synced").touch()
        return subprocess.CompletedProcess(command, returncode=int(len(calls) == 3))

    with monkeypatch.context() as patch:
        patch.setattr("search.wandb_logger.account_fault", lambda entity: "")
        patch.setattr("search.commands.subprocess.run", run)
        capsys.readouterr()
        assert main(["sync", "toy"]) == 1
        assert "1 W&B runs in runs/toy/wandb were not uploaded whole" in capsys.readouterr().err
        assert main(["sync", "toy"]) == 0
        assert main(["sync", "toy"]) == 1
        patch.setattr("search.wandb_logger.account_fault", lambda entity: "the key is no key")
        assert main(["sync", "toy"]) == 2
        assert "prunefront: nothing is uploaded: the key is no key" in capsys.readouterr().err
    assert len(calls) == 3
    assert calls[0] == [
        *(sys.executable, "-P", "-m", "wandb", "sync"),
        *("--include-online", "--yes", "runs/toy/wandb"),
    ]


def test_sync_of_nothing_is_one_sentence(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search("wandb.mode=disabled") == 0
    capsys.readouterr()
    assert main(["sync", "toy"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("prunefront: runs/toy has no W&B runs to upload: its wandb.mode was 'disabled'")
