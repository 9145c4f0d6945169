"""What a piece of work takes of the process that does it."""

from __future__ import annotations

import resource
import time

import torch

from search.gpu_memory import reset_peak

MIB = 2**20


class Usage:
    """Processor time and memory from here on; on a GPU, one piece of work at a time in a process.

    Args:
        device: torch device that is worked on.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._began = time.process_time()
        if device.startswith("cuda"):
            reset_peak(device)

    def so_far(self) -> dict[str, float]:
        """What was taken.

        `cpu_seconds`, of all threads; `memory_mb`, the most that the process has ever held, in MiB; on a GPU
        `gpu_memory_mb`, the most that tensors have held there meanwhile.
        """
        # Linux counts KiB.
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"cpu_seconds": round(time.process_time() - self._began, 3), "memory_mb": round(most, 1)}
        if self._device.startswith("cuda"):
            found["gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(self._device) / MIB, 1)
        return found
