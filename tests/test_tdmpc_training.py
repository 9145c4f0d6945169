"""Training of TD-MPC: checkpoints that change nothing, schedules, counts, and what is refused."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_environments import POINT_STEPS

from agents.environments import EnvironmentFaultError
from agents.tdmpc.config import TDMPCOptions, elites, linear
from agents.tdmpc.episodes import STREAMS, Episodes, Returns, episode_seeds
from agents.tdmpc.training import Training, planner_settings
from agents.tdmpc.world_model import WorldModel, dense_widths
from components import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = "gymnasium:toy_environments:{}-v0"
STATE = {
    "task": TASK.format("Point"),
    "encoder_width": 8,
    "mlp_width": 10,
    "latent": 5,
    "steps": 120,
    "seed_decisions": 30,
    "batch_size": 8,
    "horizon": 3,
    "samples": 12,
    "iterations": 2,
    "exploration_decisions": 90,
    "horizon_decisions": 80,
    "policy_share": 0.25,
}
PIXELS = {
    **STATE,
    "task": TASK.format("Picture"),
    "observation": "pixels",
    "image_side": 64,
    "channels": 3,
    "seed_decisions": 20,
    "batch_size": 4,
}
CPU = torch.device("cpu")
CHECKPOINT = "checkpoint.safetensors"


def training_of(options, seed=0, widths=None):
    """A new training, its weights from the seed."""
    parsed = TDMPCOptions(**options)
    episodes = Episodes(parsed)
    torch.manual_seed(seed)
    spec = episodes.spec
    model = WorldModel(widths or dense_widths(parsed), spec.observation_shape, spec.action_size).eval()
    return Training(model, parsed, episodes, seed, CPU)


def everything(training):
    """All that a training is, by name."""
    state = {
        **{f"model/{name}": tensor for name, tensor in training.model.state_dict().items()},
        **{f"target/{name}": tensor for name, tensor in training.learner.target.items()},
        **{f"replay/{name}": tensor for name, tensor in training.buffer.to_tensors().items()},
        "noise": training._noise.get_state(),
        "counts": torch.tensor([training.played, training.decisions, training.updates]),
        "return": torch.tensor(training.latest_return, dtype=torch.float64).view(torch.int64),  # NaN too
    }
    for section, moments in training.learner.moments().items():
        state |= {f"{section}/{name}": tensor for name, tensor in moments.items()}
    for i, optimizer in enumerate(training.learner._optimizers):
        state |= {f"step/{i}/{j}": s["step"] for j, s in enumerate(optimizer.state.values())}
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def run(training, episodes):
    for _ in range(episodes):
        training.run_episode()
    return training


# --- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        (STATE, 3, 3),
        (STATE, 1, 2),
        (STATE, 2, 1),
        (PIXELS, 2, 1),
        ({**STATE, "task": TASK.format("Falls")}, 8, 4),
    ],
    ids=["state", "while random", "right after", "pixels", "of many lengths"],
)
def test_a_checkpoint_goes_on_with_the_same_bits(options, before, after, tmp_path):
    uninterrupted = run(training_of(options), before)
    uninterrupted.save(tmp_path)
    saved = everything(uninterrupted)
    torch.manual_seed(12345)
    resumed = training_of(options)
    resumed.load(tmp_path)
    assert_same_bits(
        {n: t for n, t in everything(resumed).items() if "step/" not in n},
        {n: t for n, t in saved.items() if "step/" not in n},
    )
    returns = []
    for training in (uninterrupted, resumed):
        returns.append([])
        for _ in range(after):
            training.run_episode()
            returns[-1].append(training.latest_return)
    assert returns[0] == returns[1]
    assert uninterrupted.updates > 0
    assert_same_bits(everything(uninterrupted), everything(resumed))
    seeds = episode_seeds("validation", 0, 2)
    assert uninterrupted.evaluate(seeds) == resumed.evaluate(seeds)


def test_saving_and_evaluating_change_nothing(tmp_path):
    watched, plain = training_of(STATE), training_of(STATE)
    for _ in range(4):
        watched.run_episode()
        plain.run_episode()
        watched.save(tmp_path)
        watched.evaluate([1, 2])
    assert_same_bits(everything(watched), everything(plain))


def test_a_checkpoint_is_one_file_without_pickles(tmp_path):
    run(training_of(STATE), 2).save(tmp_path / "deep" / "er")
    run(training_of(STATE), 1).save(tmp_path / "deep" / "er")  # replaces what is there
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == [CHECKPOINT]
    path = tmp_path / "deep" / "er" / CHECKPOINT
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["training"])
        assert {name.partition("/")[0] for name in file.keys()} == {  # noqa: SIM118
            "model",
            "target",
            "adam_mean",
            "adam_square",
            "replay",
            "random",
        }
    assert facts["decisions"] == POINT_STEPS
    assert facts["updates"] == 0
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert json.loads(path.read_bytes()[8 : 8 + header])  # nothing but a header of JSON and numbers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("checkpoint")
    run(training_of(STATE), 2).save(directory)
    return directory


def refusal(training, directory):
    """The sentence; and nothing was taken over."""
    before = everything(training)
    with pytest.raises(UserError) as caught:
        training.load(directory)
    assert_same_bits(everything(training), before)
    assert "\n" not in str(caught.value)
    assert str(directory / CHECKPOINT) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"task": TASK.format("Falls")},
            "task 'gymnasium:toy_environments:Point-v0', this one has 'gymnasium",
        ),
        ({"mlp_width": 11}, "mlp_width 10, this one has 11"),
        ({"learning_rate": 2e-3}, "learning_rate 0.001, this one has 0.002"),
        ({"seed_decisions": 31}, "seed_decisions 30, this one has 31"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(checkpoint, change, message):
    assert message in refusal(training_of({**STATE, **change}), checkpoint)


def test_a_training_may_be_made_longer(checkpoint):
    training = training_of({**STATE, "steps": 10_000})
    training.load(checkpoint)
    assert training.decisions == 2 * POINT_STEPS


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint):
    narrow = {**dense_widths(TDMPCOptions(**STATE)), "q1.3": 9}
    message = refusal(training_of(STATE, widths=narrow), checkpoint)
    assert "is of another architecture: its q1.3.weight has shape [10, 10], this model's [9, 10]" in message


def test_a_checkpoint_of_another_seed_is_refused(checkpoint):
    assert "with seed 0, this one has 1" in refusal(training_of(STATE, seed=1), checkpoint)


def test_an_absent_checkpoint_is_refused(tmp_path):
    assert "there is no checkpoint" in refusal(training_of(STATE), tmp_path)


def test_a_checkpoint_that_finds_no_room_is_named_and_leaves_the_last(checkpoint, tmp_path, monkeypatch):
    training = training_of(STATE)
    training.load(checkpoint)
    training.save(tmp_path)
    whole = (tmp_path / CHECKPOINT).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        training.save(tmp_path)
    assert raised.value.filename == str(tmp_path / f"{CHECKPOINT}.new")
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert (tmp_path / CHECKPOINT).read_bytes() == whole


@pytest.mark.parametrize("name", ["replay/priorities", "replay/remaining", "target/encoder.0.weight"])
def test_a_checkpoint_that_lacks_something_is_refused(checkpoint, name, tmp_path):
    with safe_open(checkpoint / CHECKPOINT, "pt") as stored:
        facts = stored.metadata()
    tensors = load_file(checkpoint / CHECKPOINT)
    del tensors[name]
    save_file(tensors, tmp_path / CHECKPOINT, facts)
    assert f"is damaged, or of another device ('{name}')" in refusal(training_of(STATE), tmp_path)


@pytest.mark.parametrize("name", ["options", "widths"])
def test_a_checkpoint_of_other_facts_is_refused(checkpoint, name, tmp_path):
    with safe_open(checkpoint / CHECKPOINT, "pt") as stored:
        facts = stored.metadata()
    tensors = load_file(checkpoint / CHECKPOINT)
    [key] = facts
    facts[key] = json.dumps({**json.loads(facts[key]), name: []})
    save_file(tensors, tmp_path / CHECKPOINT, facts)
    assert "is damaged, or of another device" in refusal(training_of(STATE), tmp_path)


@pytest.mark.parametrize("left", [0, 5, 300, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(checkpoint, left, tmp_path):
    whole = (checkpoint / CHECKPOINT).read_bytes()
    part = whole[: int(left * len(whole)) if isinstance(left, float) else left]
    (tmp_path / CHECKPOINT).write_bytes(part)
    assert "a damaged one" in refusal(training_of(STATE), tmp_path)


@pytest.mark.parametrize("metadata", [None, {"other": "x"}, {"training": "{"}, {"training": "[]"}])
def test_another_safetensors_file_is_refused(checkpoint, metadata, tmp_path):
    save_file(load_file(checkpoint / CHECKPOINT), tmp_path / CHECKPOINT, metadata=metadata)
    assert "is no checkpoint of a TD-MPC training" in refusal(training_of(STATE), tmp_path)


@pytest.mark.parametrize("section", ["model", "target", "adam_mean", "replay", "random"])
def test_a_checkpoint_without_all_its_parts_is_refused(checkpoint, section, tmp_path):
    with safe_open(checkpoint / CHECKPOINT, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(checkpoint / CHECKPOINT)
    part = {name: tensor for name, tensor in tensors.items() if not name.startswith(section)}
    save_file(part, tmp_path / CHECKPOINT, metadata=metadata)
    assert "is no checkpoint of a TD-MPC training" in refusal(training_of(STATE), tmp_path)


def test_a_pickle_is_refused(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / CHECKPOINT)
    assert "is no checkpoint" in refusal(training_of(STATE), tmp_path)


# --- schedules -------------------------------------------------------------------------------------------


def test_schedules_are_linear_in_decisions():
    options = TDMPCOptions(
        task="x", max_std=0.5, min_std=0.1, exploration_decisions=200, horizon=5, horizon_decisions=100
    )
    assert [options.min_std_after(n) for n in (0, 50, 100, 200, 10**6)] == pytest.approx(
        [0.5, 0.4, 0.3, 0.1, 0.1]
    )
    # 1 + 4 n / 100, rounded down
    assert [options.horizon_after(n) for n in (0, 24, 25, 49, 50, 75, 99, 100, 10**6)] == [
        1,
        1,
        2,
        2,
        3,
        4,
        4,
        5,
        5,
    ]
    assert linear(3.0, 7.0, -1) == 3.0


def test_the_planner_follows_the_schedules():
    options = TDMPCOptions(**STATE)
    early, late = planner_settings(options, 0), planner_settings(options, 10**6)
    assert (early.horizon, early.min_std) == (1, 0.5)
    assert (late.horizon, late.min_std) == (3, 0.05)
    assert early.policy_std == late.policy_std == 0.05


@pytest.mark.parametrize(
    ("samples", "share", "count"), [(512, 0.125, 64), (10, 0.01, 1), (4, 1.0, 4), (3, 0.5, 2)]
)
def test_at_least_one_sample_is_an_elite(samples, share, count):
    assert elites(samples, share) == count


@pytest.mark.parametrize(("steps", "repeat", "decisions"), [(120, 1, 120), (120, 7, 18), (1, 4, 1)])
def test_training_ends_with_its_environment_steps(steps, repeat, decisions):
    training = training_of({**STATE, "steps": steps, "action_repeat": repeat, "seed_decisions": 1})
    assert training.total_decisions == decisions
    training.decisions = decisions - 1
    assert not training.done
    training.decisions = decisions
    assert training.done


def test_a_training_that_would_end_before_it_learns_is_refused():
    with pytest.raises(UserError, match="steps is 30, which makes 30 decisions: learning begins after 31"):
        training_of({**STATE, "steps": 30, "action_repeat": 1, "seed_decisions": 31})


# --- counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["Point", "Falls"])
def test_as_many_updates_as_decisions_once_learning_begins(task):
    training = training_of({**STATE, "task": TASK.format(task)})
    decisions = []
    for _ in range(12):
        training.run_episode()
        decisions.append(training.decisions)
        assert training.updates == (training.decisions if training.decisions >= 30 else 0)
    lengths = np.diff([0, *decisions])
    assert training.played == training.buffer.episodes == 12
    assert len(training.buffer) == decisions[-1]
    assert (lengths == POINT_STEPS).all() if task == "Point" else len(set(lengths)) > 2
    assert (training.buffer.to_tensors()["terminated"].sum() > 0) == (task == "Falls")


def test_the_first_decisions_are_random(monkeypatch):
    """Those of the episode's seed, whatever the model; later ones are planned with exploration."""
    training = training_of(STATE)
    run(training, 2)
    actions = training.buffer.to_tensors()["actions"]
    for i in range(2):
        random = np.random.default_rng(episode_seeds("training", 0, 1, first=i + 1)[0])
        wanted = np.stack([random.uniform(-1, 1, 2) for _ in range(POINT_STEPS)]).astype(np.float32)
        rows = slice(i * (POINT_STEPS + 1), (i + 1) * (POINT_STEPS + 1) - 1)
        np.testing.assert_array_equal(actions[rows], wanted)
    explored = []
    plan = __import__("agents.tdmpc.planner", fromlist=["Planner"]).Planner.plan
    monkeypatch.setattr(
        "agents.tdmpc.planner.Planner.plan",
        lambda self, *args, explore=False: explored.append(explore) or plan(self, *args, explore=explore),
    )
    training.run_episode()
    assert explored == [True] * POINT_STEPS
    training.evaluate([5])
    assert explored[POINT_STEPS:] == [False] * POINT_STEPS


