"""GPU memory: how much of a GPU a piece of work took, and giving it back to the others that share it.

On a machine without CUDA nothing is measured and nothing is done.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

CONTEXT_BYTES = 600 * 2**20
"""What a process takes on a GPU before its first tensor: CUDA's context and the kernels it loads."""

MARGIN = 1.25
"""By how much a trial may need more than the base: it has the teacher beside the student."""


@contextmanager
def peak_share(device: str) -> Iterator[Callable[[], float | None]]:
    """Measure the memory that the block takes at its peak; what was allocated before it counts too.

    Args:
        device: torch device that the block works on.

    Yields:
        A function that returns the peak so far, as a share of the GPU's memory, CUDA's context included; None
        where the device is no GPU.
    """
    if not device.startswith("cuda"):
        yield lambda: None
        return
    reset_peak(device)
    total = torch.cuda.get_device_properties(device).total_memory
    yield lambda: (torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES) / total


def reset_peak(device: str) -> None:
    """Begin to look for the peak of a GPU's memory anew."""
    torch.cuda.init()  # type: ignore[no-untyped-call]  # or there are no statistics to reset
    torch.cuda.reset_peak_memory_stats(device)


def trial_share(base_share: float | None) -> float:
    """The least share of a GPU that a trial gets: 1 over a whole number, so that no remainder is wasted.

    Args:
        base_share: what training the base took at its peak; None where it was not trained on a GPU.

    Returns:
        In (0, 1]; 0 where nothing is known, which bounds nothing.
    """
    if base_share is None:
        return 0.0
    return 1 / max(1, math.floor(1 / (MARGIN * base_share)))


def release(device: str) -> None:
    """Give the GPU memory that nothing refers to any more back to the other processes on the GPU."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
