"""One trial: what it measures, that it repeats bit for bit, and that its faults are results."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
import toy_agents

from components.plan import PruningPlan
from components.tracker import Tracking
from search.base import Base, train_base, untrained_base
from search.trial import TrialResult, TrialSettings, TrialSpec, run_trial, trial_seed

METRICS = ("l2", "fisher")
OBJECTIVES = ("parameters", "macs", "reconstruction_error")
# What records did not always have.
LATER = ("options", "fine_tuning", "repaired_by", "rung_losses", "updates")
HALF = PruningPlan({"l2": 1.0, "fisher": 1.0}, {"encoder.0": 0.5, "latent": 0.4, "decoder.0": 0.75})


@pytest.fixture(scope="module")
def base() -> Base:
    made = train_base("toy_agents:Toy", {}, seed=0, metrics=METRICS)
    for values in (*made.states.values(), *made.scores.values(), made.calibration, made.data):
        for array in values.values():
            array.flags.writeable = False  # as arrays from Ray's object store are
    return made


def spec(plan: PruningPlan = HALF, number: int = 0, **settings) -> TrialSpec:
    made = TrialSettings(
        **{"metrics": METRICS, "objectives": OBJECTIVES, "fine_tune_updates": 20, **settings}
    )
    return TrialSpec(number, plan, "test", trial_seed(0, number), made)


def with_fault(base: Base, fault: str) -> Base:
    return dataclasses.replace(base, options={**base.options, "fault": fault})


def same(first: TrialResult, second: TrialResult) -> bool:
    ignored = {"timings": {}, "usage": {}, "started": "", "finished": ""}
    one, two = (json.dumps({**r.to_record(), **ignored}) for r in (first, second))
    states = all(np.array_equal(first.state[name], second.state[name]) for name in first.state)
    return one == two and states and set(first.state) == set(second.state)


def test_keeping_everything_without_repair_is_the_base_bit_for_bit(base):
    result = run_trial(spec(PruningPlan({"l2": 1.0}, {}), reconstruction="none", fine_tune_updates=0), base)
    assert result.complete
    assert result.retention == 1.0
    assert result.size_ratio == 1.0
    assert result.parameters == base.parameters
    assert result.macs == base.macs
    assert result.performance["reconstruction_error"] == base.performance["validation"]
    for name, array in base.states["model"].items():
        np.testing.assert_array_equal(result.state[name], array)


def test_slicing_alone_keeps_the_best_channels_of_every_tensor(base):
    result = run_trial(spec(reconstruction="none", fine_tune_updates=0), base)
    assert result.widths == {"encoder.0": 6, "latent": 3, "decoder.0": 3}
    kept = {}
    for group, ratio in HALF.ratios.items():
        mixed = sum(scores[group] / scores[group].mean() for scores in base.scores.values())
        count = round((1 - ratio) * len(mixed))
        kept[group] = tuple(sorted(np.argsort(-mixed, kind="stable")[:count].tolist()))
    assert result.kept == kept
    e, z, d = (list(kept[group]) for group in ("encoder.0", "latent", "decoder.0"))
    dense = base.states["model"]
    expected = {
        "encoder.0.weight": dense["encoder.0.weight"][e],
        "encoder.0.bias": dense["encoder.0.bias"][e],
        "encoder.2.weight": dense["encoder.2.weight"][z][:, e],
        "encoder.2.bias": dense["encoder.2.bias"][z],
        "decoder.0.weight": dense["decoder.0.weight"][d][:, z],
        "decoder.0.bias": dense["decoder.0.bias"][d],
        "decoder.2.weight": dense["decoder.2.weight"][:, d],
        "decoder.2.bias": dense["decoder.2.bias"],
    }
    assert set(result.state) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(result.state[name], array)


def test_sizes_are_those_of_the_widths(base):
    result = run_trial(spec(), base)
    e, z, d, n = 6, 3, 3, toy_agents.INPUTS
    encoder, decoder = n * e + e + e * z + z, z * d + d + d * n + n
    assert result.component_sizes == {"encoder": encoder, "decoder": decoder}
    assert result.parameters == encoder + decoder == sum(array.size for array in result.state.values())
    assert result.macs == n * e + e * z + z * d + d * n
    assert result.size_ratio == result.parameters / base.parameters
    assert result.objectives == {
        "parameters": result.parameters,
        "macs": result.macs,
        "reconstruction_error": result.performance["reconstruction_error"],
    }


def test_retention_is_the_share_of_the_bases_advantage_on_validation_data(base):
    result = run_trial(spec(), base)
    agent = toy_agents.Toy({}, result.widths)
    agent.model.load_state_dict({name: torch.tensor(array) for name, array in result.state.items()})
    validation, train = agent.data()["validation"], agent.data()["train"]
    with torch.no_grad():
        error = float((agent.act(validation) - validation).square().mean())
    trivial = float((validation - train.mean(0)).square().mean())
    assert result.performance["reconstruction_error"] == error
    expected = (trivial - error) / (trivial - base.performance["validation"])
    assert result.retention == pytest.approx(expected, rel=1e-12)
    assert 0.3 < result.retention < 1.0


def test_the_moments_are_sliced_with_the_model(base, monkeypatch):
    seen = []
    load = toy_agents.Toy.load_states

    def spy(self, states):
        seen.append(
            {section: {n: tuple(t.shape) for n, t in state.items()} for section, state in states.items()}
        )
        load(self, states)

    monkeypatch.setattr(toy_agents.Toy, "load_states", spy)
    run_trial(spec(), base)
    fine_tuned = [states for states in seen if len(states) > 1][-1]
    assert set(fine_tuned) == {"model", "adam_mean", "adam_square"}
    assert fine_tuned["model"] == fine_tuned["adam_mean"] == fine_tuned["adam_square"]
    assert fine_tuned["model"]["decoder.0.weight"] == (3, 3)


@pytest.mark.parametrize("reconstruction", ["none", "sequential"])
def test_the_same_specification_gives_the_same_bits_whatever_happened_before(base, reconstruction):
    first = run_trial(spec(reconstruction=reconstruction), base)
    torch.rand(17)
    np.random.rand(3)
    run_trial(spec(number=5), base)
    copy = pickle.loads(pickle.dumps(base))  # another process: nothing is cached for it
    second = run_trial(spec(reconstruction=reconstruction), copy)
    assert same(first, second)


def test_another_trial_number_is_another_fine_tuning(base):
    first, second = run_trial(spec(number=1), base), run_trial(spec(number=2), base)
    assert first.seed != second.seed
    assert any((first.state[name] != second.state[name]).any() for name in first.state)


def test_seeds_of_trials_are_distinct():
    seeds = [trial_seed(seed, number) for seed in range(20) for number in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_nothing_outside_is_changed(base):
    before = pickle.dumps((base.states, base.scores, base.data))
    torch.set_num_threads(2)
    torch.manual_seed(3)
    np.random.seed(3)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    run_trial(spec(), base)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert torch.get_num_threads() == 2
    assert pickle.dumps((base.states, base.scores, base.data)) == before


def test_repair_and_fine_tuning_each_help(base):
    plan = PruningPlan({"l2": 1.0}, {"encoder.0": 0.5, "latent": 0.4, "decoder.0": 0.5})
    sliced = run_trial(spec(plan, reconstruction="none", fine_tune_updates=0), base)
    repaired = run_trial(spec(plan, fine_tune_updates=0), base)
    tuned = run_trial(spec(plan, fine_tune_updates=100), base)
    assert sliced.retention < repaired.retention < tuned.retention


def without_fine_tuning(result: TrialResult) -> dict:
    """The record of what was kept, without what tells of the way there."""
    record = result.to_record()
    volatile = ("timings", "usage", "started", "finished", "rungs", "updates", "fine_tuning", "repaired_by")
    return {name: value for name, value in record.items() if name not in volatile}


def test_fine_tuning_that_harms_leaves_the_reconstructed_agent(base):
    repaired = run_trial(spec(fine_tune_updates=0), base)
    harmed = run_trial(spec(), with_fault(base, "harm"))
    assert (repaired.repaired_by, harmed.repaired_by) == ("reconstruction", "reconstruction")
    assert without_fine_tuning(harmed) == without_fine_tuning(repaired)
    for name, array in repaired.state.items():
        np.testing.assert_array_equal(harmed.state[name], array)
    assert [updates for updates, _ in harmed.rungs] == [0, 20]
    assert harmed.rungs[0] == repaired.rungs[0]
    assert harmed.rungs[1][1] > 50.0  # what the harm made of it is told all the same
    agent = toy_agents.Toy({}, harmed.widths)
    agent.load_states({"model": {name: torch.tensor(array) for name, array in harmed.state.items()}})
    assert agent.evaluate("validation") == harmed.performance


def test_fine_tuning_that_does_no_harm_is_kept(base):
    tuned = run_trial(spec(), base)
    assert tuned.repaired_by == "fine_tuning"
    assert tuned.performance["reconstruction_error"] == tuned.rungs[1][1] < tuned.rungs[0][1]
    same_as_before = run_trial(spec(fine_tune_method="nothing"), base)
    assert same_as_before.rungs[0][1] == same_as_before.rungs[1][1]
    assert same_as_before.repaired_by == "fine_tuning"


@pytest.mark.parametrize("mode", ["shared", "per_trial"])
def test_what_is_whole_is_neither_reconstructed_nor_fine_tuned(mode):
    base = train_base("toy_agents:Toy", {}, seed=0, metrics=METRICS)
    shape = untrained_base("toy_agents:Toy", {}, seed=0) if mode == "per_trial" else base
    whole = run_trial(spec(PruningPlan({"l2": 1.0}, {}), base_mode=mode, number=3), shape)
    own = train_base("toy_agents:Toy", {}, seed=trial_seed(0, 3), metrics=METRICS)
    wanted = own if mode == "per_trial" else base
    assert (whole.status, whole.retention, whole.size_ratio) == ("complete", 1.0, 1.0)
    for name, array in wanted.states["model"].items():
        np.testing.assert_array_equal(whole.state[name], array)
    assert (whole.repaired_by, whole.updates, whole.fine_tuning) == ("", 0, {})
    assert [updates for updates, _ in whole.rungs] == [0]
    assert not {"reconstruct", "fine_tune"} & set(whole.timings)
    one_less = PruningPlan({"l2": 1.0}, {"latent": 0.2})
    assert run_trial(spec(one_less, base_mode=mode, number=3), shape).repaired_by == "fine_tuning"


def test_the_better_of_a_performance_to_maximize_is_the_higher():
    base = train_base("toy_agents:Scoring", {}, seed=0, metrics=METRICS)
    objectives = ("parameters", "score")
    tuned = run_trial(spec(objectives=objectives), base)
    assert tuned.repaired_by == "fine_tuning"
    assert tuned.performance["score"] == tuned.rungs[1][1] > tuned.rungs[0][1]
    harmed = run_trial(spec(objectives=objectives), with_fault(base, "harm"))
    assert harmed.repaired_by == "reconstruction"
    assert harmed.performance["score"] == harmed.rungs[0][1] > harmed.rungs[1][1]


def test_the_split_is_measured_once_before_and_once_after_fine_tuning(base, monkeypatch):
    measured = []
    evaluate = toy_agents.Toy.evaluate

    def spy(self, split):
        measured.append(split)
        return evaluate(self, split)

    monkeypatch.setattr(toy_agents.Toy, "evaluate", spy)
    for updates, fault, times in ((0, None, 1), (20, None, 2), (20, "harm", 2)):
        measured.clear()
        run_trial(spec(fine_tune_updates=updates), with_fault(base, fault))
        assert measured == ["validation"] * times


def test_a_student_learns_which_agent_it_was_pruned_from_and_how():
    base = train_base("toy_agents:Taught", {}, seed=0, metrics=METRICS)
    plan = PruningPlan(HALF.coefficients, {"encoder.0": 0.5, "latent": 0.4})  # decoder.0 keeps everything
    result = run_trial(spec(plan), base)
    assert result.complete, result.reason
    expected = {group: float(sum(2**index for index in kept)) for group, kept in result.kept.items()}
    assert expected["decoder.0"] == 2**12 - 1
    assert result.fine_tuning == {**expected, "teacher": base.performance["validation"]}


FELL = {"held_out_loss_before": 2.0, "held_out_loss": 1.0}
ROSE = {"held_out_loss_before": 1.0, "held_out_loss": 2.0}


@pytest.mark.parametrize(
    ("told", "fault", "rungs", "kept"),
    [
        (FELL, None, [20], "fine_tuning"),
        (ROSE, None, [0, 20], "fine_tuning"),
        ({"held_out_loss": 1.0}, None, [0, 20], "fine_tuning"),
        ({}, None, [0, 20], "fine_tuning"),
        (FELL, "harm", [0, 20], "reconstruction"),  # by ten: it retains nothing
    ],
)
def test_what_is_surely_better_spares_the_other_measurement(base, monkeypatch, told, fault, rungs, kept):
    plain = run_trial(spec(), with_fault(base, fault))
    measured = []
    fine_tune, evaluate = toy_agents.Toy.fine_tune, toy_agents.Toy.evaluate
    monkeypatch.setattr(toy_agents.Toy, "fine_tune", lambda self, *given: fine_tune(self, *given) or told)
    monkeypatch.setattr(
        toy_agents.Toy, "evaluate", lambda self, split: measured.append(split) or evaluate(self, split)
    )
    result = run_trial(spec(), with_fault(base, fault))
    assert ([updates for updates, _ in result.rungs], result.repaired_by) == (rungs, kept)
    assert len(measured) == len(rungs)
    for record in (plain, result):  # sparing it changes nothing else
        assert (record.performance, record.retention) == (plain.performance, plain.retention)
    assert set(result.rungs) <= set(plain.rungs)


def test_a_trial_may_act_with_other_options_than_its_base():
    base = train_base("toy_agents:Repeating", {}, seed=0, metrics=METRICS)
    alone = spec(fine_tune_updates=0)
    twice = run_trial(alone, base)
    assert twice.options == {}
    for passes in (1, 3):
        result = run_trial(dataclasses.replace(alone, options={"passes": passes}), base)
        assert result.options == {"passes": passes}
        assert result.macs * 2 == twice.macs * passes
        for name, array in twice.state.items():
            np.testing.assert_array_equal(result.state[name], array)
        agent = toy_agents.Repeating({"passes": passes}, result.widths)
        agent.load_states({"model": {name: torch.tensor(array) for name, array in result.state.items()}})
        error = agent.evaluate("validation")["reconstruction_error"]
        assert result.performance == {"reconstruction_error": error} != twice.performance
        assert result.retention == base.retention(error)
    failed = run_trial(dataclasses.replace(alone, options={"passes": 10}), base)
    assert failed.reason == "slice: UserError: agent.passes is 10: it must be at most 9"
    assert failed.options == {"passes": 10}


def test_gram_reconstruction_uses_the_grams_of_the_base():
    base = train_base("toy_agents:Toy", {}, seed=0, metrics=METRICS, reconstruction="gram")
    sliced = run_trial(spec(reconstruction="none", fine_tune_updates=0), base)
    repaired = run_trial(spec(reconstruction="gram", fine_tune_updates=0), base)
    assert repaired.complete
    assert repaired.retention > sliced.retention


def test_stages_are_timed_in_order(base):
    result = run_trial(spec(), base)
    assert list(result.timings) == ["score", "mix", "slice", "reconstruct", "fine_tune", "evaluate"]
    assert all(seconds >= 0 for seconds in result.timings.values())
    assert result.started <= result.finished


def test_a_latency_is_measured_where_it_is_an_objective(base):
    assert "latency_p99_ms" not in run_trial(spec(), base).objectives
    result = run_trial(spec(objectives=("parameters", "latency_p99_ms", "latency_median_ms")), base)
    assert 0 < result.objectives["latency_median_ms"] <= result.objectives["latency_p99_ms"]
    assert result.host


def test_a_latency_is_measured_where_a_constraint_bounds_it(base):
    unbounded = run_trial(spec(), base)
    assert unbounded.latencies == {}
    assert unbounded.measurement("latency_p99_ms") is None
    result = run_trial(spec(constrained=("latency_p99_ms", "retention")), base)
    assert result.complete
    assert set(result.objectives) == set(OBJECTIVES)
    assert set(result.latencies) == {"latency_median_ms", "latency_p99_ms"}
    assert 0 < result.measurement("latency_median_ms") <= result.measurement("latency_p99_ms")
    assert TrialResult.from_record(json.loads(json.dumps(result.to_record()))).latencies == result.latencies


def test_a_stopped_trial_has_no_latency_and_macs_where_they_are_bounded(base):
    reports = []
    ranked = dataclasses.replace(base, kind="toy_agents:Ranked")
    for constrained in ((), ("macs", "latency_p99_ms")):
        settings = {"objectives": ("parameters",), "rungs": (10,), "constrained": constrained}
        run_trial(spec(**settings), ranked, report=reports.append)
    without, bounded = reports
    assert without.macs is None
    assert bounded.macs > 0
    assert bounded.latencies == {}


def test_a_trial_may_train_its_own_base_and_is_measured_against_it():
    shape = untrained_base("toy_agents:Toy", {}, seed=0)
    assert not shape.trained
    result = run_trial(spec(base_mode="per_trial", number=3), shape)
    assert result.complete, result.reason
    assert next(iter(result.timings)) == "train"
    own = train_base("toy_agents:Toy", {}, seed=trial_seed(0, 3), metrics=METRICS)
    assert result.base_performance == own.performance
    trivial = own.trivial["validation"]
    error = result.performance["reconstruction_error"]
    assert result.retention == (error - trivial) / (own.performance["validation"] - trivial)
    assert same(result, run_trial(spec(base_mode="per_trial", number=3), shape))
    other = run_trial(spec(base_mode="per_trial", number=4), shape)
    assert other.base_performance != result.base_performance
    dense = PruningPlan({"l2": 1.0}, {})
    kept = run_trial(spec(dense, base_mode="per_trial", reconstruction="none", fine_tune_updates=0), shape)
    assert kept.retention == 1.0


def test_a_trials_own_base_is_tracked_as_the_experiment_says():
    shape = untrained_base("toy_agents:Toy", {}, seed=0)
    plan = PruningPlan({"gradient": 1.0}, HALF.ratios)
    chosen = Tracking(every=3, decay=0.5)
    settings = {"metrics": ("gradient",), "base_mode": "per_trial"}
    kept = run_trial(spec(plan, tracking=chosen, **settings), shape).kept
    own = train_base(
        "toy_agents:Toy", {}, seed=trial_seed(0, 0), metrics=("gradient",), tracking=chosen
    ).scores["gradient"]
    for group, channels in kept.items():
        assert set(channels) == set(np.argsort(-own[group], kind="stable")[: len(channels)].tolist())
    assert kept != run_trial(spec(plan, **settings), shape).kept


def test_a_fine_tuning_that_diverged_leaves_what_reconstruction_made(base):
    result = run_trial(spec(), with_fault(base, "nan fact"))
    assert result.complete, result.reason
    assert (result.repaired_by, result.fine_tuning) == ("reconstruction", {"diverged": 1.0})
    alone = run_trial(spec(fine_tune_updates=0), base)
    assert result.objectives == alone.objectives
    assert result.rungs[0] == alone.rungs[0]
    assert all(np.array_equal(result.state[name], array) for name, array in alone.state.items())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "fine_tune: RuntimeError: the toy was told to fail"),
        ("nan", "evaluate: NonFiniteError: reconstruction_error is nan"),
        ("inf", "evaluate: NonFiniteError: extra is inf"),
    ],
)
def test_a_fault_is_a_failed_result_with_its_stage_and_reason(base, fault, reason):
    result = run_trial(spec(), with_fault(base, fault))
    assert result.status == "failed"
    assert result.reason == reason
    assert result.objectives == {}
    assert (result.repaired_by, result.fine_tuning) == ("", {})
    assert result.parameters is None
    assert result.state is None
    assert result.timings
    assert TrialResult.from_record(json.loads(json.dumps(result.to_record(), allow_nan=False))) == result
    # The worker survives it: the next trial is as if nothing had happened.
    assert same(run_trial(spec(), base), run_trial(spec(), base))


@pytest.mark.parametrize(
    ("plan", "settings", "reason"),
    [
        (PruningPlan({"l2": 1.0}, {"encoder.7": 0.5}), {}, "mix: UserError: the model has no pruning group"),
        (PruningPlan({"taylor": 1.0}, {}), {}, "mix: UserError: there are no scores of metric 'taylor'"),
        (HALF, {"fine_tune_method": "magic"}, ""),
        (HALF, {"reconstruction": "gram"}, "reconstruct: UserError: reconstruction 'gram' needs the Gram"),
        (HALF, {"objectives": ("return",)}, "evaluate: KeyError: 'return'"),
    ],
)
def test_an_impossible_specification_fails_and_does_not_raise(base, plan, settings, reason):
    result = run_trial(spec(plan, **settings), base)
    if reason:
        assert not result.complete
        assert result.reason.startswith(reason)
        assert "\n" not in result.reason


def test_records_come_back_exactly(base):
    result = run_trial(spec(), base)
    text = json.dumps(result.to_record(), allow_nan=False)
    assert TrialResult.from_record(json.loads(text)) == dataclasses.replace(result, state=None)
    nested = dataclasses.replace(
        result, plan=PruningPlan({"encoder": {"l2": 0.3}, "coupling": {"l2": 1.0}}, {})
    )
    back = TrialResult.from_record(json.loads(json.dumps(nested.to_record())))
    assert back.plan == nested.plan
    assert back.measurement("size_ratio") == result.size_ratio
    assert back.measurement("reconstruction_error") == result.performance["reconstruction_error"]
    assert back.measurement("nothing") is None
    changes = {"options": {"passes": 3}, "fine_tuning": {"loss": 0.1}, "repaired_by": "reconstruction"}
    changes |= {"status": "stopped", "rung_losses": ((4, 0.5), (9, 0.25)), "updates": 9}
    told = dataclasses.replace(result, **changes, state=None)
    assert TrialResult.from_record(json.loads(json.dumps(told.to_record()))) == told


def test_records_of_before_are_read(base):
    result = run_trial(spec(), base)
    record = {name: value for name, value in result.to_record().items() if name not in LATER}
    assert len(record) == len(result.to_record()) - len(LATER)
    unknown = {"options": {}, "fine_tuning": {}, "repaired_by": "", "state": None}
    assert TrialResult.from_record(record) == dataclasses.replace(result, **unknown)


def test_a_trial_says_what_it_took_of_its_worker(base) -> None:
    result = run_trial(spec(), base)
    assert 0 < result.usage["cpu_seconds"] < 600
    assert 20 < result.usage["memory_mb"] < 100_000
    assert set(result.usage) == {"cpu_seconds", "memory_mb"}
    again = TrialResult.from_record(result.to_record())
    assert again.usage == result.usage
