"""The driver's state without Ray: which losses are charged to whom, and what is remembered of results."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
from test_cluster import SETTINGS, Journal, complete

from components.errors import UserError
from search import driver
from search.driver import Driver
from search.interruption import Interruption
from search.trial_types import TrialResult, TrialSpec

OUT_OF_MEMORY = (
    "ray.exceptions.OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory."
)
NO_TORCH = (
    "The actor died because of an error raised in its creation task\n"
    "ModuleNotFoundError: No module named 'torch'"
)


def make(journal: Journal, trials: int = 8, slots: int = 2, **options: Any) -> Driver:
    made = Driver(
        list(range(trials)),
        study=journal,
        make_spec=lambda number, proposal: TrialSpec.of(number, proposal, number, SETTINGS),
        record=options.pop("record", journal.record),
        observers=options.pop("observers", [journal.observe]),
        wanted=None,
        interrupted=Interruption(),
        early_stopping=None,
        retries=options.pop("retries", 1),
        trial_timeout=None,
        seconds=None,
    )
    made.resize(slots)
    return made


def spec_of(some: Driver, trial_id: str) -> TrialSpec:
    spec = some.next_spec(trial_id)
    assert spec is not None
    return spec


def nothing() -> None:
    """Ends no worker."""


def test_a_worker_that_dies_while_it_starts_is_not_charged_to_its_trial() -> None:
    journal = Journal()
    some = make(journal, retries=0)
    for attempt in range(3):
        assert spec_of(some, f"t{attempt}").number == 0
        some.lose(f"t{attempt}", OUT_OF_MEMORY)
    assert (some.failed, some.repeated, journal.results, some.fatal) == (0, 0, [], None)
    spec_of(some, "t3")
    some.begin("t3", nothing)
    some.lose("t3", OUT_OF_MEMORY)
    [failed] = journal.results
    assert failed.reason == "the worker was stopped because its machine ran out of memory"


def test_one_machine_on_which_nothing_starts_does_not_end_a_search_that_runs_on_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "STILLBORN_SECONDS", 0.0)
    some = make(Journal(), slots=3)
    spec_of(some, "good")
    for attempt in range(5):  # while others may still be starting
        spec_of(some, f"early {attempt}")
        some.lose(f"early {attempt}", NO_TORCH)
    assert some.fatal is None
    some.begin("good", nothing)
    for attempt in range(40):  # while one works for hours
        spec_of(some, f"late {attempt}")
        some.lose(f"late {attempt}", NO_TORCH)
    assert some.fatal is None


def test_machines_on_which_nothing_starts_at_all_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "STILLBORN_SECONDS", 0.0)
    some = make(Journal(), slots=2)
    for attempt in range(2 * driver.STILLBORN_LIMIT):
        assert some.fatal is None
        spec_of(some, f"t{attempt}")
        some.lose(f"t{attempt}", NO_TORCH)
    assert isinstance(some.fatal, UserError)
    assert str(some.fatal) == (
        "no worker can run trials: the worker could not start: ModuleNotFoundError: No module named 'torch'"
    )


def test_what_is_stored_is_not_remembered_as_well() -> None:
    journal = Journal()
    told: list[TrialResult] = []
    some = make(journal, observers=[told.append])
    result = complete(spec_of(some, "t"), state={"w": np.zeros(3, np.float32)}, kept={"encoder.0": (0, 2)})
    some.finish("t", result)
    [stored], [seen] = journal.results, told
    assert stored.state is not None
    assert stored.kept == {"encoder.0": (0, 2)}
    assert (seen.state, seen.kept) == (None, {})
    assert seen.objectives == result.objectives


def test_a_result_that_cannot_be_stored_is_a_failed_trial() -> None:
    journal = Journal()

    def record(result: TrialResult) -> None:
        if result.complete:
            raise ValueError("Out of range float values are not JSON compliant: nan")
        journal.record(result)

    some = make(journal, record=record)
    some.finish("t", complete(spec_of(some, "t")))
    assert (some.complete, some.failed, some.fatal) == (0, 1, None)
    [failed] = journal.results
    assert failed.reason == (
        "its result cannot be stored: ValueError: Out of range float values are not JSON compliant: nan"
    )


def test_a_full_disk_is_no_fault_of_the_trial() -> None:
    def record(result: TrialResult) -> None:
        raise OSError(28, "No space left on device")

    some = make(Journal(), record=record)
    some.finish("t", complete(spec_of(some, "t")))
    assert isinstance(some.fatal, OSError)
    assert some.failed == 0


def test_errors_are_told_in_words_that_any_file_can_hold(caplog: pytest.LogCaptureFixture) -> None:
    error = RuntimeError("no file \udcff\nand more")
    assert driver.describe(error).encode() == b"RuntimeError: no file \\udcff"

    def broken(result: TrialResult) -> None:
        raise error

    some = make(Journal(), observers=[broken])
    with caplog.at_level(logging.WARNING):
        some.finish("t", complete(spec_of(some, "t")))
        some.finish("u", dataclasses.replace(complete(spec_of(some, "u"))))
    assert caplog.text.count("an observer of the search failed and was dropped") == 1
