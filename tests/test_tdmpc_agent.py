"""The TD-MPC agent: what every agent promises, its episodes, its planning memory and its repairs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from agent_contract import AgentContract, _pruned, _silent, _trained
from toy_environments import POINT_STEPS

from agents.agent import agent_class, measurements
from agents.environments import Environment, make_environment
from agents.tdmpc.agent import TDMPC
from agents.tdmpc.config import TDMPCOptions
from agents.tdmpc.episodes import Episodes, episode_seeds
from agents.tdmpc.planner import PlanMemory
from components import UserError
from components.tracker import ImportanceTracker
from search.base import trace_agent

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = "gymnasium:toy_environments:{}-v0"
SMALL = {
    "task": TASK.format("Point"),
    "encoder_width": 24,
    "mlp_width": 32,
    "latent": 8,
    "steps": 400,
    "seed_decisions": 100,
    "batch_size": 32,
    "learning_rate": 3e-3,
    "discount": 0.8,
    "target_rate": 0.05,
    "horizon": 3,
    "exploration_decisions": 300,
    "horizon_decisions": 200,
    "samples": 32,
    "iterations": 3,
    "validation_episodes": 5,
    "test_episodes": 6,
    "stored_decisions": 300,
    "distillation_sequences": 256,
    "distillation_batch_size": 64,
    "on_policy_episodes": 1,
}
TINY = {
    **SMALL,
    "encoder_width": 8,
    "mlp_width": 10,
    "latent": 5,
    "steps": 60,
    "seed_decisions": 40,
    "batch_size": 8,
    "samples": 12,
    "iterations": 2,
    "validation_episodes": 2,
    "test_episodes": 3,
    "stored_decisions": 45,
    "distillation_sequences": 32,
    "distillation_batch_size": 16,
}
PIXELS = {
    **TINY,
    "task": TASK.format("Picture"),
    "observation": "pixels",
    "image_side": 64,
    "frame_stack": 2,
    "channels": 4,
    "steps": 40,
    "seed_decisions": 20,
}


def make_small(widths=None, data=None):
    return TDMPC(SMALL, widths, data)


def make_tiny(widths=None, data=None):
    return TDMPC(TINY, widths, data)


def make_pixels(widths=None, data=None):
    return TDMPC(PIXELS, widths, data)


class TestTDMPC(AgentContract):
    make_agent = staticmethod(make_small)


def test_it_is_built_in():
    assert agent_class("tdmpc") is TDMPC


def student(make=make_tiny, seed=0):
    """A pruned agent of its own; the base is shared, and not to be changed."""
    return _pruned(make, seed)[0]


def base(make=make_tiny):
    return _trained(make)[0]


def equal_states(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[section][name])
        for section, state in first.items()
        for name, tensor in state.items()
    )


# --- episodes --------------------------------------------------------------------------------------------


def alone(agent, seed):
    """One episode, one decision after the other, without any of the package's loops."""
    chosen = agent.options
    environment = make_environment(chosen["task"])
    memory = PlanMemory.start([seed], torch.device("cpu"))
    observation, rewards, actions, over = environment.reset(seed), [], [], False
    while not over:
        action = agent.act(torch.as_tensor(observation)[None], memory)[0].numpy()
        observation, reward, terminated, truncated = environment.step(action)
        rewards.append(reward)
        actions.append(action)
        over = terminated or truncated
    return rewards, np.stack(actions)


@pytest.mark.parametrize("task", ["Point", "Falls"])
def test_lockstep_plays_what_is_played_one_at_a_time(task):
    """Also where episodes end early, at different times."""
    agent = TDMPC({**SMALL, "task": TASK.format(task)})
    agent.load_states(_trained(make_small)[1])
    seeds = episode_seeds("validation", 0, 6)
    together = agent.play(seeds)
    assert len({len(trajectory.actions) for trajectory in together}) > (1 if task == "Falls" else 0)
    for seed, trajectory in zip(seeds, together, strict=True):
        rewards, actions = alone(agent, seed)
        np.testing.assert_allclose(trajectory.actions, actions, atol=1e-3)
        assert trajectory.episode_return == pytest.approx(sum(rewards), abs=1e-2)
        assert trajectory.terminated == (task == "Falls")


