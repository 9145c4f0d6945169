"""Pruning step by step: the same channels as at once where nothing is learnt, exact widths, exact moments."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import components
from agents.agent import measurements
from agents.autoencoder import Autoencoder
from agents.tdmpc.agent import TDMPC
from components.choosing import Ranking, kept_count
from components.plan import PruningPlan
from components.pruning import kept_indices, restricted, slice_state
from components.schedule import PruningSchedule
from components.tracker import ImportanceTracker, Tracking
from search.base import TRACE_ROWS, scored_base, trace_agent, train_base
from search.checked_experiment import check
from search.config import parse_experiment
from search.trial import run_trial
from search.trial_types import GradualSettings, TrialSettings, TrialSpec

SMALL = {"hidden": [24, 12], "latent": 6, "updates": 60, "normalization": "layer"}
RATIOS = {"encoder.0": 0.75, "encoder.3": 0.5, "latent": 0.34, "decoder.0": 0.5, "decoder.3": 0.75}
METRICS = ("l2", "fisher", "reconstruction")
EQUAL = PruningPlan(dict.fromkeys(METRICS, 1.0), RATIOS)
STEPS = PruningSchedule("cubic", 0, 20, 5)


TINY = {
    "task": "gymnasium:Pendulum-v1",
    "action_repeat": 10,
    "steps": 800,
    "encoder_width": 16,
    "mlp_width": 16,
    "latent": 8,
    "batch_size": 16,
    "samples": 16,
    "iterations": 2,
    "horizon": 3,
    "seed_decisions": 40,
    "validation_episodes": 2,
    "test_episodes": 2,
    "on_policy_episodes": 1,
}


@pytest.fixture(scope="module")
def tiny_base():
    """Barely trained, so that its performance is set by hand: it has to be better than a trivial one."""
    agent = TDMPC(TINY)
    graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, 0))
    tracker = ImportanceTracker(graph, agent.model)
    agent.train(0, tracker, lambda done, total, note: None)
    made = scored_base("tdmpc", agent, graph, tracker, 0, ("l2", "fisher", "reconstruction"), "sequential")
    return dataclasses.replace(made, performance=dict.fromkeys(made.trivial, 0.0))


@pytest.fixture(scope="module")
def base():
    return train_base("autoencoder", SMALL, seed=0, metrics=METRICS)


def spec(plan: PruningPlan = EQUAL, gradual: GradualSettings | None = None, **settings) -> TrialSpec:
    chosen = {"fine_tune_updates": 30, "gradual": gradual or GradualSettings(STEPS), **settings}
    made = TrialSettings(metrics=METRICS, objectives=("parameters", "reconstruction_error"), **chosen)
    return TrialSpec(0, plan, "test", 1, made)


def dense_widths(base) -> dict[str, int]:
    return dict(base.widths)


@pytest.mark.parametrize("mode", ["shared", "per_trial"])
@pytest.mark.parametrize("reconstruction", ["none", "gram", "sequential"])
def test_it_ends_with_the_widths_of_the_plan(base, mode, reconstruction) -> None:
    result = run_trial(spec(base_mode=mode, reconstruction=reconstruction), base)
    assert result.complete, result.reason
    assert result.widths == {g: kept_count(n, RATIOS.get(g, 0.0)) for g, n in dense_widths(base).items()}
    assert {group: len(kept) for group, kept in result.kept.items()} == result.widths
    assert all(list(kept) == sorted(set(kept)) for kept in result.kept.values())
    rebuilt = Autoencoder(base.options, result.widths, {k: torch.tensor(v) for k, v in base.data.items()})
    rebuilt.load_states({"model": {name: torch.tensor(a) for name, a in result.state.items()}})
    again = rebuilt.evaluate("validation")["reconstruction_error"]
    assert again == result.objectives["reconstruction_error"]
    assert result.base_performance == base.performance
    assert result.retention == base.retention(again)


def test_the_same_seed_gives_the_same_bits(base) -> None:
    first, second = run_trial(spec(), base), run_trial(spec(), base)
    assert first.kept == second.kept
    for name, array in first.state.items():
        np.testing.assert_array_equal(array, second.state[name])


@pytest.mark.parametrize("ranking", [Ranking(), Ranking("isomorphic", max_ratio=0.9)])
def test_without_learning_steps_keep_what_one_shot_keeps(ranking) -> None:
    """With scores that do not change and no learning, lowest-first in steps is lowest-first at once."""
    options = {**SMALL, "hidden": [24, 24], "latent": 24}
    trained = train_base("autoencoder", options, seed=0, metrics=("fisher",))
    still = dataclasses.replace(trained, options={**trained.options, "fine_tune_learning_rate": 1e-30})
    plan = PruningPlan({"fisher": 1.0}, dict.fromkeys(trained.widths, 0.6))
    steps = GradualSettings(STEPS, smoothing=0.999999, reconstruction=False)
    chosen = {"ranking": ranking, "reconstruction": "none"}
    gradual = run_trial(spec(plan, steps, **chosen), still)
    at_once = dataclasses.replace(spec(plan, **chosen).pruning, gradual=None)
    once = run_trial(dataclasses.replace(spec(plan), pruning=at_once), still)
    assert gradual.kept == once.kept
    assert (len(set(once.widths.values())) > 1) == (ranking.scope == "isomorphic")
    for name, array in gradual.state.items():
        np.testing.assert_allclose(array, once.state[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", sorted(components.importance.METRICS))
@pytest.mark.parametrize("mode", ["shared", "per_trial"])
def test_every_metric_prunes_in_steps_from_the_first_update_on(base, metric, mode) -> None:
    trained = train_base("autoencoder", SMALL, seed=0, metrics=(metric,), tracking=Tracking(every=1))
    gradual = GradualSettings(PruningSchedule("cubic", 0, 10, 1))
    result = run_trial(spec(PruningPlan({metric: 1.0}, RATIOS), gradual, base_mode=mode), trained)
    assert result.complete, result.reason
    assert result.widths == {g: kept_count(n, RATIOS.get(g, 0.0)) for g, n in dense_widths(trained).items()}


def test_rungs_before_the_end_are_not_reached_with_channels_to_lose(base) -> None:
    seen = []
    run_trial(spec(rungs=(20, 25)), base, report=lambda result: seen.append(result))
    final = {g: kept_count(n, RATIOS.get(g, 0.0)) for g, n in dense_widths(base).items()}
    assert [result.widths for result in seen] == [final, final]


def test_an_agent_that_loses_channels_learns_as_one_that_never_had_them() -> None:
    """Masked from the first update on and narrow from the start: the same updates, moments included."""
    agent = Autoencoder({**SMALL, "normalization": "none", "updates": 12})
    graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, 0))
    noise = torch.Generator().manual_seed(0)
    keep = {
        name: torch.randperm(size, generator=noise) < max(1, size // 2) for name, size in graph.widths.items()
    }
    widths = {name: int(mask.sum()) for name, mask in keep.items()}
    indices = kept_indices(graph, keep)
    seen: dict[str, dict] = {}

    def cut(done: int, total: int, note: str) -> None:
        if done == 6:
            states = {s: slice_state(graph, state, indices) for s, state in agent.states().items()}
            seen.update(copy.deepcopy(states))
            agent.shrink({name: mask.nonzero().flatten() for name, mask in keep.items()}, states)

    model = agent.model
    agent.train(0, None, cut)
    assert agent.model is model
    assert agent.widths == widths
    # By hand: plain Adam from the moments of step 6 on, on the same batches.
    narrow = Autoencoder({**SMALL, "normalization": "none", "updates": 12}, widths)
    narrow.model.load_state_dict(seen["model"])
    by_hand = torch.optim.Adam(narrow.model.parameters(), lr=1.0, betas=(0.9, 0.95))
    for name, parameter in narrow.model.named_parameters():
        by_hand.state[parameter] = {
            "step": torch.tensor(6.0),
            "exp_avg": seen["adam_mean"][name].clone(),
            "exp_avg_sq": seen["adam_square"][name].clone(),
        }
    images = agent.data()["train"].flatten(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for step in range(6, 12):
        batch = images[order[step * 64 : (step + 1) * 64]]
        by_hand.param_groups[0]["lr"] = 0.5 * 4e-3 * (1 + np.cos(np.pi * step / 12))
        by_hand.zero_grad()
        nn.functional.mse_loss(narrow.model(batch), batch).backward()
        by_hand.step()
    for name, tensor in agent.model.state_dict().items():
        torch.testing.assert_close(tensor, narrow.model.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_tracker_goes_on_with_the_channels_that_are_left() -> None:
    """Never having seen the others is the same: gradients that are zero there by a mask."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    inputs = torch.randn(16, 3, dtype=torch.float64)
    graph = components.trace(dense, lambda m: {"out": m(inputs)}, components={"all": [""]})
    [group] = graph.groups
    keep = {group.name: torch.tensor([True, False, True, True, False, True, False, True])}
    tracker = ImportanceTracker(graph, dense, every=1)
    with tracker.capture():
        dense(inputs).square().sum().backward()
    tracker.update()
    before = tracker.statistics()
    narrow = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    narrow.load_state_dict(components.prune(graph, dense.state_dict(), keep))
    tracker.shrink(restricted(graph, keep), narrow, keep)
    after = tracker.statistics()
    for field in ("gradient", "taylor", "square", "mean", "variance"):
        expected = components.prune(graph, getattr(before, field), keep)
        for name, tensor in getattr(after, field).items():
            torch.testing.assert_close(tensor, expected[name])
    torch.testing.assert_close(after.gates[group.name], before.gates[group.name][keep[group.name]])
    with tracker.capture():
        narrow(inputs).square().sum().backward()
    tracker.update()
    assert tracker.steps == 2


