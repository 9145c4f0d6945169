"""What every agent has to hold to, as tests to run on your own.

Either in one call, which raises `AssertionError` at the first broken promise:

    check_agent(lambda widths=None, data=None: MyAgent({"updates": 200}, widths, data))

or as pytest tests, one per promise:

    class TestMyAgent(AgentContract):
        @staticmethod
        def make_agent(widths=None, data=None):
            return MyAgent({"updates": 200}, widths, data)

`make_agent` returns a new, untrained agent every time, with options that make training short: some seconds
at most, but long enough to beat the trivial agent.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import components
from agents.agent import (
    Agent,
    Objective,
    Shrinkable,
    Student,
    Untracked,
    calibration_program,
    measurements,
    rehearsal,
    rung_methods,
    searchable_options,
    shared_ratios,
    task_loss,
)
from components import DependencyGraph, importance
from components.pruning import kept_indices, slice_state
from components.tracker import ImportanceTracker

MakeAgent = Callable[..., Agent]

TRAIN_SEED, FINE_TUNE_UPDATES, KEPT = 3, 100, 0.4


def check_agent(make_agent: MakeAgent) -> None:
    """Run every check of `AgentContract` on an agent.

    Raises:
        AssertionError: the agent breaks a promise; the name of the failing method says which.
    """
    contract = AgentContract()
    contract.make_agent = make_agent
    for name in dir(AgentContract):
        if name.startswith("test_"):
            getattr(contract, name)()


class AgentContract:
    """One test per promise of `agents.agent.Agent`; subclass it and say how your agent is made."""

    make_agent: MakeAgent

    # --- what it says of itself --------------------------------------------------------------------------

    def test_class_members(self) -> None:
        agent = self.make_agent()
        assert isinstance(type(agent).performance, Objective)
        assert agent.fine_tune_methods
        assert len(set(agent.fine_tune_methods)) == len(agent.fine_tune_methods)

    def test_options_are_complete_and_json_able(self) -> None:
        agent = self.make_agent()
        options = json.loads(json.dumps(dict(agent.options)))
        again = type(agent)(options)
        assert json.loads(json.dumps(dict(again.options))) == options
        assert dict(again.widths) == dict(agent.widths)

    def test_a_rehearsal_is_of_an_agent_of_the_same_shapes(self) -> None:
        agent = self.make_agent()
        how = rehearsal(agent)
        if how is not None:
            assert how.steps >= 1
            assert dict(type(agent)(how.options).widths) == dict(agent.widths)

    def test_components_cover_the_model(self) -> None:
        agent = self.make_agent()
        for name, _ in agent.model.named_parameters():
            assert components.dependency.owner(name, agent.components) is not None, name

    def test_contract_describes_act(self) -> None:
        agent = self.make_agent()
        contract = json.loads(json.dumps(agent.contract()))
        assert set(contract) == {"inputs", "outputs", "control_step_s"}
        inputs = agent.example_inputs(3)
        for (described, *_), batch in (
            (contract["inputs"], inputs),
            (contract["outputs"], agent.act(inputs)),
        ):
            assert described["name"]
            assert described["shape"] == list(batch.shape[1:])
            assert described["dtype"] == str(batch.dtype).removeprefix("torch.")
            if described["range"] is not None:
                low, high = described["range"]
                assert low <= batch.min()
                assert batch.max() <= high

    # --- widths and states -------------------------------------------------------------------------------

    def test_widths_are_those_of_the_trace(self) -> None:
        agent = self.make_agent()
        assert _trace(agent).widths == dict(agent.widths)

    def test_built_from_its_own_widths(self) -> None:
        agent = self.make_agent()
        widths = dict(sorted(agent.widths.items(), reverse=True))  # the order says nothing
        again = self.make_agent(widths=widths)
        assert dict(again.widths) == dict(agent.widths)
        assert _shapes(again) == _shapes(agent)

    def test_states_round_trip(self) -> None:
        trained, states = _trained(self.make_agent)
        other = self.make_agent(data=trained.data())
        other.load_states(states)
        assert _equal(other.states(), states)
        inputs = trained.example_inputs(5)
        assert torch.equal(other.act(inputs), trained.act(inputs))

    def test_states_are_copies(self) -> None:
        trained, states = _trained(self.make_agent)
        agent = self.make_agent(data=trained.data())
        agent.load_states(states)
        taken = agent.states()
        for section in taken.values():
            for tensor in section.values():
                tensor.zero_()
        assert _equal(agent.states(), states)

    def test_sections_mirror_the_parameters(self) -> None:
        _, states = _trained(self.make_agent)
        for section in states.values():
            for name, tensor in section.items():
                assert tensor.shape == states["model"][name].shape

    def test_pruned_agent_loads_and_runs(self) -> None:
        for seed in (0, 1):
            pruned, graph = _pruned(self.make_agent, seed)
            assert set(_shapes(pruned)) == set(_shapes(_trained(self.make_agent)[0]))
            wider = {name: size for name, size in pruned.widths.items() if size > 1}
            assert _trace(pruned).widths == wider
            assert set(graph.widths) == set(pruned.widths)
            measured = pruned.evaluate("validation")
            assert all(math.isfinite(value) for value in measured.values())

    def test_state_of_another_width_is_refused(self) -> None:
        _, states = _trained(self.make_agent)
        pruned, _ = _pruned(self.make_agent, 0)
        try:
            pruned.load_states(states)
        except (ValueError, RuntimeError):
            return
        raise AssertionError("a dense state was loaded into a pruned agent")

    # --- determinism -------------------------------------------------------------------------------------

    def test_program_is_deterministic(self) -> None:
        trained, _ = _trained(self.make_agent)
        inputs = trained.calibration_inputs(8, 0)
        first, second = (_run(trained, inputs) for _ in range(2))
        assert set(first) == set(second)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert {name for tie in trained.ties for name in tie} <= set(first)

    def test_calibration_inputs_follow_their_arguments(self) -> None:
        agent = self.make_agent()
        first, second = agent.calibration_inputs(8, 0), agent.calibration_inputs(8, 0)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert {len(rows) for rows in first.values()} == {8}

    def test_evaluation_is_deterministic_and_finite(self) -> None:
        trained, _ = _trained(self.make_agent)
        for split in ("validation", "test"):
            measured = trained.evaluate(split)
            assert measured == trained.evaluate(split)
            assert trained.performance.name in measured
            assert all(math.isfinite(value) for value in measured.values())

    def test_same_seed_trains_to_the_same_bits(self) -> None:
        trained, states = _trained(self.make_agent)
        again = self.make_agent(data=trained.data())
        torch.manual_seed(12345)  # what happened before does not matter
        again.train(TRAIN_SEED, None, _silent)
        assert _equal(again.states(), states)

    def test_tracking_changes_nothing(self) -> None:
        trained, states = _trained(self.make_agent)
        tracked = self.make_agent(data=trained.data())
        graph = _trace(tracked)
        tracker = ImportanceTracker(graph, tracked.model)
        model = tracked.model
        tracked.train(TRAIN_SEED, tracker, _silent)
        assert tracked.model is model
        assert _equal(tracked.states(), states)
        scores = importance.score("taylor", graph, state=states["model"], statistics=tracker.statistics())
        assert all(bool((scores[name] > 0).any()) for name in graph.widths)

    def test_data_serves_another_agent(self) -> None:
        trained, states = _trained(self.make_agent)
        copied = {name: tensor.clone() for name, tensor in trained.data().items()}
        other = self.make_agent(data=copied)
        other.load_states(states)
        assert other.evaluate("test") == trained.evaluate("test")
        everything = {
            name: torch.ones(width, dtype=torch.bool) for name, width in _trace(trained).widths.items()
        }
        _teach(other, trained, everything)
        other.fine_tune(other.fine_tune_methods[0], 3, 0, _silent)
        assert all(torch.equal(copied[name], tensor) for name, tensor in trained.data().items())

    # --- learning and acting -----------------------------------------------------------------------------

    def test_training_beats_the_trivial_agent(self) -> None:
        trained, _ = _trained(self.make_agent)
        for split in ("validation", "test"):
            assert _better(trained, trained.evaluate(split)[trained.performance.name], trained.trivial(split))

    def test_training_starts_from_new_weights(self) -> None:
        trained, states = _trained(self.make_agent)
        again = self.make_agent(data=trained.data())
        again.load_states(states)
        again.train(TRAIN_SEED, None, _silent)
        assert _equal(again.states(), states)

    def test_fine_tuning_improves_a_pruned_agent(self) -> None:
        name = type(self.make_agent()).performance.name
        pruned, _ = _pruned(self.make_agent, 0)
        cut, states = pruned.evaluate("validation")[name], pruned.states()
        for method in pruned.fine_tune_methods:
            reached = []
            for _ in range(2):
                pruned.load_states(states)
                facts = pruned.fine_tune(method, FINE_TUNE_UPDATES, 0, _silent) or {}
                assert all(math.isfinite(value) for value in facts.values())
                reached.append(pruned.evaluate("validation")[name])
            assert _better(pruned, reached[0], cut)
            assert reached[0] == reached[1]

    def test_evaluation_measures_act(self) -> None:
        trained, states = _trained(self.make_agent)
        agent = self.make_agent(data=trained.data())
        agent.load_states(states)
        act = agent.act
        # A controller may hand itself more than the inputs along an episode, such as what it remembers.
        agent.act = (  # type: ignore[method-assign]
            lambda inputs, *more, **named: torch.zeros_like(act(inputs, *more, **named))
        )
        name = agent.performance.name
        assert agent.evaluate("validation")[name] != trained.evaluate("validation")[name], (
            "evaluate() goes round act(): it measures something else than what is deployed"
        )

    def test_act_is_batched_and_needs_no_gradients(self) -> None:
        trained, _ = _trained(self.make_agent)
        inputs = trained.example_inputs(4)
        assert len(inputs) == 4
        assert torch.equal(inputs, trained.example_inputs(4))
        outputs = trained.act(inputs)
        assert len(outputs) == 4
        assert not outputs.requires_grad
        assert torch.equal(outputs, trained.act(inputs))
        torch.testing.assert_close(outputs[:1], trained.act(inputs[:1]))

    # --- what it may have besides ------------------------------------------------------------------------

    def test_shared_ratios_name_groups(self) -> None:
        agent = self.make_agent()
        assert set(shared_ratios(agent)) <= set(agent.widths)

    def test_searchable_options_are_whole_numbers_that_shape_nothing(self) -> None:
        agent = self.make_agent()
        for name in searchable_options(agent):
            value = agent.options[name]
            assert type(value) is int, name
            assert value >= 1, name
            other = type(agent)({**agent.options, name: value + 1})
            assert other.options[name] == value + 1, name
            assert _shapes(other) == _shapes(agent), name

    def test_what_it_measures_besides_is_named_and_reported(self) -> None:
        trained, _ = _trained(self.make_agent)
        pruned, _ = _pruned(self.make_agent, 0)
        for agent in (trained, pruned):
            named = measurements(agent)
            taken = {"parameters", "size_ratio", "macs", "retention", "latency_median_ms", "latency_p99_ms"}
            assert not set(named) & {*taken, agent.performance.name}, "these names are taken"
            assert all(isinstance(unit, str) for unit in named.values())
            for split in ("validation", "test"):
                reported = agent.evaluate(split)
                assert set(named) <= set(reported)
                assert all(math.isfinite(reported[name]) for name in named)

    def test_the_rung_loss_watches_and_changes_nothing(self) -> None:
        pruned, _ = _pruned(self.make_agent, 0)
        states = pruned.states()
        assert set(rung_methods(pruned)) <= set(pruned.fine_tune_methods)
        for method in rung_methods(pruned):
            told: list[int] = []
            losses: list[float] = []

            def watch(
                done: int, total: int, note: str, told: list[int] = told, losses: list[float] = losses
            ) -> None:
                told.append(done)
                if done % 33 == 1:
                    before = _surroundings(pruned)
                    losses.append(pruned.rung_loss())  # type: ignore[attr-defined]
                    assert losses[-1] == pruned.rung_loss(), "not the same bits"  # type: ignore[attr-defined]
                    assert _surroundings(pruned) == before, "something was changed"

            reached = []
            for progress in (watch, _silent):
                pruned.load_states(states)
                pruned.fine_tune(method, FINE_TUNE_UPDATES, 0, progress)
                reached.append(pruned.states())
            assert told == list(range(1, FINE_TUNE_UPDATES + 1)), "progress has to be told after every update"
            assert _equal(*reached), "the fine-tuning took another course"
            assert all(math.isfinite(loss) for loss in losses)
            assert losses[-1] < losses[0], "lower is better, and fine-tuning improves"

    def test_fine_tuning_may_be_ended_by_its_progress(self) -> None:
        pruned, _ = _pruned(self.make_agent, 0)
        states = pruned.states()
        for method in rung_methods(pruned):
            reached = []
            for ended in (True, False):
                pruned.load_states(states)
                if ended:
                    try:
                        pruned.fine_tune(method, FINE_TUNE_UPDATES, 0, _end)
                    except _Ended:
                        pass
                    else:
                        raise AssertionError("progress was not told, or what it raised was swallowed")
                    assert not pruned.model.training
                    assert all(parameter.grad is None for parameter in pruned.model.parameters())
                    pruned.load_states(states)
                pruned.fine_tune(method, 5, 0, _silent)
                reached.append(pruned.states())
            assert _equal(*reached), "what was ended left something behind"

    def test_channels_can_be_lost_in_the_middle_of_a_training(self) -> None:
        agent = self.make_agent()
        if not isinstance(agent, Shrinkable):
            return
        graph, model, counting = _trace(agent), agent.model, _Counting()
        score = importance.random(graph, 0)
        keep = {name: s >= s.topk(max(1, round(KEPT * len(s)))).values.min() for name, s in score.items()}
        kept = {name: mask.nonzero().flatten() for name, mask in keep.items()}
        told: list[tuple[int, int]] = []

        def cut_once(done: int, total: int, note: str) -> None:
            told.append((done, total))
            if len(told) == 1:
                indices = kept_indices(graph, keep)
                states = {name: slice_state(graph, state, indices) for name, state in agent.states().items()}
                agent.shrink(kept, states)

        agent.train(TRAIN_SEED, counting, cut_once)
        assert agent.model is model, "a caller may hold on to it"
        assert len(told) > 1
        assert told[-1] == (agent.training_steps, agent.training_steps)
        assert counting.updates >= agent.training_updates > 0
        assert dict(agent.widths) == {name: len(channels) for name, channels in kept.items()}
        narrow = self.make_agent(widths=agent.widths, data=agent.data())
        narrow.load_states(agent.states())
        assert _equal(narrow.states(), agent.states())
        inputs = agent.example_inputs(3)
        assert torch.equal(narrow.act(inputs), agent.act(inputs))

    def test_its_own_loss_tells_a_trained_agent_from_an_untrained_one(self) -> None:
        trained, _ = _trained(self.make_agent)
        inputs = trained.calibration_inputs(64, 0)
        untrained = self.make_agent(data=trained.data())
        losses = []
        for agent in (trained, untrained):
            loss = task_loss(agent, agent.program(agent.model, inputs), inputs)
            if loss is None:
                return
            assert loss.shape == ()
            assert torch.autograd.grad(loss, next(agent.model.parameters()))[0].isfinite().all()
            losses.append(float(loss.detach()))
        assert losses[0] < losses[1]

    def test_the_calibration_program_is_deterministic(self) -> None:
        trained, _ = _trained(self.make_agent)
        inputs = trained.calibration_inputs(8, 0)
        with torch.no_grad():
            first, second = (calibration_program(trained)(trained.model, inputs) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


# --- parts -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _trained(make_agent: MakeAgent) -> tuple[Agent, dict[str, dict[str, Tensor]]]:
    """A trained agent and its states; trained once per `make_agent`, so no test may change it."""
    agent = make_agent()
    agent.train(TRAIN_SEED, None, _silent)
    return agent, agent.states()


def _pruned(make_agent: MakeAgent, seed: int) -> tuple[Agent, DependencyGraph]:
    """The trained agent with a random choice of channels sliced, every section of its states included."""
    trained, states = _trained(make_agent)
    graph = _trace(trained)
    scores = importance.random(graph, seed)
    keep = {
        name: score >= score.topk(max(1, round(KEPT * len(score)))).values.min()
        for name, score in scores.items()
    }
    pruned = make_agent(widths={name: int(mask.sum()) for name, mask in keep.items()}, data=trained.data())
    pruned.load_states({section: components.prune(graph, state, keep) for section, state in states.items()})
    _teach(pruned, trained, keep)
    return pruned, graph


class _Counting(Untracked):
    """Counts the updates of the model's loss."""

    def __init__(self) -> None:
        self.updates = 0

    def update(self, loss: str = "model") -> None:
        self.updates += loss == "model"


