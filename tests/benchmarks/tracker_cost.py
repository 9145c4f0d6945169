"""What following importance costs a training: `python tests/benchmarks/tracker_cost.py --json`.

Two trainings of the same agent, on one thread, one with the tracker as experiments have it
(`base.importance`) and one without, take turns, 128 steps each. `*_step_ms` is the processor time of a step
without it and `*_overhead` the share by which the other takes longer, snapshots included, of which two turns
in three have one: medians over the turns. The goal is at most 0.10; other work of the machine slows the
tracker more than the training, by the caches. The autoencoder is the shipped `autoencoder` and trains in
full; TD-MPC, the shipped `cartpole`, learns from its first, random episodes. `--every` tracks more closely.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

import torch
from figures import run
from greenlet import getcurrent, greenlet

from agents.agent import UNTRACKED, Agent, Tracker
from agents.autoencoder import Autoencoder
from agents.tdmpc.agent import TDMPC
from components.tracker import USUAL, ImportanceTracker, Tracking
from search.base import TRACE_ROWS, trace_agent
from search.config import load_experiment

BLOCK = 128


class Pausing:
    """A tracker that hands over to the other training after every block of steps."""

    def __init__(self, inner: Tracker) -> None:
        self._inner = inner
        self._step = 0

    def is_due(self, loss: str = "model") -> bool:
        return self._inner.is_due(loss)

    def capture(self, loss: str = "model") -> AbstractContextManager[None]:
        return self._inner.capture(loss)

    def update(self, loss: str = "model") -> None:
        self._inner.update(loss)
        if loss == "model":
            self._step += 1
            if self._step % BLOCK == 0:
                getcurrent().parent.switch()


def tracker_of(agent: Agent, tracking: Tracking | None) -> Pausing:
    """For one training; None follows nothing."""
    if tracking is None:
        return Pausing(UNTRACKED)
    graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, 0))
    return Pausing(ImportanceTracker(graph, agent.model, **asdict(tracking)))


def compare(
    name: str, training: Callable[[Tracking | None], Callable[[], None]], tracking: Tracking
) -> dict[str, float]:
    """Two trainings, block by block.

    Args:
        name: of the figures.
        training: makes one, with or without a tracker.
        tracking: of the one that has one.
    """
    both = {chosen: greenlet(training(chosen)) for chosen in (None, tracking)}
    seconds: dict[Tracking | None, list[float]] = {None: [], tracking: []}
    while not any(one.dead for one in both.values()):
        for chosen, one in both.items():
            start = time.process_time()
            one.switch()
            seconds[chosen].append(time.process_time() - start)
    # The first block, with what comes before it, warms up; after the last there is nothing but the end.
    pairs = list(zip(seconds[None], seconds[tracking], strict=True))[1:-1]
    return {
        f"{name}_step_ms": round(1000 * statistics.median(one for one, _ in pairs) / BLOCK, 3),
        f"{name}_overhead": round(statistics.median(other / one for one, other in pairs) - 1, 4),
        f"{name}_steps": BLOCK * len(pairs),
    }


def autoencoder(tracking: Tracking | None) -> Callable[[], None]:
    """Its whole training."""
    agent = Autoencoder(load_experiment("autoencoder").agent.options)
    tracker = tracker_of(agent, tracking)
    return lambda: agent.train(0, tracker, lambda done, total, note: None)


def cartpole(tracking: Tracking | None, steps: int) -> Callable[[], None]:
    """Updates on the experience of the first, random episodes."""
    agent = TDMPC(load_experiment("cartpole").agent.options)
    tracker = tracker_of(agent, tracking)
    training = agent.start_training(0)
    learn = training._update
    training._update = lambda tracker: None  # type: ignore[method-assign]
    while training.decisions < agent.options["seed_decisions"]:
        training.run_episode()
    agent.model.train()

    def updates() -> None:
        for _ in range(steps):
            learn(tracker)

    return updates


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """Both agents."""
    torch.set_num_threads(1)
    tracking = replace(USUAL, every=options.every)
    return {
        "every": options.every,
        **compare("autoencoder", autoencoder, tracking),
        **compare("cartpole", lambda chosen: cartpole(chosen, options.steps), tracking),
    }


if __name__ == "__main__":
    run(__doc__, measure, every=USUAL.every, steps=BLOCK * 7)
