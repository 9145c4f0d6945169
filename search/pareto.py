"""Fronts, hypervolumes, knees and selections: the arithmetic of the trade-off, in NumPy alone.

Sizes are `size_ratio`s, parameters over those of the base; retention is 1 for an agent as good as the base
and 0 for a trivial one. Every function takes parallel arrays with one entry per trial, answers with indices
into them, modifies nothing, and refuses NaN and infinity with a `ValueError`: they are failures, not numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Direction = Literal["minimize", "maximize"]

SMALLEST_SIZE = 0.005
"""Where the logarithmic hypervolume starts: 0.5 % of the base."""

SIZE_THRESHOLDS = (0.01, 0.02, 0.05, 0.10, 0.25)
"""The sizes at which people read the best retention."""


@dataclass(frozen=True)
class Selection:
    """The trial that answers a wish, or comes closest to it.

    Attributes:
        index: of the trial in the arrays that were passed.
        satisfied: False where no trial meets the wish; `index` is then the closest miss.
    """

    index: int
    satisfied: bool


def non_dominated(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.bool_]:
    """Which points no other point dominates: none is at least as good everywhere and better somewhere.

    Equal points do not dominate one another, so duplicates are kept together.

    Args:
        values: `(n, m)`, one row per trial.
        directions: `m` times `minimize` or `maximize`.

    Returns:
        `(n,)` bool.

    Raises:
        ValueError: a value is NaN or infinite, or the shapes do not agree.
    """
    losses = _losses(values, directions)  # (n, m), lower is better
    if len(losses) == 0:
        return np.zeros(0, dtype=np.bool_)
    # Distinct points in lexicographic order: none is dominated by a later one.
    points, place = np.unique(losses, axis=0, return_inverse=True)
    return _lexicographic_front(points)[place.reshape(-1)]


def front(
    values: ArrayLike, directions: Sequence[Direction], feasible: ArrayLike | None = None
) -> NDArray[np.intp]:
    """Indices of the feasible points that no feasible point dominates.

    Args:
        values: `(n, m)`, one row per trial.
        directions: `m` times `minimize` or `maximize`.
        feasible: `(n,)` bool; all are where it is left out.

    Returns:
        Indices sorted by the first objective, best first; ties by the following objectives, then by index.

    Raises:
        ValueError: a value is NaN or infinite (feasible or not), or the shapes do not agree.
    """
    losses = _losses(values, directions)
    allowed = np.asarray(np.ones(len(losses)) if feasible is None else feasible, dtype=np.bool_)
    if allowed.shape != (len(losses),):
        raise ValueError(f"feasible has shape {allowed.shape}, the values have {len(losses)} rows")
    candidates = np.flatnonzero(allowed)
    members = candidates[non_dominated(losses[candidates], ["minimize"] * losses.shape[1])]
    keys = [members, *losses[members].T[::-1]]  # np.lexsort sorts by its last key first
    return members[np.lexsort(keys)]


def ranks(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.intp]:
    """Non-dominated sorting (Deb et al., 2002): 0 on the front, 1 on the front of the others, and so on.

    Equal points have equal ranks.

    Args:
        values: `(n, m)`, one row per trial.
        directions: `m` times `minimize` or `maximize`.

    Returns:
        `(n,)`.

    Raises:
        ValueError: a value is NaN or infinite, or the shapes do not agree.
    """
    losses = _losses(values, directions)  # (n, m), lower is better
    points, place = np.unique(losses, axis=0, return_inverse=True)  # lexicographic order
    found = np.zeros(len(points), dtype=np.intp)
    if len(directions) == 2:
        # A point belongs to the first front whose best second objective so far does not dominate it; those
        # bests rise from front to front, so it is found by bisection: n log n where peeling takes n^1.5.
        best: list[float] = []
        for index, second in enumerate(points[:, 1].tolist()):
            found[index] = rank = bisect_right(best, second)
            best[rank : rank + 1] = [second]
    else:
        remaining = np.arange(len(points))
        rank = 0
        while len(remaining):
            efficient = _lexicographic_front(points[remaining])
            found[remaining[efficient]] = rank
            remaining, rank = remaining[~efficient], rank + 1
    return found[place.reshape(-1)]


def crowding_distances(values: ArrayLike) -> NDArray[np.float64]:
    """How much room a point has among those of its front (Deb et al., 2002): the more, the rarer it is.

    The sum over objectives of the gap between the nearest lower and the nearest higher value there are, over
    the range; infinite for the lowest and highest values of an objective. Points that are equal in an
    objective have the same gap there, so neither their order nor that of the objectives matters, and
    directions do not either. An objective in which all are equal says nothing.

    Args:
        values: `(n, m)`, on scales whose differences mean something.

    Returns:
        `(n,)`, >= 0.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    _require_finite(array)
    room = np.zeros(len(array))
    for column in array.T:
        levels, place = np.unique(column, return_inverse=True)
        if len(levels) > 1:
            gaps = np.full(len(levels), np.inf)
            gaps[1:-1] = (levels[2:] - levels[:-2]) / (levels[-1] - levels[0])
            room += gaps[place]
    return room


