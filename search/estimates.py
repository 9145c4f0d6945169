"""What a trial that was stopped early would have measured, told from its last rung by trials that ran on.

For samplers that model objectives: without it they know nothing of stopped trials and propose the like again.
An estimate is never stored as a measurement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from search.trial_types import TrialResult


LATEST = 1000
"""Complete trials that are remembered."""


class Estimates:
    """Estimates of measurements, better the more complete trials there are."""

    def __init__(self) -> None:
        self._complete: list[TrialResult] = []

    def learn(self, result: TrialResult) -> None:
        """Take in a complete trial; others say nothing of how a rung and the end go together."""
        if result.complete and result.rung_losses:
            self._complete.append(result)
            del self._complete[:-LATEST]

    def of(self, stopped: TrialResult, name: str) -> float | None:
        """A measurement of a stopped trial, where it has none an estimate.

        Linear between the measurements of the complete trials whose rung losses were next below and above at
        its last rung, and that of the nearest one outside of their range. A latency says nothing of how well
        a model does, and goes by the number of parameters instead.

        Returns None where no complete trial reached that rung and measured it.
        """
        known = stopped.measurement(name)
        if known is not None or not stopped.rung_losses:
            return known
        rung, loss = stopped.rung_losses[-1]
        by_size = name.startswith("latency_")
        pairs = sorted(
            (float(result.parameters or 0) if by_size else dict(result.rung_losses)[rung], measured)
            for result in self._complete
            if rung in dict(result.rung_losses) and (measured := result.measurement(name)) is not None
        )
        if not pairs:
            return None
        known_at, measurements = np.array(pairs).T
        return float(np.interp(float(stopped.parameters or 0) if by_size else loss, known_at, measurements))
