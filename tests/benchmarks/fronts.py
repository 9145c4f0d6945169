"""What benchmarks of fronts have in common: points, hypervolumes, intervals and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from search.pareto import SIZE_THRESHOLDS, SMALLEST_SIZE


@dataclass(frozen=True)
class Point:
    """One agent: its size and its retention on validation and on test data."""

    size_ratio: float
    validation: float
    test: float


Points = Mapping[str, Sequence[Point]]
"""Method -> its agents, on one base seed."""


def shares(points: int, smallest: float) -> list[float]:
    """Kept shares, log-spaced from everything to the smallest."""
    return [float(share) for share in np.geomspace(1.0, smallest, points)]


def chosen_retention(points: Sequence[Point], sizes: np.ndarray) -> np.ndarray:
    """At every size: the test retention of the agent at or below it that validates best; 0 without one."""
    result = np.zeros(len(sizes))
    for index, size in enumerate(sizes):
        fitting = [point for point in points if point.size_ratio <= size * (1 + 1e-12)]
        if fitting:
            result[index] = max(fitting, key=lambda point: point.validation).test
    return result


def hypervolumes(points: Sequence[Point], resolution: int = 2000) -> dict[str, float]:
    """Mean chosen retention over log and over linear size, by the midpoint rule."""
    middle = (np.arange(resolution) + 0.5) / resolution
    log_sizes = SMALLEST_SIZE ** (1 - middle)
    return {
        "log": float(np.clip(chosen_retention(points, log_sizes), 0, 1).mean()),
        "linear": float(np.clip(chosen_retention(points, middle), 0, 1).mean()),
    }


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean with the half-width of its 95 % interval (Student's t)."""
    array = np.asarray(values, dtype=float)
    half = 0.0
    if len(array) > 1:
        half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return {"mean": round(float(array.mean()), 4), "ci95": round(half, 4)}


def summarise(by_seed: Sequence[Points], ours: str) -> dict[str, object]:
    """The figures of all seeds.

    Args:
        by_seed: the same methods for every seed.
        ours: the method that ratios are of.
    """
    methods = list(by_seed[0])
    volumes = {name: [hypervolumes(seed[name]) for seed in by_seed] for name in methods}
    figures: dict[str, object] = {
        "seeds": len(by_seed),
        "points": [len(seed[ours]) for seed in by_seed],
    }
    for kind in ("log", "linear"):
        figures[f"hypervolume_{kind}"] = {
            name: interval([volume[kind] for volume in volumes[name]]) for name in methods
        }
        for other in methods:
            pairs = [(a[kind], b[kind]) for a, b in zip(volumes[ours], volumes[other], strict=True)]
            if other != ours and all(theirs > 0 for _, theirs in pairs):
                figures[f"ratio_{kind}_to_{other}"] = interval([mine / theirs for mine, theirs in pairs])
    figures["test_retention_at_or_below"] = {
        f"{threshold:.0%}": {
            name: interval(
                [float(chosen_retention(seed[name], np.array([threshold]))[0]) for seed in by_seed]
            )
            for name in methods
        }
        for threshold in SIZE_THRESHOLDS
    }
    return figures
