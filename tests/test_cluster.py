"""Searches over synthetic trials: real Ray workers, nothing trained."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from greenlet import GreenletExit
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from components.errors import UserError
from components.plan import PruningPlan
from search import cluster, driver, ray_connection
from search.rungs import Report
from search.trial_types import Proposal, TrialResult, TrialSettings, TrialSpec

SETTINGS = TrialSettings(metrics=("l2",), objectives=("parameters", "error"))
STATE_BYTES = 400_000

unpacked = 0  # bases unpacked in this process, which is a worker's when it counts


class Base:
    """Stands for a base: an array, and a count of how often it was unpacked."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __setstate__(self, state: dict[str, Any]) -> None:
        global unpacked
        unpacked += 1
        self.__dict__.update(state)


class Unreadable:
    """A base that no worker can unpack."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_refuse, ())


def _refuse() -> None:
    raise RuntimeError("half a base")


def complete(spec: TrialSpec, **measured: Any) -> TrialResult:
    return replace(
        TrialResult.of(spec, "complete"),
        objectives={"parameters": 100.0 - spec.number, "error": 0.1 * spec.number},
        **measured,
    )


def troubled(spec: TrialSpec, base: Base, device: str) -> TrialResult:
    """Trials 2 to 6 each fail in a way of their own; the others say who ran them, and with what."""
    if spec.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.number == 3:
        raise RuntimeError("the trial broke\nand said so at length")
    if spec.number == 4:
        return replace(complete(spec), objectives={"parameters": 5.0, "error": float("nan")})
    if spec.number == 5:
        return replace(complete(spec), objectives={"parameters": float("inf"), "error": 0.1})
    if spec.number == 6:
        return None  # type: ignore[return-value]
    rows = STATE_BYTES // 4 // 10
    state = {f"layer{i}": np.full((rows,), spec.number + i, np.float32) for i in range(10)}
    performance = {
        "worker": float(os.getpid()),
        "unpacked": float(unpacked),
        "sum": float(base.values.sum()),
    }
    return complete(spec, performance=performance, host=device, state=state)


def plain(spec: TrialSpec, base: None, device: str) -> TrialResult:
    return complete(spec)


def lost_once(spec: TrialSpec, base: Path, device: str) -> TrialResult:
    """Trials 1 and 2 kill their worker the first time; every attempt leaves a mark in `base`."""
    attempts = len(list(base.glob(f"{spec.number}-*")))
    (base / f"{spec.number}-{attempts}").touch()
    if spec.number in (1, 2) and attempts == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return complete(spec)


def slow_at_two(spec: TrialSpec, base: None, device: str) -> TrialResult:
    if spec.number == 2:
        time.sleep(3600)
    return complete(spec)


def unhurried(spec: TrialSpec, base: None, device: str) -> TrialResult:
    time.sleep(0.3)
    return complete(spec)


left_rungs = 0  # trials that were ended at a rung in this process, which is a worker's when it counts


def with_rungs(spec: TrialSpec, base: None, device: str, report: Report) -> TrialResult:
    """Reports three rungs, however it ends; trial 5 dies after its first."""
    global left_rungs
    said = replace(
        complete(spec, performance={"worker": float(os.getpid())}),
        status="stopped",
        objectives={},
        parameters=100,
    )
    try:
        for rung in range(1, 4):
            report(replace(said, rung_losses=tuple((10 * n, float(n)) for n in range(1, rung + 1))))
            if spec.number == 5:
                raise RuntimeError("not this one")
    except GreenletExit:
        left_rungs += 1
        raise
    return complete(spec, performance={"worker": float(os.getpid()), "left": float(left_rungs)})


@dataclass
class StopSome:
    """Early stopping that stops trials 2 and 3 at their first rung and 4 at its third."""

    asked: list[tuple[int, int]] = field(default_factory=list)
    learnt: list[int] = field(default_factory=list)

    def goes_on(self, report: TrialResult) -> bool:
        rung = len(report.rung_losses)
        self.asked.append((report.number, rung))
        if report.number == 6:
            raise RuntimeError("it cannot be ranked")
        return (report.number, rung) not in ((2, 1), (3, 1), (4, 3))

    def finish(self, result: TrialResult) -> None:
        self.learnt.append(result.number)


def endless_after_two(spec: TrialSpec, base: None, device: str) -> TrialResult:
    if spec.number >= 2:
        time.sleep(3600)
    return complete(spec)


@dataclass
class Journal:
    """A study, a store and an observer that write down what they are told, in one list."""

    entries: list[tuple[str, int]] = field(default_factory=list)
    results: list[TrialResult] = field(default_factory=list)

    def ask(self, number: int) -> Proposal:
        self.entries.append(("ask", number))
        plan = PruningPlan(coefficients={"l2": 1.0}, ratios={"encoder.0": number / 100})
        return Proposal(plan, f"origin {number}", {"passes": number})

    def tell(self, result: TrialResult) -> None:
        self.entries.append(("tell", result.number))

    def record(self, result: TrialResult) -> None:
        self.entries.append(("record", result.number))
        self.results.append(result)

    def observe(self, result: TrialResult) -> None:
        self.entries.append(("observe", result.number))

    def of(self, kind: str) -> list[int]:
        return [number for entry, number in self.entries if entry == kind]


def search(journal: Journal, numbers: range, run_trial: Any, base: Any = None, **options: Any) -> Any:
    settings = options.pop("settings", SETTINGS)
    return cluster.run_search(
        numbers,
        study=journal,
        make_spec=lambda number, proposal: TrialSpec.of(number, proposal, 1000 + number, settings),
        run_trial=run_trial,
        base=base,
        record=options.pop("record", journal.record),
        **options,
    )


@dataclass
class TroubledSearch:
    journal: Journal
    outcome: cluster.SearchOutcome
    scratch_bytes: int
    told_after_failure: list[int]

    def result(self, number: int) -> TrialResult:
        [result] = [result for result in self.journal.results if result.number == number]
        return result


@pytest.fixture(scope="module")
def troubled_search() -> TroubledSearch:
    journal = Journal()
    scratch: list[Path] = []
    sizes = [0]
    calls: list[int] = []

    class Scratch(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            scratch.append(Path(self.name))

    def weigh(result: TrialResult) -> None:
        journal.observe(result)
        sizes.append(sum(file.stat().st_size for file in scratch[0].rglob("*") if file.is_file()))

    def failing_observer(result: TrialResult) -> None:
        calls.append(result.number)
        raise RuntimeError("no more")

    before = (dict(os.environ), signal.getsignal(signal.SIGINT), logging.getLogger("ray").level)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", Scratch)
        outcome = search(
            journal,
            range(14),
            troubled,
            base=Base(np.arange(100_000.0)),
            observers=[failing_observer, weigh],
            concurrency=2,
        )
    after = (dict(os.environ), signal.getsignal(signal.SIGINT), logging.getLogger("ray").level)
    assert after == before
    assert not scratch[0].exists()
    return TroubledSearch(journal, outcome, max(sizes), calls)


def test_every_trial_is_recorded_then_told_then_observed_once(troubled_search: TroubledSearch) -> None:
    entries = troubled_search.journal.entries
    assert troubled_search.journal.of("ask") == list(range(14))
    for number in range(14):
        assert [kind for kind, n in entries if n == number] == ["ask", "record", "tell", "observe"]
    assert (troubled_search.outcome.complete, troubled_search.outcome.failed) == (9, 5)
    assert not troubled_search.outcome.interrupted


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (2, "the worker died: killed, out of memory, or crashed (the last of 3 times)"),
        (3, "RuntimeError: the trial broke"),
        (4, "objective 'error' is nan"),
        (5, "objective 'parameters' is inf"),
        (6, "the trial returned a NoneType instead of a TrialResult"),
    ],
)
def test_a_failure_has_its_reason_and_no_numbers(
    troubled_search: TroubledSearch, number: int, reason: str
) -> None:
    result = troubled_search.result(number)
    assert (result.status, result.reason) == ("failed", reason)
    assert result.objectives == {}
    assert result.state is None
    assert (result.origin, result.seed) == (f"origin {number}", 1000 + number)
    assert result.plan.ratios == {"encoder.0": number / 100}
    assert result.options == {"passes": number}


def test_results_arrive_whole(troubled_search: TroubledSearch) -> None:
    for number in (0, 1, *range(7, 14)):
        result = troubled_search.result(number)
        assert result.complete
        assert result.objectives == {"parameters": 100.0 - number, "error": 0.1 * number}
        assert result.performance["sum"] == np.arange(100_000.0).sum()
        assert result.host == "cpu"
        assert result.state is not None
        for i in range(10):
            array = result.state[f"layer{i}"]
            np.testing.assert_array_equal(array, np.float32(number + i))
            array[0] = 0  # its own memory, which outlives the cluster


def test_no_more_trials_at_once_than_allowed(troubled_search: TroubledSearch) -> None:
    assert troubled_search.outcome.concurrency == 2
    running = 0
    for kind, _ in troubled_search.journal.entries:
        running += {"ask": 1, "record": -1}.get(kind, 0)
        assert 0 <= running <= 2


def test_workers_are_reused_and_unpack_the_base_once(troubled_search: TroubledSearch) -> None:
    complete_ones = [result for result in troubled_search.journal.results if result.complete]
    workers = {result.performance["worker"] for result in complete_ones}
    assert len(workers) <= 5, "two workers, and three that replaced those that were killed"
    assert {result.performance["unpacked"] for result in complete_ones} == {1.0}


def test_pruned_states_stay_out_of_what_tune_stores(troubled_search: TroubledSearch) -> None:
    assert troubled_search.scratch_bytes < STATE_BYTES / 4


def test_an_observer_that_fails_is_dropped_and_the_others_stay(troubled_search: TroubledSearch) -> None:
    assert len(troubled_search.told_after_failure) == 1
    assert len(troubled_search.journal.of("observe")) == 14


def test_trials_are_stopped_at_rungs_and_their_workers_go_on(caplog: pytest.LogCaptureFixture) -> None:
    journal, stopping = Journal(), StopSome()
    outcome = search(
        journal,
        range(8),
        with_rungs,
        settings=replace(SETTINGS, rungs=(10, 20, 30)),
        early_stopping=stopping,
        concurrency=1,
    )
    assert [result.status for result in journal.results] == (
        ["complete"] * 2 + ["stopped"] * 3 + ["failed"] + ["complete"] * 2
    )
    assert (outcome.complete, outcome.stopped, outcome.failed) == (4, 3, 1)
    assert outcome.finished == 8
    assert not outcome.interrupted
    for number in range(8):
        steps = [kind for kind, n in journal.entries if n == number]
        assert steps == ["ask", "record", "tell"], "rungs are no results"
    reached = [3, 3, 1, 1, 3, 1, 3, 3]
    assert stopping.asked == [(n, rung) for n, last in enumerate(reached) for rung in range(1, last + 1)]
    assert stopping.learnt == list(range(8))
    for number, losses in ((2, 1), (3, 1), (4, 3)):
        result = journal.results[number]
        assert [updates for updates, _ in result.rung_losses] == [10, 20, 30][:losses]
        assert (result.objectives, result.state, result.reason) == ({}, None, None)
    assert journal.results[5].reason == "RuntimeError: not this one"
    assert "trial 6 could not be ranked, and goes on: RuntimeError: it cannot be ranked" in caplog.text
    workers = {result.performance["worker"] for result in journal.results if not result.failed}
    assert len(workers) == 1, "a stopped trial costs no worker"
    assert journal.results[7].performance["left"] == 3, "each was unwound before the next began"


def test_the_trial_that_comes_next_is_tunes_own_choice() -> None:
    class All:
        def __init__(self) -> None:
            self.trials: list[Any] = []

        def get_trials(self) -> list[Any]:
            return self.trials

    draw = random.Random(0)
    everything, ours, tunes = All(), cluster._Scheduler(cast("driver.Driver", None)), FIFOScheduler()
    chosen = 0
    for _ in range(400):
        if draw.random() < 0.3:
            trial = SimpleNamespace(status=Trial.PENDING)
            everything.trials.append(trial)
            ours.on_trial_add(everything, cast("Trial", trial))
        for trial in everything.trials:
            if trial.status not in (Trial.TERMINATED, Trial.ERROR) and draw.random() < 0.2:
                trial.status = draw.choice(
                    [Trial.PENDING, Trial.RUNNING, Trial.RUNNING, Trial.PAUSED, Trial.TERMINATED, Trial.ERROR]
                )
        expected = tunes.choose_trial_to_run(everything)
        assert ours.choose_trial_to_run(everything) is expected
        chosen += expected is not None
    assert 50 < chosen < 400


def test_no_rungs_are_reported_without_early_stopping() -> None:
    journal = Journal()
    settings = replace(SETTINGS, rungs=(10,))
    outcome = search(journal, range(3), with_rungs, settings=settings, concurrency=1)
    assert (outcome.complete, outcome.stopped, outcome.failed) == (3, 0, 0)


def test_ctrl_c_keeps_what_is_finished_and_waits_for_nothing() -> None:
    journal = Journal()

    def press(result: TrialResult) -> None:
        if result.number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = search(journal, range(6), endless_after_two, observers=[press], concurrency=1)
    assert outcome.interrupted
    assert [result.number for result in journal.results] == [0, 1]


def test_ctrl_c_after_the_last_trial_is_not_forgotten() -> None:
    class Interrupted(Journal):
        def record(self, result: TrialResult) -> None:
            super().record(result)
            if len(self.results) == 3:
                os.kill(os.getpid(), signal.SIGINT)

    outcome = search(Interrupted(), range(3), unhurried, concurrency=1)
    assert (outcome.complete, outcome.interrupted, outcome.out_of_time) == (3, True, False)


def test_sigterm_is_heeded_like_ctrl_c() -> None:
    journal = Journal()

    def end(result: TrialResult) -> None:
        if result.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    outcome = search(journal, range(6), endless_after_two, observers=[end], concurrency=1)
    assert outcome.interrupted
    assert [result.number for result in journal.results] == [0, 1]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_trial_whose_worker_was_lost_runs_again_unchanged(tmp_path: Path) -> None:
    journal = Journal()
    outcome = search(journal, range(5), lost_once, base=tmp_path, concurrency=2)
    assert (outcome.complete, outcome.failed, outcome.repeated) == (5, 0, 2)
    assert sorted(journal.of("ask")) == list(range(5)), "a trial that runs again is not asked for again"
    assert sorted(journal.of("record")) == list(range(5))
    attempts = {number: len(list(tmp_path.glob(f"{number}-*"))) for number in range(5)}
    assert attempts == {0: 1, 1: 2, 2: 2, 3: 1, 4: 1}
    assert {result.seed for result in journal.results} == {1000, 1001, 1002, 1003, 1004}


def test_the_last_trial_may_be_lost_too(tmp_path: Path) -> None:
    journal = Journal()
    outcome = search(journal, range(2), lost_once, base=tmp_path, concurrency=2)
    assert (outcome.complete, outcome.failed, outcome.repeated) == (2, 0, 1)
    assert not outcome.out_of_time


def test_without_retries_a_lost_trial_has_failed(tmp_path: Path) -> None:
    journal = Journal()
    outcome = search(journal, range(3), lost_once, base=tmp_path, concurrency=1, retries=0)
    assert (outcome.complete, outcome.failed, outcome.repeated) == (1, 2, 0)
    reasons = {result.number: result.reason for result in journal.results}
    assert reasons == {0: None, 1: reasons[2], 2: "the worker died: killed, out of memory, or crashed"}


def test_a_trial_that_takes_too_long_has_failed_and_the_search_goes_on() -> None:
    journal = Journal()
    outcome = search(journal, range(5), slow_at_two, concurrency=1, trial_timeout=2.0)
    assert (outcome.complete, outcome.failed, outcome.repeated) == (4, 1, 0)
    reasons = {result.number: result.reason for result in journal.results if not result.complete}
    assert reasons == {2: "it ran for longer than trial_timeout, 2 s"}


def test_when_the_time_is_up_no_further_trial_begins() -> None:
    journal = Journal()
    outcome = search(journal, range(200), unhurried, concurrency=1, seconds=2)
    assert outcome.out_of_time
    assert not outcome.interrupted
    assert 1 <= len(journal.results) <= 8, "0.3 seconds each"
    assert journal.of("ask") == journal.of("record"), "what had begun was waited for"


def test_a_local_cluster_that_is_lost_is_started_again() -> None:
    script = Path(__file__).with_name("lost_raylet.py")
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["complete"], told["failed"]) == (8, 0)
    assert 1 <= told["repeated"] <= 2
    assert sorted(told["asked"]) == sorted(told["recorded"]) == list(range(8))


def test_one_at_a_time_builds_on_all_before_until_a_result_cannot_be_stored() -> None:
    journal = Journal()

    def record(result: TrialResult) -> None:
        if result.number == 9:
            raise OSError("disk full")
        journal.record(result)

    with pytest.raises(OSError, match="disk full"):
        search(journal, range(3, 50), plain, record=record, concurrency=1)
    steps = [(kind, number) for number in range(3, 9) for kind in ("ask", "record", "tell")]
    assert journal.entries == [*steps, ("ask", 9)]


def test_workers_that_cannot_start_end_the_search_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "STILLBORN_LIMIT", 2)
    monkeypatch.setattr(driver, "STILLBORN_SECONDS", 0.0)
    journal = Journal()
    with pytest.raises(UserError, match=r"no worker can run trials: the worker could not start: .*half"):
        search(journal, range(50), plain, base=Unreadable(), concurrency=1)
    assert journal.results == [], "the trials are not to blame, and run when workers start again"


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("ray://head:10001", "'ray://head:10001' is a Ray Client address; start the search on a machine of"),
        ("127.0.0.1:9", r"no Ray cluster answers at address '127.0.0.1:9' \(ConnectionRefusedError"),
        ("127.0.0.1:99999", "no Ray cluster answers at address '127.0.0.1:99999'"),
        ("head", "address 'head' is neither 'auto' nor of the form 'host:port'"),
    ],
)
def test_an_address_where_no_cluster_answers_is_named(address: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        search(Journal(), range(2), plain, address=address)


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "least", "expected"),
    [
        ([{"CPU": 8.0}], 1, 0, 0, (8, 0)),
        ([{"CPU": 8.0}], 3, 0, 0.5, (2, 0)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], 2, None, 0.5, (6, 0.0)),
        ([{"CPU": 16.0, "GPU": 2.0}], 1, None, 0, (16, 1 / 8)),
        ([{"CPU": 16.0, "GPU": 2.0}], 1, None, 1 / 16, (16, 1 / 8)),
        ([{"CPU": 16.0, "GPU": 2.0}], 1, None, 1 / 3, (6, 1 / 3)),
        ([{"CPU": 4.0, "GPU": 8.0}], 1, None, 0, (4, 1.0)),
        ([{"CPU": 16.0, "GPU": 1.0}, {"CPU": 2.0}], 1, 0.5, 1.0, (2, 0.5)),
    ],
)
def test_trials_per_cluster(
    monkeypatch: pytest.MonkeyPatch, nodes: Any, cpus: Any, gpus: Any, least: Any, expected: Any
) -> None:
    reported = [{"Alive": True, "Resources": node} for node in nodes]
    reported.append({"Alive": False, "Resources": {"CPU": 64.0}})
    monkeypatch.setattr(ray_connection.ray, "nodes", lambda: reported)
    assert ray_connection.slots_of(cpus, gpus, least) == expected


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (3, 3), (0.5, 1), (2.5, 2)])
def test_torch_gets_as_many_threads_as_a_trial_has_cpus(cpus: float, threads: int) -> None:
    worker = object.__new__(cluster._Worker)  # without Ray around it
    spec = TrialSpec.of(0, Proposal(PruningPlan({"l2": 1.0}, {}), "here"), 0, SETTINGS)
    torch.set_num_threads(4)
    worker.setup({"spec": cluster._Parcel(spec)}, None, plain, cpus, 0)
    assert torch.get_num_threads() == threads


def test_a_full_disk_of_rays_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray_connection.ray, "init", full)
    with pytest.raises(UserError, match=r"^Ray cannot start: No space left on device: /tmp/ray, or wher"):
        search(Journal(), range(1), unhurried)


def test_a_trial_larger_than_every_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
    ]
    monkeypatch.setattr(ray_connection.ray, "nodes", lambda: nodes)
    with pytest.raises(
        UserError, match=r"needs 8 CPUs and 0 GPUs, but the largest node .* 4 CPUs and 1 GPUs"
    ):
        ray_connection.slots_of(8, 0)


@pytest.mark.parametrize(
    ("account", "reason"),
    [
        ("ActorDiedError: The actor died because its node has died. Node Id: 1f", "lost with its machine"),
        ("1 worker(s) were killed due to the node running low on memory.", "ran out of memory"),
        ("", "the worker was lost: Ray gave no reason"),
        ("TuneError: setting up\nValueError: no", "the worker was lost: ValueError: no"),
    ],
)
def test_what_is_said_of_a_lost_worker(account: str, reason: str) -> None:
    assert reason in driver._reason_of_loss(account)