def test_an_evaluation_is_the_statistics_of_its_episodes():
    agent = base(make_small)
    for split, count in (("validation", 5), ("test", 6)):
        returns = [sum(alone(agent, seed)[0]) for seed in episode_seeds(split, 0, count)]
        measured = agent.evaluate(split)
        assert set(measured) == {"return", *measurements(agent)}
        mean = sum(returns) / count
        variance = sum((value - mean) ** 2 for value in returns) / (count - 1)
        assert measured["return"] == pytest.approx(mean, abs=1e-2)
        assert measured["return_standard_error"] == pytest.approx(math.sqrt(variance / count), abs=1e-2)
        assert measured["worst_return"] == pytest.approx(min(returns), abs=1e-2)


def test_policy_only_acts_by_the_policys_mean():
    agent = base(make_small)
    measured = agent.evaluate("validation", policy_only=True)
    assert set(measured) == {
        "policy_only_return",
        "policy_only_return_standard_error",
        "policy_only_worst_return",
    }
    environment, returns = make_environment(SMALL["task"]), []
    for seed in episode_seeds("validation", 0, 5):
        observation, total, over = environment.reset(seed), 0.0, False
        while not over:
            with torch.no_grad():
                z = agent.model.encoder(torch.as_tensor(observation)[None])
                action = torch.tanh(agent.model.policy(z))[0].numpy()
            observation, reward, terminated, truncated = environment.step(action)
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert measured["policy_only_return"] == pytest.approx(sum(returns) / 5, abs=1e-3)
    assert measured["policy_only_worst_return"] == pytest.approx(min(returns), abs=1e-3)
    assert measured["policy_only_return"] != agent.evaluate("validation")["return"]


def reset_seeds(monkeypatch):
    """The seeds of all episodes from here on."""
    seen = []
    reset = Environment.reset
    monkeypatch.setattr(Environment, "reset", lambda self, seed: seen.append(seed) or reset(self, seed))
    return seen


def test_all_agents_of_a_task_meet_the_same_episodes(monkeypatch):
    dense, narrow = base(), student()
    other = TDMPC({**TINY, "samples": 7, "latent": 3})
    narrow.evaluate("validation")  # whatever happened before does not matter
    seen = reset_seeds(monkeypatch)
    episodes = []
    for measure in (
        lambda: dense.evaluate("validation"),
        lambda: narrow.evaluate("validation"),
        lambda: other.evaluate("validation"),
        lambda: dense.evaluate("validation", policy_only=True),
        lambda: dense.trivial("validation"),
    ):
        measure()
        episodes.append(tuple(seen))
        seen.clear()
    assert set(episodes) == {tuple(episode_seeds("validation", 0, 2))}


def test_validation_test_and_training_share_no_episode(monkeypatch):
    agent = make_tiny()
    seen = reset_seeds(monkeypatch)
    agent.train(0, None, _silent)
    trained_on = set(seen)
    assert not trained_on & set(episode_seeds("validation", 0, 100))
    # The examples of `act` are an episode of the test, and teach nothing.
    assert trained_on & set(episode_seeds("test", 0, 100)) == set(episode_seeds("test", 0, 1))
    assert not set(episode_seeds("validation", 0, 100)) & set(episode_seeds("test", 0, 100))


def test_episodes_may_be_played_by_anyone():
    agent = base()
    seeds = agent.evaluation_seeds("test")
    assert seeds == episode_seeds("test", 0, 3)
    assert len(agent.evaluation_seeds("validation")) == 2
    planned = [trajectory.episode_return for trajectory in agent.play(seeds)]
    assert agent.evaluate("test")["return"] == pytest.approx(sum(planned) / 3, rel=1e-12)
    still = agent.play(seeds, lambda observations, memory: torch.zeros(len(observations), 2))
    environment = make_environment(TINY["task"])
    for seed, trajectory in zip(seeds, still, strict=True):
        environment.reset(seed)
        total = sum(environment.step(np.zeros(2)).reward for _ in range(POINT_STEPS))
        assert trajectory.episode_return == pytest.approx(total, abs=1e-9)


def test_trivial_is_the_return_of_random_actions():
    environment, returns = make_environment(TINY["task"]), []
    for seed in episode_seeds("test", 0, 3):
        random = np.random.default_rng(seed)
        environment.reset(seed)
        returns.append(sum(environment.step(random.uniform(-1, 1, 2)).reward for _ in range(POINT_STEPS)))
    assert make_tiny().trivial("test") == pytest.approx(sum(returns) / 3, abs=1e-4)


