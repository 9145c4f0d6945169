"""Numbers with no more digits than anybody reads: a third of the bytes of all of them."""

from __future__ import annotations

import math

DIGITS = 5
"""Significant digits of measured numbers."""


def short(value: float | None, digits: int = DIGITS) -> float | None:
    """A number with few digits; None for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
