"""TD-MPC through the whole search: shipped experiments, trials, the planner's options, bundles, bad input."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from serial_search import run_serially
from toy_environments import Point

from agents.tdmpc.agent import TDMPC
from agents.tdmpc.training import Training
from search.base_files import load_base
from search.bundle import load_bundle
from search.checked_experiment import check
from search.cli import main
from search.config import load_experiment, shipped_experiments
from search.verification import verify_bundle

TESTS = Path(__file__).parent
UPDATES = 40

EXPERIMENT = """
name: point
agent:
  kind: tdmpc
  task: gymnasium:toy_environments:Point-v0
  steps: 600
  seed_decisions: 100
  encoder_width: 24
  mlp_width: 24
  latent: 8
  batch_size: 32
  samples: 24
  iterations: 3
  horizon: 3
  exploration_decisions: 300
  horizon_decisions: 300
  validation_episodes: 3
  test_episodes: 4
  distillation_sequences: 256
  distillation_batch_size: 64
  on_policy_episodes: 2
pruning:
  metrics: [l2, fisher, gate_fisher, reconstruction]
  fine_tune: {updates: 40}
search:
  trials: 6
  objectives: [parameters, return]
  options: {samples: [8, 24], horizon: [1, 3]}
wandb: {mode: disabled}
"""


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.chdir(tmp_path)
    Path("point.yaml").write_text(EXPERIMENT)


@pytest.fixture
def serial(monkeypatch):
    """Without Ray."""
    monkeypatch.setattr("search.experiment.run_search", run_serially)


def trials(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "trials.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [n for n in shipped_experiments() if not n.startswith("autoencoder")])
def test_shipped_experiments_pass_every_check_before_the_work(name, tmp_path):
    config = load_experiment(name)
    checked = check(config, tmp_path / "run")
    assert isinstance(checked.agent, TDMPC)
    keeps = checked.space.keeps
    assert keeps["q2.0"] == keeps["q1.0"], "twin Q functions share their ratios"
    assert keeps["q1.3"] != keeps["q1.0"]
    steps, repeat = checked.agent.options["steps"], checked.agent.spec.action_repeat
    planned = checked.agent.options["horizon_decisions"]
    assert steps / repeat >= 2 * planned, "the horizon is whole well before the training ends"


def test_a_search_prunes_repairs_plans_and_keeps_bundles_that_verify(serial, capsys):
    assert main(["search", "point.yaml", "--name", "point"]) == 0
    printed = capsys.readouterr().out
    assert "fine-tune" in printed.splitlines()[-1] or "median trial" in printed
    found = trials("runs/point")
    assert [trial["status"] for trial in found] == ["complete"] * 6
    whole, *pruned = found
    assert (whole["size_ratio"], whole["retention"], whole["repaired_by"]) == (1.0, 1.0, "")
    for trial in pruned:
        told = trial["fine_tuning"]
        assert told["on_policy_episodes"] == 2
        assert told["environment_steps"] == 40
        assert told["held_out_loss"] >= 0
        assert {"score", "mix", "slice", "reconstruct", "fine_tune", "evaluate"} <= set(trial["timings"])
        assert {"return", "return_standard_error", "worst_return"} <= set(trial["performance"])
        reported = trial["performance"]
        assert 0 <= reported["stability_low"] <= reported["stability"] <= reported["stability_high"] <= 1
        assert trial["widths"]["q1.0"] == trial["widths"]["q2.0"]
        assert 8 <= trial["options"]["samples"] <= 24
        assert 1 <= trial["options"]["horizon"] <= 3
        measured = dict(trial["rungs"])
        assert trial["performance"]["return"] == max(measured.values())
        if told["held_out_loss"] < told["held_out_loss_before"] and trial["retention"] >= 0.5:
            assert (list(measured), trial["repaired_by"]) == ([UPDATES], "fine_tuning")
        else:
            assert list(measured) == [0, UPDATES]
            tuned = trial["repaired_by"] == "fine_tuning"
            assert trial["performance"]["return"] == measured[UPDATES if tuned else 0]
    macs = {(t["options"]["samples"], t["options"]["horizon"], t["parameters"]): t["macs"] for t in found}
    assert len(set(macs.values())) > 1

    front = json.loads(Path("runs/point/front.json").read_text())
    assert all("test_retention" in row for row in front["trials"])
    assert "stability" in front["base"]["reported"]
    assert front["stability"]["words"] in printed.replace("\n", " ")
    for row in front["trials"]:
        report = verify_bundle(Path("runs/point", row["bundle"]))
        assert report.identical
        measured = {m.name: (m.stored, m.now) for m in report.measurements}
        assert measured["validation return"][0] == measured["validation return"][1]
        assert measured["test return"][0] == measured["test return"][1]


def test_a_selected_agent_controls_in_a_loop(serial, capsys):
    assert main(["search", "point.yaml", "--name", "point", "--trials", "3"]) == 0
    assert main(["select", "point", "--knee", "--out", "chosen"]) == 0
    agent = load_bundle(Path("chosen")).agent
    assert isinstance(agent, TDMPC)
    memory = agent.remember(episodes=1)
    observation = agent.example_inputs(1)
    first, second = (agent.act(observation, memory) for _ in range(2))
    assert first.shape == (1, agent.spec.action_size)
    assert memory.means is not None
    assert not torch.equal(first, second), "the second decision goes on from the first plan"


@pytest.mark.parametrize("method", ["td", "distill_td"])
def test_other_ways_to_fine_tune(serial, method):
    settings = ["--set", f"pruning.fine_tune.method={method}", "--trials", "2"]
    assert main(["search", "point.yaml", "--name", "point", *settings]) == 0
    assert [trial["status"] for trial in trials("runs/point")] == ["complete"] * 2


def test_the_base_comes_with_its_experience(serial):
    assert main(["train", "point.yaml", "--name", "point"]) == 0
    assert main(["search", "point.yaml", "--name", "point", "--trials", "2"]) == 0
    assert [trial["status"] for trial in trials("runs/point")] == ["complete"] * 2


@pytest.mark.parametrize(
    "call",
    [
        ["train", "point.yaml"],
        ["train", "point.yaml", "--set", "base.mode=per_trial"],
        ["search", "point.yaml", "--trials", "2"],
    ],
)
def test_a_base_whose_training_is_interrupted_goes_on(call, serial, monkeypatch, capsys):
    assert main([*call, "--name", "whole"]) == 0
    monkeypatch.setattr("agents.tdmpc.agent.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("agents.tdmpc.agent.CHECKPOINT_RATIO", 0.0)
    run_episode = Training.run_episode

    def interrupt(self, tracker):
        if self.decisions > 400:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # Python runs the handler between two instructions
        run_episode(self, tracker)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Training, "run_episode", interrupt)
        assert main([*call, "--name", "point"]) == 130
    assert capsys.readouterr().err.splitlines()[0] == (
        "prunefront: the training of the base is kept in runs/point; the same command with --resume goes on "
        "from there"
    )
    assert main([*call, "--name", "point"]) == 2
    assert "runs/point exists and is not overwritten" in capsys.readouterr().err
    assert main([*call, "--name", "point", "--resume"]) == 0
    bases = [load_base(Path("runs", name, "base")) for name in ("whole", "point")]
    for section, state in bases[0].states.items():
        assert all(np.array_equal(array, bases[1].states[section][name]) for name, array in state.items())
    for metric, scores in bases[0].scores.items():
        assert all(np.array_equal(array, bases[1].scores[metric][group]) for group, array in scores.items())
    assert bases[0].performance == bases[1].performance
    assert not Path("runs/point/training").exists()


def test_a_base_that_has_not_learnt_leaves_nothing_whatever_it_had_kept(serial, monkeypatch, capsys):
    monkeypatch.setattr("agents.tdmpc.agent.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("agents.tdmpc.agent.CHECKPOINT_RATIO", 0.0)
    monkeypatch.setattr(TDMPC, "trivial", lambda self, split: 1e9)
    assert main(["search", "point.yaml", "--name", "point"]) == 2
    assert "no better than" in capsys.readouterr().err
    assert not Path("runs/point").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("agent.task=cartpole-swingop", "did you mean one of 'cartpole-swingup'"),
        ("agent.task=gymnasium:toy_environments:Discrete-v0", "Discrete"),
        ("agent.task=gymnasium:toy_environments:Broken-v0", "reward is not finite at decision"),
        (
            "agent.horizon=30",
            "the replay buffer's longest episode has 20 decisions, fewer than the horizon of 30",
        ),
        ("agent.min_std=0.9", "min_std is 0.9, which is more than max_std, 0.5"),
        ("agent.smaples=8", "did you mean 'samples'?"),
        ("search.options.latent=[2, 8]", "no option of tdmpc to search"),
        ("search.constraints.stability_width=<= 0.1", "stability_width is not measured"),
        ("agent.stability=lyapunov", 'stability is "lyapunov": allowed: none, quadratic, value'),
        ("agent.stability_window=0", "stability_window is 0: it must be greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(setting, sentence, serial, capsys):
    code = main(["search", "point.yaml", "--name", "bad", "--set", setting])
    captured = capsys.readouterr()
    assert code == 2
    assert sentence in captured.err
    assert captured.err.startswith("prunefront: ")
    assert len(captured.err.splitlines()) == 1
    assert not Path("runs/bad").exists()


def test_a_stability_constraint_bounds_the_front_and_needs_the_measure(serial, capsys):
    bound = ["--set", "search.constraints={stability: '>= 0.0, <= 1.0', stability_low: '>= 0.1'}"]
    assert main(["search", "point.yaml", "--name", "point", "--trials", "2", *bound]) == 0
    found = {trial["trial"]: trial for trial in trials("runs/point")}
    front = json.loads(Path("runs/point/front.json").read_text())
    assert all(found[row["trial"]]["performance"]["stability_low"] >= 0.1 for row in front["trials"])
    capsys.readouterr()
    without = ["--set", "agent.stability=none"]
    assert main(["search", "point.yaml", "--name", "none", *bound, *without]) == 2
    error = capsys.readouterr().err
    assert "search.constraints.stability is not measured" in error
    assert len(error.splitlines()) == 1


def test_a_fault_of_the_environment_in_a_trial_is_a_failed_trial(monkeypatch):
    step = Point.step

    def broken(self, action):
        observation, _, *rest = step(self, action)
        return observation, float("nan"), *rest

    def run_with_broken_rewards(*arguments, **settings):  # the base was trained with whole ones
        monkeypatch.setattr(Point, "step", broken)
        return run_serially(*arguments, **settings)

    monkeypatch.setattr("search.experiment.run_search", run_with_broken_rewards)
    assert main(["search", "point.yaml", "--name", "point", "--trials", "2"]) == 2
    found = trials("runs/point")
    assert [trial["status"] for trial in found] == ["failed"] * 2
    assert "the reward is not finite at decision 1" in found[0]["reason"]


@pytest.mark.slow
def test_a_search_of_a_dm_control_task_on_ray():
    settings = [
        "agent.step_limit=160",
        "agent.steps=1600",
        "agent.seed_decisions=60",
        "agent.batch_size=32",
        "agent.mlp_width=32",
        "agent.latent=8",
        "agent.samples=32",
        "agent.validation_episodes=2",
        "agent.test_episodes=2",
        "agent.distillation_sequences=128",
        "pruning.fine_tune.updates=20",
        "search.sampler=tpe",
        "wandb.mode=offline",
    ]
    overrides = [part for setting in settings for part in ("--set", setting)]
    assert main(["search", "cartpole", "--name", "tiny", "--trials", "4", *overrides]) == 0
    assert [trial["status"] for trial in trials("runs/tiny")] == ["complete"] * 4
