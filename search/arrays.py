"""Tensors as plain NumPy arrays, and back: what crosses process and file boundaries."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Arrays = Mapping[str, np.ndarray]


def to_tensors(arrays: Arrays, device: str = "cpu") -> dict[str, Tensor]:
    """Arrays as tensors on a device. Always copies: arrays from shared memory are read-only."""
    return {name: torch.tensor(array, device=device) for name, array in arrays.items()}


def to_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors as contiguous arrays that share no memory with them."""
    return {name: tensor.detach().cpu().contiguous().numpy().copy() for name, tensor in tensors.items()}
