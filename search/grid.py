"""The optimiser `grid`: a lattice on the simplex of the mixing coefficients, times a row of kept shares.

Every group keeps the same share, and every searched mixture takes every point of the lattice, pure metrics
included. The resolution follows from the budget. (arXiv 2507.14882 finds its soft coefficients by grid search
or gradient descent; only its abstract was available, so the grid is this project's own definition.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.choosing import kept_count
from components.errors import UserError
from search.optimisers import coarse_to_fine
from search.space import Params, SearchSpace

if TYPE_CHECKING:
    from search.config import GridConfig


@dataclass(frozen=True)
class Resolution:
    """How fine a grid is.

    Attributes:
        coefficients: n >= 1: coefficients are multiples of 1 / n.
        ratios: how many kept shares, >= 2, log-spaced from the smallest to 1.
    """

    coefficients: int
    ratios: int

    def mixtures(self, space: SearchSpace) -> int:
        """How many mixtures it tries: a power of the lattice's size where several are searched."""
        each = math.comb(self.coefficients + len(space.metrics) - 1, self.coefficients)
        return int(each ** len(space.mixtures.searched))

    def points(self, space: SearchSpace) -> int:
        """How many trials it takes: where everything is kept, all mixtures are one."""
        return self.mixtures(space) * (self.ratios - 1) + 1


class Grid:
    """The points of a grid, one for every trial that is no anchor.

    It goes through all kept shares again and again, with other mixtures every time, and from coarse to fine:
    one that is interrupted has seen all sizes.

    Args:
        space: what is searched; options are as the agent has them.
        resolution: how fine.
        first: number of the first trial that is no anchor.
    """

    origin = "grid"

    def __init__(self, space: SearchSpace, resolution: Resolution, first: int) -> None:
        self._space = space
        self._first = first
        self._lattice = list(lattice(len(space.metrics), resolution.coefficients))
        self._mixtures = resolution.mixtures(space)
        shares = distinct_shares(space, resolution.ratios)
        self._shares = [shares[index] for index in coarse_to_fine(len(shares))]

    def __len__(self) -> int:
        return self._mixtures * len(self._shares) + 1

    def propose(self, number: int) -> Params | None:
        """A point of the grid; None for anchors, and once all its points have been proposed."""
        index = number - self._first
        if not 0 <= index < len(self):
            return None
        if index == len(self) - 1:  # nothing pruned, and so the least to be learnt
            return self._point(1.0, 0)
        turn, place = divmod(index, len(self._shares))
        return self._point(self._shares[place], (turn + place) % self._mixtures)

    def _point(self, share: float, mixture: int) -> Params:
        params = dict.fromkeys(self._space.keeps.values(), share) | self._space.own_options()
        for key in self._space.mixtures.searched:
            mixture, which = divmod(mixture, len(self._lattice))
            params |= self._space.coordinates(key, self._lattice[which])
        return params


def grid_for(space: SearchSpace, budget: int, anchors: int, wish: GridConfig | None = None) -> Grid:
    """The grid of a search.

    Args:
        space: what is searched.
        budget: trials of the search, anchors included.
        anchors: how many of them those are.
        wish: a resolution; what it leaves open follows from the budget: about as many kept shares as
            mixtures.

    Raises:
        UserError: the grid has more points than there are trials; the sentence says how many, and what fits.
            Or coefficients are to be in steps that are not searched.
    """
    left = budget - anchors
    asked_n = wish.coefficients if wish else None
    asked_ratios = wish.ratios if wish else None
    if asked_n is not None and not space.mixtures.searched:
        raise UserError(
            f"search.grid.coefficients is {asked_n}, and no coefficients are searched here: leave it out"
        )
    fitting = best_resolution(space, left, asked_n, asked_ratios)
    if fitting is None:
        least = Resolution(asked_n or 1, asked_ratios or 2)
        instead = best_resolution(space, left)
        shared = ", shared coefficients" if len(space.mixtures.searched) > 1 else ""
        fits = (
            f"search.grid {{coefficients: {instead.coefficients}, ratios: {instead.ratios}}} fits"
            if instead
            else f"the smallest grid has {Resolution(1, 2).points(space)}, so use more trials{shared} or "
            "another sampler"
        )
        raise UserError(
            f"the grid has {least.points(space)} points, with coefficients in steps of "
            f"1/{least.coefficients} and {least.ratios} ratios, and {max(left, 0)} of {budget} trials are "
            f"left after {anchors} anchors: {fits}"
        )
    return Grid(space, fitting, anchors)


def best_resolution(
    space: SearchSpace, budget: int, coefficients: int | None = None, ratios: int | None = None
) -> Resolution | None:
    """The most balanced grid of at most `budget` points: with as many mixtures and kept shares as can be.

    Args:
        space: what is searched.
        budget: points.
        coefficients, ratios: where they are given, the resolution has them; None where they are free.

    Returns:
        None where no grid fits.
    """
    best, best_balance = None, (0, 0)
    steps = coefficients or 1
    while True:
        mixtures = Resolution(steps, 2).mixtures(space)
        most = 1 + (budget - 1) // mixtures
        if most < (ratios or 2):
            return best
        found = Resolution(steps, ratios or most)
        balance = min(mixtures, found.ratios - 1), found.points(space)
        if best is None or balance > best_balance:
            best, best_balance = found, balance
        if coefficients or mixtures == 1:
            return best
        steps += 1


def distinct_shares(space: SearchSpace, count: int) -> list[float]:
    """Kept shares below 1, log-spaced from the smallest, that keep different numbers of channels."""
    low = 1.0 - space.max_ratio
    shares: dict[tuple[int, ...], float] = {}
    for place in range(count - 1):
        share = low if place == 0 else max(low, low ** (1 - place / (count - 1)))
        kept = tuple(kept_count(space.sizes[group], 1.0 - share, space.round_to) for group in space.keeps)
        if kept != tuple(space.sizes[group] for group in space.keeps):
            shares.setdefault(kept, share)
    return list(shares.values())


def lattice(metrics: int, steps: int) -> Iterator[list[float]]:
    """All weights that are multiples of 1 / steps and sum to 1; pure metrics come first."""
    for parts in sorted(_compositions(steps, metrics), key=lambda parts: max(parts) < steps):
        yield [part / steps for part in parts]


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a total as so many whole numbers >= 0, in order."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)
