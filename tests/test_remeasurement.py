"""The front's test, by one process or several: the same numbers, whatever becomes of those that help."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from serial_search import search_serially

from search import remeasurement
from search.driver import SearchOutcome
from search.front import Front
from search.remeasurement import Candidate, performance_on_test, performances_on_test
from search.search_command import print_results
from search.verification import verify_bundle


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    ready, front = search_serially(tmp_path_factory.mktemp("runs") / "toy")
    found = [
        Candidate(trial.trial, str(ready.run.path / trial.bundle), seed=trial.trial, threads=1)
        for trial in front.trials
    ]
    assert len(found) >= 3
    return found


def nothing(done: int, total: int, note: str) -> None:
    pass


def measure_slowly(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], object]) -> list[int]:
    """Let two processes measure, this one waiting before all but the first; returns what is measured here."""
    measured: list[int] = []

    def slowly(candidate: Candidate, data: object) -> float:
        measured.append(candidate.trial)
        if len(measured) > 1:
            wait()
        return performance_on_test(candidate, None)

    monkeypatch.setattr(remeasurement, "performance_on_test", slowly)
    monkeypatch.setattr(remeasurement, "WORTH_SECONDS", -1.0)
    monkeypatch.setattr(remeasurement, "usable_cores", lambda: 2)
    return measured


@pytest.mark.slow
def test_a_helper_finds_the_same_bits(candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    all_but_one = threading.Event()

    def progress(done: int, total: int, note: str) -> None:
        told.append((done, total))
        if done == total - 1:
            all_but_one.set()

    here = measure_slowly(monkeypatch, lambda: all_but_one.wait(60))
    found = performances_on_test(candidates, None, progress)
    assert found == measured_here(candidates)
    assert len(here) == 2  # the helper did the rest
    assert told == [(done, len(candidates)) for done in range(len(candidates) + 1)]


def measured_here(candidates: list[Candidate]) -> dict[int, float]:
    return {candidate.trial: performance_on_test(candidate, None) for candidate in candidates}


def assert_ended(pids: Path) -> None:
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Let helpers be a shell script that notes its process id in the file that is returned."""
    pids, program = tmp_path / "pids", tmp_path / "helper"
    program.write_text(f"#!/bin/sh\necho $$ >> {pids}\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return pids


def begun(pids: Path) -> None:
    """Wait until helpers have begun, and a moment longer."""
    deadline = time.monotonic() + 60
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)


@pytest.mark.parametrize(
    "script", ["exit 1", "read line; echo nonsense", "read line; echo null", "exec sleep 600"]
)
def test_what_helpers_cannot_do_is_done_here(
    script: str,
    candidates: list[Candidate],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pids = stand_in(tmp_path, monkeypatch, script)
    here = measure_slowly(monkeypatch, lambda: begun(pids))
    monkeypatch.setattr(remeasurement, "PATIENCE_SECONDS", 0.1)
    found = performances_on_test(candidates, None, nothing)
    assert found == measured_here(candidates)
    assert sorted(here) == sorted(candidate.trial for candidate in candidates)
    assert_ended(pids)


def test_what_cannot_be_measured_costs_nothing_else(
    candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([ArithmeticError("the reward is nan"), float("inf")])

    def measure(candidate: Candidate, data: object) -> float:
        outcome = next(outcomes, None)
        if isinstance(outcome, Exception):
            raise outcome
        return performance_on_test(candidate, None) if outcome is None else outcome

    monkeypatch.setattr(remeasurement, "performance_on_test", measure)
    found = performances_on_test(candidates, None, nothing)
    first, second, *others = candidates
    assert found[first.trial] == "ArithmeticError: the reward is nan"
    assert found[second.trial] == "its performance is inf"
    assert all(found[other.trial] == performance_on_test(other, None) for other in others)


def test_a_front_says_which_trial_could_not_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost: list[int] = []

    def measure(candidate: Candidate, data: object) -> float:
        if not lost:
            lost.append(candidate.trial)
            raise ArithmeticError("the reward is nan")
        return performance_on_test(candidate, None)

    monkeypatch.setattr(remeasurement, "performance_on_test", measure)
    ready, front = search_serially(tmp_path / "toy")
    tested = {trial.trial: trial.test_retention for trial in front.trials}
    assert [number for number, retention in tested.items() if retention is None] == lost
    assert Front.from_json(ready.run.front, json.loads(ready.run.front.read_text())).trials == front.trials
    assert front.hypervolumes()["test_hypervolume"] > 0
    assert verify_bundle(ready.run.bundle(lost[0])).identical
    print_results(ready, front, SearchOutcome(12, 0, False, 1, 1.0), Console())
    sentence = f"Trial {lost[0]} could not be measured on test data: ArithmeticError: the reward is nan"
    assert sentence in capsys.readouterr().out


def test_without_a_program_everything_is_done_here(
    candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = measure_slowly(monkeypatch, lambda: None)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert len(performances_on_test(candidates, None, nothing)) == len(candidates) == len(here)


def test_an_interruption_ends_the_helpers(
    candidates: list[Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = stand_in(tmp_path, monkeypatch, "exec sleep 600")
    measure_slowly(monkeypatch, lambda: begun(pids))

    def interrupt(done: int, total: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        performances_on_test(candidates, None, interrupt)
    assert_ended(pids)


@pytest.mark.parametrize(
    ("cores", "threads", "expected"), [(1, 1, 1), (2, 1, 2), (2, 4, 1), (8, 2, 4), (64, 1, 8)]
)
def test_processes_share_the_cores(
    cores: int, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remeasurement, "usable_cores", lambda: cores)
    assert remeasurement.processes(threads) == expected