def hypervolume_log(size_ratio: ArrayLike, retention: ArrayLike, smallest: float = SMALLEST_SIZE) -> float:
    """Mean over log size in [`smallest`, 1] of the best retention, clipped to [0, 1], at or below that size.

    The exact integral of a step function; 0 where no trial is small enough, 1 for a trial that retains
    everything at `smallest`. Higher is better. Trials larger than the base (`size_ratio > 1`) add nothing.

    Args:
        size_ratio: `(n,)`, > 0.
        retention: `(n,)`.
        smallest: lower end of the range, in (0, 1).

    Raises:
        ValueError: a number is NaN or infinite, or a size is not positive.
    """
    sizes, retained = _sizes_and_retention(size_ratio, retention)
    return _mean_of_steps(np.log(sizes), retained, float(np.log(smallest)), 0.0)


def hypervolume_linear(size_ratio: ArrayLike, retention: ArrayLike) -> float:
    """As `hypervolume_log`, over linear size in [0, 1]: everything below 5 % counts 0.05 at most."""
    sizes, retained = _sizes_and_retention(size_ratio, retention)
    return _mean_of_steps(sizes, retained, 0.0, 1.0)


def retention_at(
    size_ratio: ArrayLike, retention: ArrayLike, thresholds: Sequence[float] = SIZE_THRESHOLDS
) -> dict[float, float | None]:
    """For every size threshold, the best retention at or below it (not clipped), or None if nothing is."""
    sizes, retained = _sizes_and_retention(size_ratio, retention)
    return {
        threshold: float(retained[sizes <= threshold].max()) if (sizes <= threshold).any() else None
        for threshold in thresholds
    }


def knee(size_ratio: ArrayLike, retention: ArrayLike) -> int:
    """Index of the knee: past it, a smaller agent costs disproportionately much retention.

    On the front of (log size, retention), each axis scaled to [0, 1] over the front, the point highest above
    the chord between the front's ends. Among equals (two points; no point above the chord) the best
    retention, then the lowest index, wins.

    Raises:
        ValueError: there are no trials, a number is NaN or infinite, or a size is not positive.
    """
    sizes, retained = _sizes_and_retention(size_ratio, retention)
    _require_trials(sizes)
    members = front(np.stack([sizes, retained], axis=1), ["minimize", "maximize"])
    # Along the front both rise, so its ends are (0, 0) and (1, 1) and the chord is the diagonal.
    height = _unit(retained[members]) - _unit(np.log(sizes[members]))
    highest = members[height >= height.max() - 1e-12]
    return int(highest[np.lexsort([highest, -retained[highest]])[0]])