@pytest.mark.parametrize("method", ["distill", "td", "distill_td"])
def test_td_mpc_shrinks_while_it_is_fine_tuned(tiny_base, method) -> None:
    plan = PruningPlan({"l2": 1.0, "fisher": 1.0}, dict.fromkeys(tiny_base.widths, 0.5))
    settings = TrialSettings(
        metrics=("l2", "fisher"),
        objectives=("parameters", "return"),
        fine_tune_method=method,
        fine_tune_updates=12,
        gradual=GradualSettings(PruningSchedule("cosine", 0, 8, 2)),
    )
    result = run_trial(TrialSpec(0, plan, "test", 0, settings), tiny_base)
    assert result.complete, result.reason
    assert result.widths == {g: kept_count(n, 0.5) for g, n in tiny_base.widths.items()}
    agent = TDMPC(tiny_base.options, result.widths)
    agent.load_states({"model": {name: torch.tensor(a) for name, a in result.state.items()}})
    assert agent.evaluate("validation")["return"] == result.objectives["return"]


@pytest.mark.parametrize("metric", ["fisher", "bayesian"])
def test_td_mpc_shrinks_while_it_is_trained(tiny_base, metric) -> None:
    total = tiny_base.options["steps"]
    plan = PruningPlan({metric: 1.0, "reconstruction": 1.0}, dict.fromkeys(tiny_base.widths, 0.5))
    settings = TrialSettings(
        metrics=(metric, "reconstruction"),
        objectives=("parameters", "return"),
        base_mode="per_trial",
        fine_tune_updates=0,
        gradual=GradualSettings(PruningSchedule("cubic", total // 4, 3 * total // 4, total // 8)),
    )
    result = run_trial(TrialSpec(0, plan, "test", 0, settings), tiny_base)
    assert result.complete, result.reason
    assert result.repaired_by == "training"
    # Stability included, which the dense base is the judge of.
    assert measurements(TDMPC(tiny_base.options)).keys() <= result.performance.keys()
    assert result.widths == {g: kept_count(n, 0.5) for g, n in tiny_base.widths.items()}
    agent = TDMPC(tiny_base.options, result.widths)
    agent.load_states({"model": {name: torch.tensor(a) for name, a in result.state.items()}})
    assert agent.evaluate("validation")["return"] == result.objectives["return"]


@pytest.mark.parametrize(("scope", "round_to"), [("isomorphic", 1), ("group", 4), ("isomorphic", 4)])
def test_rankings_hold_in_steps_too(base, scope, round_to) -> None:
    result = run_trial(spec(ranking=Ranking(scope, round_to)), base)
    assert result.complete, result.reason
    apart = {g: kept_count(n, RATIOS.get(g, 0.0), round_to) for g, n in dense_widths(base).items()}
    if scope == "group":
        assert result.widths == apart
    elif round_to == 1:  # as many as apart, wherever the scores are lowest
        assert sum(result.widths.values()) == sum(apart.values())
    assert all(width % round_to == 0 or width == base.widths[g] for g, width in result.widths.items())


AUTOENCODER, TOY = "autoencoder", "'toy_agents:Toy'"
CARTPOLE = "tdmpc, task: cartpole-swingup"


@pytest.mark.parametrize(
    ("agent", "mode", "pruning", "search", "words"),
    [
        (
            AUTOENCODER,
            "shared",
            "{schedule: {kind: cubic, end: 151}}",
            "{}",
            "151 steps and .* after 150",
        ),
        (AUTOENCODER, "per_trial", "{schedule: {kind: cubic, end: 4001}}", "{}", "4000 steps of training"),
        (
            AUTOENCODER,
            "shared",
            "{schedule: {kind: cosine, start: 90, end: 80}}",
            "{}",
            "starts after 90",
        ),
        (TOY, "shared", "{schedule: cosine}", "{}", "cannot lose channels while it trains"),
        (AUTOENCODER, "shared", "{schedule: {kind: cubic, start: 200}}", "{}", "starts after 200 steps"),
        (AUTOENCODER, "shared", "{schedule: {end: 7}}", "{}", "for the kinds 'cosine' and 'cubic'"),
        (AUTOENCODER, "shared", "{schedule: cosine, fine_tune: {updates: 0}}", "{}", "updates is 0"),
        (AUTOENCODER, "shared", "{round_to: 8}", "{sampler: gradient}", "pruning.round_to is 8"),
        (AUTOENCODER, "shared", "{schedule: cubic}", "{sampler: gradient}", "pruning.schedule is 'cubic'"),
        (AUTOENCODER, "shared", "{}", "{sampler: gradient, trials: 6}", "6 trials leave nothing to it"),
        (CARTPOLE, "per_trial", "{schedule: cosine}", "{}", "'distill', which learns from the trained base"),
        (AUTOENCODER, "shared", "{schedule: cosine}", "{early_stopping: {}}", "first rung after 30 updates"),
        (AUTOENCODER, "shared", "{ranking: isomorphic}", "{sampler: gradient}", "threshold for every group"),
        (AUTOENCODER, "shared", "{round_to: 256}", "{}", "more than 256 channels, pruning.round_to"),
    ],
)
def test_what_does_not_fit_is_said_before_the_search(tmp_path, agent, mode, pruning, search, words) -> None:
    text = f"agent: {{kind: {agent}}}\nbase: {{mode: {mode}}}\npruning: {pruning}\nsearch: {search}\n"
    with pytest.raises(components.UserError, match=words):
        check(parse_experiment(text), tmp_path / "run")
