"""What reaches Weights & Biases, read back from the files of offline runs, and that nothing else happens."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from serial_search import EXPERIMENT

from components.errors import UserError
from search import wandb_logger, wandb_runs
from search.cli import main
from search.wandb_logger import WandbLogger
from search.wandb_records import flat, front_table, importance_table, trial_run

BLOCK = 32 * 1024


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, which is a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    content = file.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def items(updates: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in updates}


class OfflineRun:
    """One run as its file tells it."""

    def __init__(self, file: Path) -> None:
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.directory = file.parent
        self.metrics: list[Any] = []
        self.artifacts: list[Any] = []
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config |= items(record.run.config.update)
            elif kind == "config":
                self.config |= items(record.config.update)
            elif kind == "history":
                self.history.append(items(record.history.item))
            elif kind == "summary":
                self.summary |= items(record.summary.update)
            elif kind == "metric":
                self.metrics.append(record.metric)
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
                self.artifacts.append(record.request.log_artifact.artifact)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


def offline_runs(directory: Path) -> dict[str, OfflineRun]:
    """The runs of a search by name; each must be there once."""
    runs = [OfflineRun(file) for file in sorted((directory / "wandb").glob("offline-run-*/*.wandb"))]
    named = {run.run.display_name: run for run in runs}
    assert len(named) == len(runs)
    return named


def record(number: int, **changes: Any) -> dict[str, Any]:
    complete = {
        "trial": number,
        "status": "complete",
        "reason": None,
        "origin": "tpe",
        "seed": 7,
        "objectives": {"parameters": 1000.0, "reconstruction_error": 0.25},
        "parameters": 1000,
        "size_ratio": 0.125,
        "macs": 2000,
        "retention": 0.875,
        "performance": {"reconstruction_error": 0.25},
        "component_sizes": {"encoder": 600, "decoder": 400},
        "widths": {"encoder.0": 16, "latent": 4},
        "coefficients": {"l2": 0.25, "fisher": 0.75},
        "ratios": {"encoder.0": 0.5, "latent": 0.75},
        "kept": {"encoder.0": [1, 2], "latent": [0]},
        "rungs": [[50, 0.5], [150, 0.125]],
        "options": {"samples": 64},
        "fine_tuning": {"held_out_loss": 0.5},
        "repaired_by": "fine_tuning",
        "timings": {"prune": 0.01, "fine_tune": 0.5},
        "usage": {"cpu_seconds": 1.5, "memory_mb": 300.5},
        "host": "somewhere",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:01+00:00",
    }
    return complete | changes


FAILED = {
    "status": "failed",
    "reason": "the worker died",
    "objectives": {},
    "parameters": None,
    "size_ratio": None,
    "macs": None,
    "retention": None,
    "performance": {},
    "component_sizes": {},
    "widths": {},
    "kept": {},
    "rungs": [],
    "timings": {},
}


IMPORTANCE = {
    "steps": [10, 20],
    "metrics": {"fisher": {"groups": ["latent", "encoder.0"], "values": [[0.5, 1.0], [-0.5, None]]}},
}


FRONT: list[dict[str, Any]] = [
    {"trial": 0, "parameters": 10, "size_ratio": 0.125, "retention": 0.875, "ratios": {"latent": 0.75}},
    {"trial": 2, "parameters": 40, "size_ratio": 0.5, "retention": 1.0, "ratios": {"encoder.0": 0.5}},
]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OfflineRun]:
    """The files of a search of two trials."""
    directory = tmp_path_factory.mktemp("logged")
    warnings: list[str] = []
    options: dict[str, Any] = {"experiment": "digits", "project": "small-agents", "warn": warnings.append}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.delenv("WANDB_MODE", raising=False)
        patch.setenv("NETRC", str(directory / "netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(directory))
        with WandbLogger(directory, config={"search": {"trials": 3}}, **options) as logger:
            logger.log_trial(record(0), on_front=True)
            row = {"finished": 1, "failed": 0, "front_size": 1, "hypervolume": 0.5}
            logger.log_search(row)
            logger.log_tried([(0, "tpe", 0.125, 0.875), (3, "anchor: dense", 1.0, 0.5)])
            logger.log_front([FRONT[0]])
            logger.log_trial(record(1, **FAILED))
            logger.log_search({"finished": 2, "failed": 1, "front_size": 1, "hypervolume": None})
            bundle = directory / "bundle"
            bundle.mkdir()
            (bundle / "model.safetensors").write_bytes(b"weights")
            (directory / "report.html").write_text("<!doctype html><p>all of it</p>")
            logger.finish(
                FRONT,
                {"hypervolume": 0.75, "retention_at": {"5 %": 0.25}},
                bundles={0: bundle, 2: bundle},
                aliases={0: ["knee", "smallest-90"]},
                importance=IMPORTANCE,
                matters={"retention": {"share latent": 0.75}},
                report=directory / "report.html",
            )
        assert logger.mode == "offline"
    assert warnings == []
    return offline_runs(directory)


def test_every_trial_is_a_run_of_the_experiments_group(logged: dict[str, OfflineRun]) -> None:
    assert set(logged) == {"digits", "trial 0", "trial 1"}
    for name, run in logged.items():
        assert run.run.run_group == "digits"
        assert run.run.project == "small-agents"
        assert run.run.job_type == ("search" if name == "digits" else "trial")
    prefix = logged["digits"].run.run_id.removesuffix("-search")
    assert logged["trial 0"].run.run_id == f"{prefix}-00000"
    assert logged["trial 1"].run.run_id == f"{prefix}-00001"


def test_a_trial_has_its_configuration_measurements_and_losses(logged: dict[str, OfflineRun]) -> None:
    run = logged["trial 0"]
    config = {name: value for name, value in run.config.items() if not name.startswith("_")}
    assert config == {
        "trial": 0,
        "origin": "tpe",
        "seed": 7,
        "ratio/encoder/0": 0.5,
        "ratio/latent": 0.75,
        "coefficient/l2": 0.25,
        "coefficient/fisher": 0.75,
        "option/samples": 64,
    }
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in run.history]
    measured = {
        "parameters": 1000.0,
        "reconstruction_error": 0.25,
        "size_ratio": 0.125,
        "macs": 2000,
        "retention": 0.875,
        "performance/reconstruction_error": 0.25,
    }
    losses = [
        {"fine_tune/updates": 50, "fine_tune/performance": 0.5},
        {"fine_tune/updates": 150, "fine_tune/performance": 0.125},
    ]
    assert rows == [*losses, measured]
    for name, value in {
        "status": "complete",
        "size/encoder": 600,
        "width/encoder/0": 16,
        "seconds/prune": 0.01,
        "on_front": True,
        "usage/memory_mb": 300.5,
    }.items():
        assert run.summary[name] == value
    assert run.exit_code == 0


def test_a_stopped_trial_has_its_rung_losses_and_is_no_failure() -> None:
    kept = {name: record(2)[name] for name in ("parameters", "size_ratio", "component_sizes", "widths")}
    changes = {"status": "stopped", "reason": None, "rung_losses": [[30, 0.5], [52, 0.25]], "updates": 52}
    _, rows, summary = trial_run(record(2, **FAILED | kept | changes))
    assert rows[:2] == [
        {"fine_tune/updates": 30, "fine_tune/rung_loss": 0.5},
        {"fine_tune/updates": 52, "fine_tune/rung_loss": 0.25},
    ]
    assert set(rows[2]) == {"parameters", "size_ratio"}
    assert (summary["status"], summary["updates"]) == ("stopped", 52)


def test_a_failed_trial_has_its_reason(logged: dict[str, OfflineRun]) -> None:
    run = logged["trial 1"]
    assert run.summary["status"] == "failed"
    assert run.summary["reason"] == "the worker died"
    assert run.history == []
    assert run.exit_code == 1


def test_the_search_has_its_course_and_its_front(logged: dict[str, OfflineRun]) -> None:
    run = logged["digits"]
    assert run.config["search/trials"] == 3
    first, live, second, last = run.history
    assert (first["finished"], first["failed"], first["front_size"], first["hypervolume"]) == (1, 0, 1, 0.5)
    assert (second["finished"], second["failed"]) == (2, 1)
    assert "hypervolume" not in second
    assert (live["live_front/_type"], live["live_front/nrows"]) == ("table-file", 1)
    assert live["live_front/log_mode"] == "MUTABLE"
    assert (last["front/_type"], last["front/nrows"], last["front/ncols"]) == ("table-file", 2, 8)
    assert (last["importance/nrows"], last["importance/ncols"]) == (3, 4)
    assert last["report/_type"] == "html-file"
    assert run.summary["hypervolume"] == 0.75
    assert run.summary["retention_at/5 %"] == 0.25
    assert run.summary["matters/retention/share latent"] == 0.75
    assert run.exit_code == 0
    plots = ("front_plot", "importance_plot", "matters_plot")
    assert {last[f"{name}/_type"] for name in plots} == {"plotly-file"}
    assert live["front_plot/_type"] == "plotly-file"


def test_what_is_over_trials_has_them_as_its_axis(logged: dict[str, OfflineRun]) -> None:
    steps = {metric.name: metric.step_metric for metric in logged["digits"].metrics}
    over = {"failed", "stopped", "front_size", "hypervolume", "trials_per_minute"}
    assert {name for name, step in steps.items() if step == "finished"} == over


def test_media_are_what_was_handed_over(logged: dict[str, OfflineRun]) -> None:
    run = logged["digits"]
    files = run.directory / "files"
    last = run.history[-1]
    page = files / last["report/path"]
    assert page.read_text() == "<!doctype html><p>all of it</p>"
    table = json.loads((files / last["front/path"]).read_text())
    place = {name: i for i, name in enumerate(table["columns"])}
    prefix = run.run.run_id.removesuffix("-search")
    assert [row[place["run"]] for row in table["data"]] == [f"{prefix}-00000", f"{prefix}-00002"]
    assert [row[place["retention"]] for row in table["data"]] == [0.875, 1.0]
    models = [f"{prefix}-models:trial-00000", f"{prefix}-models:trial-00002"]
    assert [row[place["model"]] for row in table["data"]] == models


def test_the_front_is_drawn_with_what_it_dominates(logged: dict[str, OfflineRun]) -> None:
    run = logged["digits"]
    plot = json.loads((run.directory / "files" / run.history[-1]["front_plot/path"]).read_text())
    drawn = {(trace["name"], trace["mode"]): (trace["x"], trace["y"]) for trace in plot["data"]}
    assert drawn == {
        ("other trials", "markers"): ([], []),
        ("baselines", "markers"): ([1.0], [0.5]),
        ("front", "lines"): ([0.125, 0.5], [0.875, 1.0]),
        ("front", "markers"): ([0.125, 0.5], [0.875, 1.0]),
        ("base", "markers"): ([1.0], [1.0]),
    }


def test_the_fronts_bundles_are_versions_of_one_artifact(logged: dict[str, OfflineRun]) -> None:
    run = logged["digits"]
    prefix = run.run.run_id.removesuffix("-search")
    first, other = [found for found in run.artifacts if found.type == "bundle"]
    assert {first.name, other.name} == {f"{prefix}-models"}
    assert list(first.tags) == ["pareto"]
    assert {"trial-00000", "knee", "smallest-90"} <= set(first.aliases)
    assert "trial-00002" in other.aliases
    assert "knee" not in other.aliases
    assert [json.loads(found.metadata)["trial"] for found in (first, other)] == [0, 2]
    assert [entry.path for entry in first.manifest.contents] == ["model.safetensors"]


def test_importance_is_a_row_for_each_number() -> None:
    columns, rows = importance_table(IMPORTANCE)
    assert columns == ["metric", "group", "step", "value"]
    assert rows == [
        ["fisher", "latent", 10, 0.5],
        ["fisher", "latent", 20, 1.0],
        ["fisher", "encoder.0", 10, -0.5],
    ]
    assert importance_table({}) == (columns, [])


def test_whatever_waits_for_its_upload_waits_in_the_run_directory(logged: dict[str, OfflineRun]) -> None:
    run = logged["digits"]
    places = [Path(entry.local_path) for found in run.artifacts for entry in found.manifest.contents]
    assert places
    inside = run.directory.parent
    assert all(place.is_relative_to(inside) and place.is_file() for place in places)


def test_a_trial_that_leaves_the_front_is_no_longer_on_it(tmp_path: Path) -> None:
    with WandbLogger(tmp_path, experiment="digits", mode="offline", warn=pytest.fail) as logger:
        for number, members in enumerate([[0], [0, 1], [1, 2], [1, 3]]):
            logger.log_trial(record(number), on_front=True)
            logger.log_members(members)
        logger.log_trial(record(4), on_front=False)
    runs = offline_runs(tmp_path)
    found = {number: runs[f"trial {number}"].summary["on_front"] for number in range(5)}
    assert found == {0: False, 1: True, 2: False, 3: True, 4: False}
    assert {run.exit_code for run in runs.values()} == {0}


def test_runs_of_the_front_end_even_if_the_search_is_killed(tmp_path: Path) -> None:
    logger = WandbLogger(tmp_path, experiment="digits", mode="offline", warn=pytest.fail)
    logger.log_trial(record(0), on_front=True)
    logger.close()  # the end of the input is all that the process sees
    assert offline_runs(tmp_path)["trial 0"].exit_code == 0


def test_half_a_message_is_the_end_of_all(tmp_path: Path) -> None:
    logger = WandbLogger(tmp_path, experiment="digits", mode="offline", warn=pytest.fail)
    logger.log_trial(record(0), on_front=True)
    logger._waiting.put('{"kind": "trial", "rec')
    logger.close()
    runs = offline_runs(tmp_path)
    assert {name: run.exit_code for name, run in runs.items()} == {"digits": 0, "trial 0": 0}


def test_a_resumed_search_says_who_has_left_the_front(tmp_path: Path) -> None:
    for members in ([0, 1], [1]):
        with WandbLogger(tmp_path, experiment="digits", mode="offline", warn=pytest.fail) as logger:
            for number in members[:-1]:
                logger.log_trial(record(number), on_front=True)
            logger.log_members(members)
        time.sleep(1.1)  # folders of runs are told apart by the second
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*-00000.wandb"))
    assert [OfflineRun(file).summary["on_front"] for file in files] == [True, False]


def test_a_start_that_fails_is_the_only_thing_said(tmp_path: Path) -> None:
    warnings: list[str] = []
    with WandbLogger(
        tmp_path, experiment="digits", mode="offline", project="a/b", warn=warnings.append
    ) as logger:
        for number in range(4):
            logger.log_trial(record(number))
        logger.finish([], {})
    [warning] = warnings
    assert warning.endswith("; no more is logged, and the search goes on")


def test_after_many_failures_the_end_is_still_logged(tmp_path: Path) -> None:
    warnings: list[str] = []
    with WandbLogger(tmp_path, experiment="digits", mode="offline", warn=warnings.append) as logger:
        for _ in range(5):
            logger.log_trial(record(0, trial="not a number"))
        logger.log_trial(record(1))
        logger.finish([], {"hypervolume": 0.5})
    assert warnings[-1].endswith("; no more is logged, and the search goes on")
    runs = offline_runs(tmp_path)
    assert set(runs) == {"digits"}
    assert runs["digits"].summary["hypervolume"] == 0.5


def test_a_resumed_search_keeps_its_ids(tmp_path: Path) -> None:
    for _ in range(2):
        with WandbLogger(tmp_path, experiment="a.b c", mode="offline", warn=pytest.fail) as logger:
            logger.log_trial(record(3))
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 2
    assert all(file.name.startswith("run-a-b-c-") for file in files)


def test_disabled_means_nothing_at_all(tmp_path: Path) -> None:
    with WandbLogger(tmp_path, experiment="digits", mode="disabled", warn=pytest.fail) as logger:
        logger.log_trial(record(0))
        logger.finish([], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_that_does_not_answer_costs_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    warnings: list[str] = []
    with WandbLogger(tmp_path, experiment="digits", mode="online", warn=warnings.append) as logger:
        logger.log_trial(record(0))
    assert logger.mode == "offline"
    [warning] = warnings
    assert warning.startswith("W&B runs are kept offline: ")
    assert set(offline_runs(tmp_path)) == {"digits", "trial 0"}


def test_online_without_a_key_is_said(tmp_path: Path) -> None:
    warnings: list[str] = []
    with WandbLogger(tmp_path, experiment="digits", mode="online", warn=warnings.append) as logger:
        logger.log_trial(record(0))
    [warning] = warnings
    assert "No API key configured" in warning
    assert set(offline_runs(tmp_path)) == {"digits", "trial 0"}


def test_a_missing_key_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(EXPERIMENT)
    assert main(["search", "toy.yaml", "--set", "wandb.mode=online"]) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith(
        "prunefront: wandb.mode is 'online', but W&B does not take the key: No API key"
    )
    assert not Path("runs").exists()


class Refusing(BaseHTTPRequestHandler):
    """A server that knows nobody."""

    answer = b'{"errors": [{"message": "user is not logged in", "extensions": {"code": "PERMISSION_ERROR"}}]}'
    status = 401

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(self.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


class Unknowing(Refusing):
    """A server that takes the key of nobody."""

    answer = b'{"data": {"viewer": null}}'
    status = 200


@pytest.mark.parametrize("handler", [Refusing, Unknowing])
def test_a_wrong_key_is_said_before_anything_is_done(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match="'online', but W&B does not take the key: Failed to auth"):
            wandb_logger.require_account("online")
        server.shutdown()


@pytest.mark.parametrize("mode", ["auto", "offline", "disabled"])
def test_other_modes_need_no_key(mode: Any) -> None:
    wandb_logger.require_account(mode, "nobody")


def test_a_server_that_does_not_answer_keeps_no_search_from_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb_logger.require_account("online", "nobody")


def test_a_process_that_is_killed_costs_one_sentence(tmp_path: Path) -> None:
    warnings: list[str] = []
    with WandbLogger(tmp_path, experiment="digits", mode="offline", warn=warnings.append) as logger:
        assert logger._process is not None
        os.kill(logger._process.pid, signal.SIGKILL)
        logger._process.wait()
        for number in range(100):
            logger.log_trial(record(number))
        logger.finish([], {})
    log = tmp_path / "wandb" / "logger.log"
    assert warnings == [f"W&B logging has ended early (see {log}); the search goes on without it"]


def test_a_process_that_fails_at_the_very_end_costs_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_process(monkeypatch, "import sys; sys.stdin.read(); sys.exit(1)")
    warnings: list[str] = []
    with WandbLogger(tmp_path, experiment="digits", mode="offline", warn=warnings.append) as logger:
        logger.log_trial(record(0))
    log = tmp_path / "wandb" / "logger.log"
    assert warnings == [f"W&B logging has ended early (see {log}); the search goes on without it"]


def test_a_search_may_be_over_before_its_process_has_begun(tmp_path: Path) -> None:
    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
    place = {"experiment": "digits", "project": "prunefront", "entity": None, "config": {}}
    (tmp_path / "wandb").mkdir()
    messages.put({"kind": "start", "directory": str(tmp_path), "mode": "disabled", **place})
    for number in range(wandb_runs._BEHIND + 1):
        messages.put({"kind": "search", "row": {"finished": number}})
    messages.put(None)
    reports: list[dict[str, str]] = []
    wandb_runs._handle_all(wandb_runs._Runs(reports.append), messages)
    assert [report["mode"] for report in reports] == ["disabled"]
    assert messages.empty()


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = hang(monkeypatch)
    warnings: list[str] = []
    logger = WandbLogger(tmp_path, experiment="digits", mode="offline", warn=warnings.append)
    while logger.mode != "online":  # until it hangs
        time.sleep(0.01)
    for number in range(wandb_logger._WAITING_LIMIT + 5000):
        logger.log_trial(record(number))
    logger.close(timeout=0.2)
    assert [sentence.split(":")[0].split(" and ")[0] for sentence in warnings] == [
        "W&B logging is too slow for this search",
        "W&B logging had not finished after 0.2 s",
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def hang(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the logging process read nothing and ignore polite requests to end; returns its id."""
    script = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"mode": "online"}', flush=True)
