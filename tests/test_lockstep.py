"""Episodes played together: the same as played alone, in any number, of any length."""

from __future__ import annotations

import numpy as np
import pytest
from toy_environments import POINT_STEPS, actions_of, play

from agents.environments import make_environment
from agents.lockstep import Lockstep, Trajectory, random_trajectories


def test_lockstep_runs_what_single_environments_run():
    task = "gymnasium:toy_environments:Falls-v0"
    seeds = [11, 3, 2**35, 5, 8, 13, 21]
    plans = {i: actions_of(i, POINT_STEPS, 2).astype(np.float32) for i in range(len(seeds))}
    asked: dict[int, list] = {i: [] for i in plans}

    def act(observations, which):
        assert len(observations) == len(which) <= 3
        for observation, i in zip(observations, which, strict=True):
            asked[int(i)].append(observation)
        return np.stack([plans[int(i)][len(asked[int(i)]) - 1] for i in which])

    trajectories = Lockstep([make_environment(task) for _ in range(3)]).run(seeds, act)
    assert len({len(t.rewards) for t in trajectories}) > 1  # some fall before others
    single = make_environment(task)
    for i, (seed, trajectory) in enumerate(zip(seeds, trajectories, strict=True)):
        observations, rest = play(single, seed, plans[i])
        assert np.array_equal(trajectory.observations, observations)
        assert np.array_equal(asked[i], observations[:-1])
        assert np.array_equal(trajectory.actions, np.clip(plans[i][: len(rest)], -1, 1))
        assert trajectory.actions.dtype == trajectory.rewards.dtype == np.float32
        assert np.array_equal(trajectory.rewards, np.array([r[0] for r in rest], np.float32))
        assert trajectory.episode_return == sum(r[0] for r in rest)
        assert trajectory.terminated is rest[-1][1] is True


def test_lockstep_with_fewer_seeds_than_environments():
    environments = [make_environment("gymnasium:toy_environments:Point-v0") for _ in range(3)]
    assert random_trajectories(environments, []) == []
    (trajectory,) = random_trajectories(environments, [4])
    assert len(trajectory.rewards) == POINT_STEPS
    assert not trajectory.terminated
    expected = np.random.default_rng(4).uniform(-1, 1, (POINT_STEPS, 2)).astype(np.float32)
    assert np.array_equal(trajectory.actions, expected)
    with pytest.raises(ValueError, match="shape"):
        Lockstep(environments).run([0], lambda observations, which: np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least one"):
        Lockstep([])


def test_random_trajectories_do_not_depend_on_how_many_run_together():
    environments = [make_environment("gymnasium:toy_environments:Falls-v0") for _ in range(4)]
    seeds = [0, 1, 2, 3, 4, 5]
    for a, b in zip(
        random_trajectories(environments, seeds), random_trajectories(environments[:1], seeds), strict=True
    ):
        assert np.array_equal(a.observations, b.observations)
        assert np.array_equal(a.actions, b.actions)
        assert a.episode_return == b.episode_return


def test_returns_without_exact_rewards_are_summed_in_float64():
    rewards = np.array([1e8, 1, 1, 1], np.float32)
    trajectory = Trajectory(np.zeros((5, 1)), np.zeros((4, 1), np.float32), rewards, False)
    assert trajectory.episode_return == 1e8 + 3
