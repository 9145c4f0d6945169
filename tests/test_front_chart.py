"""The front as text: heights and places of a known front."""

from __future__ import annotations

import math
import re

from search.front_chart import EIGHTHS, front_chart


def heights(lines: list[str], height: int) -> list[int]:
    """Filled eighths of every column."""
    columns = zip(*(line[6:] for line in lines[:height]), strict=True)
    return [sum(EIGHTHS.index(sign) for sign in column) for column in columns]


def test_an_area_is_as_high_as_the_best_retention_at_that_size() -> None:
    sizes, retention = [0.01, 0.1, 0.1, 1.0], [0.25, 0.5, 0.4, 1.0]
    width, height = 53, 4
    found = heights(front_chart(sizes, retention, width, height), height)
    assert len(found) == width
    for column, eighths in enumerate(found):
        size = math.exp(math.log(0.005) * (1 - (column + 1) / width))
        best = max((r for s, r in zip(sizes, retention, strict=True) if s <= size * 1.0001), default=0)
        assert eighths == best * height * 8
    assert found[-1] == height * 8
    assert set(found) == {0, 8, 16, 32}


def test_what_is_outside_is_drawn_at_the_edge() -> None:
    assert heights(front_chart([0.001], [1.7], 5, 2), 2) == [16] * 5
    assert heights(front_chart([0.001], [-0.3], 5, 2), 2) == [0] * 5
    assert heights(front_chart([], [], 5, 2), 2) == [0] * 5


def test_axes_name_retention_and_sizes() -> None:
    lines = front_chart([0.1], [0.5], 60, 6)
    assert lines[0].startswith(" 1.0 │")
    assert lines[5].startswith(" 0.0 │")
    assert lines[6] == "     └" + "─" * 60
    marks = ["0.5 %", "1 %", "5 %", "10 %", "50 %", "100 %"]
    found = {match[0]: match.start() for match in re.finditer(r"[\d.]+ %", lines[7])}
    places = [found[mark] for mark in marks]
    assert places == sorted(places)
    assert max(map(len, lines)) <= 72
    # 10 % stands below the column from which on the area is filled.
    first = lines[5].index(next(sign for sign in lines[5][6:] if sign != " "))
    assert abs(first - (found["10 %"] + 2)) <= 1


def test_narrow_ones_leave_out_sizes_that_have_no_room() -> None:
    for width in (8, 15, 30):
        axis = front_chart([0.1], [0.5], width)[-1]
        assert "  " in axis.strip() or len(axis.split("%")) <= 3
        assert len(axis) <= width + 12
