"""What following importance costs a training: `python tests/benchmarks/tracker_cost.py --json`.

One training each of the shipped `autoencoder` and `cartpole` agents, on one thread. Blocks of 64 steps take
turns: with the tracker as experiments have it (`base.importance`), and without. `*_step_ms` is the processor
time of a step without it, so that other work of the machine does not count, and `*_overhead` by which share
steps with it take longer, snapshots included; the goal is at most 0.10. `--every` tracks more closely.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace

import torch
from figures import run

from agents.agent import Agent
from agents.autoencoder import Autoencoder
from agents.tdmpc.agent import TDMPC
from components.tracker import USUAL, ImportanceTracker, Tracking
from search.base import TRACE_ROWS, trace_agent
from search.config import load_experiment

BLOCK = 64


class Alternating:
    """A tracker that is there in every second block of steps, and times all of them."""

    def __init__(self, agent: Agent, tracking: Tracking) -> None:
        graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, 0))
        self._inner = ImportanceTracker(graph, agent.model, **asdict(tracking))
        self._step = -1
        self._block_began = 0.0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    @property
    def _there(self) -> bool:
        return self._step // BLOCK % 2 == 1

    def capture(self, loss: str = "model") -> AbstractContextManager[None]:
        if loss == "model":
            if (self._step + 1) % BLOCK == 0:
                now = time.process_time()
                if self._step > 0:
                    self.seconds[self._there].append(now - self._block_began)
                self._block_began = now
            self._step += 1
        return self._inner.capture(loss) if self._there else nullcontext()

    def update(self, loss: str = "model") -> None:
        if self._there:
            self._inner.update(loss)

    def figures(self, name: str) -> dict[str, float]:
        """Of whole pairs of blocks; the first pair warms up."""
        pairs = list(zip(self.seconds[False], self.seconds[True], strict=False))[1:]
        without, with_it = (sum(times) for times in zip(*pairs, strict=True))
        return {
            f"{name}_step_ms": round(1000 * without / (BLOCK * len(pairs)), 3),
            f"{name}_overhead": round(with_it / without - 1, 4),
            f"{name}_steps": BLOCK * 2 * len(pairs),
        }


def autoencoder(tracking: Tracking) -> dict[str, float]:
    """Its whole training."""
    agent = Autoencoder(load_experiment("autoencoder").agent.options)
    tracker = Alternating(agent, tracking)
    agent.train(0, tracker, lambda done, total, note: None)
    return tracker.figures("autoencoder")


def cartpole(tracking: Tracking, steps: int) -> dict[str, float]:
    """Updates on the experience of the first, random episodes."""
    agent = TDMPC(load_experiment("cartpole").agent.options)
    tracker = Alternating(agent, tracking)
    training = agent.start_training(0)
    with _without_learning(training):
        while training.decisions < agent.options["seed_decisions"]:
            training.run_episode()
    agent.model.train()
    for _ in range(steps):
        training._update(tracker)
    return tracker.figures("cartpole")


@contextmanager
def _without_learning(training: object) -> Iterator[None]:
    """Episodes are played and nothing is learnt from them."""
    learn = training._update  # type: ignore[attr-defined]
    training._update = lambda tracker: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        training._update = learn  # type: ignore[attr-defined]


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """Both agents."""
    torch.set_num_threads(1)
    tracking = replace(USUAL, every=options.every)
    return {"every": options.every, **autoencoder(tracking), **cartpole(tracking, options.steps)}


if __name__ == "__main__":
    run(__doc__, measure, every=USUAL.every, steps=BLOCK * 22)
