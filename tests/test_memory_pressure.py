"""A trial that takes more memory than its machine has, for real: Ray's memory monitor ends its worker."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from test_cluster import Journal, complete, search

from search.trial_types import TrialResult, TrialSpec

MIB = 2**20
ALLOWED, TAKEN = 1500 * MIB, 4000 * MIB


def hungry(spec: TrialSpec, base: None, device: str) -> TrialResult:
    """Trial 1 takes memory, and holds it for a while."""
    hoard = []
    if spec.number == 1:
        for _ in range(TAKEN // (100 * MIB)):
            hoard.append(np.ones(100 * MIB, np.uint8))
            time.sleep(0.05)
        time.sleep(60)
    return complete(spec, performance={"bytes": float(sum(block.nbytes for block in hoard))})


def memory() -> tuple[int, int]:
    """Bytes of this machine in all, and in use."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total, total - available


def test_a_trial_that_takes_too_much_memory_fails_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total, used = memory()
    if total - used < TAKEN + 2000 * MIB:
        pytest.skip("too little memory to be generous with")
    limits = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    for limit in limits:
        if limit.exists() and limit.read_text().strip().isdigit() and int(limit.read_text()) < total:
            pytest.skip("this process may use a part of the machine's memory only")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(used + ALLOWED) / total:.4f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    journal = Journal()
    outcome = search(journal, range(5), hungry, retries=1, concurrency=1)
    assert (outcome.complete, outcome.failed, outcome.repeated) == (4, 1, 1)
    [failed] = [result for result in journal.results if result.failed]
    assert failed.number == 1
    assert failed.reason == (
        "the worker was stopped because its machine ran out of memory (the last of 2 times)"
    )
    assert sorted(journal.of("record")) == [0, 1, 2, 3, 4]
