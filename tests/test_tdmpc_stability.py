"""The empirical stability: closed loops whose decrease is known, the Lyapunov equation, and real episodes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from agent_contract import _pruned, _trained
from hypothesis import given
from hypothesis import strategies as st
from test_tdmpc_agent import SMALL, TINY, make_small, make_tiny
from toy_environments import POINT_STEPS

from agents.agent import measurements
from agents.tdmpc import stability
from agents.tdmpc.agent import TDMPC
from agents.tdmpc.episodes import Returns
from agents.tdmpc.stability import (
    Candidate,
    bootstrap_interval,
    decrease_rate,
    lyapunov_solution,
    measure,
    quadratic_candidate,
    quadratic_form,
    share_decreasing,
    value_candidate,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SQUARE = Candidate(lambda observations: (observations.double() ** 2).sum(dim=1).numpy(), level=0.0)


def linear(factor: float, start: float = 1.0, decisions: int = 40) -> torch.Tensor:
    """x+ = factor x, observed as it is."""
    return torch.tensor([[start * factor**k] for k in range(decisions + 1)], dtype=torch.float64)


class Line:
    """A world model whose latent is the observation, and whose value is what the test says."""

    def __init__(self, value=lambda latents: -latents.abs().sum(dim=1, keepdim=True)) -> None:
        self.value = value

    def encode(self, observations):
        return observations

    def policy_mean(self, latents):
        return latents

    def q_values(self, latents, actions):
        return self.value(latents), self.value(latents) + latents[:, :1]


# --- closed loops that are known


@given(st.floats(0.1, 0.97), st.integers(1, 10), st.floats(0.01, 2.0))
def test_a_linear_loop_decreases_at_its_own_rate(factor: float, window: int, seconds: float) -> None:
    found = measure(SQUARE, [linear(factor), linear(factor, -3.0)], window, seconds)
    enough = factor ** (2 * window) <= 1 - stability.DECREASE
    assert found["stability"] == found["stability_low"] == found["stability_high"] == float(enough)
    assert found["lyapunov_decrease"] == pytest.approx(-2 * math.log(factor) / seconds, rel=1e-9)


def test_the_rates_interval_reaches_from_the_slowest_to_the_fastest_of_two() -> None:
    found = measure(SQUARE, [linear(0.5), linear(0.8)], 5, 0.1)
    slow, fast = (-2 * math.log(factor) / 0.1 for factor in (0.8, 0.5))
    bounds = [found[f"lyapunov_decrease{end}"] for end in ("_low", "", "_high")]
    assert bounds == pytest.approx([slow, (slow + fast) / 2, fast])


@pytest.mark.parametrize("factor", [1.0, 1.02, 1.5, -1.1])
def test_a_loop_that_diverges_or_stands_still_has_none(factor: float) -> None:
    found = measure(SQUARE, [linear(factor), linear(factor, 0.2)], 5, 0.1)
    assert found["stability"] == found["stability_high"] == 0.0
    assert found["lyapunov_decrease"] == pytest.approx(-2 * math.log(abs(factor)) / 0.1, abs=1e-9)


def test_what_reaches_the_goal_and_stays_is_stable_and_what_leaves_is_not() -> None:
    level, window = 1.0, 2
    comes = np.array([9.0, 8.5, 4.0, 0.9, 0.2, 0.99, 0.1])
    assert share_decreasing(comes, level, window) == 1.0
    rests = np.array([0.5, 0.1, 0.9, 0.2])
    assert share_decreasing(rests, level, window) == 1.0
    assert decrease_rate(rests, level, window, 1.0) is None
    leaves = np.array([0.5, 0.5, 0.5, 2.0, 2.0, 2.0])  # windows: 0-2 good, 1-3, 2-4, 3-5 bad
    assert share_decreasing(leaves, level, window) == 0.25
    # Nothing is gained by being farther within the goal than its level.
    assert decrease_rate(np.array([4.0, 4.0, 1e-12]), level, 2, 0.5) == pytest.approx(math.log(4.0) / 1.0)


def test_shares_are_those_that_brute_force_counts() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = generator.exponential(size=generator.integers(2, 30))
        level, window = generator.exponential() / 2, int(generator.integers(1, 12))
        n = min(window, len(values) - 1)
        held, rates = [], []
        for k in range(len(values) - n):
            held.append(values[k + n] <= 0.9 * values[k] or values[k + n] <= level)
            if values[k] > level:
                rates.append(math.log(values[k] / max(values[k + n], level)) / (n * 0.1))
        assert share_decreasing(values, level, window) == pytest.approx(sum(held) / len(held))
        rate = decrease_rate(values, level, window, 0.1)
        assert rate == (pytest.approx(sum(rates) / len(rates)) if rates else None)


def test_episodes_weigh_alike_however_long() -> None:
    found = measure(SQUARE, [linear(0.5, decisions=6), linear(1.5, decisions=200)], 5, 1.0)
    assert found["stability"] == 0.5
    assert measure(SQUARE, [linear(0.5, decisions=1)], 5, 1.0)["stability"] == 1.0
    at_rest = measure(Candidate(SQUARE.along, level=4.0), [linear(0.5)], 5, 1.0)
    assert (at_rest["stability"], at_rest["lyapunov_decrease"]) == (1.0, 0.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_interval_holds_the_mean_and_repeats(shares: list[float]) -> None:
    low, high = bootstrap_interval(np.array(shares))
    assert (low, high) == bootstrap_interval(np.array(shares))
    assert min(shares) - 1e-12 <= low <= high <= max(shares) + 1e-12
    if len(set(shares)) == 1:
        assert low == pytest.approx(high)


def test_the_interval_is_that_of_many_episodes() -> None:
    shares = (np.random.default_rng(1).random(400) < 0.7).astype(float)
    low, high = bootstrap_interval(shares)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert (low, high) == pytest.approx((shares.mean() - half, shares.mean() + half), abs=0.012)


# --- candidates


def stable_matrix(size: int, seed: int, radius: float = 0.9) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(size, size))
    return radius * matrix / np.abs(np.linalg.eigvals(matrix)).max()


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("radius", [0.0, 0.5, 0.999])
def test_the_solution_of_the_lyapunov_equation_is_that_of_a_linear_system(size: int, radius: float) -> None:
    dynamics = stable_matrix(size, seed=size, radius=radius)
    root = np.random.default_rng(9).normal(size=(size, size))
    weight = root @ root.T + np.eye(size)
    # vec(A' P A) = (A' x A') vec(P): brute force.
    kronecker = np.kron(dynamics.T, dynamics.T) - np.eye(size * size)
    expected = np.linalg.solve(kronecker, -weight.flatten()).reshape(size, size)
    np.testing.assert_allclose(lyapunov_solution(dynamics, weight), expected, rtol=1e-8)


def test_the_form_of_a_linear_system_decreases_along_it() -> None:
    dynamics = stable_matrix(4, seed=2, radius=0.95)
    before = np.random.default_rng(3).normal(size=(2000, 4))
    after = before @ dynamics.T
    form = quadratic_form(before, after)
    assert np.linalg.eigvalsh(form).min() > 0
    np.testing.assert_allclose(form, lyapunov_solution(dynamics, np.eye(4)), rtol=0.05)
    now, then = (np.einsum("ni,ij,nj->n", rows, form, rows) for rows in (before, after))
    assert (then < now).all()
    assert (np.square(after).sum(1) > np.square(before).sum(1)).any(), "the plain norm does not decrease"


def test_the_form_of_an_unstable_system_is_the_inverse_covariance() -> None:
    scales = np.array([1.0, 5.0])
    before = scales * np.random.default_rng(3).normal(size=(5000, 2))
    form = quadratic_form(before, 1.1 * before)
    np.testing.assert_allclose(np.diag(form), 1 / scales**2, rtol=0.1)
    assert abs(form[0, 1]) < 0.02
    nothing = quadratic_form(np.empty((0, 3)), np.empty((0, 3)))
    np.testing.assert_array_equal(nothing, np.eye(3))


def arrivals(count: int = 5) -> list[torch.Tensor]:
    """Episodes that come to 0 from several sides, in two dimensions."""
    directions = [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.5), (0.3, -1.0), (2.0, 1.0)]
    return [linear(0.8, 10.0, 60) * torch.tensor([d], dtype=torch.float64) for d in directions[:count]]


@pytest.mark.parametrize("make", [value_candidate, quadratic_candidate])
def test_a_candidate_is_small_at_the_goal_and_decreases_along_the_bases_episodes(make) -> None:
    candidate = make(Line(), arrivals())
    found = measure(candidate, arrivals(), 5, 1.0)
    assert found["stability"] == 1.0
    assert found["lyapunov_decrease"] > 0
    assert (candidate.along(torch.zeros(1, 2, dtype=torch.float64)) <= candidate.level).all()
    assert (candidate.along(torch.full((1, 2), 9.0, dtype=torch.float64)) > candidate.level).all()
    away = [episode.flip(0) for episode in arrivals()]
    assert measure(candidate, away, 5, 1.0)["stability_high"] < 0.9
    assert measure(candidate, away, 5, 1.0)["lyapunov_decrease"] < 0


def test_the_value_candidate_is_how_much_less_the_smaller_q_promises() -> None:
    candidate = value_candidate(Line(), arrivals())
    points = torch.tensor([[3.0, -4.0], [-3.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
    assert candidate.along(points) == pytest.approx([7.0, 10.0, 0.0], abs=0.05)
    assert candidate.level == pytest.approx(0.1 * 30.0, rel=0.01), "a tenth of the farthest start"


def test_one_episode_that_goes_astray_does_not_widen_the_goal() -> None:
    astray = linear(1.0, 10.0, 60) * torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    assert value_candidate(Line(), [*arrivals(4), astray]).level == pytest.approx(2.5, rel=0.01)


def test_where_all_values_are_alike_everything_is_the_goal() -> None:
    flat = Line(lambda latents: torch.zeros(len(latents), 1, dtype=torch.float64))
    for make in (value_candidate, quadratic_candidate):
        assert measure(make(flat, arrivals()), arrivals(), 5, 1.0)["stability"] == 1.0


# --- agents


@pytest.fixture(scope="module")
def trained() -> TDMPC:
    agent, _ = _trained(make_small)
    assert isinstance(agent, TDMPC)
    return agent


def student(trained: TDMPC, **changed) -> TDMPC:
    """The trained agent's weights, as if pruned from it."""
    agent = TDMPC({**SMALL, **changed}, data=trained.data())
    agent.load_states({"model": trained.states()["model"]})
    agent.learn_from(trained, {group: torch.arange(size) for group, size in trained.widths.items()})
    return agent


