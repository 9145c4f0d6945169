"""The same seed, the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import scipy.linalg  # noqa: F401  (has a BLAS of its own: loaded here, so that it is bounded below)
import torch
from threadpoolctl import threadpool_limits


@contextmanager
def deterministic(seed: int, threads: int = 1) -> Iterator[None]:
    """Seed every global generator and fix the thread count inside the block; outside, both are as before.

    Results are bit-reproducible on one machine for one thread count: sums are split by threads. The bound on
    BLAS is for speed too: beside busy workers, a Gaussian-process proposal takes five times as long without.

    Args:
        seed: any non-negative integer; NumPy's legacy generator gets its lowest 32 bits.
        threads: CPU threads that torch and the BLAS of NumPy and SciPy may use, at least 1.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    threads_before = torch.get_num_threads()
    cudnn = torch.backends.cudnn
    flags_before = (cudnn.deterministic, cudnn.benchmark)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), threadpool_limits(threads, user_api="blas"):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            torch.set_num_threads(threads)
            cudnn.deterministic, cudnn.benchmark = True, False
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_num_threads(threads_before)
            cudnn.deterministic, cudnn.benchmark = flags_before
