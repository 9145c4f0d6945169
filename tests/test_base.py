"""The base: trained the same way every time, stored and read back exactly, damage named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from components import UserError
from search.base import Base, train_base, untrained_base
from search.base_files import load_base, save_base
from search.durable_files import CorruptFileError
from search.prepared_base import prepare

KIND = "toy_agents:Toy"
METRICS = ("l2", "fisher", "reconstruction", "random")
FILES = (
    "widths.json",
    "model.safetensors",
    "importance.safetensors",
    "calibration.safetensors",
    "data.safetensors",
    "metrics.json",
)


@pytest.fixture(scope="module")
def base() -> Base:
    return train_base(KIND, {}, seed=0, metrics=METRICS, reconstruction="gram")


@pytest.fixture(scope="module")
def stored(base, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "base"
    save_base(base, directory)
    return directory


@pytest.fixture
def copy(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "base"))


def assert_same(first: Base, second: Base) -> None:
    for name in ("kind", "options", "widths", "seed", "parameters", "macs", "performance", "trivial"):
        assert getattr(first, name) == getattr(second, name), name
    for name in ("history", "calibration", "grams", "data"):
        assert_same_arrays(getattr(first, name), getattr(second, name))
    for name in ("states", "scores"):
        one, two = getattr(first, name), getattr(second, name)
        assert set(one) == set(two)
        for key in one:
            assert_same_arrays(one[key], two[key])


def assert_same_arrays(first, second) -> None:
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype


def test_a_base_has_what_its_name_says(base):
    assert base.trained
    assert base.widths == {"encoder.0": 12, "latent": 5, "decoder.0": 12}
    assert set(base.scores) == set(METRICS)
    for scores in base.scores.values():
        assert {group: array.shape for group, array in scores.items()} == {
            group: (width,) for group, width in base.widths.items()
        }
    assert set(base.states) == {"model", "adam_mean", "adam_square"}
    assert base.parameters == sum(array.size for array in base.states["model"].values())
    assert base.performance["validation"] < base.trivial["validation"]
    assert {"train", "validation", "test"} == set(base.data)
    assert base.history["steps"][-1] <= base.options["updates"]


def test_training_is_reproducible_and_follows_its_seed(base):
    torch.manual_seed(99)
    assert_same(base, train_base(KIND, {}, seed=0, metrics=METRICS, reconstruction="gram"))
    other = train_base(KIND, {}, seed=1, metrics=METRICS)
    assert other.performance != base.performance


def test_progress_is_told():
    seen = []
    train_base(
        KIND,
        {"updates": 30},
        seed=0,
        metrics=("l2",),
        progress=lambda done, total, note: seen.append((done, total)),
    )
    assert seen[-1] == (30, 30)


def test_data_and_calibration_inputs_are_those_after_training(tmp_path):
    gathered = train_base("toy_agents:Gathering", {}, seed=1, metrics=METRICS, reconstruction="gram")
    plain = train_base(KIND, {}, seed=1, metrics=("l2",))
    assert_same_arrays(gathered.states["model"], plain.states["model"])
    assert_same_arrays(gathered.data, {**plain.data, "gathered": plain.data["train"] + np.float32(1)})
    np.testing.assert_array_equal(gathered.calibration["observations"], gathered.data["gathered"])
    save_base(gathered, tmp_path)
    assert_same(gathered, load_base(tmp_path))
    assert set(prepare(gathered).agent.data()) == set(gathered.data)


def test_reconstruction_runs_the_program_for_calibration():
    """Rolled out, every layer would be called twice; with one step the base is that of the plain toy."""
    settings = {"seed": 0, "metrics": METRICS, "reconstruction": "gram"}
    rolling, plain = (train_base(kind, {}, **settings) for kind in ("toy_agents:Rolling", KIND))
    assert_same_arrays(rolling.grams, plain.grams)
    assert_same_arrays(rolling.scores["reconstruction"], plain.scores["reconstruction"])
    dense = prepare(rolling)
    found = dense.program(dense.agent.model)
    assert set(found) == {"latent", "reconstruction"}
    assert len(found["latent"]) == 240
    assert dense.recording is not None  # the program of tracing would refuse so many rows


def test_grams_are_kept_only_where_trials_need_them():
    assert train_base(KIND, {}, seed=0, metrics=("reconstruction",)).grams is None


def test_retention_is_one_for_the_base_and_zero_for_the_trivial_agent(base):
    for split in ("validation", "test"):
        assert base.retention(base.performance[split], split) == 1.0
        assert base.retention(base.trivial[split], split) == 0.0
    worse = base.performance["validation"] + 0.5 * (
        base.trivial["validation"] - base.performance["validation"]
    )
    assert base.retention(worse) == pytest.approx(0.5, rel=1e-12)


def test_an_untrained_base_knows_shape_and_data_only(base):
    shape = untrained_base(KIND, {}, seed=0)
    assert not shape.trained
    assert (shape.widths, shape.parameters, shape.macs) == (base.widths, base.parameters, base.macs)
    assert_same_arrays(shape.data, base.data)
    assert shape.states == {}


def test_a_base_no_better_than_a_trivial_agent_is_refused():
    with pytest.raises(
        UserError, match=r"is no better than a trivial agent: its validation reconstruction_error"
    ):
        train_base("toy_agents:Untrainable", {}, seed=0, metrics=("l2",))


@pytest.mark.parametrize(
    ("kind", "options", "metrics", "sentence"),
    [
        ("autoencodr", {}, ("l2",), "unknown agent 'autoencodr'"),
        (KIND, {"hiden": 3}, ("l2",), "did you mean 'hidden'"),
        (KIND, {}, ("l3",), "there is no importance metric 'l3'"),
    ],
)
def test_what_is_not_known_is_named(kind, options, metrics, sentence):
    with pytest.raises(UserError, match=sentence):
        train_base(kind, options, seed=0, metrics=metrics)


def test_a_stored_base_comes_back_exactly(base, stored):
    assert sorted(entry.name for entry in stored.iterdir()) == sorted(FILES)
    assert_same(base, load_base(stored))


def test_a_base_is_prepared_once_per_process(base):
    assert prepare(base) is prepare(base)
    dense = prepare(base)
    assert dense.graph.widths == base.widths
    small = dense.build({"encoder.0": 2, "latent": 1, "decoder.0": 3})
    assert small.model["decoder"][0].weight.shape == (3, 1)
    assert small.data()["train"] is dense.agent.data()["train"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named(copy, name):
    path = copy / name
    content = path.read_bytes()
    for cut in sorted({0, 1, 7, 8, 9, len(content) // 3, len(content) // 2, len(content) - 3}):
        path.write_bytes(content[:cut])
        with pytest.raises(CorruptFileError, match=name.replace(".", r"\.")) as caught:
            load_base(copy)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CorruptFileError, match=f"{name} is missing"):
        load_base(copy)


@pytest.mark.parametrize("name", ["widths.json", "metrics.json"])
@pytest.mark.parametrize("value", [None, "text", -1, True, [], {"x": "y"}])
def test_every_json_key_is_checked(copy, name, value):
    path = copy / name
    content = json.loads(path.read_text())
    unchecked = {"environment"}  # for people
    later = {"reported"}  # bases of before lack it
    for key in set(content) - unchecked:
        for damaged in ({k: v for k, v in content.items() if k != key}, {**content, key: value}):
            if key == "reported" and key not in damaged:
                continue  # bases of before lack it
            if value == -1 and key in damaged and isinstance(content[key], int | float) and key != "format":
                continue  # another number is no damage that can be seen
            if key in later and key not in damaged:
                continue
            path.write_text(json.dumps(damaged))
            if key == "agent" and value == "text" and key in damaged:
                with pytest.raises(UserError, match="unknown agent 'text'"):
                    load_base(copy)
                continue
            with pytest.raises(CorruptFileError, match=name.replace(".", r"\.")) as caught:
                load_base(copy)
            assert "\n" not in str(caught.value)


def test_what_its_evaluation_reports_is_stored(tmp_path):
    base = train_base("toy_agents:Steady", {}, seed=0, metrics=("l2",))
    assert base.reported["reconstruction_error"] == base.performance["validation"]
    assert base.reported["smoothness"] == -base.reported["stability"]
    save_base(base, tmp_path)
    assert load_base(tmp_path).reported == base.reported


def test_the_share_of_a_gpu_is_stored_where_there_was_one(base, tmp_path):
    save_base(dataclasses.replace(base, gpu_share=0.125), tmp_path)
    assert load_base(tmp_path).gpu_share == 0.125
    content = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**content, "gpu_share": "all"}))
    with pytest.raises(CorruptFileError, match=r"metrics\.json"):
        load_base(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named(copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model/encoder.0.bias"] = tensors["model/encoder.0.bias"][:-1]
    save_file(tensors, path)
    with pytest.raises(
        CorruptFileError, match=r"'encoder.0.bias' has shape \(11,\), the model needs \(12,\)"
    ):
        load_base(copy)


def test_tensors_that_are_missing_unexpected_or_not_finite_are_named(copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "model/encoder.0.bias"}, path)
    with pytest.raises(CorruptFileError, match=r"it has no tensor 'encoder.0.bias'"):
        load_base(copy)
    save_file({**tensors, "model/extra": tensors["model/encoder.0.bias"]}, path)
    with pytest.raises(CorruptFileError, match=r"it has an unexpected tensor 'extra'"):
        load_base(copy)
    broken = tensors["model/encoder.0.bias"].copy()
    broken[3] = np.nan
    save_file({**tensors, "model/encoder.0.bias": broken}, path)
    with pytest.raises(CorruptFileError, match=r"'encoder.0.bias' holds numbers that are not finite"):
        load_base(copy)


def test_files_of_different_bases_do_not_fit(copy, tmp_path):
    other = train_base(KIND, {"hidden": 10}, seed=0, metrics=METRICS)
    save_base(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "importance.safetensors", copy)
    with pytest.raises(
        CorruptFileError, match=r"importance.safetensors is corrupt: the '.*' scores do not fit"
    ):
        load_base(copy)
    shutil.copy(tmp_path / "other" / "widths.json", copy)
    with pytest.raises(CorruptFileError, match=r"model.safetensors is corrupt"):
        load_base(copy)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no base in"):
        load_base(tmp_path / "nowhere")
