"""A search's study in optuna-dashboard: the real server answers with names, values and attributes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serial_search import search_serially

from search.run_directory import RunDirectory


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[tuple[RunDirectory, str]]:
    """A run directory, and the address of a dashboard that shows its study as it is."""
    run = RunDirectory(tmp_path / "toy")
    search_serially(run.path, "search.trials=6", "search.constraints={retention: '>= 0.6'}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [program, f"sqlite:///{run.study}", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
        )
    try:
        yield run, f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def ask(url: str) -> Any:
    """What the server answers, once it has started."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.2)


def test_the_dashboard_shows_all_there_is(dashboard: tuple[RunDirectory, str]) -> None:
    run, address = dashboard
    [summary] = ask(f"{address}/api/studies")["study_summaries"]
    assert summary["study_name"] == "toy"
    assert summary["directions"] == ["minimize", "minimize"]
    study = ask(f"{address}/api/studies/{summary['study_id']}")
    assert study["objective_names"] == ["log parameters", "reconstruction_error"], sorted(study)
    results = {result.number: result for result in run.read_trials()}
    shown = {_attributes(trial)["trial"]: trial for trial in study["trials"]}
    assert {int(number) for number in shown} == set(results)
    for number, trial in shown.items():
        result, attributes = results[int(number)], _attributes(trial)
        assert trial["state"] == "Complete"
        assert float(trial["values"][1]) == result.objectives["reconstruction_error"]
        assert attributes["origin"] == result.origin
        assert float(attributes["retention"]) == result.retention
        assert float(attributes["constraint retention >= 0.6"]) == pytest.approx(
            0.6 - (result.retention or 0)
        )
    names = {parameter["name"] for trial in study["trials"] for parameter in trial["params"]}
    assert names == {"keep/encoder.0", "keep/latent", "keep/decoder.0", "mix/l2", "mix/fisher"}


def _attributes(trial: dict[str, Any]) -> dict[str, str]:
    return {entry["key"]: entry["value"] for entry in trial["user_attrs"]}
