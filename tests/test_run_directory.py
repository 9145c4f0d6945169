"""The study directory: what is on disk after a crash, and what is said about damage."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from components import UserError
from components.plan import PruningPlan
from search.durable_files import (
    CorruptFileError,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
    write_text,
)
from search.run_directory import RunDirectory
from search.trial_types import Proposal, TrialResult, trial_seed


def result(number: int = 0, **changes: object) -> TrialResult:
    complete = TrialResult(
        number=number,
        status="complete",
        plan=PruningPlan({"l2": 0.1 + 0.2, "fisher": 0.7}, {"encoder.0": 1 / 3, "latent": 0.0}),
        origin="tpe",
        seed=trial_seed(0, number),
        objectives={"parameters": 100.0, "reconstruction_error": 0.1 + 0.2},
        parameters=100,
        size_ratio=1 / 3,
        macs=90,
        retention=2 / 3,
        performance={"reconstruction_error": 0.1 + 0.2},
        base_performance={"validation": 0.1, "test": 0.2},
        component_sizes={"encoder": 60, "decoder": 40},
        widths={"encoder.0": 2, "latent": 1},
        kept={"encoder.0": (0, 5), "latent": (0,)},
        rungs=((10, 0.5), (20, 0.25)),
        timings={"mix": 1e-3},
        device="cpu",
        host="here",
        started="2026-01-01T00:00:00.000+00:00",
        finished="2026-01-01T00:00:01.000+00:00",
    )
    return dataclasses.replace(complete, **changes)  # type: ignore[arg-type]


PROPOSAL = Proposal(
    PruningPlan({"encoder": {"l2": 0.1 + 0.2}, "coupling": {"l2": 1.0}}, {"latent": 1 / 3}),
    "tpe",
    {"samples": 64},
    {"keep/latent": 2 / 3, "mix/l2": 0.1 + 0.2},
)


MENDED = "{}: its last line was damaged by a crash and has been moved to trials.jsonl.damaged"


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "runs" / "mine", "name: mine\n")


def test_create_makes_parents_and_stores_the_experiment(run):
    assert run.experiment.read_text() == "name: mine\n"
    assert RunDirectory.open(run.path).path == run.path


def test_create_refuses_a_path_that_exists_and_touches_nothing(run):
    (run.path / "precious").write_text("x")
    with pytest.raises(UserError, match=r"mine exists and is not overwritten"):
        RunDirectory.create(run.path, "name: other\n")
    assert run.experiment.read_text() == "name: mine\n"
    assert (run.path / "precious").read_text() == "x"
    file = run.path / "precious"
    with pytest.raises(UserError, match="exists and is not overwritten"):
        RunDirectory.create(file, "")


def test_open_refuses_what_is_no_run_directory(tmp_path):
    with pytest.raises(UserError, match="there is no run directory"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run directory: it has no experiment\.yaml"):
        RunDirectory.open(tmp_path)


def test_trials_come_back_exactly_and_in_order_without_their_states(run):
    stored = [
        result(3, state={"w": np.ones(3)}),
        result(0),
        result(
            1, status="failed", reason="slice: ValueError: a sentence with “quotes”\u2028", retention=None
        ),
        result(2, plan=PruningPlan({"encoder": {"l2": 1.0}, "coupling": {"l2": 0.5}}, {})),
    ]
    for entry in stored:
        run.append_trial(entry)
    assert run.read_trials() == [dataclasses.replace(entry, state=None) for entry in stored]
    assert len(run.trials.read_bytes().splitlines()) == 4


def test_a_study_without_trials_is_empty(run):
    assert run.read_trials() == []
    run.trials.write_bytes(b"")
    assert run.read_trials() == []


def test_a_last_line_cut_anywhere_is_left_out_with_a_warning(run):
    run.append_trial(result(0))
    whole = len(run.trials.read_bytes())
    run.append_trial(result(1))
    content = run.trials.read_bytes()
    for cut in range(whole + 1, len(content) - 1, 37):
        run.trials.write_bytes(content[:cut])
        with pytest.warns(UserWarning, match="line 2: the last line is damaged"):
            assert run.read_trials() == [result(0)]
    # A whole record that only lacks its newline is a record.
    run.trials.write_bytes(content[:-1])
    assert run.read_trials() == [result(0), result(1)]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"trial": 1',
        b"\x00\xff\xfe",
        b"",
        b"[]",
        b"17",
        json.dumps({**result(1).to_record(), "status": "perhaps"}).encode(),
        json.dumps({k: v for k, v in result(1).to_record().items() if k != "ratios"}).encode(),
        json.dumps({**result(1).to_record(), "ratios": {"latent": 2.0}}).encode(),
        json.dumps({**result(1).to_record(), "kept": {"latent": 3}}).encode(),
        json.dumps(result(1).to_record()).replace("0.5", "NaN").encode(),
        b"[" * 100_000,
    ],
)
def test_a_corrupt_line_in_the_middle_is_named(run, damage):
    for number in range(3):
        run.append_trial(result(number))
    lines = run.trials.read_bytes().split(b"\n")
    lines[1] = damage
    run.trials.write_bytes(b"\n".join(lines))
    before = run.trials.read_bytes()
    with pytest.raises(CorruptFileError, match=r"trials\.jsonl, line 2 is corrupt") as caught:
        run.read_trials()
    assert "\n" not in str(caught.value)
    assert run.trials.read_bytes() == before


def test_a_trial_that_is_there_twice_is_refused(run):
    run.append_trial(result(5))
    run.append_trial(result(5))
    with pytest.raises(CorruptFileError, match="line 2: trial 5 is there twice"):
        run.read_trials()


def test_a_non_finite_number_is_never_written(run):
    run.append_trial(result(0))
    before = run.trials.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append_trial(result(1, retention=float("nan")))
    assert run.trials.read_bytes() == before


def test_every_line_is_synced_before_append_returns(run, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run.append_trial(result(0))
    assert synced == [str(run.trials), str(run.path)]
    run.append_trial(result(1))
    assert synced[2:] == [str(run.trials)]


def test_a_file_that_does_not_fit_on_the_disk_is_named(run, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left .*/\.front\.json\.") as raised:
        run.write_front({})
    assert Path(raised.value.filename).parent == run.path


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_trace(run, monkeypatch):
    run.append_trial(result(0))
    before = run.trials.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run.append_trial(result(1))
    assert run.trials.read_bytes() == before
    run.append_trial(result(1))
    assert run.read_trials() == [result(0), result(1)]


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_that_a_crash_cut_off_is_removed_and_what_follows_is_whole(run, cut):
    run.append_trial(result(0))
    run.append_trial(result(1))
    run.append_proposal(2, PROPOSAL)
    for path in (run.trials, run.proposals):
        path.write_bytes(path.read_bytes()[:-cut])
    lost = run.trials.read_bytes().split(b"\n")[1]
    assert run.mend() == [MENDED.format(run.trials)]
    assert run.mend() == []
    assert run.path.joinpath("trials.jsonl.damaged").read_bytes() == lost + b"\n"
    run.append_trial(result(1))
    run.append_proposal(2, PROPOSAL)
    assert run.read_trials() == [result(0), result(1)]
    assert run.read_proposals() == {2: PROPOSAL}


@pytest.mark.parametrize("lost", [slice(0, 40), slice(5, -1), slice(100, 300)])
def test_a_last_line_whose_beginning_a_power_failure_lost_is_put_aside(run, lost):
    """Blocks of a file reach the disk in any order."""
    run.append_trial(result(0))
    first = run.trials.read_bytes()
    run.append_trial(result(1))
    line = bytearray(run.trials.read_bytes()[len(first) :])
    line[lost] = bytes(len(line[lost]))
    run.trials.write_bytes(first + line)
    with pytest.warns(UserWarning, match="line 2: the last line is damaged"):
        assert run.read_trials() == [result(0)]
    assert run.mend() == [MENDED.format(run.trials)]
    assert run.trials.read_bytes() == first
    run.append_trial(result(1))
    assert run.read_trials() == [result(0), result(1)]


def test_a_damaged_line_that_is_not_the_last_is_no_business_of_a_crash(run):
    run.append_trial(result(0))
    run.trials.write_bytes(bytes(30) + run.trials.read_bytes()[30:])
    run.append_trial(result(1))
    assert run.mend() == []
    with pytest.raises(CorruptFileError, match="line 1 is corrupt"):
        run.read_trials()


def test_a_reason_with_bytes_of_no_text_is_stored(run):
    reason = "no file named " + os.fsdecode(b"\xff\xfe")
    stored = dataclasses.replace(result(0), status="failed", reason=reason)
    run.append_trial(stored)
    assert run.read_trials() == [stored]


def test_proposals_read_back_equal_and_the_last_one_counts(run):
    assert run.read_proposals() == {}
    run.append_proposal(3, dataclasses.replace(PROPOSAL, origin="earlier"))
    run.append_proposal(4, PROPOSAL)
    run.append_proposal(3, PROPOSAL)
    assert run.read_proposals() == {3: PROPOSAL, 4: PROPOSAL}


def test_one_process_at_a_time_writes(run):
    with pytest.raises(UserError, match=rf"mine is in use by another search \(process {os.getpid()} on "):
        RunDirectory.open(run.path).claim()
    run.claim()  # its own already
    run.release()
    other = RunDirectory.open(run.path)
    other.claim()
    with pytest.raises(UserError, match="is in use by another search"):
        run.claim()
    other.release()


def test_a_claim_ends_with_its_process(run):
    run.release()
    code = (
        "import os, pathlib, signal, sys; from search.run_directory import RunDirectory; "
        "run = RunDirectory(pathlib.Path(sys.argv[1])); run.claim(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert killed.returncode == -9
    run.claim()


def test_the_front_is_replaced_as_a_whole(run, monkeypatch):
    run.write_front({"trials": [1]})

    def full(source, destination):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            run.write_front({"trials": [2]})
    assert run.read_front() == {"trials": [1]}
    assert sorted(entry.name for entry in run.path.iterdir()) == [
        "experiment.yaml",
        "front.json",
        "identity",
        "lock",
    ]


def test_a_directory_without_a_front_says_so(run):
    with pytest.raises(UserError, match="has no front yet"):
        run.read_front()


def test_bundles_of_other_trials_are_removed(run):
    for number in (1, 2, 3):
        run.bundle(number).mkdir(parents=True)
    (run.models / "notes").mkdir()
    run.remove_bundles_but([2, 7])
    assert run.bundles() == {2}
    assert (run.models / "notes").is_dir()


def test_json_and_arrays_come_back_and_damage_is_named(tmp_path):
    path, arrays = tmp_path / "a.json", tmp_path / "a.safetensors"
    write_json(path, {"x": 0.1 + 0.2, "é": [1]})
    assert read_json(path) == {"x": 0.1 + 0.2, "é": [1]}
    values = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3).T, "n": np.array(3, dtype=np.int64)}
    write_arrays(arrays, values)
    back = read_arrays(arrays)
    for name, value in values.items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].dtype == value.dtype
        assert back[name].flags.writeable
    content = arrays.read_bytes()
    for cut in range(0, len(content), 11):
        arrays.write_bytes(content[:cut])
        with pytest.raises(CorruptFileError, match=r"a\.safetensors is corrupt"):
            read_arrays(arrays)
    for text in ("", "{", "[1]", '{"x": NaN}', "\x00"):
        write_text(path, text)
        with pytest.raises(CorruptFileError, match=r"a\.json is corrupt"):
            read_json(path)
    with pytest.raises(CorruptFileError, match="is missing"):
        read_json(tmp_path / "b.json")
    with pytest.raises(CorruptFileError, match="is missing"):
        read_arrays(tmp_path / "b.safetensors")
