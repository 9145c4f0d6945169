"""Digits and MNIST: splits, scale, and what is said when MNIST cannot be had."""

from __future__ import annotations

import gzip
import hashlib
import json
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from agents.datasets import IMAGE_SIDES, Dataset, load
from components import UserError

ROWS = 70


def mnist_pixels():
    """Seventy distinguishable images, 0 to 255."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(ROWS, 784))
    pixels[:, 0], pixels[0, 1:3] = np.arange(ROWS), (0, 255)
    return pixels


@pytest.fixture
def mnist_home(tmp_path):
    """A small MNIST in the format of scikit-learn's cache of openml.org; returns its `data_home`."""
    pixels = mnist_pixels()
    names = [f"pixel{i + 1}" for i in range(784)]
    labels = ",".join(map(str, range(10)))
    lines = ["@RELATION mnist_784", "", *(f"@ATTRIBUTE {name} real" for name in names)]
    lines += [f"@ATTRIBUTE class {{{labels}}}", "", "@DATA"]
    lines += [",".join(map(str, [*row, i % 10])) for i, row in enumerate(pixels.tolist())]
    arff = ("\n".join(lines) + "\n").encode()
    url = "https://api.openml.org/data/v1/download/52667/mnist_784.arff"

    def feature(index, name, kind, target):
        return {
            "index": str(index),
            "name": name,
            "data_type": kind,
            "is_target": target,
            "is_ignore": "false",
            "is_row_identifier": "false",
            "number_of_missing_values": "0",
        }

    features = [feature(i, name, "numeric", "false") for i, name in enumerate(names)]
    api = "api/v1/json/data"
    files = {
        f"{api}/list/data_name/mnist_784/limit/2/data_version/1": {
            "data": {"dataset": [{"did": 554, "name": "mnist_784", "version": 1, "status": "active"}]}
        },
        f"{api}/554": {
            "data_set_description": {
                "id": "554",
                "name": "mnist_784",
                "version": "1",
                "status": "active",
                "format": "ARFF",
                "description": "handwritten digits",
                "url": url,
                "md5_checksum": hashlib.md5(arff).hexdigest(),
            }
        },
        f"{api}/features/554": {
            "data_features": {"feature": [*features, feature(784, "class", "nominal", "true")]}
        },
        f"{api}/qualities/554": {
            "data_qualities": {"quality": [{"name": "NumberOfInstances", "value": str(ROWS)}]}
        },
    }
    cached = {path: json.dumps(content).encode() for path, content in files.items()}
    cached["data/v1/download/52667/mnist_784.arff"] = arff
    for path, content in cached.items():
        file = tmp_path / "openml" / "openml.org" / f"{path}.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(content))
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("sklearn.datasets._openml.urlopen", refuse)
    monkeypatch.setattr("sklearn.datasets._openml.time.sleep", lambda _: None)


def rows_of(dataset):
    parts = (dataset.train, dataset.validation, dataset.test)
    return [part.flatten(1).numpy() for part in parts]


def test_digits_are_split_without_loss():
    dataset = load("digits")
    assert [len(part) for part in rows_of(dataset)] == [1078, 359, 360]
    original = load_digits().data
    together = np.concatenate(rows_of(dataset)) * 16
    assert sorted(map(tuple, together)) == sorted(map(tuple, original))
    assert dataset.train.shape[1:] == (IMAGE_SIDES["digits"],) * 2
    assert dataset.train.dtype == torch.float32
    assert (float(dataset.train.min()), float(dataset.train.max())) == (0.0, 1.0)


def test_splits_are_the_same_every_time():
    torch.manual_seed(1)
    first = load("digits")
    torch.manual_seed(2)
    for a, b in zip(rows_of(first), rows_of(load("digits")), strict=True):
        assert np.array_equal(a, b)
    # The first validation image, so that a new version of torch cannot move test images into training unseen.
    index = int(torch.randperm(1797, generator=torch.Generator().manual_seed(0))[1078])
    assert np.array_equal(first.validation[0].numpy() * 16, load_digits().images[index])
    assert index == 591


def test_mnist_comes_from_the_cache(mnist_home, no_network):
    dataset = load("mnist", mnist_home)
    train, validation, test = (part * 255 for part in rows_of(dataset))
    pixels = mnist_pixels()
    assert (len(train), len(validation), len(test)) == (50, 10, 10)
    np.testing.assert_allclose(test, pixels[60:], atol=1e-4)  # the customary test set, in its order
    rest = np.concatenate([train, validation])
    order = rest[:, 0].round().astype(int)
    assert sorted(order) == list(range(60))
    assert list(order) != list(range(60))
    np.testing.assert_allclose(rest, pixels[order], atol=1e-4)
    assert dataset.train.shape[1:] == (28, 28)


def test_mnist_comes_from_the_cache_that_the_environment_names(mnist_home, no_network, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(mnist_home))
    assert len(load("mnist").train) == 50


def test_mnist_without_network(tmp_path, no_network):
    with pytest.raises(UserError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"mnist is not in the cache {tmp_path}")
    assert "Name or service not known" in message
    assert "use dataset: digits" in message


def test_damaged_cache(mnist_home, no_network):
    file = mnist_home / "openml/openml.org/data/v1/download/52667/mnist_784.arff.gz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError) as caught:
        load("mnist", mnist_home)
    assert str(mnist_home) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_cache(tmp_path, no_network):
    home = tmp_path / "file"
    home.write_text("")
    with pytest.raises(UserError, match="mnist could not be read from the cache"):
        load("mnist", home)


def test_unknown_dataset():
    with pytest.raises(UserError, match="unknown dataset 'minst': did you mean 'mnist'"):
        load("minst")


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(0, 2, 2),
        torch.zeros(3, 4),
        torch.zeros(3, 2, 2, dtype=torch.float64),
        torch.full((3, 2, 2), 1.5),
        torch.full((3, 2, 2), torch.nan),
    ],
)
def test_datasets_are_checked(images):
    good = torch.zeros(3, 2, 2)
    with pytest.raises(UserError, match="the validation images of mine"):
        Dataset("mine", train=good, validation=images, test=good)
