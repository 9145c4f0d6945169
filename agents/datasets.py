"""Images to learn from: handwritten digits (bundled with scikit-learn) and MNIST (from openml.org).

Every image is a float32 matrix with values in [0, 1]. Splits are fixed: the same rows on every machine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.errors import UserError, nearest

Name = Literal["digits", "mnist"]

IMAGE_SIDES: Mapping[str, int] = {"digits": 8, "mnist": 28}
"""Dataset -> height and width of its images, in pixels: known without loading it."""

SPLIT_SEED = 0
"""Of the permutation before splitting; one for all experiments, so that test images are never trained on."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images, split once and for all.

    Attributes:
        name: of the dataset.
        train: `(n, height, width)` float32 in [0, 1].
        validation: the same; what a search may choose by.
        test: the same; only for what is reported at the end.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            images = getattr(self, split)
            if images.dim() != 3 or images.dtype != torch.float32 or len(images) == 0:
                raise UserError(
                    f"the {split} images of {self.name} are {images.dtype} of shape {tuple(images.shape)}: "
                    "they must be float32 of shape (n, height, width), n at least 1"
                )
            if not bool(((images >= 0) & (images <= 1)).all()):  # NaN fails this too
                raise UserError(f"the {split} images of {self.name} have values outside [0, 1]")


def load(name: str, data_home: Path | str | None = None) -> Dataset:
    """A dataset by name.

    Args:
        name: `digits` (1,797 images of 8 x 8: 1,078 / 359 / 360) or `mnist` (70,000 of 28 x 28: 50,000 /
            10,000 / 10,000, the last being its customary test set).
        data_home: scikit-learn's cache for downloads; None means its own default, which the environment
            variable SCIKIT_LEARN_DATA moves. `digits` needs none.

    Raises:
        UserError: an unknown name, or MNIST is neither cached nor downloadable, or damaged.
    """
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(data_home)
    raise UserError(f"unknown dataset {name!r}: {nearest(name, IMAGE_SIDES)}")


def _digits() -> Dataset:
    """60 / 20 / 20 % of the permuted digits; pixels are whole numbers from 0 to 16."""
    from sklearn.datasets import load_digits

    images = _images(load_digits().data, 16.0, "digits")
    images = images[_permutation(len(images))]
    train, validation = round(0.6 * len(images)), round(0.2 * len(images))
    return Dataset(
        "digits",
        train=images[:train],
        validation=images[train : train + validation],
        test=images[train + validation :],
    )


def _mnist(data_home: Path | str | None) -> Dataset:
    """The last seventh is MNIST's test set; of the rest, permuted, one sixth is validation."""
    images = _images(_fetch_mnist(data_home), 255.0, "mnist")
    test = len(images) // 7
    rest = images[: len(images) - test][_permutation(len(images) - test)]
    return Dataset("mnist", train=rest[test:], validation=rest[:test], test=images[len(images) - test :])


def _fetch_mnist(data_home: Path | str | None) -> NDArray[np.float32]:
    """`(n, 784)`, 0 to 255, from scikit-learn's cache or openml.org."""
    from sklearn.datasets import fetch_openml

    home = str(data_home or os.environ.get("SCIKIT_LEARN_DATA") or Path.home() / "scikit_learn_data")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about retries: the error below says it all
            # Not the pandas parser: with pandas 3 it fails on MNIST's labels, and scikit-learn then deletes
            # the download as damaged.
            bunch = fetch_openml(
                "mnist_784", version=1, as_frame=False, parser="liac-arff", data_home=home, n_retries=1
            )
    except (URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"mnist is not in the cache {home} and could not be downloaded from openml.org "
            f"({_reason(error)}); connect once, copy a cache there, or use dataset: digits"
        ) from error
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"mnist could not be read from the cache {home} ({_reason(error)}); "
            "remove its openml folder to download it again, or use dataset: digits"
        ) from error
    return np.asarray(bunch.data, dtype=np.float32)


def _reason(error: Exception) -> str:
    """An exception in a few words on one line."""
    text = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _images(pixels: NDArray[np.float32], white: float, name: str) -> Tensor:
    """Rows of pixels as `(n, side, side)` in [0, 1]."""
    side = IMAGE_SIDES[name]
    if pixels.ndim != 2 or pixels.shape[1] != side * side or len(pixels) < 7:
        raise UserError(
            f"{name} has pixels of shape {pixels.shape}: at least 7 rows of {side * side} are needed"
        )
    return torch.tensor(pixels / white, dtype=torch.float32).reshape(len(pixels), side, side)


def _permutation(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