def test_the_model_is_in_evaluation_mode_between_episodes():
    training = run(training_of(STATE), 3)
    assert not training.model.training


def test_priorities_are_the_latest_errors():
    training = run(training_of(STATE), 2)
    priorities = training.buffer.to_tensors()["priorities"][training.buffer.places(3)]
    assert len(priorities.unique()) > 20
    assert bool((priorities > 0).all())


def test_episodes_of_different_streams_share_no_seed():
    seeds = [seed for stream in STREAMS for number in range(3) for seed in episode_seeds(stream, number, 50)]
    assert len(set(seeds)) == len(seeds)
    assert episode_seeds("test", 0, 10)[4:] == episode_seeds("test", 0, 6, first=4)


def test_different_seeds_play_different_episodes():
    first, second = (run(training_of(STATE, seed), 1).buffer.to_tensors() for seed in (0, 1))
    assert not torch.equal(first["observations"][0], second["observations"][0])


# --- what goes wrong -------------------------------------------------------------------------------------


def test_a_reward_that_is_not_a_number_is_one_sentence():
    training = training_of({**STATE, "task": TASK.format("Broken")})
    with pytest.raises(EnvironmentFaultError) as caught:
        training.run_episode()
    assert str(caught.value) == "gymnasium:toy_environments:Broken-v0: the reward is not finite at decision 6"
    assert training.played == len(training.buffer) == 0


