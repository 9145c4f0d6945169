"""Episodes that TD-MPC plays: their seeds, the environments they run in, and how an agent acts along them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.environments import Environment, EnvironmentSpec, make_environment
from agents.lockstep import Lockstep, Trajectory, random_trajectories
from agents.tdmpc.config import TDMPCOptions
from agents.tdmpc.planner import PlanMemory

Stream = Literal["training", "validation", "test", "on_policy"]
STREAMS: tuple[Stream, ...] = ("training", "validation", "test", "on_policy")
"""Episodes of different streams never share a seed."""


ENVIRONMENT = {"task", "action_repeat", "observation", "frame_stack", "image_side", "step_limit"}
"""The options that `make_environment` takes."""


def episode_seeds(stream: Stream, seed: int, count: int, *, first: int = 0) -> list[int]:
    """Seeds of episodes `first` to `first + count` of a stream."""
    number = STREAMS.index(stream)
    return [
        int(np.random.SeedSequence([number, seed, i]).generate_state(1)[0])
        for i in range(first, first + count)
    ]


Act = Callable[[Tensor, PlanMemory], Tensor]
"""Actions `(n, actions)` for observations `(n, ...)` and the memory of the same episodes."""


class Episodes:
    """Plays episodes of one task in lockstep; environments are made as they are needed and kept.

    Args:
        options: task, observation and limits of it are used.
    """

    def __init__(self, options: TDMPCOptions) -> None:
        self._options = options
        self._environments: list[Environment] = [self._make()]

    @property
    def spec(self) -> EnvironmentSpec:
        """Of the task."""
        return self._environments[0].spec

    def play(
        self,
        seeds: Sequence[int],
        act: Act,
        device: torch.device,
    ) -> list[Trajectory]:
        """One episode for every seed, which is the seed of the environment and of the planner's noise.

        Args:
            seeds: of the episodes.
            act: actions `(n, actions)` for observations `(n, ...)` of the episodes that still run, and their
                memory, which it takes on to the next decision.
            device: of the observations and of the noise.
        """
        memory = PlanMemory.start(seeds, device)

        def decide(observations: NDArray[Any], which: NDArray[Any]) -> NDArray[Any]:
            if len(which) == len(seeds):
                actions = act(torch.as_tensor(observations, device=device), memory)
            else:
                part = memory.only(which.tolist())
                actions = act(torch.as_tensor(observations, device=device), part)
                memory.keep(part, which.tolist())
            return actions.detach().cpu().numpy()

        return Lockstep(self._enough(len(seeds))).run(seeds, decide)

    def play_randomly(self, seeds: Sequence[int]) -> list[Trajectory]:
        """One episode of random actions for every seed."""
        return random_trajectories(self._enough(len(seeds)), seeds)

    def _enough(self, count: int) -> list[Environment]:
        while len(self._environments) < count:
            self._environments.append(self._make())
        return self._environments[:count]

    def _make(self) -> Environment:
        return make_environment(**self._options.model_dump(include=ENVIRONMENT))


def episodes_of(options: TDMPCOptions) -> Episodes:
    """The episodes of a task, kept for the life of the process: a search builds an agent for every trial.

    Sharing is safe because an episode depends on its seed and its actions alone.
    """
    return _kept_episodes(TDMPCOptions(**options.model_dump(include=ENVIRONMENT)))


@lru_cache(maxsize=4)
def _kept_episodes(environment: TDMPCOptions) -> Episodes:
    return Episodes(environment)


@dataclass(frozen=True)
class Returns:
    """Episode returns, higher is better.

    Attributes:
        mean: over the episodes.
        standard_error: of the mean; 0 for one episode.
        worst: the lowest.
    """

    mean: float
    standard_error: float
    worst: float

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Returns:
        """Of some episodes, at least one."""
        values = np.array([trajectory.episode_return for trajectory in trajectories], dtype=np.float64)
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
        return cls(float(values.mean()), error, float(values.min()))
