"""TD-MPC's planner, which plans all episodes in the same tensors, against the plain one of one episode."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plain_tdmpc
import pytest
import torch
from plain_tdmpc import Plain
from tdmpc_cases import (
    ACTION,
    EVEN,
    OBSERVATION,
    UNEQUAL_TWINS,
    WIDTHS,
    draws_of,
    normal,
    numbers_of_plan,
    plan_noise,
    settings,
    world,
)
from torch import nn

from agents.environments import make_environment
from agents.tdmpc import planner as planner_module
from agents.tdmpc.agent import TDMPC
from agents.tdmpc.episodes import Episodes
from agents.tdmpc.planner import PackedModel, PlanMemory, Planner, PlanNoise
from agents.tdmpc.world_model import WorldModel

EPISODES, DECISIONS = 3, 4
CLOSE = {"rtol": 0, "atol": 1e-10}

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equal_plans(model, chosen, explore=False, episodes=EPISODES):
    """Over several decisions, each beginning with the means of the one before."""
    ours, plain = Planner(model, chosen), Plain(model.state_dict(), numbers_of_plan(chosen))
    before, plain_before = None, [None] * episodes
    for decision in range(DECISIONS):
        observations = normal(episodes, OBSERVATION, seed=77 + decision)
        noise = plan_noise(chosen, episodes, seed=decision)
        actions, before = ours.decide(observations, before, noise, explore=explore)
        assert actions.shape == (episodes, ACTION)
        assert before.shape == (episodes, chosen.horizon, ACTION)
        for e in range(episodes):
            wanted, plain_before[e] = plain.plan(
                observations[e], plain_before[e], draws_of(noise, e), explore=explore
            )
            torch.testing.assert_close(actions[e], wanted, **CLOSE)
            torch.testing.assert_close(before[e], plain_before[e], **CLOSE)


@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("horizon", [1, 3, 5])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_plans_as_the_plain_planner(widths, horizon, explore):
    assert_equal_plans(world(widths), settings(horizon=horizon), explore)


@pytest.mark.parametrize(
    "changed",
    [
        {"policy_share": 0.0},
        {"policy_share": 0.9},
        {"elite_share": 0.01},
        {"elite_share": 1.0},
        {"iterations": 1},
        {"momentum": 0.0},
        {"temperature": 5.0},
        {"min_std": 0.5},
        {"discount": 0.5},
    ],
    ids=str,
)
def test_plans_as_the_plain_planner_whatever_the_settings(changed):
    assert_equal_plans(world(EVEN, seed=1), settings(**changed), explore=True)


@pytest.mark.parametrize("widths", [EVEN, UNEQUAL_TWINS])
def test_one_episode_alone_is_planned_as_in_a_batch(widths):
    chosen, model = settings(), world(widths)
    observations, noise = normal(EPISODES, OBSERVATION, seed=5), plan_noise(chosen, EPISODES, seed=5)
    before = normal(EPISODES, chosen.horizon, ACTION, seed=6).clamp(-1, 1)
    actions, means = Planner(model, chosen).decide(observations, before, noise)
    for e in range(EPISODES):
        alone = PlanNoise(
            noise.samples[:, :, e : e + 1],
            noise.ends[:, e : e + 1],
            noise.policy[:, e : e + 1],
            noise.choice[e : e + 1],
            noise.exploration[e : e + 1],
        )
        action, mean = Planner(model, chosen).decide(observations[e : e + 1], before[e : e + 1], alone)
        torch.testing.assert_close(action[0], actions[e], **CLOSE)
        torch.testing.assert_close(mean[0], means[e], **CLOSE)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_blocks_change_nothing(widths, monkeypatch):
    monkeypatch.setattr(planner_module, "BLOCK_SIZE", 1)
    chosen, model = settings(samples=300, iterations=2), world(widths)
    packed = PackedModel(model, None)
    assert packed.block < EPISODES * chosen.samples
    assert EPISODES * chosen.samples % packed.block != 0  # the last block is a smaller one
    assert_equal_plans(model, chosen)


def test_a_value_that_is_no_number_counts_as_zero():
    """Where the sum of an action is large, two hidden units overflow, and the next layer subtracts them."""
    model, chosen = world(EVEN), settings()
    with torch.no_grad():
        for head in (model.reward, model.q1, model.q2):
            head[-1].weight.mul_(0.02)
            head[-1].bias.fill_(0.1)  # zero is less than all other values, one is more
        model.reward[0].weight[:2] = 0.0
        model.reward[0].weight[:2, -ACTION:] = 1.5e308
        model.reward[0].bias[:2] = 0.0
        model.reward[2].weight[:, :2] = 0.0
        model.reward[2].weight[0] = 0.0
        model.reward[2].weight[0, :2] = torch.tensor([1.0, -1.0])
        model.reward[2].bias[0] = 0.0
        rewards = model.reward(normal(99, EVEN["latent"] + ACTION, seed=4).clamp(-1, 1))
        assert 0 < rewards.isnan().double().mean() < 0.5
        assert ((rewards > 0) | rewards.isnan()).all()
    assert_equal_plans(model, chosen)


def test_the_choice_follows_the_weights_of_the_elites():
    """With the highest temperature the best elite acts alone, with none each is as likely as the others."""
    model, observation = world(EVEN), normal(1, OBSERVATION, seed=3)
    for temperature, wanted in ((1e6, 1), (0.0, 6)):
        chosen = settings(temperature=temperature)
        ours, noise = Planner(model, chosen), plan_noise(chosen, 1, seed=2)
        picked = [
            ours.decide(observation, None, replace(noise, choice=torch.tensor([u], dtype=torch.float64)))[0]
            for u in np.linspace(0.001, 0.999, 120)
        ]
        kinds, counts = torch.cat(picked).unique(dim=0, return_counts=True)
        assert len(kinds) == wanted
        assert counts.tolist() == [120 // wanted] * wanted


@pytest.mark.parametrize("choice", [0.0, 1.0 - 2**-53, 1.0])
def test_any_choice_picks_an_elite(choice):
    chosen = settings()
    noise = replace(plan_noise(chosen, 1, seed=2), choice=torch.tensor([choice], dtype=torch.float64))
    actions, _ = Planner(world(EVEN), chosen).decide(normal(1, OBSERVATION, seed=3), None, noise)
    assert torch.isfinite(actions).all()


def test_planning_writes_to_nothing_that_it_is_given():
    chosen, model = settings(), world(EVEN)
    observations, noise = normal(2, OBSERVATION, seed=1), plan_noise(chosen, 2, seed=1)
    before = normal(2, chosen.horizon, ACTION, seed=2)
    given = [observations, before, *vars(noise).values(), *model.state_dict().values()]
    copies = [tensor.clone() for tensor in given]
    Planner(model, chosen).decide(observations, before, noise, explore=True)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


def test_a_planner_keeps_the_weights_that_it_was_made_with():
    chosen, model = settings(), world(EVEN)
    ours = Planner(model, chosen)
    observations, noise = normal(2, OBSERVATION, seed=1), plan_noise(chosen, 2, seed=1)
    actions, means = ours.decide(observations, None, noise)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.3)
    again, same = ours.decide(observations, None, noise)
    assert torch.equal(actions, again)
    assert torch.equal(means, same)


# --- noise and memory ------------------------------------------------------------------------------------


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_an_episodes_noise_does_not_depend_on_the_batch():
    chosen = settings()
    together = PlanNoise.draw(chosen, ACTION, seeded(3, 4, 5))
    for place, seed in ((0, 3), (2, 5)):
        alone = PlanNoise.draw(chosen, ACTION, seeded(seed))
        assert torch.equal(together.samples[:, :, place], alone.samples[:, :, 0])
        assert torch.equal(together.ends[:, place], alone.ends[:, 0])
        assert torch.equal(together.policy[:, place], alone.policy[:, 0])
        assert torch.equal(together.choice[place], alone.choice[0])
        assert torch.equal(together.exploration[place], alone.exploration[0])
    assert not torch.equal(together.samples[:, :, 0], together.samples[:, :, 1])


def test_noise_has_the_shapes_and_the_distribution_that_it_promises():
    chosen = settings(samples=400, policy_share=0.5, horizon=4)
    generators = seeded(1, 2)
    noise = PlanNoise.draw(chosen, ACTION, generators)
    assert noise.samples.shape == (3, 4, 2, 400, ACTION)
    assert noise.ends.shape == (3, 2, 400, ACTION)
    assert noise.policy.shape == (5, 2, 200, ACTION)
    assert noise.exploration.shape == (2, ACTION)
    for part in (noise.samples, noise.ends, noise.policy):
        assert abs(float(part.mean())) < 0.1
        assert abs(float(part.std()) - 1) < 0.05
    assert ((noise.choice >= 0) & (noise.choice < 1)).all()
    assert not torch.equal(PlanNoise.draw(chosen, ACTION, generators).samples, noise.samples)


def test_memory_of_some_episodes_goes_back_to_where_it_came_from():
    memory = PlanMemory.start([1, 2, 3], torch.device("cpu"))
    part = memory.only([2, 0])
    assert part.means is None
    assert part.generators[0] is memory.generators[2]
    part.means = torch.tensor([[[2.0]], [[0.5]]])
    memory.keep(part, [2, 0])
    assert memory.means is not None
    assert memory.means.flatten().tolist() == [0.5, 0.0, 2.0]
    last = memory.only([1, 2])
    assert last.means is not None
    assert last.means.flatten().tolist() == [0.0, 2.0]
    last.means = last.means + 1
    memory.keep(last, [1, 2])
    assert memory.means.flatten().tolist() == [0.5, 1.0, 3.0]
    memory.keep(PlanMemory(memory.generators[:1]), [0])
    assert memory.means.flatten().tolist() == [0.5, 1.0, 3.0]


def test_an_episode_is_planned_alike_with_and_without_others_that_end_before():
    """`only` and `keep`, in the middle of episodes, through `plan`."""
    model, chosen = world(EVEN).float(), settings()
    ours = Planner(model, chosen)
    observations = normal(6, 3, OBSERVATION, seed=8).float()
    memory, kept = PlanMemory.start([7, 8, 9], torch.device("cpu")), [0, 1, 2]
    found = []
    for decision in range(6):
        if decision == 3:
            kept = [0, 2]
        if decision == 5:
            kept = [2]
        if len(kept) == 3:
            actions = ours.plan(observations[decision], memory)
        else:
            part = memory.only(kept)
            actions = ours.plan(observations[decision, kept], part)
            memory.keep(part, kept)
        found.append(actions[kept.index(2)])
    alone = PlanMemory.start([9], torch.device("cpu"))
    for decision in range(6):
        action = ours.plan(observations[decision, 2:], alone)
        torch.testing.assert_close(found[decision], action[0], rtol=0, atol=1e-4)


def test_evaluation_in_lockstep_has_the_returns_of_plain_episodes():
    """Episodes of different lengths; in float64, because rounding may change which samples are elites."""
    options = {"task": "gymnasium:toy_environments:Falls-v0", "samples": 32, "horizon": 2, "iterations": 2}
    agent = TDMPC({**options, "encoder_width": 8, "mlp_width": 8, "latent": 4})
    model = agent.model
    assert isinstance(model, WorldModel)
    with torch.no_grad():
        for i, parameter in enumerate(model.double().parameters()):
            parameter.copy_(0.6 * normal(*parameter.shape, seed=i))
    chosen = settings(samples=32, horizon=2, iterations=2)
    seeds = [11, 12, 13, 14]
    ours = Planner(model, chosen)

    def act(observations, memory):
        return ours.plan(observations.double(), memory)

    episodes = Episodes(agent._options).play(seeds, act, torch.device("cpu"))
    assert len({len(episode.actions) for episode in episodes}) > 1

    class InDouble:
        def __init__(self):
            self.environment = make_environment(options["task"])

        def reset(self, seed):
            return self.environment.reset(seed).astype(np.float64)

        def step(self, action):
            observation, *rest = self.environment.step(action.astype(np.float32))
            return observation.astype(np.float64), *rest

    def draws(generator):
        return draws_of(PlanNoise.draw(chosen, ACTION, [generator]), 0)

    plain = Plain(model.state_dict(), numbers_of_plan(chosen))
    wanted = plain_tdmpc.returns(plain, InDouble(), seeds, draws)
    assert [episode.episode_return for episode in episodes] == pytest.approx(wanted, abs=1e-9)


# --- precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [EVEN, UNEQUAL_TWINS])
def test_bfloat16_plans_nearly_the_same(widths):
    chosen, model = settings(samples=64, temperature=0.1), world(widths, scale=0.4).float()
    observations, noise = normal(EPISODES, OBSERVATION, seed=5).float(), plan_noise(chosen, EPISODES, seed=5)
    exact, low = Planner(model, chosen), Planner(model, chosen, torch.bfloat16)
    _, wanted = exact.decide(observations, None, noise)
    actions, means = low.decide(observations, None, noise)
    assert actions.dtype == means.dtype == torch.float32
    assert 0 < (means - wanted).abs().mean() < 0.1


@pytest.mark.parametrize("widths", [EVEN, UNEQUAL_TWINS])
def test_bfloat16_leaves_the_last_layers_of_rewards_values_and_actions_alone(widths):
    """Their outputs are finer than bfloat16, and their products are those of float32 weights."""
    model = world(widths).float()
    with torch.no_grad():
        for head in (model.reward, model.q1, model.q2, model.policy):
            last = head[-1]
            assert isinstance(last, nn.Linear)
            last.weight.zero_()
            last.bias.fill_(1.001953125)  # lies between two numbers of bfloat16
    packed = PackedModel(model, torch.bfloat16)
    inputs = normal(9, widths["latent"] + ACTION, seed=1).float()
    assert packed.reward(inputs).unique().tolist() == [1.001953125]
    assert packed.q(inputs).unique().tolist() == [1.001953125]
    acted = packed.act(inputs[:, : widths["latent"]], torch.zeros(9, ACTION))
    assert acted.unique().tolist() == pytest.approx([np.tanh(1.001953125)], abs=1e-6)
