"""The front as a few lines of text, for terminals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from search.pareto import SMALLEST_SIZE

EIGHTHS = " ▁▂▃▄▅▆▇█"
MARKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def front_chart(
    sizes: Sequence[float], retention: Sequence[float], width: int = 60, height: int = 6
) -> list[str]:
    """The best retention at or below every size, as an area over log size.

    Args:
        sizes: size ratio of each trial of the front, in (0, 1].
        retention: of each; what is outside of [0, 1] is drawn at its edge.
        width: columns of the area; the axis takes six more.
        height: lines of the area; two more say what is what.

    Returns:
        Lines from top to bottom.
    """
    best = []
    for column in range(width):
        # The largest size that still falls into the column.
        size = SMALLEST_SIZE ** (1 - (column + 1) / width)
        reached = [r for s, r in zip(sizes, retention, strict=True) if s <= size * (1 + 1e-9)]
        best.append(min(1.0, max(0.0, max(reached, default=0.0))))
    lines = []
    for row in range(height):
        floor = (height - 1 - row) * 8
        filled = (min(8, max(0, round(value * height * 8) - floor)) for value in best)
        label = {0: "1.0", height - 1: "0.0"}.get(row, "")
        lines.append(f"{label:>4} │" + "".join(EIGHTHS[eighths] for eighths in filled))
    lines.append("     └" + "─" * width)
    lines.append(_size_axis(width))
    return lines


def _size_axis(width: int) -> str:
    """The sizes below the area, those that have room."""
    axis = [" "] * (width + 12)
    free = 0
    for size in MARKS:
        label = f"{100 * size:g} %"
        place = 6 + round(width * (1 - math.log(size) / math.log(SMALLEST_SIZE))) - len(label) // 2
        place = min(max(place, 4), width + 7 - len(label) // 2)
        if place >= free:
            axis[place : place + len(label)] = label
            free = place + len(label) + 2
    return "".join(axis).rstrip()
