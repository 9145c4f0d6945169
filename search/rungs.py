"""A trial run from rung to rung: it stands still at each until whoever runs it steps on, or ends it there.

A cluster calls a worker step by step, and a trial is one function from beginning to end. So the trial runs in
a greenlet, a second stack on the same thread: a report switches to the caller, the next step switches back.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable

from greenlet import GreenletExit, getcurrent, greenlet

from search.trial_types import TrialResult

logger = logging.getLogger(__name__)

Report = Callable[[TrialResult], None]
"""Called by a trial at every rung with what its result is if it is stopped there; it may never return."""


class SteppedTrial:
    """One trial, to be stepped through by one thread.

    Args:
        run: the whole trial; it is given the `Report` to call at rungs, and returns the result. Ending it at
            a rung raises `GreenletExit`, which is no `Exception`, from the report.
    """

    def __init__(self, run: Callable[[Report], TrialResult]) -> None:
        self._greenlet = greenlet(lambda: run(self._report))
        self._greenlet.gr_context = contextvars.copy_context()

    @property
    def over(self) -> bool:
        """True once the trial has returned, raised or been ended: there is no further step."""
        return bool(self._greenlet.dead)

    def step(self) -> TrialResult:
        """Run to the next rung and return its report, or to the end and return the result: see `over`.

        Raises:
            RuntimeError: the trial is over.
            Exception: whatever the trial raised.
        """
        if self.over:
            raise RuntimeError("the trial is over")
        self._greenlet.parent = getcurrent()
        result: TrialResult = self._greenlet.switch()
        return result

    def end(self) -> None:
        """Unwind a trial that stands at a rung, so that its context managers are left; else nothing.

        What the trial raises meanwhile is logged only: nobody waits for it any more.
        """
        if not self._greenlet:  # not begun, or over
            return
        self._greenlet.parent = getcurrent()
        while not self.over:  # one that catches everything goes on to its next rung, of which there are few
            try:
                self._greenlet.throw(GreenletExit)
            except Exception as error:
                logger.warning("a stopped trial failed to clean up: %s: %s", type(error).__name__, error)

    def _report(self, rung: TrialResult) -> None:
        self._greenlet.parent.switch(rung)
