"""Optimisers that plan their trials ahead: what a trial is to do follows from its number alone.

`Study` asks them first, Optuna's samplers for what they leave open. Whoever proposes, a proposal is a point
of the search space that the same pipeline makes a trial of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from scipy.stats import qmc

from search.space import Dimension, Params


class Optimiser(Protocol):
    """Proposes points of a search space.

    Attributes:
        origin: what its proposals say that they come from.
    """

    origin: str

    def propose(self, number: int) -> Params | None:
        """The point of trial `number`, inside the space: always the same, whatever came before.

        None where it has none for that trial.
        """


class QuasiRandom:
    """A scrambled Sobol sequence, which fills the space more evenly than random points.

    Args:
        dimensions: of the space.
        seed: of the scrambling.
    """

    origin = "qmc"

    def __init__(self, dimensions: Sequence[Dimension], seed: int) -> None:
        self._dimensions = tuple(dimensions)
        self._seed = seed

    def propose(self, number: int) -> Params:
        """Point `number` of the sequence."""
        sequence = qmc.Sobol(len(self._dimensions), rng=np.random.default_rng(self._seed))
        if number:
            sequence.fast_forward(number)
        [point] = sequence.random(1)
        return {
            dimension.name: dimension.at(float(u))
            for dimension, u in zip(self._dimensions, point, strict=True)
        }


def coarse_to_fine(count: int) -> list[int]:
    """0 to count - 1 in such an order that the first few are spread over all: both ends, then the middles."""
    order = [0, count - 1][:count]
    gaps = [(0, count - 1)]
    while gaps:
        first, last = gaps.pop(0)
        middle = (first + last) // 2
        if first < middle < last:
            order.append(middle)
            gaps += [(first, middle), (middle, last)]
    return order
