"""Several environments of one task stepped together, so that their actions can be planned as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.environments import Environment, Step


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode of T decisions.

    Attributes:
        observations: `(T + 1, *shape)`, the first before the first action.
        actions: `(T, action_size)` float32, clipped to [-1, 1].
        rewards: `(T,)` float32.
        terminated: False where the time was up.
        exact_return: sum of the rewards before they were rounded to float32; None if not known.
    """

    observations: NDArray[Any]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminated: bool
    exact_return: float | None = None

    @property
    def episode_return(self) -> float:
        """Sum of the rewards in float64."""
        if self.exact_return is not None:
            return self.exact_return
        return float(self.rewards.sum(dtype=np.float64))


class _Episode:
    """A trajectory that grows."""

    def __init__(self, first: NDArray[Any]) -> None:
        self.observations = [first]
        self.actions: list[NDArray[np.float32]] = []
        self.rewards: list[float] = []
        self.terminated = False
        self.over = False

    def add(self, action: NDArray[np.float32], step: Step) -> None:
        self.observations.append(step.observation)
        self.actions.append(action)
        self.rewards.append(step.reward)
        self.terminated = step.terminated
        self.over = step.terminated or step.truncated

    def finish(self) -> Trajectory:
        return Trajectory(
            np.stack(self.observations),
            np.stack(self.actions),
            np.array(self.rewards, np.float32),
            self.terminated,
            sum(self.rewards),
        )


class Lockstep:
    """Steps several environments of one task together, so that their actions can be planned as one batch."""

    def __init__(self, environments: Sequence[Environment]) -> None:
        if not environments:
            raise ValueError("at least one environment is needed")
        self.environments = tuple(environments)

    def run(
        self, seeds: Sequence[int], act: Callable[[NDArray[Any], NDArray[np.intp]], NDArray[Any]]
    ) -> list[Trajectory]:
        """One episode per seed, in waves of as many as there are environments.

        Args:
            seeds: of the episodes; any number of them.
            act: from the observations `(n, *shape)` and the indices `(n,)` into `seeds` of the episodes of
                this wave that still run, to their actions `(n, action_size)`.

        Returns:
            The episodes in the order of `seeds`.
        """
        trajectories: list[Trajectory] = []
        for start in range(0, len(seeds), len(self.environments)):
            wave = seeds[start : start + len(self.environments)]
            trajectories += self._wave(wave, start, act)
        return trajectories

    def _wave(
        self, seeds: Sequence[int], start: int, act: Callable[[NDArray[Any], NDArray[np.intp]], NDArray[Any]]
    ) -> list[Trajectory]:
        pairs = list(zip(self.environments, seeds, strict=False))
        episodes = [_Episode(environment.reset(seed)) for environment, seed in pairs]
        size = self.environments[0].spec.action_size
        while active := [i for i, episode in enumerate(episodes) if not episode.over]:
            observations = np.stack([episodes[i].observations[-1] for i in active])
            given = np.asarray(act(observations, np.array(active) + start), np.float32)
            if given.shape != (len(active), size):
                raise ValueError(f"act gave actions of shape {given.shape}, not {(len(active), size)}")
            for i, action in zip(active, np.clip(given, -1, 1), strict=True):
                episodes[i].add(action, self.environments[i].step(action))
        return [episode.finish() for episode in episodes]


def random_trajectories(environments: Sequence[Environment], seeds: Sequence[int]) -> list[Trajectory]:
    """One episode per seed of actions that are uniform in [-1, 1], drawn from a generator with that seed."""
    generators = [np.random.default_rng(seed) for seed in seeds]
    size = environments[0].spec.action_size if environments else 0

    def act(observations: NDArray[Any], which: NDArray[np.intp]) -> NDArray[Any]:
        return np.stack([generators[i].uniform(-1.0, 1.0, size) for i in which])

    return Lockstep(environments).run(seeds, act)