# --- acting ----------------------------------------------------------------------------------------------


def test_memory_goes_on_from_the_plan_before():
    agent = base(make_small)
    inputs = agent.example_inputs(3)
    cold = agent.act(inputs)
    memory = PlanMemory.start([0, 0, 0], torch.device("cpu"))
    assert torch.equal(agent.act(inputs, memory), cold)  # the first decision has no plan before
    assert memory.means.shape == (3, 3, 2)
    means = memory.means.clone()
    noise = [generator.get_state() for generator in memory.generators]
    warm = agent.act(inputs, memory)
    forgetful = PlanMemory.start([0, 0, 0], torch.device("cpu"))
    for generator, state in zip(forgetful.generators, noise, strict=True):
        generator.set_state(state)
    assert not torch.equal(agent.act(inputs, forgetful), warm)  # the same noise, no plan
    assert not torch.equal(memory.means, means)
    assert torch.equal(agent.act(inputs), cold)


def test_remember_begins_episodes_of_their_own():
    agent = base()
    memory = agent.remember(2, seed=4)
    states = [generator.get_state() for generator in memory.generators]
    assert memory.means is None
    assert not torch.equal(*states)
    again = [generator.get_state() for generator in agent.remember(2, seed=4).generators]
    assert all(torch.equal(first, second) for first, second in zip(states, again, strict=True))
    inputs = agent.example_inputs(2)
    assert torch.equal(agent.act(inputs, memory), agent.act(inputs, agent.remember(2, seed=4)))


def test_acting_follows_the_weights():
    """The planner's copy of them is not an old one, whichever way they changed."""
    trained, states = _trained(make_small)
    agent = make_small(data=trained.data())
    inputs = agent.example_inputs(20)
    seen = [agent.act(inputs)]
    agent.load_states(states)
    seen.append(agent.act(inputs))
    agent.fine_tune("td", 5, 0, _silent)
    seen.append(agent.act(inputs))
    with torch.no_grad():
        for parameter in agent.model.reward.parameters():
            parameter.mul_(-1)
    seen.append(agent.act(inputs))
    for i, first in enumerate(seen):
        assert not any(torch.equal(first, other) for other in seen[i + 1 :])


@pytest.mark.parametrize(("name", "value"), [("samples", 9), ("iterations", 5), ("horizon", 2)])
def test_searchable_options_change_the_planning_only(name, value):
    assert name in TDMPC.searchable_options
    trained, states = _trained(make_small)
    other = TDMPC({**SMALL, name: value}, data=trained.data())
    other.load_states(states)
    settings, before = other._current_planner().settings, trained._current_planner().settings
    assert getattr(settings, name) == value
    changed = {field for field in vars(settings) if getattr(settings, field) != getattr(before, field)}
    assert changed == {name}
    inputs = trained.example_inputs(20)
    assert not torch.equal(other.act(inputs), trained.act(inputs))


def test_plans_with_what_the_schedules_end_with():
    settings = TDMPC({**TINY, "steps": 10_000})._current_planner().settings
    assert (settings.horizon, settings.min_std) == (3, 0.05)
    early = TDMPC({**TINY, "steps": 60, "horizon_decisions": 120})._current_planner().settings
    assert early.horizon == 2


def test_contract_names_every_number():
    state, pixels = make_tiny().contract(), make_pixels().contract()
    assert json.loads(json.dumps(state)) == {
        "inputs": [
            {
                "name": "observation",
                "shape": [4],
                "dtype": "float32",
                "range": None,
                "names": [f"observation.{i}" for i in range(4)],
            }
        ],
        "outputs": [
            {
                "name": "action",
                "shape": [2],
                "dtype": "float32",
                "range": [-1.0, 1.0],
                "low": [-1.0, -1.0],
                "high": [1.0, 1.0],
            }
        ],
        "control_step_s": 0.1,
    }
    assert pixels["inputs"][0]["shape"] == [6, 64, 64]
    assert pixels["inputs"][0]["range"] == [0, 255]
    assert pixels["inputs"][0]["dtype"] == "uint8"
    assert TDMPC({**TINY, "action_repeat": 4}).contract()["control_step_s"] == pytest.approx(0.4)


