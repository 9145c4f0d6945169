"""When how much is pruned, where that happens step by step while a model is trained."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from components.errors import UserError

Curve = Literal["cosine", "cubic"]


@dataclass(frozen=True)
class PruningSchedule:
    """How the pruned share grows from nothing to all that a plan removes.

    With τ in [0, 1] from `start` to `end`, `cubic` has removed 1 - (1 - τ)³ of it (Zhu and Gupta, 2017,
    1710.01878, eq. 1): fast at first, when there is most to spare. `cosine` has removed (1 - cos πτ) / 2:
    slow at both ends.

    Attributes:
        curve: how the share grows.
        start: steps of the training before anything is removed, >= 0.
        end: steps after which the last is removed, >= `start`.
        interval: steps between two removals, >= 1; the last may follow sooner.

    Raises:
        UserError: a value outside its range.
    """

    curve: Curve
    start: int
    end: int
    interval: int

    def __post_init__(self) -> None:
        if self.curve not in ("cosine", "cubic"):
            raise UserError(f"the curve of a schedule is {self.curve!r}: it must be 'cosine' or 'cubic'")
        if self.start < 0 or self.end < self.start:
            raise UserError(f"a schedule from {self.start} to {self.end} steps must have 0 <= start <= end")
        if self.interval < 1:
            raise UserError(f"the interval of a schedule must be at least 1 step, not {self.interval}")

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """After how many steps something is removed, ascending; `end` is the last."""
        return (*range(self.start + self.interval, self.end, self.interval), self.end)

    def share(self, step: int) -> float:
        """What share of all that is to be removed has to be gone after so many steps, in [0, 1].

        Constant between two of `steps`, 0 before the first, 1 from `end` on.
        """
        reached = bisect.bisect_right(self.steps, step)
        if reached == len(self.steps):
            return 1.0
        if reached == 0:
            return 0.0
        tau = (self.steps[reached - 1] - self.start) / (self.end - self.start)
        return (1 - math.cos(math.pi * tau)) / 2 if self.curve == "cosine" else 1 - (1 - tau) ** 3
