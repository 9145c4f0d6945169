"""On a GPU: everything does what it does on a CPU, recorded in a graph or not, and gives its memory back.

All of it is skipped on machines without CUDA.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from agent_contract import AgentContract
from tdmpc_cases import ACTION, EVEN, OBSERVATION, batch, normal, options, settings, update_noise, world
from test_tdmpc_agent import TINY
from test_tdmpc_distillation import distillation_of, lessons_of, pruned, random_model

from agents.agent import agent_class
from agents.autoencoder import Autoencoder
from agents.cuda_graphs import WARM_UPS, CudaGraphs
from agents.tdmpc.agent import TDMPC
from agents.tdmpc.distillation import Lessons, Sequences, Targets
from agents.tdmpc.learning import Learner, UpdateNoise
from agents.tdmpc.planner import PlanMemory, Planner, PlanNoise
from components.plan import PruningPlan
from components.schedule import PruningSchedule
from search.base import train_base
from search.gpu_memory import release
from search.trial import TrialSettings, TrialSpec, run_trial, trial_seed
from search.trial_types import GradualSettings

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("one_thread"),
]

METRICS = ("l2", "fisher")
AUTOENCODER = {"hidden": [24, 12], "latent": 6, "updates": 150, "fine_tune_batch_size": 64}
CALLS = WARM_UPS + 4


class Every:
    """A tracker that looks at every so-manieth step and keeps nothing."""

    def __init__(self, every):
        self.every, self.told, self.due = every, {}, 0

    def is_due(self, loss="model"):
        return self.told.get(loss, 0) % self.every == 0

    def capture(self, loss="model"):
        self.due += self.is_due(loss)
        return nullcontext()

    def update(self, loss="model"):
        self.told[loss] = self.told.get(loss, 0) + 1


def on_gpu(record, kind):
    return kind(
        **{
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in vars(record).items()
        }
    )


# --- graphs ----------------------------------------------------------------------------------------------


def test_a_graph_computes_what_the_function_does_with_what_it_is_given():
    graphs, calls = CudaGraphs(), []

    def function(x, y):
        calls.append(1)
        return x @ y, x.sum()

    for step in range(CALLS):
        x, y = torch.randn(5, 3, device="cuda"), torch.randn(3, 2, device="cuda")
        product, total = graphs.run("it", function, x, y)
        torch.testing.assert_close(product, x @ y)
        torch.testing.assert_close(total, x.sum())
        assert len(calls) == min(step + 1, WARM_UPS + 1)


def test_every_shape_and_name_has_a_graph_of_its_own():
    graphs = CudaGraphs()
    for _ in range(CALLS):
        for rows in (2, 3):
            x = torch.randn(rows, device="cuda")
            (doubled,) = graphs.run("double", lambda x: (2 * x,), x)
            (squared,) = graphs.run("square", lambda x: (x * x,), x)
            torch.testing.assert_close(doubled, 2 * x)
            torch.testing.assert_close(squared, x * x)


def test_what_a_graph_returned_stays_as_it_is():
    graphs = CudaGraphs()
    inputs = [torch.full((4,), float(i), device="cuda") for i in range(CALLS)]
    outputs = [graphs.run("it", lambda x: (x + 1,), x)[0] for x in inputs]
    for given, made in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(made, given + 1)


# --- TD-MPC's parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("explore", [False, True])
def test_plans_as_on_a_cpu(explore):
    chosen, episodes = settings(), 3
    model = world(EVEN)
    there, here = Planner(copy.deepcopy(model).cuda(), chosen), Planner(model, chosen)
    memory, before = PlanMemory.start([1, 2, 3], torch.device("cuda")), None
    twins = PlanMemory.start([1, 2, 3], torch.device("cuda"))
    for step in range(CALLS):
        observations = normal(episodes, OBSERVATION, seed=step)
        noise = PlanNoise.draw(chosen, ACTION, twins.generators)
        drawn = PlanNoise(**{name: value.cpu() for name, value in vars(noise).items()})
        wanted, before = here.decide(observations, before, drawn, explore=explore)
        actions = there.plan(observations.cuda(), memory, explore=explore)
        torch.testing.assert_close(actions.cpu(), wanted, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(memory.means.cpu(), before, rtol=1e-8, atol=1e-9)
    assert len(there._graphs._recordings) == 1


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_learns_as_on_a_cpu_whatever_is_tracked(every):
    chosen = options(target_every=2)
    model = world(EVEN)
    other = copy.deepcopy(model).cuda()
    here, there, tracker = Learner(model, chosen), Learner(other, chosen), Every(every)
    for number in range(3 * CALLS):
        given, noise = batch(chosen.horizon, 9, number), update_noise(chosen.horizon, 9, number)
        wanted = here.update(given, noise, number)
        losses = there.update(on_gpu(given, type(given)), on_gpu(noise, UpdateNoise), number, tracker)
        for name, value in vars(wanted).items():
            torch.testing.assert_close(getattr(losses, name).cpu(), value, rtol=1e-6, atol=1e-8)
    assert tracker.told == {"model": 3 * CALLS, "policy": 3 * CALLS}
    assert tracker.due == 2 * math.ceil(3 * CALLS / every)
    assert len(there._graphs._recordings) == (every > 1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name).cpu(), parameter, rtol=1e-5, atol=1e-7)
    for name, slow in here.target.items():
        torch.testing.assert_close(there.target[name].cpu(), slow, rtol=1e-5, atol=1e-7)
    for section, moments in here.moments().items():
        for name, moment in moments.items():
            torch.testing.assert_close(
                there.moments()[section][name].cpu(), moment, rtol=1e-5, atol=1e-9, msg=name
            )


def test_distils_as_on_a_cpu():
    """With what the student visits added midway, and a learning rate that falls."""
    base = random_model(0)
    student, kept = pruned(base)
    other = copy.deepcopy(student).cuda()
    lessons, visited = lessons_of(base), lessons_of(base, 10, seed=9)

    def moved(lessons):
        return Lessons(on_gpu(lessons.sequences, Sequences), on_gpu(lessons.targets, Targets))

    here = distillation_of(student, lessons, kept, updates=4 * CALLS)
    there = distillation_of(other, moved(lessons), kept.cuda(), updates=4 * CALLS)
    tracker = Every(5)
    for step in range(4 * CALLS):
        if step == 2 * CALLS:
            here.add_visited(visited)
            there.add_visited(moved(visited))
        assert float(there.step(tracker)) == pytest.approx(float(here.step()), rel=1e-6)
    assert len(there._graphs._recordings) == 1
    assert there.held_out_loss() == pytest.approx(here.held_out_loss(), rel=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(other.get_parameter(name).cpu(), parameter, rtol=1e-5, atol=1e-7)


# --- agents ----------------------------------------------------------------------------------------------


class TestAutoencoder(AgentContract):
    make_agent = staticmethod(
        lambda widths=None, data=None: Autoencoder(AUTOENCODER, widths, data, device="cuda")
    )


class TestTDMPC(AgentContract):
    make_agent = staticmethod(
        lambda widths=None, data=None: TDMPC(
            {**TINY, "steps": 400, "mlp_width": 16, "latent": 8}, widths, data, device="cuda"
        )
    )


# --- bases and trials ------------------------------------------------------------------------------------

KINDS = {"autoencoder": AUTOENCODER, "tdmpc": {**TINY, "steps": 600, "mlp_width": 16, "latent": 8}}


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    """Trained on the GPU."""
    metrics = ("l2", "gradient", "fisher", "taylor", "bayesian", "reconstruction")
    return train_base(request.param, KINDS[request.param], seed=0, metrics=metrics, device="cuda")


def half(base):
    return PruningPlan({"l2": 1.0, "fisher": 1.0}, dict.fromkeys(base.widths, 0.5))


def spec(base, plan=None, **changed):
    objectives = ("parameters", agent_class(base.kind).performance.name)
    made = TrialSettings(**{"metrics": METRICS, "objectives": objectives, "fine_tune_updates": 12, **changed})
    return TrialSpec(1, plan or half(base), "test", trial_seed(0, 1), made)


def test_a_base_of_the_gpu_has_what_one_of_the_cpu_has(base):
    other = train_base(base.kind, KINDS[base.kind], seed=0, metrics=tuple(base.scores))
    assert base.widths == other.widths
    assert {name: set(state) for name, state in base.states.items()} == {
        name: set(state) for name, state in other.states.items()
    }
    assert set(base.scores) == set(other.scores)
    assert all(np.isfinite(values).all() for by_group in base.scores.values() for values in by_group.values())
    assert base.gpu_share is not None
    assert 0 < base.gpu_share < 0.5


@pytest.mark.parametrize("reconstruction", ["none", "sequential"])
def test_a_trial_keeps_and_measures_what_it_does_on_a_cpu(base, reconstruction):
    """Without fine-tuning, in which a GPU draws other random numbers."""
    settings = {"reconstruction": reconstruction, "fine_tune_updates": 0}
    there = run_trial(spec(base, **settings), base, "cuda")
    here = run_trial(spec(base, **settings), base, "cpu")
    assert there.complete, there.reason
    assert there.kept == here.kept
    for name, array in here.state.items():
        np.testing.assert_allclose(there.state[name], array, rtol=1e-2, atol=1e-3, err_msg=name)
    if base.kind == "autoencoder":
        assert there.retention == pytest.approx(here.retention, rel=1e-2)


@pytest.mark.parametrize("metric", ["l2", "gradient", "fisher", "taylor", "bayesian", "reconstruction"])
def test_trials_by_every_metric_complete(base, metric):
    plan = dataclasses.replace(half(base), coefficients={metric: 1.0})
    result = run_trial(spec(base, plan, metrics=(metric,)), base, "cuda")
    assert result.complete, result.reason


@pytest.mark.parametrize("mode", ["shared", "per_trial"])
def test_gradual_trials_complete(base, mode):
    end = 10 if mode == "shared" else 100
    schedule = GradualSettings(PruningSchedule("cubic", 0, end, 5 if mode == "shared" else 40))
    alone = base.kind == "tdmpc" and mode == "per_trial"  # there is no dense agent to distil
    changed = {"fine_tune_method": "td"} if alone else {}
    result = run_trial(spec(base, gradual=schedule, base_mode=mode, **changed), base, "cuda")
    assert result.complete, result.reason
    assert result.size_ratio < 0.5


def test_a_trial_on_the_gpu_repeats_bit_for_bit(base):
    first, second = (run_trial(spec(base), base, "cuda") for _ in range(2))
    assert first.complete, first.reason
    assert first.objectives == second.objectives
    for name, array in first.state.items():
        np.testing.assert_array_equal(array, second.state[name], err_msg=name)


def test_trials_give_all_their_memory_back(base):
    reserved = []
    for _ in range(8):
        assert run_trial(spec(base), base, "cuda").complete
        release("cuda")
        reserved.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(reserved[2:])) == 1, reserved
