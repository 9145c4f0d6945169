"""An empirical measure of closed-loop stability: how surely a Lyapunov candidate of the base decreases.

After arXiv 2508.08144, Lyapunov-limited compression of TD-MPC; its text was not available, and the
definitions are ours. A candidate L >= 0 is made from the base alone and is small at the goal: where the
base's closed loop ends up. Along the episodes of any agent, pruned or not, the condition of practical
stability is looked at after every decision k,

    L(k + n) <= max((1 - d) L(k), l),

n the window, d = `DECREASE`, l the level of the goal set: outside of the goal L is lower by a tenth n
decisions later, and what has come to the goal stays. `stability` is the share of decisions at which that
holds.

This is a statistic of some episodes. It certifies nothing: neither is L known to be a Lyapunov function of
the base, nor does a share say what happens from states that no episode visited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.tdmpc.world_model import WorldModel

Values = NDArray[np.float64]
"""Of a candidate, `(T + 1,)` along an episode of T decisions, or of a latent, `(T + 1, latent)`."""

DECREASE = 0.1
"""By what share L falls over a window, d: any decrease at all is there half of the time by noise alone."""

GOAL_SHARE = 0.1
"""The goal set reaches at least this far from the goal, as a share of how far the base's episodes come from:
closer, L is mostly the error of the networks, and a small offset of a pruned agent at rest."""

SETTLED_QUANTILE = 0.95
"""The goal set holds so much of the second half of the base's episodes, in the median episode."""

REFERENCE_EPISODES = 5
"""The last episodes of the base's experience that a candidate is made from."""

RIDGE = 1e-3
"""Of the linear model of the closed loop, over the mean variance of a latent."""

DOUBLINGS = 40
"""2 ** 40 terms of a sum that converges: enough for a spectral radius of 1 - 1e-10."""

RESAMPLES = 1000
"""Of the episodes, for the confidence interval."""

AT_ONCE = 256
"""Observations that are encoded together."""

MEASUREMENTS: Mapping[str, str] = {
    "stability": "share of decisions",
    "stability_low": "share of decisions",
    "stability_high": "share of decisions",
    "lyapunov_decrease": "1/s",
    "lyapunov_decrease_low": "1/s",
    "lyapunov_decrease_high": "1/s",
}
"""What `measure` reports, with units."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A function of observations that is small at the goal.

    Attributes:
        along: L along an episode, `(T + 1,)` >= 0, of its observations `(T + 1, ...)`.
        level: of the goal set, L <= level.
    """

    along: Callable[[Tensor], Values]
    level: float


def value_candidate(world: WorldModel, episodes: Sequence[Tensor]) -> Candidate:
    """How much less the base expects to earn than at its goal: L(o) = max(0, V_goal - V(o)).

    V(o) = min(Q1, Q2)(z, pi(z)), z = h(o). V_goal is a high quantile of V over the second halves of the
    episodes; a maximum would be one lucky error of the networks.

    Args:
        world: of the base.
        episodes: of the base's closed loop: observations `(T + 1, ...)` each.
    """
    values = [_values(world, observations) for observations in episodes]
    goal = float(np.quantile(np.concatenate([_settled(v) for v in values]), SETTLED_QUANTILE))
    below = [np.maximum(goal - v, 0.0) for v in values]
    farthest = max(float(v.max()) for v in below)
    level = max(_settled_level(below), GOAL_SHARE * farthest)
    return Candidate(lambda observations: np.maximum(goal - _values(world, observations), 0.0), level)


def quadratic_candidate(world: WorldModel, episodes: Sequence[Tensor]) -> Candidate:
    """A quadratic form in the latent around the goal: L(o) = (z - z*)' P (z - z*), z = h(o).

    The goal states are those in the goal set of `value_candidate`, z* is their mean. P solves the discrete
    Lyapunov equation A' P A - P = -I of the linear model A of the closed loop among them, where that is
    stable; else it is the inverse of their covariance.

    Args:
        world: of the base.
        episodes: of the base's closed loop: observations `(T + 1, ...)` each.
    """
    value = value_candidate(world, episodes)
    latents = [_latents(world, observations) for observations in episodes]
    goal = [value.along(observations) <= value.level for observations in episodes]
    centre = np.concatenate([z[inside] for z, inside in zip(latents, goal, strict=True)]).mean(axis=0)
    stays = [inside[:-1] & inside[1:] for inside in goal]
    before = np.concatenate([z[:-1][stay] for z, stay in zip(latents, stays, strict=True)]) - centre
    after = np.concatenate([z[1:][stay] for z, stay in zip(latents, stays, strict=True)]) - centre
    form = quadratic_form(before, after)

    def along(observations: Tensor) -> Values:
        away = _latents(world, observations) - centre
        return _at_least_zero(np.einsum("ti,ij,tj->t", away, form, away))

    squares = [along(observations) for observations in episodes]
    farthest = max(float(square.max()) for square in squares)
    # The same distance as that of the value, squared.
    return Candidate(along, max(_settled_level(squares), GOAL_SHARE**2 * farthest))