@pytest.mark.parametrize("batch_size", [16, 64])  # of 60 decisions fewer than 64 can be drawn
def test_losses_that_are_not_finite_are_one_sentence(batch_size):
    training = training_of({**STATE, "seed_decisions": 60, "learning_rate": 1e30, "batch_size": batch_size})
    with pytest.raises(EnvironmentFaultError) as caught:
        run(training, 5)
    message = str(caught.value)
    assert "the losses of the TD-MPC agent are not finite after 2 updates: use a smaller learning" in message
    assert "\n" not in message
    assert not training.model.training


def test_episodes_shorter_than_the_horizon_are_one_sentence():
    training = training_of({**STATE, "horizon": POINT_STEPS + 1})
    with pytest.raises(UserError, match=r"longest episode has 20 decisions, fewer than the horizon of 21"):
        run(training, 2)


# --- returns ---------------------------------------------------------------------------------------------


def test_returns_by_hand():
    class Played:
        def __init__(self, value):
            self.episode_return = value

    returns = Returns.of([Played(value) for value in (1.0, 4.0, 10.0)])
    assert returns.mean == 5.0
    assert returns.standard_error == pytest.approx(math.sqrt((16 + 1 + 25) / 2 / 3))
    assert returns.worst == 1.0
    assert Returns.of([Played(3.0)]) == Returns(3.0, 0.0, 3.0)
