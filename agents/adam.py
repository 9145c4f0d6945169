"""What the agents' uses of Adam have in common."""

from __future__ import annotations

import math

WARM_STEPS = 1e6
"""Adam steps after which the moments need no correction for their start at zero."""


def half_cosine(learning_rate: float, step: int, steps: int) -> float:
    """The learning rate at a step: the whole one at the first, falling to 0 along a half cosine."""
    return 0.5 * learning_rate * (1.0 + math.cos(math.pi * step / steps))