time.sleep(3600)
"""
    return replace_process(monkeypatch, script)


def replace_process(monkeypatch: pytest.MonkeyPatch, script: str) -> list[int]:
    """Let the logging process be another; returns the ids of those that are started."""
    start = subprocess.Popen
    pids: list[int] = []

    def start_other(command: list[str], **options: Any) -> Any:
        process = start([sys.executable, "-c", script], **options)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(wandb_logger.subprocess, "Popen", start_other)
    return pids


def test_a_value_that_is_no_json_costs_one_sentence(tmp_path: Path) -> None:
    warnings: list[str] = []
    with WandbLogger(tmp_path, experiment="digits", mode="offline", warn=warnings.append) as logger:
        logger.log_trial(record(0, origin=object()))
        logger.log_trial(record(1, trial="not a number"))
        logger.log_trial(record(2))
    assert len(warnings) == 2
    assert set(offline_runs(tmp_path)) == {"digits", "trial 2"}


def test_flat_names() -> None:
    assert flat({"a": {"b.c": 1, "d": {}}, "e": [1]}, "x/") == {"x/a/b/c": 1, "x/e": [1]}


def test_coefficients_of_components_are_flat() -> None:
    config, rows, summary = trial_run(
        record(0, coefficients={"encoder": {"l2": 1.0}, "coupling": {"l1": 1.0}})
    )
    assert config["coefficient/encoder/l2"] == 1.0
    assert config["coefficient/coupling/l1"] == 1.0
    assert len(rows) == 3
    assert "kept" not in summary


def test_the_fronts_table_has_every_column_and_no_objects() -> None:
    columns, rows = front_table(
        [
            {"trial": 1, "bundle": "models/1", "kept": [1, 2]},
            {"trial": 2, "ratios": {"latent": 0.5}, "test": None},
        ]
    )
    assert columns == ["trial", "bundle", "ratios/latent"]
    assert rows == [[1, "models/1", None], [2, None, 0.5]]
    assert front_table([]) == ([], [])
