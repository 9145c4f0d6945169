"""Where the time of a trial goes."""

from __future__ import annotations

import time

STAGES = ("train", "score", "mix", "slice", "reconstruct", "fine_tune", "report", "evaluate")
"""The stages of a trial; `train` only where it trains its own base, `report` waits at rungs."""


class Stages:
    """A stopwatch that knows which stage of a trial is under way; a stage entered again goes on.

    Attributes:
        current: the stage under way.
        updates: of fine-tuning that were made.
    """

    def __init__(self) -> None:
        self.current = "start"
        self.updates = 0
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds, in the order of `STAGES`, those that were not entered left out."""
        return {stage: self._seconds[stage] for stage in STAGES if stage in self._seconds}

    def enter(self, stage: str) -> None:
        """End the current stage and begin another, one of `STAGES`."""
        self.leave()
        self.current = stage

    def leave(self) -> None:
        """End the current stage."""
        now = time.perf_counter()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self._since = now
