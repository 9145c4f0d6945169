"""`deterministic`: the same numbers inside, nothing changed outside."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from search.determinism import deterministic


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    with deterministic(3):
        first = draw()
    draw()
    with deterministic(3):
        second = draw()
    with deterministic(4):
        third = draw()
    assert first == second
    assert all(a != b for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_generators_and_threads_are_as_before_even_after_an_exception(fails):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    torch.set_num_threads(2)
    expected = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        assert before != {1}
        try:
            with deterministic(2**40 + 7, threads=1):
                assert torch.get_num_threads() == 1
                assert blas_threads() == {1}
                draw()
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert draw() == expected
        assert torch.get_num_threads() == 2
        assert blas_threads() == before


def test_blocks_nest():
    with deterministic(1):
        first = draw()
        with deterministic(2):
            draw()
        rest = draw()
    with deterministic(1):
        assert (first, rest) == (draw(), draw())