@pytest.mark.parametrize("kind", ["value", "quadratic"])
def test_an_agent_is_measured_by_its_base_and_a_base_by_itself(trained: TDMPC, kind: str) -> None:
    same = student(trained, stability=kind)
    found = same.evaluate("validation")
    assert set(measurements(same)) <= set(found)
    assert found == same.evaluate("validation")
    assert 0 <= found["stability_low"] <= found["stability"] <= found["stability_high"] <= 1
    if kind == "value":
        assert found == trained.evaluate("validation")
    played = trained.play(trained.evaluation_seeds("validation"))
    make = value_candidate if kind == "value" else quadratic_candidate
    candidate = make(trained.model, trained._replay.last_episodes(stability.REFERENCE_EPISODES))
    by_hand = measure(
        candidate,
        [torch.as_tensor(episode.observations) for episode in played],
        5,
        trained.spec.control_step_s or 1.0,
    )
    assert {name: found[name] for name in by_hand} == by_hand


def test_returns_are_the_same_bits_with_and_without(trained: TDMPC, monkeypatch) -> None:
    for split in ("validation", "test"):
        without = student(trained, stability="none").evaluate(split)
        found = student(trained).evaluate(split)
        assert not set(without) & set(stability.MEASUREMENTS)
        assert without == {name: found[name] for name in without}
        played = trained.play(trained.evaluation_seeds(split))
        assert found["return"] == Returns.of(played).mean
    steps = []
    environment = trained._episodes._environments[0]
    step = type(environment).step
    monkeypatch.setattr(type(environment), "step", lambda self, a: steps.append(1) or step(self, a))
    student(trained, stability="none").evaluate("validation")
    before = len(steps)
    student(trained).evaluate("validation")
    assert len(steps) == 2 * before, "no further environment steps"