def _teach(agent: Agent, base: Agent, keep: Mapping[str, Tensor]) -> None:
    """Tell a student what a trial tells it."""
    if isinstance(agent, Student):
        agent.learn_from(base, {name: mask.nonzero().flatten() for name, mask in keep.items()})


def _trace(agent: Agent) -> DependencyGraph:
    inputs = agent.calibration_inputs(2, 0)
    return components.trace(
        agent.model,
        lambda model: agent.program(model, inputs),
        components=agent.components,
        ties=agent.ties,
    )


def _run(agent: Agent, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return agent.program(agent.model, inputs)


def _better(agent: Agent, reached: float, reference: float) -> bool:
    return reached > reference if agent.performance.direction == "maximize" else reached < reference


def _shapes(agent: Agent) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in agent.states()["model"].items()}


def _equal(first: Mapping[str, Mapping[str, Tensor]], second: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """The same sections, names and bits."""
    if {s: set(state) for s, state in first.items()} != {s: set(state) for s, state in second.items()}:
        return False
    return all(torch.equal(first[s][name], second[s][name]) for s in first for name in first[s])


def _silent(*_: Any) -> None:
    pass


class _Ended(BaseException):
    pass


def _end(done: int, total: int, note: str) -> None:
    if done == 7:
        raise _Ended


def _surroundings(agent: Agent) -> tuple[Any, ...]:
    """What measuring must leave alone, besides what later updates show: modes, gradients, generators."""
    return (
        [module.training for module in agent.model.modules()],
        [None if p.grad is None else float(p.grad.double().sum()) for p in agent.model.parameters()],
        [p.requires_grad for p in agent.model.parameters()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        random.getstate(),
    )
