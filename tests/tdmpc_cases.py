"""World models of TD-MPC with random weights, and both sides' inputs for the same case."""

from __future__ import annotations

import torch
from plain_tdmpc import Draws, Experience, Numbers
from torch import Tensor

from agents.tdmpc.config import TDMPCOptions, elites
from agents.tdmpc.learning import UpdateNoise
from agents.tdmpc.planner import PlannerSettings, PlanNoise
from agents.tdmpc.replay_buffer import Batch
from agents.tdmpc.world_model import WorldModel, dense_widths

OBSERVATION, ACTION = 4, 2

EVEN = {"latent": 5, **{f"{head}.{i}": 7 for head in ("dynamics", "reward", "policy") for i in (0, 2)}}
EVEN |= {"encoder.0": 6, "q1.0": 8, "q1.3": 6, "q2.0": 8, "q2.3": 6}
UNEQUAL_TWINS = {**EVEN, "q1.0": 3, "q1.3": 9, "dynamics.0": 11, "reward.2": 2}
ONES = dict.fromkeys(EVEN, 1)
WIDTHS = {"even": EVEN, "unequal twins": UNEQUAL_TWINS, "ones": ONES}


def normal(*shape: int, seed: int) -> Tensor:
    """Float64, so that every CPU draws the same to the last few bits."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(widths: dict[str, int], seed: int = 0, scale: float = 0.6) -> WorldModel:
    """In float64, every parameter random: nothing is zero as it is at the start of a training."""
    model = WorldModel(widths, (OBSERVATION,), ACTION).double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(scale * normal(*parameter.shape, seed=1000 * seed + i))
    return model


def settings(**changed) -> PlannerSettings:
    chosen = {
        "samples": 24,
        "iterations": 3,
        "horizon": 3,
        "elite_share": 0.25,
        "policy_share": 0.2,
        "temperature": 0.5,
        "momentum": 0.1,
        "discount": 0.97,
        "min_std": 0.07,
        "policy_std": 0.2,
    }
    return PlannerSettings(**{**chosen, **changed})


def numbers_of_plan(chosen: PlannerSettings) -> Numbers:
    """The plain side's numbers for the same planner."""
    return Numbers(
        samples=chosen.samples,
        iterations=chosen.iterations,
        horizon=chosen.horizon,
        elites=elites(chosen.samples, chosen.elite_share),
        policy_trajectories=chosen.policy_trajectories,
        temperature=chosen.temperature,
        momentum=chosen.momentum,
        discount=chosen.discount,
        min_std=chosen.min_std,
        policy_std=chosen.policy_std,
    )


def plan_noise(chosen: PlannerSettings, episodes: int, seed: int) -> PlanNoise:
    """Of one decision, in float64."""
    j, h, n, p = chosen.iterations, chosen.horizon, chosen.samples, chosen.policy_trajectories
    first = 10 * seed
    return PlanNoise(
        samples=normal(j, h, episodes, n, ACTION, seed=first),
        ends=normal(j, episodes, n, ACTION, seed=first + 1),
        policy=normal(h + 1, episodes, p, ACTION, seed=first + 2),
        choice=torch.rand(episodes, generator=torch.Generator().manual_seed(first + 3), dtype=torch.float64),
        exploration=normal(episodes, ACTION, seed=first + 4),
    )


def draws_of(noise: PlanNoise, episode: int) -> Draws:
    """One episode's, for the plain side."""
    return Draws(
        samples=noise.samples[:, :, episode],
        ends=noise.ends[:, episode],
        policy=noise.policy[:-1, episode],
        policy_ends=noise.policy[-1, episode],
        choice=noise.choice[episode],
        exploration=noise.exploration[episode],
    )


def options(**changed) -> TDMPCOptions:
    return TDMPCOptions(**{"task": "cartpole-swingup", "horizon": 3, **changed})


def numbers_of_update(chosen: TDMPCOptions) -> Numbers:
    """The plain side's numbers for the same learner."""
    return Numbers(
        horizon=chosen.horizon,
        discount=chosen.discount,
        policy_std=chosen.min_std,
        rho=chosen.rho,
        consistency=chosen.consistency_weight,
        reward=chosen.reward_weight,
        value=chosen.value_weight,
        learning_rate=chosen.learning_rate,
        gradient_clip=chosen.gradient_clip,
        target_every=chosen.target_every,
        target_rate=chosen.target_rate,
    )


def batch(horizon: int, rows: int, seed: int, reward_scale: float = 1.0) -> Batch:
    """Random subtrajectories in float64; some decisions end the task, importance weights differ."""
    first = 100 + 10 * seed
    return Batch(
        observations=normal(horizon + 1, rows, OBSERVATION, seed=first),
        actions=normal(horizon, rows, ACTION, seed=first + 1).clamp(-1, 1),
        rewards=reward_scale * normal(horizon, rows, seed=first + 2),
        terminated=(normal(horizon, rows, seed=first + 3) > 0.8).double(),
        indices=torch.arange(rows),
        weights=normal(rows, seed=first + 4).abs().clamp(0.1, 1.0),
    )


def experience_of(given: Batch) -> Experience:
    """The same for the plain side."""
    return Experience(given.observations, given.actions, given.rewards, given.terminated, given.weights)


def update_noise(horizon: int, rows: int, seed: int) -> UpdateNoise:
    """In float64."""
    first = 500 + 10 * seed
    return UpdateNoise(
        normal(horizon, rows, ACTION, seed=first), normal(horizon + 1, rows, ACTION, seed=first + 1)
    )


def uniform_widths(chosen: TDMPCOptions, share: float) -> dict[str, int]:
    """Every width of the dense model times `share`, at least 1."""
    return {name: max(1, round(share * size)) for name, size in dense_widths(chosen).items()}