def test_a_wrecked_agent_is_told_from_a_good_one(trained: TDMPC) -> None:
    good = student(trained).evaluate("test")
    wrecked = student(trained)
    away = trained.act
    wrecked.act = lambda inputs, memory=None: -away(inputs, memory)  # type: ignore[method-assign]
    bad = wrecked.evaluate("test")
    assert bad["return"] < good["return"]
    assert bad["stability_high"] < good["stability_low"]
    assert bad["lyapunov_decrease"] < good["lyapunov_decrease"]


def test_without_a_base_there_is_none(trained: TDMPC) -> None:
    reloaded = TDMPC(SMALL, data=trained.data())
    reloaded.load_states({"model": trained.states()["model"]})
    alone = reloaded.evaluate("validation")
    assert not set(alone) & set(stability.MEASUREMENTS)
    assert alone["return"] == trained.evaluate("validation")["return"]
    assert not set(TDMPC(TINY).evaluate("validation")) & set(stability.MEASUREMENTS)
    assert not set(trained.evaluate("validation", policy_only=True)) & set(stability.MEASUREMENTS)


def test_options_of_another_kind_report_nothing_and_say_so() -> None:
    assert "stability" in measurements(TDMPC(TINY))
    without = TDMPC({**TINY, "stability": "none"})
    assert set(measurements(without)) == {"return_standard_error", "worst_return"}


def test_a_candidate_is_made_anew_when_the_weights_change(trained: TDMPC) -> None:
    agent = TDMPC(SMALL, data=trained.data())
    agent.load_states(trained.states())
    first = agent._current_lyapunov("value")
    assert agent._current_lyapunov("value") is first
    agent.load_states(trained.states())
    second = agent._current_lyapunov("value")
    assert second is not first
    assert second.level == first.level
    assert agent._current_lyapunov("quadratic").level != first.level


def test_a_pruned_agent_told_of_its_base_reports_all_that_it_names() -> None:
    pruned, _ = _pruned(make_tiny, 0)
    assert set(measurements(pruned)) <= set(pruned.evaluate("validation"))


def test_the_last_episodes_are_those_that_were_played_last(trained: TDMPC) -> None:
    replay = trained._replay
    episodes = replay.last_episodes(3)
    stored = replay._column("observations")
    assert torch.equal(torch.cat(episodes), stored[-sum(map(len, episodes)) :])
    assert {len(episode) for episode in episodes} == {POINT_STEPS + 1}
    assert len(replay.last_episodes(10_000)) == replay.episodes
