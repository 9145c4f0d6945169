"""The memory of a GPU: what work took of it, how it is shared, and that it is given back."""

from __future__ import annotations

import pytest
import torch

from search.gpu_memory import CONTEXT_BYTES, MARGIN, peak_share, release, trial_share

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("base_share", [0.001, 0.02, 0.1, 0.13, 0.3, 0.399])
def test_as_many_trials_share_a_gpu_as_its_memory_holds(base_share: float) -> None:
    share = trial_share(base_share)
    together = round(1 / share)
    assert share == pytest.approx(1 / together)
    assert together * MARGIN * base_share <= 1 < (together + 1) * MARGIN * base_share


@pytest.mark.parametrize("base_share", [0.5, 0.81, 0.99])
def test_a_trial_of_a_large_base_has_a_gpu_of_its_own(base_share: float) -> None:
    assert trial_share(base_share) == 1


def test_a_base_of_the_cpu_bounds_nothing() -> None:
    with peak_share("cpu") as share:
        assert share() is None
    assert trial_share(None) == 0
    release("cpu")


@needs_cuda
def test_the_peak_is_what_was_reserved_at_once() -> None:
    total = torch.cuda.get_device_properties("cuda").total_memory
    release("cuda")
    before = torch.cuda.memory_reserved("cuda")
    with peak_share("cuda") as share:
        for _ in range(3):
            block = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
            del block
        expected = before + 256 * 2**20 + CONTEXT_BYTES
        assert share() == pytest.approx(expected / total, rel=0.02)


@needs_cuda
def test_memory_that_only_a_cycle_refers_to_is_given_back() -> None:
    release("cuda")
    before = torch.cuda.memory_reserved("cuda")
    cycle: list[object] = [torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")]
    cycle.append(cycle)
    del cycle
    release("cuda")
    assert torch.cuda.memory_reserved("cuda") == before
