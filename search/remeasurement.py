"""What the agents of a front reach on test data, measured when the search is over and the machine is free.

Where that takes long, other processes help: `python -m search.remeasurement` is one. It reads a bundle to
measure per line, as a JSON object, and answers each with a line. What it cannot do is done here.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Self

from torch import Tensor

from agents.agent import Progress
from search.bundle import load_bundle
from search.determinism import deterministic
from search.driver import describe
from search.measurement import decision_latency, performance_of
from search.node_checks import usable_cores

WORTH_SECONDS = 10.0
"""Work that is left, in seconds of one process, from which on others are worth their start."""

PATIENCE_SECONDS = 30.0
"""How much longer than the slowest measurement here a helper may take for one."""

MOST_PROCESSES = 8
"""Each takes half a gigabyte."""


@dataclass(frozen=True)
class Candidate:
    """A bundle to be measured.

    Attributes:
        trial: its number.
        bundle: its directory.
        seed: of the trial; generators start from it.
        threads: CPU threads of the trial.
    """

    trial: int
    bundle: str
    seed: int
    threads: int


def performances_on_test(
    candidates: Sequence[Candidate], data: Mapping[str, Tensor] | None, progress: Progress
) -> dict[int, float | str]:
    """Trial -> performance on test data, on the CPU, or in one line why there is none.

    The same bits whichever process measures it.

    Args:
        candidates: what to measure, best begun with the slowest.
        data: of the agents, where it is at hand.
        progress: is told how many are done.
    """
    work = _Work(candidates, progress)
    slowest = 0.0
    with ExitStack() as helpers:
        while not work.done:
            candidate = work.take()
            if candidate is None:
                if not work.wait(slowest + PATIENCE_SECONDS):
                    helpers.close()  # what they had taken is there again
                continue
            began = time.monotonic()
            work.put(candidate, _attempt(candidate, data))
            slowest = max(slowest, time.monotonic() - began)
            if candidate is candidates[0] and slowest * work.left > WORTH_SECONDS:
                for _ in range(min(processes(candidate.threads) - 1, work.left)):
                    helpers.enter_context(_Helper(work))
    return work.found


def _attempt(candidate: Candidate, data: Mapping[str, Tensor] | None) -> float | str:
    try:
        performance = performance_on_test(candidate, data)
    except Exception as error:  # an agent that breaks its simulator costs itself, not the front
        return describe(error)
    return performance if math.isfinite(performance) else f"its performance is {performance}"


def performance_on_test(candidate: Candidate, data: Mapping[str, Tensor] | None = None) -> float:
    """Performance on test data, measured here."""
    agent = load_bundle(candidate.bundle, data=data).agent
    with deterministic(candidate.seed, candidate.threads):
        return performance_of(agent, "test")


def latencies(candidate: Candidate, data: Mapping[str, Tensor] | None) -> dict[str, float]:
    """Latencies of one decision on this machine, which nothing else should keep busy."""
    agent = load_bundle(candidate.bundle, data=data).agent
    with deterministic(candidate.seed, candidate.threads):
        return decision_latency(agent)


def processes(threads: int) -> int:
    """How many processes measure at once, this one included."""
    return max(1, min(usable_cores() // threads, MOST_PROCESSES))


class _Work:
    """Candidates that this process and its helpers take one by one, and what they found."""

    def __init__(self, candidates: Sequence[Candidate], progress: Progress) -> None:
        self.found: dict[int, float | str] = {}
        self._total = len(candidates)
        self._waiting = deque(candidates)
        self._changed = threading.Condition()
        self._progress = progress
        progress(0, self._total, "")

    @property
    def done(self) -> bool:
        return len(self.found) == self._total

    @property
    def left(self) -> int:
        """How many nobody has taken."""
        return len(self._waiting)

    def take(self) -> Candidate | None:
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def put(self, candidate: Candidate, outcome: float | str) -> None:
        with self._changed:
            self.found[candidate.trial] = outcome
            self._progress(len(self.found), self._total, "")
            self._changed.notify_all()

    def give_back(self, candidate: Candidate) -> None:
        with self._changed:
            self._waiting.append(candidate)
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait for others; False if nothing has come of them in so many seconds."""
        with self._changed:
            return bool(self._waiting) or self.done or self._changed.wait(seconds)


class _Helper:
    """Another process that takes part in the work; as a context manager.

    Whatever happens to the process, what it had taken is given back, and it takes nothing more.
    """

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        with suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "search.remeasurement"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                # The modules of this process: agents of the user's own are found as they are here.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )
            self._thread = threading.Thread(target=self._help, args=(self._process,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._thread.join()

    def _help(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError), process:
            while (candidate := self._work.take()) is not None:
                try:
                    print(json.dumps(asdict(candidate)), file=process.stdin, flush=True)
                    outcome = json.loads(process.stdout.readline())
                    if not isinstance(outcome, float | str):
                        raise TypeError
                except (OSError, ValueError, TypeError):
                    self._work.give_back(candidate)
                    return
                self._work.put(candidate, outcome)


def _serve(lines: IO[str]) -> None:
    """What a helper does until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed besides
    for line in lines:
        print(json.dumps(_attempt(Candidate(**json.loads(line)), None)), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.stdin)