def quadratic_form(before: Values, after: Values) -> Values:
    """P of a quadratic Lyapunov function of the linear system that takes `before` to `after`.

    Args:
        before, after: deviations from the goal and what they become, `(n, size)` each; n may be 0.

    Returns:
        Symmetric and positive definite, `(size, size)`: see `quadratic_candidate`.
    """
    size = before.shape[1]
    covariance = before.T @ before / max(len(before), 1)
    ridge = RIDGE * (np.trace(covariance) / size or 1.0) * np.eye(size)
    # Rows are states: after = before A', so that A' is what least squares gives.
    fitted = np.linalg.solve(covariance + ridge, before.T @ after / max(len(before), 1))
    dynamics = fitted.T.astype(np.float64)
    if np.abs(np.linalg.eigvals(dynamics)).max() < 1.0:
        return lyapunov_solution(dynamics, np.eye(size))
    inverse = np.linalg.inv(covariance + ridge).astype(np.float64)
    return (inverse + inverse.T) / 2


def lyapunov_solution(dynamics: Values, weight: Values) -> Values:
    """P with A' P A - P = -Q, the sum over k of (A')^k Q A^k, by doubling (Smith, 1968).

    Args:
        dynamics: A, of spectral radius below 1.
        weight: Q, symmetric and positive definite.
    """
    solution, power = weight.copy(), dynamics.copy()
    for _ in range(DOUBLINGS):
        solution = solution + power.T @ solution @ power
        power = power @ power
    return (solution + solution.T) / 2


def measure(
    candidate: Candidate, episodes: Sequence[Tensor], window: int, seconds: float
) -> dict[str, float]:
    """The stability of the closed loop that made these episodes, an empirical measure.

    Args:
        candidate: of the base.
        episodes: observations `(T + 1, ...)` each, at least one, T >= 1.
        window: decisions after which L has to have fallen, n.
        seconds: of a decision.

    Returns:
        `stability`, the mean over episodes of `share_decreasing`; `stability_low` and `stability_high`, its
        95 % interval by the bootstrap over episodes, which are what is independent of one another: a point
        where all are alike, however few; `lyapunov_decrease`, the mean of `decrease_rate` over the episodes
        that were outside of the goal, 0 where none was; and its interval, in the same way.
    """
    along = [candidate.along(observations) for observations in episodes]
    shares = np.array([share_decreasing(values, candidate.level, window) for values in along])
    rates = [decrease_rate(values, candidate.level, window, seconds) for values in along]
    known = np.array([rate for rate in rates if rate is not None] or [0.0])
    found: dict[str, float] = {}
    for name, values in (("stability", shares), ("lyapunov_decrease", known)):
        mean = float(values.mean())
        low, high = bootstrap_interval(values)
        found |= {name: mean, f"{name}_low": min(low, mean), f"{name}_high": max(high, mean)}
    return found


def share_decreasing(values: Values, level: float, window: int) -> float:
    """The share of decisions of an episode after which L(k + n) <= max((1 - d) L(k), level).

    Args:
        values: L along the episode, `(T + 1,)`.
        level: of the goal set.
        window: n; in an episode that is shorter, its whole length. Decisions whose window reaches beyond the
            end are not looked at.
    """
    before, after = _windows(values, window)
    return float((after <= np.maximum((1 - DECREASE) * before, level)).mean())


def decrease_rate(values: Values, level: float, window: int, seconds: float) -> float | None:
    """The mean of log(L(k) / L(k + n)) / (n seconds) over the decisions outside of the goal set, in 1/s.

    The rate of an exponential decrease, negative where L grows. What comes to the goal counts as having come
    to its level. None where the episode is in the goal all along.
    """
    before, after = _windows(values, window)
    outside = before > level
    if not outside.any():
        return None
    floor = max(level, float(np.finfo(np.float64).tiny))
    ratios = np.log(before[outside]) - np.log(np.maximum(after[outside], floor))
    return float(ratios.mean() / (min(window, len(values) - 1) * seconds))


def bootstrap_interval(values: Values) -> tuple[float, float]:
    """A 95 % interval of the mean, by resampling; the same for the same numbers."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _windows(values: Values, window: int) -> tuple[Values, Values]:
    """L at the beginning and at the end of every window."""
    n = min(window, len(values) - 1)
    return values[:-n], values[n:]


def _settled(values: Values) -> Values:
    return values[len(values) // 2 :]


def _settled_level(along: Sequence[Values]) -> float:
    """Below it is most of the second half of an episode, in the median episode: one may have gone astray."""
    return float(np.median([np.quantile(_settled(values), SETTLED_QUANTILE) for values in along]))


def _at_least_zero(values: Values) -> Values:
    return np.maximum(values, 0.0)  # a positive definite form, but for rounding


def _values(world: WorldModel, observations: Tensor) -> Values:
    """min(Q1, Q2)(z, pi(z)) of observations."""

    def value(latents: Tensor) -> Tensor:
        return torch.minimum(*world.q_values(latents, world.policy_mean(latents))).squeeze(-1)

    return _batched(world, observations, value)


def _latents(world: WorldModel, observations: Tensor) -> Values:
    return _batched(world, observations, lambda latents: latents)


def _batched(world: WorldModel, observations: Tensor, head: Callable[[Tensor], Tensor]) -> Values:
    with torch.no_grad():
        made = [head(world.encode(rows)) for rows in torch.split(observations, AT_ONCE)]
    found: Values = torch.cat(made).double().cpu().numpy()
    return found