# --- experience ------------------------------------------------------------------------------------------


def test_experience_that_is_kept():
    data = base().data()
    assert {name.partition(".")[0] for name in data} == {"examples", "replay"}
    decisions = int((data["replay.remaining"] > 0).sum())
    assert decisions == 2 * POINT_STEPS <= TINY["stored_decisions"] < TINY["steps"]
    assert len(data["examples"]) == 64


def test_calibration_inputs_are_half_as_played_and_half_random():
    agent = base()
    data = agent.data()
    inputs = agent.calibration_inputs(40, 3)
    observations, actions = inputs["observations"], inputs["actions"]
    # (40, rows): which stored decisions each observation, and each pair, may be from
    found = (observations[:, None] == data["replay.observations"][None]).all(dim=2)
    found &= data["replay.remaining"] > 0
    assert bool(found.any(1).all())
    played = found & (actions[:, None] == data["replay.actions"][None]).all(dim=2)
    assert played.any(1).tolist() == [True, False] * 20
    assert not torch.equal(actions, agent.calibration_inputs(40, 4)["actions"])
    untrained = make_tiny().calibration_inputs(70, 0)
    assert len(untrained["observations"]) == 70
    assert len(untrained["actions"].unique(dim=0)) == 70


# --- learning --------------------------------------------------------------------------------------------


def test_the_tracker_sees_both_losses_of_every_update_before_clipping():
    """And no other loss's gradients."""
    agent = make_tiny()
    events = []

    def with_gradient():
        return {name.partition(".")[0] for name, p in agent.model.named_parameters() if p.grad is not None}

    class Spy:
        def is_due(self, loss="model"):
            return True

        def capture(self, loss="model"):
            events.append(("capture", loss, with_gradient()))
            return torch.enable_grad()

        def update(self, loss="model"):
            events.append(("update", loss, with_gradient()))

    agent.train(0, Spy(), _silent)
    model = {"encoder", "dynamics", "reward", "q1", "q2"}
    one = [
        ("capture", "model", set()),
        ("update", "model", model),
        ("capture", "policy", set()),
        ("update", "policy", {"policy"}),
    ]
    assert events == one * 60
    assert not with_gradient()