def smallest_retaining(size: ArrayLike, retention: ArrayLike, minimum: float) -> Selection:
    """The smallest trial with `retention >= minimum`; ties by retention, then index.

    Where there is none, the closest miss: the highest retention; ties by size, then index.

    Raises:
        ValueError: there are no trials, or a number is NaN or infinite.
    """
    sizes, retained = _parallel(size, retention)
    _require_trials(sizes)
    enough = np.flatnonzero(retained >= minimum)
    if len(enough):
        return Selection(int(enough[np.lexsort([enough, -retained[enough], sizes[enough]])[0]]), True)
    return Selection(int(np.lexsort([sizes, -retained])[0]), False)


def best_within(cost: ArrayLike, retention: ArrayLike, limit: float) -> Selection:
    """The trial with the best retention whose cost (parameters, MACs, latency) is at most `limit`.

    Ties by cost, then index. Where there is none, the closest miss: the lowest cost; ties by retention, then
    index.

    Raises:
        ValueError: there are no trials, or a number is NaN or infinite.
    """
    costs, retained = _parallel(cost, retention)
    _require_trials(costs)
    affordable = np.flatnonzero(costs <= limit)
    if len(affordable):
        order = np.lexsort([affordable, costs[affordable], -retained[affordable]])
        return Selection(int(affordable[order[0]]), True)
    return Selection(int(np.lexsort([-retained, costs])[0]), False)


def _lexicographic_front(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of distinct, lexicographically sorted points `(n, m)`, lower better, are non-dominated."""
    count, objectives = points.shape
    efficient = np.zeros(count, dtype=np.bool_)
    if objectives <= 2:
        efficient[0] = True
        if objectives == 2:
            second = points[:, 1]
            efficient[1:] = second[1:] < np.minimum.accumulate(second)[:-1]
        return efficient
    remaining = np.arange(count)
    while len(remaining):
        head = remaining[0]  # what could dominate it came earlier and would have removed it
        efficient[head] = True
        remaining = remaining[(points[remaining] < points[head]).any(axis=1)]
    return efficient


def _mean_of_steps(
    position: NDArray[np.float64], height: NDArray[np.float64], low: float, high: float
) -> float:
    """Mean over [low, high] of the highest `height`, clipped to [0, 1], at or left of each position."""
    inside = position <= high
    left = np.maximum(position[inside], low)
    order = np.argsort(left, kind="stable")
    left = left[order]
    best = np.maximum.accumulate(np.clip(height[inside][order], 0.0, 1.0))
    widths = np.diff(left, append=high)
    return float(np.sum(best * widths) / (high - low))


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    above: NDArray[np.float64] = values - values.min()
    extent = float(above.max())
    return np.divide(above, extent) if extent > 0 else above


def _losses(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        array = array.reshape(0, len(directions))
    if array.ndim != 2 or array.shape[1] != len(directions) or not directions:
        raise ValueError(f"values have shape {array.shape}, expected (trials, {len(directions)} objectives)")
    unknown = set(directions) - {"minimize", "maximize"}
    if unknown:
        raise ValueError(f"direction {sorted(unknown)[0]!r} is neither 'minimize' nor 'maximize'")
    _require_finite(array)
    signs = np.array([1.0 if direction == "minimize" else -1.0 for direction in directions])
    losses: NDArray[np.float64] = array * signs
    return losses


def _parallel(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.ndim != 1 or one.shape != two.shape:
        raise ValueError(f"sizes and retentions must be parallel 1-D arrays, got {one.shape} and {two.shape}")
    _require_finite(one)
    _require_finite(two)
    return one, two


def _sizes_and_retention(
    size_ratio: ArrayLike, retention: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    sizes, retained = _parallel(size_ratio, retention)
    if (sizes <= 0).any():
        raise ValueError(f"size_ratio must be positive, got {float(sizes.min())}")
    return sizes, retained


def _require_finite(array: NDArray[np.float64]) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(f"every number must be finite, got {float(array[~finite][0])}")


def _require_trials(array: NDArray[np.float64]) -> None:
    if len(array) == 0:
        raise ValueError("there are no trials to choose from")
