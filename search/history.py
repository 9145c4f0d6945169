"""Which finished trials a sampler goes on learning from, once there are more than it can afford.

The cost of a proposal grows with the trials that a sampler models: linearly for `tpe`, with their cube for
`gp`. What it learns from the thousandth mediocre trial does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from search import pareto
from search.pareto import Direction


def worth_keeping(values: NDArray[np.float64], directions: Sequence[Direction], limit: int) -> list[int]:
    """The indices of at most `limit` trials: half of them the best, the others the latest.

    The best are those of the lowest non-dominated ranks, and of the rank at the cut those with the most room
    around them, which are the ends first: what the search is after. The latest say what the sampler proposes
    now, as the bulk of what it has seen would.

    Args:
        values: `(n, objectives)`, in the order in which the trials finished; rows that are not finite, of
            trials without values, are among the latest only.
        directions: of the objectives.
        limit: >= 1.

    Returns:
        Ascending; all where there are no more than the limit.
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    finite = np.flatnonzero(np.isfinite(values).all(axis=1))
    ranks = pareto.ranks(values[finite], directions)
    room = np.zeros(len(finite))
    for rank in range(int(ranks.max(initial=-1)) + 1):
        room[ranks == rank] = pareto.crowding_distances(values[finite][ranks == rank])
    by_rank = finite[np.lexsort((-finite, -room, ranks))]
    best = {int(index) for index in by_rank[: limit // 2]}
    latest = [index for index in range(count - 1, -1, -1) if index not in best]
    return sorted(best | set(latest[: limit - len(best)]))