@pytest.mark.parametrize("after", [1, 2])  # before it learns, and after
def test_an_interrupted_training_ends_with_the_same_bits(after, tmp_path, monkeypatch):
    monkeypatch.setattr("agents.tdmpc.agent.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("agents.tdmpc.agent.CHECKPOINT_RATIO", 0.0)

    def followed(agent):
        graph = trace_agent(agent, agent.calibration_inputs(8, 0))
        return ImportanceTracker(graph, agent.model, every=4, snapshots=2)

    whole = make_tiny()
    expected = followed(whole)
    whole.train(3, expected, _silent)

    told = []

    def interrupt(*now):
        told.append(now)
        if len(told) > after:
            raise KeyboardInterrupt

    first = make_tiny()
    with pytest.raises(KeyboardInterrupt):
        first.train_from(3, followed(first), interrupt, tmp_path / "training")
    agent = make_tiny()
    found = followed(agent)
    told = []
    agent.train_from(3, found, lambda *now: told.append(now), tmp_path / "training")
    assert len(told) == 3 - after  # episodes of 20 decisions: the others were not played again
    assert equal_states(agent.states(), whole.states())
    for ours, theirs in ((found.statistics(), expected.statistics()), (found.history(), expected.history())):
        ours, theirs = ours.to_tensors(), theirs.to_tensors()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all(torch.equal(tensor, whole.data()[name]) for name, tensor in agent.data().items())
    run_without = make_tiny().start_training(3)
    run_without.load(tmp_path / "training")
    run_without.save(tmp_path / "bare")  # nobody followed it
    with pytest.raises(UserError, match="is damaged"):
        make_tiny().train_from(3, followed(agent), _silent, tmp_path / "bare")
    with pytest.raises(UserError, match="with seed 3, this one has 4"):
        make_tiny().train_from(4, followed(agent), _silent, tmp_path / "training")


def test_progress_counts_environment_steps():
    seen = []
    TDMPC({**TINY, "action_repeat": 3, "steps": 70, "seed_decisions": 10}).train(
        0, None, lambda *told: seen.append(told)
    )
    assert [steps for steps, _, _ in seen] == sorted({steps for steps, _, _ in seen})
    assert seen[-1][0] == 70
    assert {total for _, total, _ in seen} == {70}
    assert all(note.startswith("return ") for _, _, note in seen)


def test_global_generators_are_left_alone():
    agent = make_tiny()
    pupil = student()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    make_tiny()
    agent.train(0, None, _silent)
    agent.evaluate("test")
    for method in TDMPC.fine_tune_methods:
        pupil.fine_tune(method, 2, 0, _silent)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_different_seeds_train_differently():
    first, second = make_tiny(), make_tiny()
    first.train(0, None, _silent)
    second.train(1, None, _silent)
    assert not torch.equal(first.model.encoder[0].weight, second.model.encoder[0].weight)


def test_sections_of_the_state():
    states = _trained(make_tiny)[1]
    assert set(states) == {"model", "target", "adam_mean", "adam_square"}
    assert {name.partition(".")[0] for name in states["target"]} == {"encoder", "q1", "q2"}
    assert states["adam_mean"].keys() == states["adam_square"].keys() == states["model"].keys()
    assert set(make_tiny().states()) == {"model"}


@pytest.mark.parametrize("method", TDMPC.fine_tune_methods)
def test_fine_tuning_tells_what_it_took(method):
    pupil = student()
    told = []
    facts = pupil.fine_tune(method, 12, 0, lambda *progress: told.append(progress[:2]))
    assert told == [(done, 12) for done in range(1, 13)]
    if method == "td":
        assert facts == {}
    else:
        assert facts.pop("on_policy_episodes") == 1
        assert facts.pop("environment_steps") == POINT_STEPS
        after = facts.pop("held_out_loss")
        if method == "distill":  # beside TD-learning, it would not tell whether the agent got better
            assert facts.pop("held_out_loss_before") != after
        assert facts == {}
    assert not pupil.model.training
    assert all(p.grad is None for p in pupil.model.parameters())


def test_distillation_lowers_the_held_out_loss():
    facts = student(make_small).fine_tune("distill", 60, 0, _silent)
    assert facts["held_out_loss"] < 0.3 * facts["held_out_loss_before"]


def test_only_learning_from_experience_keeps_the_moments():
    """They are of another loss after a distillation alone."""
    pupil = student()
    states = pupil.states()
    pupil.fine_tune("td", 3, 0, _silent)
    after = pupil.states()
    assert after.keys() == states.keys()
    for section in ("model", "target", "adam_mean", "adam_square"):
        assert any(not torch.equal(after[section][n], tensor) for n, tensor in states[section].items())
    pupil.fine_tune("distill", 3, 0, _silent)
    assert set(pupil.states()) == {"model"}
    pupil.fine_tune("distill_td", 3, 0, _silent)
    assert set(pupil.states()) == set(states)


def test_td_goes_on_from_the_moments():
    """Warm ones move a weight by their direction; cold ones, by the gradient's, corrected for the start."""
    moved = []
    for scale in (1.0, -1.0):
        pupil = student()
        states = pupil.states()
        for name, tensor in states["adam_mean"].items():
            states["adam_mean"][name] = torch.full_like(tensor, scale * 1e4)
            states["adam_square"][name] = torch.full_like(tensor, 1e8)
        pupil.load_states(states)
        pupil.fine_tune("td", 1, 0, _silent)
        after = pupil.states()["model"]
        moved.append(torch.cat([(after[n] - t).flatten() for n, t in states["model"].items()]))
    expected = torch.full_like(moved[0], -3e-3 * 0.9 / math.sqrt(0.999))
    torch.testing.assert_close(moved[0], expected, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(moved[1], -expected, rtol=1e-2, atol=1e-6)


def test_fine_tuning_changes_neither_base_nor_experience():
    pupil, teacher = student(), base()
    before = teacher.states(), {name: tensor.clone() for name, tensor in teacher.data().items()}
    for method in TDMPC.fine_tune_methods:
        pupil.fine_tune(method, 6, 0, _silent)
    assert equal_states(teacher.states(), before[0])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in teacher.data().items())
    assert torch.equal(pupil.data()["replay.priorities"], before[1]["replay.priorities"])


def test_repair_without_the_environment(monkeypatch):
    trained, states = _trained(make_tiny)
    pupil = TDMPC({**TINY, "on_policy_episodes": 0}, data=trained.data())
    pupil.load_states(states)
    pupil.learn_from(trained, {"latent": torch.arange(5)})

    def refuse(*_):
        raise AssertionError("the environment was used")

    monkeypatch.setattr(Episodes, "play", refuse)
    facts = pupil.fine_tune("distill", 4, 0, _silent)
    assert set(facts) == {"held_out_loss_before", "held_out_loss"}


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("method", TDMPC.fine_tune_methods)
def test_a_student_may_plan_over_another_horizon_than_its_base(method, horizon):
    """A search may choose `horizon` for every trial."""
    trained, states = _trained(make_tiny)
    pupil = TDMPC({**TINY, "horizon": horizon}, data=trained.data())
    pupil.load_states(states)
    pupil.learn_from(trained, {"latent": torch.arange(5)})
    facts = pupil.fine_tune(method, 4, 0, _silent)
    assert all(math.isfinite(value) for value in facts.values())


def test_a_student_may_fall_before_its_horizon_is_over():
    options = {**TINY, "task": TASK.format("Falls"), "horizon": 7, "on_policy_episodes": 3}
    trained = TDMPC(options)
    trained.train(0, None, _silent)
    trained.learn_from(trained, {"latent": torch.arange(5)})
    for seed in range(3):
        facts = trained.fine_tune("distill", 3, seed, _silent)
        assert 9 <= facts["environment_steps"] <= 27


def test_no_updates_change_nothing():
    pupil = student()
    before = pupil.states()
    for method in TDMPC.fine_tune_methods:
        assert not pupil.fine_tune(method, 0, 0, _silent)
    assert equal_states(pupil.states(), before)


def test_a_base_teaches_all_its_students_the_same():
    trained = base()
    lessons = trained.lessons
    student(seed=0).fine_tune("distill", 4, 0, _silent)
    student(seed=1).fine_tune("distill", 4, 0, _silent)
    assert trained.lessons is lessons
    horizon, count = lessons.sequences.actions.shape[:2]
    assert (horizon, count) == (3, TINY["distillation_sequences"])


def test_lessons_are_those_of_the_present_weights():
    trained, states = _trained(make_tiny)
    agent = make_tiny(data=trained.data())
    before = agent.lessons
    agent.load_states(states)
    assert not torch.equal(agent.lessons.targets.latents, before.targets.latents)
    assert torch.equal(agent.lessons.targets.latents, trained.lessons.targets.latents)


@pytest.mark.slow
def test_pixels_are_trained_on_pruned_and_repaired():
    trained, states = _trained(make_pixels)
    again = make_pixels(data=trained.data())
    again.load_states(states)
    assert again.evaluate("test") == trained.evaluate("test")
    assert trained.data()["replay.observations"].dtype == torch.uint8
    assert trained.data()["replay.observations"].shape[1:] == (3, 64, 64)  # images once, whatever the stack
    pupil = student(make_pixels)
    cut = pupil.states()
    for method in TDMPC.fine_tune_methods:
        pupil.load_states(cut)
        facts = pupil.fine_tune(method, 6, 0, _silent)
        assert all(math.isfinite(value) for value in facts.values())
        assert all(math.isfinite(value) for value in pupil.evaluate("validation").values())


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "cartpole-swingupp"}, "did you mean"),
        ({"task": "gymnasium:Pendulumm-v1"}, "unknown task 'gymnasium:Pendulumm-v1'"),
        (
            {"task": TASK.format("Discrete")},
            "the actions of gymnasium:toy_environments:Discrete-v0 are Discrete",
        ),
        ({"task": TASK.format("Unbounded")}, "are unbounded"),
        ({"task": 3}, "task is 3"),
        ({"latnt": 3}, "no option 'latnt': did you mean 'latent'"),
        ({"observation": "pixel"}, "observation is \"pixel\": did you mean 'pixels'"),
        ({"latent": 0}, "latent is 0"),
        ({"samples": 1}, "samples is 1"),
        ({"samples": True}, "samples is true"),
        ({"discount": 1.5}, "discount is 1.5"),
        ({"learning_rate": math.nan}, "learning_rate is NaN"),
        ({"elite_share": 0}, "elite_share is 0"),
        ({"image_side": 63}, "image_side is 63"),
        ({"min_std": 0.6}, "min_std is 0.6, which is more than max_std, 0.5"),
        ({"precision": "float16"}, "precision is"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(UserError) as caught:
        TDMPC({**TINY, **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_is_needed():
    with pytest.raises(UserError, match="the TD-MPC agent needs the option 'task'"):
        TDMPC({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latnet": 3}, "no group 'latnet': did you mean 'latent'"),
        ({"latent": 6}, "the width of group 'latent' is 6: it must be a whole number from 1 to 5"),
        ({"q1.0": 0}, "is 0"),
    ],
)
def test_bad_widths_are_one_sentence(change, message):
    with pytest.raises(UserError) as caught:
        TDMPC(TINY, {**make_tiny().widths, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize("section", ["target", "adam_mean", "adam_square"])
def test_states_of_another_shape_are_refused(section):
    agent = make_tiny()
    states = agent.states()
    states[section] = {"encoder.0.bias": torch.ones(3)}
    with pytest.raises(UserError, match=rf"{section} 'encoder\.0\.bias' of shape \(3,\) does not fit"):
        agent.load_states(states)


def test_distillation_needs_a_base():
    trained, states = _trained(make_tiny)
    orphan = make_tiny(data=trained.data())
    orphan.load_states(states)
    for method in ("distill", "distill_td"):
        with pytest.raises(UserError, match="call learn_from first, or fine-tune with 'td'"):
            orphan.fine_tune(method, 3, 0, _silent)
    orphan.fine_tune("td", 3, 0, _silent)


def test_only_tdmpc_teaches_tdmpc():
    with pytest.raises(UserError, match="cannot learn from a Linear"):
        make_tiny().learn_from(torch.nn.Linear(1, 1), {"latent": torch.arange(5)})


@pytest.mark.parametrize("method", TDMPC.fine_tune_methods)
def test_an_untrained_agent_has_nothing_to_fine_tune_on(method):
    with pytest.raises(UserError, match="no stored experience to fine-tune on: train it first"):
        make_tiny().fine_tune(method, 3, 0, _silent)


def test_unknown_fine_tuning_method():
    with pytest.raises(UserError, match="no fine-tuning method 'distil': did you mean 'distill'"):
        make_tiny().fine_tune("distil", 1, 0, _silent)


# --- precision -------------------------------------------------------------------------------------------


def test_precision_is_low_where_that_is_faster(monkeypatch):
    wide = {**TINY, "mlp_width": 64}
    for has_hardware in (True, False):
        monkeypatch.setattr("agents.tdmpc.agent.multiplies_bfloat16", lambda has=has_hardware: has)
        assert TDMPC(wide)._precision == (torch.bfloat16 if has_hardware else None)
        assert TDMPC(TINY)._precision is None  # too narrow
        assert TDMPC({**wide, "precision": "float32"})._precision is None
        assert TDMPC({**TINY, "precision": "bfloat16"})._precision == torch.bfloat16
    assert TDMPCOptions(task="x").precision == "auto"


def test_low_precision_trains_and_plans_nearly_the_same():
    trained, states = _trained(make_small)
    low = TDMPC({**SMALL, "precision": "bfloat16"}, data=trained.data())
    low.load_states(states)
    assert low.evaluate("validation")["return"] == pytest.approx(
        trained.evaluate("validation")["return"], rel=0.05
    )
    tiny = TDMPC({**TINY, "precision": "bfloat16"})
    tiny.train(0, None, _silent)
    assert {tensor.dtype for state in tiny.states().values() for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["td", "distill_td"])
def test_td_learning_does_not_start_from_a_target_that_nothing_repaired(method):
    """The target in the states is the base's, sliced; the repaired model's own takes its place."""
    trained, states = _trained(make_small)
    reached = []
    for scale in (0.0, 1.0):
        agent = TDMPC(SMALL, data=trained.data())
        agent.load_states(
            {**states, "target": {name: scale * tensor for name, tensor in states["target"].items()}}
        )
        agent.learn_from(trained, {name: torch.arange(size) for name, size in trained.widths.items()})
        agent.fine_tune(method, 5, 0, _silent)
        reached.append(agent.states()["model"])
    assert all(torch.equal(reached[0][name], tensor) for name, tensor in reached[1].items())
