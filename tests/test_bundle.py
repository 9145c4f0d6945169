"""Bundles: stored whole, loaded exactly, verified bit for bit, and refused when anything was altered."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_agents
from safetensors.numpy import load_file, save_file

from components import UserError
from components.plan import PruningPlan
from search import verification
from search.base import train_base
from search.bundle import FILES, add_test_measurements, copy_bundle, load_bundle, save_bundle
from search.durable_files import CorruptFileError
from search.front import Remeasured
from search.prepared_base import prepare
from search.trial import TrialSettings, TrialSpec, run_trial
from search.verification import verify_bundle

ALL = (*FILES, "metrics.json")
PLAN = PruningPlan({"l2": 0.25, "fisher": 0.75}, {"encoder.0": 0.5, "latent": 0.4, "decoder.0": 0.75})


@pytest.fixture(scope="module")
def dense():
    return prepare(train_base("toy_agents:Toy", {}, seed=0, metrics=("l2", "fisher")))


@pytest.fixture(scope="module")
def result(dense):
    settings = TrialSettings(("l2", "fisher"), ("parameters", "reconstruction_error"), fine_tune_updates=20)
    return run_trial(TrialSpec(7, PLAN, "tpe", 11, settings), dense.base)


@pytest.fixture(scope="module")
def stored(dense, result, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "models" / "7"
    save_bundle(directory, dense, result)
    return directory


@pytest.fixture
def copy(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "bundle"))


def read(directory: Path, name: str) -> dict:
    return json.loads((directory / name).read_text())


def rewrite(directory: Path, name: str, content: bytes) -> None:
    """Change a file and its digest: what a careful forger would do."""
    (directory / name).write_bytes(content)
    metrics = read(directory, "metrics.json")
    if name != "metrics.json":
        metrics["sha256"][name] = hashlib.sha256(content).hexdigest()
        (directory / "metrics.json").write_text(json.dumps(metrics))


def test_a_bundle_has_the_documented_files(stored, result, dense):
    assert sorted(entry.name for entry in stored.iterdir()) == sorted(ALL)
    assert [entry.name for entry in stored.parent.iterdir()] == ["7"]
    architecture, plan, metrics = (
        read(stored, f"{name}.json") for name in ("architecture", "plan", "metrics")
    )
    assert architecture["agent"] == "toy_agents:Toy"
    assert architecture["widths"] == {"encoder.0": 6, "latent": 3, "decoder.0": 3}
    assert architecture["options"] == dense.base.options
    assert plan["coefficients"] == {"l2": 0.25, "fisher": 0.75}
    assert plan["ratios"] == PLAN.ratios
    assert {group: tuple(kept) for group, kept in plan["kept"].items()} == result.kept
    assert metrics["retention"] == result.retention
    assert metrics["seeds"] == {"trial": 11, "base": 0}
    assert metrics["environment"]["torch"] == torch.__version__
    assert metrics["measured"]["device"] == "cpu"
    assert read(stored, "contract.json")["inputs"][0]["shape"] == [toy_agents.INPUTS]


def test_a_bundle_acts_with_the_options_of_its_trial(tmp_path):
    dense = prepare(train_base("toy_agents:Repeating", {}, seed=0, metrics=("l2", "fisher")))
    settings = TrialSettings(("l2", "fisher"), ("parameters", "reconstruction_error"), fine_tune_updates=5)
    result = run_trial(TrialSpec(7, PLAN, "tpe", 11, settings, {"passes": 3}), dense.base)
    save_bundle(tmp_path / "7", dense, result)
    assert read(tmp_path / "7", "architecture.json")["options"] == {**dense.base.options, "passes": 3}
    bundle = load_bundle(tmp_path / "7")
    once, values = toy_agents.Toy({}, result.widths), bundle.inputs
    once.load_states({"model": {name: torch.tensor(array) for name, array in result.state.items()}})
    for _ in range(3):
        values = once.act(values)
    torch.testing.assert_close(bundle.outputs, values)
    report = verify_bundle(tmp_path / "7")
    assert report.identical
    measured = {row.name: (row.stored, row.now) for row in report.measurements}
    for name in ("validation reconstruction_error", "validation retention", "macs"):
        assert measured[name][0] == measured[name][1]
    assert read(tmp_path / "7", "metrics.json")["repaired_by"] == result.repaired_by


def test_a_loaded_bundle_acts_as_the_trial_did(stored, result):
    bundle = load_bundle(stored)
    for name, tensor in bundle.agent.states()["model"].items():
        np.testing.assert_array_equal(tensor.numpy(), result.state[name])
    inputs = torch.linspace(-1, 1, 4 * toy_agents.INPUTS).reshape(4, -1)
    state = {name: torch.tensor(array) for name, array in result.state.items()}

    def linear(values, name):
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    latent = linear(linear(inputs, "encoder.0").relu(), "encoder.2")
    expected = linear(linear(latent, "decoder.0").relu(), "decoder.2")
    torch.testing.assert_close(bundle.agent.act(inputs).detach(), expected)
    assert torch.equal(bundle.inputs, bundle.agent.data()["test"][:16])


def test_loading_does_not_load_the_data(stored, monkeypatch):
    def refuse(self):
        raise AssertionError("the data was asked for")

    monkeypatch.setattr(toy_agents.Toy, "data", refuse)
    assert load_bundle(stored).agent.act(torch.zeros(1, toy_agents.INPUTS)).shape == (1, toy_agents.INPUTS)


def test_verification_reproduces_outputs_and_measurements(copy, result, dense):
    add_test_measurements(
        copy, "reconstruction_error", Remeasured(0.1, 0.9, {"latency_p99_ms": 3.0}, "there")
    )
    report = verify_bundle(copy)
    assert report.identical
    assert report.passed
    assert report.difference == 0.0
    assert report.changes == ()
    assert report.not_measured is None
    assert report.rows == 16
    rows = {row.name: (row.stored, row.now) for row in report.measurements}
    assert rows["parameters"] == (result.parameters, result.parameters)
    assert rows["macs"] == (result.macs, result.macs)
    assert rows["validation reconstruction_error"][0] == rows["validation reconstruction_error"][1]
    assert rows["validation retention"] == (result.retention, result.retention)
    assert rows["test reconstruction_error"][0] == 0.1
    assert rows["test retention"][1] == pytest.approx(
        dense.base.retention(rows["test reconstruction_error"][1], "test"), rel=1e-12
    )
    assert rows["latency_p99_ms"][0] == 3.0
    assert rows["latency_p99_ms"][1] > 0


def test_verification_in_a_fresh_process(copy):
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, "-m", "search.cli", "verify", str(copy)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the outputs for 16 stored inputs are the same, bit for bit" in done.stdout
    weights = load_file(copy / "model.safetensors")
    weights["decoder.2.bias"][0] += 1e-3
    save_file(weights, copy / "model.safetensors")
    rewrite(copy, "model.safetensors", (copy / "model.safetensors").read_bytes())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"prunefront: {copy}: the outputs differ from the stored ones by up to")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ALL)
def test_a_truncated_or_missing_file_is_named(copy, name):
    path = copy / name
    content = path.read_bytes()
    for cut in sorted({0, 1, 8, 9, len(content) // 2, len(content) - 3}):
        path.write_bytes(content[:cut])
        with pytest.raises(CorruptFileError, match=name.replace(".", r"\.")) as caught:
            load_bundle(copy)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CorruptFileError, match=rf"{name} is missing"):
        load_bundle(copy)


@pytest.mark.parametrize("name", FILES)
def test_any_altered_byte_is_noticed(copy, name):
    path = copy / name
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), max(1, len(content) // 23)):
        altered = bytearray(content)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises(CorruptFileError, match=rf"{name} is corrupt: it is not the file that was stored"):
            load_bundle(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "verification.safetensors"])
def test_files_truncated_by_somebody_who_fixed_the_digest_are_still_refused(copy, name):
    content = (copy / name).read_bytes()
    for cut in (0, 9, len(content) // 2, len(content) - 1):
        rewrite(copy, name, content[:cut])
        with pytest.raises(CorruptFileError, match=rf"{name} is corrupt"):
            load_bundle(copy)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("architecture.json", {"widths": None}, "'widths' is None"),
        ("architecture.json", {"widths": {"encoder.0": 6, "latent": 0, "decoder.0": 3}}, "latent is 0"),
        ("architecture.json", {"widths": {"encoder.0": 6, "latent": "3"}}, "'latent' is '3'"),
        (
            "architecture.json",
            {"widths": {"encoder.0": 6}},
            "does not describe an agent: the toy has the widths",
        ),
        ("architecture.json", {"widths": {"encoder.0": 5, "latent": 3, "decoder.0": 3}}, "has shape"),
        ("architecture.json", {"options": {"hiden": 3}}, "did you mean 'hidden'"),
        ("architecture.json", {"options": 7}, "'options' is 7"),
        ("metrics.json", {"format": 99}, "has format 99; this version reads 1"),
        ("metrics.json", {"sha256": {}}, "it has no 'architecture.json'"),
        ("metrics.json", {"threads": "many"}, "'threads' is 'many'"),
        ("metrics.json", {"environment": None}, "'environment' is None"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_sentence(copy, name, change, sentence):
    rewrite(copy, name, json.dumps({**read(copy, name), **change}).encode())
    with pytest.raises(CorruptFileError, match=sentence) as caught:
        load_bundle(copy)
    assert name.split(".")[0] in str(caught.value) or "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no bundle"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a bundle"):
        load_bundle(tmp_path)


def test_an_agent_that_is_not_here_is_named(copy):
    rewrite(
        copy,
        "architecture.json",
        json.dumps({**read(copy, "architecture.json"), "agent": "gone:Away"}).encode(),
    )
    with pytest.raises(UserError, match="there is no module 'gone'"):
        load_bundle(copy)


def test_other_bits_on_another_machine_are_explained_and_here_they_fail(copy):
    verification_arrays = load_file(copy / "verification.safetensors")
    verification_arrays["outputs"] = np.nextafter(verification_arrays["outputs"], np.float32(9))
    save_file(verification_arrays, copy / "verification.safetensors")
    rewrite(copy, "verification.safetensors", (copy / "verification.safetensors").read_bytes())
    report = verify_bundle(copy)
    assert not report.identical
    assert 0 < report.difference < 1e-6
    assert not report.passed
    metrics = read(copy, "metrics.json")
    metrics["environment"]["torch"] = "2.0.0"
    (copy / "metrics.json").write_text(json.dumps(metrics))
    report = verify_bundle(copy)
    assert report.passed
    assert report.changes == (f"torch 2.0.0 -> {torch.__version__}",)
    verification_arrays["outputs"][0, 0] = np.nan
    save_file(verification_arrays, copy / "verification.safetensors")
    rewrite(copy, "verification.safetensors", (copy / "verification.safetensors").read_bytes())
    assert not verify_bundle(copy).passed


def test_outputs_are_verified_where_the_data_is_out_of_reach(copy, monkeypatch):
    def offline(agent, split):
        raise UserError("the data set cannot be downloaded")

    monkeypatch.setattr(verification, "performance_of", offline)
    report = verify_bundle(copy)
    assert report.passed
    assert report.not_measured == "the data set cannot be downloaded"
    assert [row.name for row in report.measurements] == ["parameters"]


def test_a_bundle_is_stored_whole_or_not_at_all(dense, result, tmp_path, monkeypatch):
    directory = tmp_path / "models" / "1"
    save_bundle(directory, dense, result)
    before = {entry.name: entry.read_bytes() for entry in directory.iterdir()}

    def fail(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(toy_agents.Toy, "contract", fail)
        with pytest.raises(OSError, match="No space left"):
            save_bundle(directory, dense, result)
        with pytest.raises(OSError, match="No space left"):
            save_bundle(tmp_path / "models" / "2", dense, result)
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["1"]
    assert {entry.name: entry.read_bytes() for entry in directory.iterdir()} == before
    save_bundle(directory, dense, result)
    assert {entry.name: entry.read_bytes() for entry in directory.iterdir()} == before


def test_copies_go_to_new_or_empty_directories_only(stored, tmp_path):
    for destination in (tmp_path / "deep" / "new", tmp_path / "empty"):
        if destination.name == "empty":
            destination.mkdir()
        copy_bundle(stored, destination)
        assert {p.name: p.read_bytes() for p in destination.iterdir()} == {
            p.name: p.read_bytes() for p in stored.iterdir()
        }
        with pytest.raises(UserError, match="exists and is not overwritten"):
            copy_bundle(stored, destination)
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        copy_bundle(stored, file)
    assert file.read_text() == "precious"


def test_a_corrupt_bundle_is_not_copied(copy, tmp_path):
    (copy / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is corrupt"):
        copy_bundle(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_pickled(stored):
    for entry in stored.iterdir():
        assert entry.suffix in (".json", ".safetensors")
        if entry.suffix == ".json":
            json.loads(entry.read_text())
        else:
            load_file(entry)
