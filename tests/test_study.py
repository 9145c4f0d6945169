"""The study: anchors, proposals, results, determinism and its projection, on synthetic trials."""

from __future__ import annotations

import logging
import math
import random
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from agents.agent import Objective
from components.choosing import kept_count
from components.dependency import Group
from components.errors import UserError
from search import study as study_module
from search.constraints import Constraint
from search.pareto import hypervolume_log
from search.space import OptionRange, SearchSpace
from search.study import HISTORY, Study
from search.study_database import StudyDatabase
from search.trial_types import Proposal, TrialResult

ENCODER, DECODER = frozenset({"encoder"}), frozenset({"decoder"})
GROUPS = (
    Group("encoder.0", ENCODER, 128, ()),
    Group("latent", ENCODER | DECODER, 16, ()),
    Group("decoder.0", DECODER, 128, ()),
)
METRICS = ("l2", "fisher")
OBJECTIVES = (Objective("parameters", "minimize", "parameters"), Objective("score", "maximize", "points"))
SAMPLERS = ["tpe", "nsga2", "gp", "random", "qmc"]


def space_of(metrics: Sequence[str] = METRICS, groups: Sequence[Group] = GROUPS) -> SearchSpace:
    return SearchSpace.build(groups, metrics=metrics, max_ratio=0.98, trials=64)


def nine_decisions() -> SearchSpace:
    """Two groups of three channels, one metric."""
    groups = tuple(Group(name, ENCODER, 3, ()) for name in ("a", "b"))
    return SearchSpace.build(groups, metrics=("l2",), max_ratio=0.7, trials=9)


def make(
    sampler: Any = "tpe",
    seed: int = 0,
    *,
    space: SearchSpace | None = None,
    database: Path | None = None,
    name: str = "prunefront",
    **more: Any,
) -> Study:
    made = None if database is None else StudyDatabase(database, name)
    return Study(space or space_of(), OBJECTIVES, sampler, seed, database=made, **more)


def finish(number: int, proposal: Proposal, **changes: Any) -> TrialResult:
    """The result of a synthetic trial.

    A layer's size is the product of its widths; groups need some channels, fewer if `fisher` chose them.
    """
    plan = proposal.plan
    kept = [kept_count(group.size, plan.ratios[group.name]) for group in GROUPS]
    widths = [64, *kept, 64]
    parameters = sum(a * b for a, b in pairwise(widths))
    weight = float(plan.coefficients.get("fisher", 0.0))  # type: ignore[arg-type]
    needs = [(16 - 8 * weight), 4.0, (10 - 4 * weight)]
    score = math.prod(1 - math.exp(-own / need) for own, need in zip(kept, needs, strict=True))
    measured: dict[str, Any] = {
        "objectives": {"parameters": float(parameters), "score": score},
        "parameters": parameters,
        "size_ratio": parameters / (64 * 128 + 128 * 16 + 16 * 128 + 128 * 64),
        "macs": parameters,
        "retention": score,
        "performance": {"score": score},
        "started": "2026-01-31T12:00:00+00:00",
        "finished": "2026-01-31T12:00:02+00:00",
    }
    made = {"plan": plan, "origin": proposal.origin, "options": proposal.options, "seed": 0}
    return TrialResult(number, "complete", **made, **(measured | changes))


def run(study: Study, trials: int, *, first: int = 0, parallel: int = 1) -> list[TrialResult]:
    """Ask and tell, with so many trials running at a time."""
    running: list[tuple[int, Proposal]] = []
    results = []
    for number in range(first, trials):
        running.append((number, study.ask(number)))
        if len(running) == parallel:
            results.append(finish(*running.pop(0)))
            study.tell(results[-1])
    for entry in running:
        results.append(finish(*entry))
        study.tell(results[-1])
    return results


# --- proposals


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_anchors_come_first_and_exactly(sampler: str) -> None:
    space = space_of()
    anchors = space.anchors()
    study = make(sampler)
    for number, anchor in enumerate(anchors):
        proposal = study.ask(number)
        assert proposal == Proposal(
            space.to_plan(anchor.params), f"anchor: {anchor.label}", params=anchor.params
        )
    assert study.ask(len(anchors)).origin == sampler


def test_anchors_can_be_left_out() -> None:
    assert make(anchors=False).ask(0).origin == "tpe"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_seeds_and_results_give_equal_proposals(sampler: str) -> None:
    trials = 13 if sampler == "gp" else 40  # two proposals of the model after ten random ones
    plans = []
    for attempt in range(2):
        random.seed(attempt)  # nothing may come from the global generators
        np.random.seed(attempt)
        torch.manual_seed(attempt)
        plans.append([result.plan for result in run(make(sampler, 3), trials)])
    assert plans[0] == plans[1]
    other = [result.plan for result in run(make(sampler, 4), trials)]
    anchors = len(space_of().anchors())
    assert other[:anchors] == plans[0][:anchors]
    assert all(plan not in plans[0] for plan in other[anchors:])


def test_proposals_do_not_depend_on_how_often_others_were_drawn() -> None:
    """A proposal has a generator of its own, which others do not shift."""
    one, other = make("tpe", anchors=False), make("tpe", anchors=False)
    for number in range(5):
        one.ask(number)
    assert one.ask(5) == other.ask(5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_eight_parallel_proposals_differ(sampler: str) -> None:
    space = space_of()
    study = make(sampler, space=space)
    first = 12 if sampler == "gp" else 24
    results = run(study, first, parallel=4)
    plans = [study.ask(number).plan for number in range(first, first + 8)]
    decisions = [space.decision(plan) for plan in [*plans, *(result.plan for result in results)]]
    assert len(set(decisions)) == len(decisions)


def test_repeated_decisions_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    space = nine_decisions()

    def decisions() -> set[tuple[object, ...]]:
        study = make("random", space=space, anchors=False)
        return {space.decision(study.ask(number).plan) for number in range(5)}

    assert len(decisions()) == 5
    monkeypatch.setattr(study_module, "PROPOSALS", 1)
    assert len(decisions()) < 5


def test_an_exhausted_space_still_gets_proposals() -> None:
    space = space_of(metrics=("l2",), groups=(Group("a", ENCODER, 2, ()),))
    study = make("tpe", space=space)
    assert len({space.decision(study.ask(number).plan) for number in range(12)}) == 2


def test_nsga2_evolves_with_a_fresh_sampler_for_every_proposal() -> None:
    """With as many anchors as a population holds, the first child inherits from anchors alone."""
    space = space_of(metrics=("l1", "l2", "fisher"))
    anchors = space.anchors()
    study = make("nsga2", space=space, trials=40)  # a population of 8
    assert len(anchors) == 8
    run(study, 8)
    inherited = {(name, value) for anchor in anchors for name, value in anchor.params.items()}
    ratios = {ratio for name, value in inherited if name.startswith("keep/") for ratio in [1.0 - value]}
    genes = [ratio in ratios for number in range(8, 16) for ratio in study.ask(number).plan.ratios.values()]
    assert sum(genes) > len(genes) / 2

    later = make("nsga2", seed=1, space=space, trials=40)
    results = run(later, 60)
    known = {ratio for result in results[:16] for ratio in result.plan.ratios.values()}
    recent = [ratio in known for result in results[-8:] for ratio in result.plan.ratios.values()]
    assert any(recent)  # genes of the first generations live on
    assert not all(recent)  # and there are new ones


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_samplers_learn(sampler: str) -> None:
    """The mean hypervolume of several seeds is clearly better than that of random proposals."""

    def hypervolumes(name: str) -> np.ndarray:
        values = []
        for seed in range(6):
            results = run(make(name, seed), 64, parallel=2)
            sizes = [result.size_ratio for result in results]
            values.append(hypervolume_log(sizes, [result.retention for result in results]))
        return np.array(values)

    learned, drawn = hypervolumes(sampler), hypervolumes("random")
    assert learned.mean() > drawn.mean() + 2 * drawn.std() / math.sqrt(len(drawn))


def test_tpe_prefers_feasible_trials() -> None:
    constraint = Constraint("retention", ">=", 0.6)
    shares = {}
    for constraints in ((), (constraint,)):
        results = run(make("tpe", 1, constraints=constraints), 64)
        later = [result.retention >= 0.6 for result in results[32:]]
        shares[bool(constraints)] = sum(later) / len(later)
    assert shares[True] > shares[False] + 0.2


# --- options of the agent

OPTIONS = {"samples": OptionRange(32, 256, own=512), "iterations": OptionRange(2, 6, own=4)}


def with_options(metrics: Sequence[str] = ("l2",)) -> SearchSpace:
    return SearchSpace.build(GROUPS, metrics=metrics, max_ratio=0.98, trials=64, options=OPTIONS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_options_are_proposed_within_their_bounds(sampler: str) -> None:
    results = run(make(sampler, space=with_options(METRICS)), 14)
    anchored = len(with_options(METRICS).anchors())
    assert all(result.options == {"samples": 256, "iterations": 4} for result in results[:anchored])
    for result in results:
        assert list(result.options) == ["samples", "iterations"]
        assert all(type(value) is int for value in result.options.values())
        assert 32 <= result.options["samples"] <= 256
        assert 2 <= result.options["iterations"] <= 6
    assert len({result.options["samples"] for result in results[anchored:]}) > 1


def test_options_are_drawn_uniformly_in_their_logarithm() -> None:
    """Of [1, 100], random proposals lie at or below 10 about half the time, not a tenth of it."""
    wide = {"samples": OptionRange(1, 100, own=1)}
    space = SearchSpace.build(GROUPS, metrics=("l2",), max_ratio=0.98, trials=64, options=wide)
    study = make("random", space=space, anchors=False)
    small = [study.ask(number).options["samples"] <= 10 for number in range(200)]
    assert 70 < sum(small) < 130


def test_the_same_plan_with_other_options_is_another_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Group("a", ENCODER, 2, ())
    few = {"passes": OptionRange(1, 9, own=1)}
    space = SearchSpace.build((one,), metrics=("l2",), max_ratio=0.98, trials=6, options=few)

    def decided() -> set[tuple[int, int]]:
        study = make("random", space=space, anchors=False)
        proposals = [study.ask(number) for number in range(6)]
        return {(kept_count(2, p.plan.ratios["a"]), p.options["passes"]) for p in proposals}

    assert len(decided()) == 6
    monkeypatch.setattr(study_module, "PROPOSALS", 1)
    assert len(decided()) < 6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_replayed_study_remembers_options(sampler: str, tmp_path: Path) -> None:
    whole, resumed = (make(sampler, space=with_options(), trials=40) for _ in range(2))
    trials = 12 if sampler == "gp" else 20
    results = run(whole, trials)
    resumed.replay([TrialResult.from_record(result.to_record()) for result in results])
    proposal, again = whole.ask(trials), resumed.ask(trials)
    assert again.options == proposal.options
    assert again.plan.ratios == pytest.approx(proposal.plan.ratios, abs=1e-3 if sampler == "gp" else 1e-12)


def test_options_are_in_the_database(tmp_path: Path) -> None:
    trial = told(tmp_path, lambda proposal: finish(1, proposal), space=with_options())
    assert (trial.params["option/samples"], trial.params["option/iterations"]) == (256, 4)
    assert trial.distributions["option/samples"] == optuna.distributions.IntDistribution(32, 256, log=True)


# --- what is told


def test_trials_are_asked_for_once_and_told_after() -> None:
    study = make()
    proposal = study.ask(0)
    with pytest.raises(ValueError, match="trial 0 was asked for before"):
        study.ask(0)
    with pytest.raises(ValueError, match="trial 1 was never asked for"):
        study.tell(finish(1, proposal))
    study.tell(finish(0, proposal))
    study.tell(finish(0, proposal))  # a result may come twice
    with pytest.raises(ValueError, match="trial 0 was asked for before"):
        study.ask(0)


def stored(path: Path, name: str = "prunefront") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}")


def told(tmp_path: Path, result: Callable[[Proposal], TrialResult], **more: Any) -> optuna.trial.FrozenTrial:
    """What the database has of one trial."""
    study = make(database=tmp_path / "study.db", **more)
    study.tell(result(study.ask(1)))
    study.close()
    return stored(tmp_path / "study.db").trials[0]


def test_sizes_are_told_as_logarithms(tmp_path: Path) -> None:
    trial = told(tmp_path, lambda proposal: finish(1, proposal))
    expected = finish(1, make().ask(1))
    assert trial.state == TrialState.COMPLETE
    assert trial.values == [math.log(expected.objectives["parameters"]), expected.objectives["score"]]
    assert trial.user_attrs["parameters"] == expected.parameters
    assert trial.user_attrs["retention"] == expected.retention
    assert trial.user_attrs["trial"] == 1
    assert trial.user_attrs["origin"] == "anchor: uniform 50 %"
    assert trial.duration is not None
    assert trial.duration.total_seconds() == 2.0


def stopped(number: int, proposal: Proposal, **changes: Any) -> TrialResult:
    """A trial of this plan that was given up at its first rung."""
    given = {"status": "stopped", "objectives": {}, "performance": {}, "retention": None, "macs": None}
    given |= {"rung_losses": ((30, 0.5),), "updates": 30, "state": None}
    return replace(finish(number, proposal), **(given | changes))


def test_a_stopped_trial_is_pruned_and_has_no_values(tmp_path: Path) -> None:
    constraint = Constraint("retention", ">=", 0.5)
    trial = told(tmp_path, lambda proposal: stopped(1, proposal), constraints=(constraint,))
    assert trial.state == TrialState.PRUNED
    assert trial.values is None
    assert trial.params
    assert trial.user_attrs["parameters"] == finish(1, make().ask(1)).parameters
    assert trial.user_attrs["rung_loss"] == 0.5
    assert trial.user_attrs["updates"] == 30
    assert "reason" not in trial.user_attrs
    assert not {"retention", "score"} & set(trial.user_attrs)
    assert trial.intermediate_values == {}


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "random"])
def test_every_sampler_goes_on_after_stopped_trials(sampler: str) -> None:
    study = make(sampler)
    anchors = len(study._anchors)
    for number in range(anchors + 14):
        proposal = study.ask(number)
        early = number >= 2 and number % 3 > 0
        study.tell(stopped(number, proposal) if early else finish(number, proposal))
    states = [trial.state for trial in study._optuna.get_trials(deepcopy=False)]
    assert states.count(TrialState.PRUNED) > anchors
    assert TrialState.RUNNING not in states
    assert study._optuna.best_trials
    assert all(trial.state == TrialState.COMPLETE for trial in study._optuna.best_trials)


def test_stopped_trials_repel_the_tree_structured_sampler() -> None:
    """They are among the worse of what it compares, not among the good, and not left out."""
    from optuna.samplers._tpe.sampler import _split_trials, default_gamma_multiobjective

    study = make("tpe")
    for number in range(40):
        proposal = study.ask(number)
        study.tell(finish(number, proposal) if number % 4 == 0 else stopped(number, proposal))
    trials = study._optuna.get_trials(deepcopy=False)
    good, worse = _split_trials(study._optuna, trials, default_gamma_multiobjective(len(trials)))
    assert {trial.state for trial in good} == {TrialState.COMPLETE}
    assert sum(trial.state == TrialState.PRUNED for trial in worse) == 30


def learnt(study: Study, *, early: Callable[[int], bool], trials: int) -> None:
    """Tell a study of trials whose rung losses foretell their scores."""
    for number in range(trials):
        proposal = study.ask(number)
        whole = finish(number, proposal)
        rungs = ((30, 1 - whole.objectives["score"]),)
        told = (
            stopped(number, proposal, rung_losses=rungs)
            if early(number)
            else replace(whole, rung_losses=rungs)
        )
        study.tell(told)


@pytest.mark.parametrize("constraints", [(), (Constraint("retention", ">=", 0.3),)])
def test_the_gaussian_process_models_stopped_trials_by_estimates(constraints: Sequence[Constraint]) -> None:
    """All else equal, what it proposes depends on them; the study itself holds them as pruned."""
    proposals = []
    for loss in (0.05, 0.95):
        study = make("gp", constraints=constraints)
        learnt(study, early=lambda number: False, trials=12)
        study.tell(stopped(12, study.ask(12), rung_losses=((30, loss),)))
        [further] = study._estimated()
        assert len(further.values) == 2
        assert len(further.constraints) == len(constraints)
        score = further.values[1]
        assert (score > 0.6) == (loss == 0.05), score
        proposals.append(study.ask(13).plan.ratios)
        assert study._optuna.get_trials()[12].state == TrialState.PRUNED
        assert study._optuna.get_trials()[12].values is None
    assert proposals[0] != proposals[1]


def test_the_gaussian_process_does_not_wait_for_complete_trials_alone() -> None:
    study = make("gp")
    learnt(study, early=lambda number: number % 3 > 0, trials=15)
    random = make("random")
    learnt(random, early=lambda number: number % 3 > 0, trials=15)
    assert study.ask(15).plan.ratios != random.ask(15).plan.ratios
    complete = [trial for trial in study._optuna.get_trials() if trial.state == TrialState.COMPLETE]
    assert len(complete) < study_module.STARTUP_TRIALS


def test_stopped_trials_are_replayed_as_stopped() -> None:
    first, again = make(), make()
    results = []
    for number in range(8):
        proposal = first.ask(number)
        results.append(stopped(number, proposal) if number % 2 else finish(number, proposal))
        first.tell(results[-1])
    again.replay(TrialResult.from_record(result.to_record()) for result in results)
    states = [[trial.state for trial in study._optuna.get_trials()] for study in (first, again)]
    assert states[0] == states[1]
    assert states[0].count(TrialState.PRUNED) == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "failed", "reason": "prune: it broke", "objectives": {}}, "prune: it broke"),
        ({"status": "failed", "objectives": {}}, "the trial failed"),
        ({"objectives": {"parameters": 10.0, "score": math.inf}}, "objective score is inf"),
        ({"objectives": {"parameters": 10.0, "score": -math.inf}}, "objective score is -inf"),
        ({"objectives": {"parameters": 10.0, "score": math.nan}}, "objective score is nan"),
        ({"objectives": {"parameters": 10.0}, "performance": {}}, "objective score is missing"),
        (
            {"objectives": {"parameters": 0.0, "score": 1.0}},
            "objective parameters is 0.0, which has no logarithm",
        ),
        ({"retention": math.nan}, "constraint retention is nan"),
        ({"retention": None}, "constraint retention is missing"),
    ],
)
def test_what_is_no_number_becomes_a_failure(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    def result(proposal: Proposal) -> TrialResult:
        made = finish(1, proposal, **{key: value for key, value in changes.items() if key != "status"})
        return TrialResult(**{**made.__dict__, "status": changes.get("status", "complete")})

    trial = told(tmp_path, result, constraints=(Constraint("retention", ">=", 0.5),))
    assert trial.state == TrialState.FAIL
    assert trial.values is None
    assert trial.user_attrs["reason"] == reason
    assert trial.params  # what was tried is there to see
    numbers = [value for value in trial.user_attrs.values() if isinstance(value, float)]
    assert all(math.isfinite(number) for number in numbers)


def test_failures_teach_the_sampler_nothing() -> None:
    clean, noisy = make(), make()
    run(clean, 20)
    for number in range(20):
        noisy.tell(finish(number, noisy.ask(number)))
    for number in range(20, 24):
        proposal = noisy.ask(number)
        noisy.tell(finish(number, proposal, objectives={"parameters": 1.0, "score": math.inf}))
    assert noisy.ask(24) == clean.ask(24)


def test_constraints_are_told_and_mirrored(tmp_path: Path) -> None:
    constraints = (Constraint("retention", ">=", 0.5), Constraint("macs", "<=", 1000.0))
    trial = told(
        tmp_path, lambda proposal: finish(1, proposal, retention=0.75, macs=1500), constraints=constraints
    )
    assert trial.constraints == {"retention >= 0.5": -0.25, "macs <= 1000.0": 500.0}
    assert trial.user_attrs["constraint retention >= 0.5"] == -0.25
    assert trial.user_attrs["constraint macs <= 1000.0"] == 500.0


# --- the database


def test_the_database_holds_every_finished_trial(tmp_path: Path) -> None:
    path = tmp_path / "a %?# name.db"
    study = make(database=path, name="mine")
    results = run(study, 12, parallel=3)
    study.ask(12)
    study.close()
    assert not list(tmp_path.glob("*-wal"))  # the file alone is complete
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    copy = tmp_path / "study.db"
    copy.write_bytes(path.read_bytes())  # the URL of Optuna's own reader cannot spell the first name
    database = stored(copy, "mine")
    assert database.directions == [optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE]
    assert database.metric_names == ["log parameters", "score"]
    assert [trial.user_attrs["trial"] for trial in database.trials] == [result.number for result in results]
    space = space_of()
    for trial, result in zip(database.trials, results, strict=True):
        assert space.to_plan(trial.params) == result.plan


def test_a_database_that_cannot_be_written_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="search.study_database"):
        study = make(database=tmp_path / "absent" / "study.db")
        results = run(study, 12)
        study.close()
    assert [record.message for record in caplog.records if "cannot be written" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1
    assert [result.plan for result in results] == [result.plan for result in run(make(), 12)]


def test_what_a_passing_fault_kept_from_the_database_is_written_later(tmp_path: Path) -> None:
    path = tmp_path / "later" / "study.db"
    study = make(database=path)
    run(study, 3)
    path.parent.mkdir()
    run(study, 4, first=3)
    study.close()
    assert [trial.user_attrs["trial"] for trial in stored(path).trials] == [0, 1, 2, 3]


# --- replay


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_replayed_study_goes_on_where_it_was(sampler: str) -> None:
    """With one metric plans tell all, so the next proposals are those of a study never interrupted."""
    space = space_of(metrics=("l2",))
    whole, resumed = make(sampler, space=space, trials=40), make(sampler, space=space, trials=40)
    trials = 12 if sampler == "gp" else 40
    results = run(whole, trials)
    resumed.replay(reversed(results))
    for number in range(trials, trials + 2):
        proposal, again = whole.ask(number), resumed.ask(number)
        assert again.origin == proposal.origin
        assert again.plan.ratios == pytest.approx(
            proposal.plan.ratios, abs=1e-3 if sampler == "gp" else 1e-12
        )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_what_was_proposed_a_replayed_study_goes_on_bit_for_bit(sampler: str) -> None:
    whole, resumed = make(sampler), make(sampler)
    trials = 14 if sampler == "gp" else 30
    proposals, results = {}, []
    for number in range(trials):
        proposals[number] = whole.ask(number)
        results.append(finish(number, proposals[number]))
        whole.tell(results[-1])
    resumed.replay(results, proposals)
    assert [resumed.ask(n) for n in (trials, trials + 1)] == [whole.ask(n) for n in (trials, trials + 1)]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_ratios_come_first_with_all_metrics_alike(sampler: str) -> None:
    first = 16
    study, resumed = (make(sampler, ratios_first=first) for _ in range(2))
    results = run(study, first - 1)
    anchors = space_of().anchors()
    for result in results[len(anchors) :]:
        assert result.plan.coefficients == pytest.approx(dict.fromkeys(METRICS, 0.5), abs=1e-12)
    assert len({tuple(result.plan.ratios.values()) for result in results[len(anchors) :]}) == 15 - len(
        anchors
    )
    resumed.replay(results)
    assert resumed.ask(first - 1).plan.ratios == pytest.approx(study.ask(first - 1).plan.ratios, abs=1e-3)
    later = [study.ask(number).plan.coefficients["l2"] for number in range(first, first + 4)]
    assert len(set(later)) > 1


def test_where_no_new_ratios_are_left_mixtures_are_searched_sooner() -> None:
    groups = tuple(Group(name, ENCODER, 3, ()) for name in ("a", "b"))
    space = SearchSpace.build(groups, metrics=METRICS, max_ratio=0.7, trials=30)
    study, decided = make("tpe", space=space, anchors=False, ratios_first=30), []
    for number in range(30):
        proposal = study.ask(number)
        decided.append(space.decision(proposal.plan))
        study.tell(finish_any(number, proposal))
    assert len(set(decided)) == 30 > 9


@pytest.mark.parametrize("sampler", ["random", "nsga2", "qmc"])
def test_what_learns_otherwise_or_not_at_all_mixes_from_the_beginning(sampler: str) -> None:
    assert run(make(sampler), 20) == run(make(sampler, ratios_first=20), 20)


def test_what_was_proposed_and_has_not_finished_is_proposed_again() -> None:
    before, after = make(), make(seed=1)
    proposals = {number: before.ask(number) for number in (0, 20, 21)}
    done = finish(0, proposals[0])
    after.replay([done], {number: Proposal.from_record(p.to_record()) for number, p in proposals.items()})
    assert [after.ask(number) for number in (20, 21)] == [proposals[20], proposals[21]]
    assert after.ask(22) != before.ask(22)  # of another seed


def test_quasi_random_points_are_those_of_the_sequence_whatever_was_told() -> None:
    space = space_of(metrics=("l2",))
    study, other = make("qmc", 3, space=space, anchors=False), make("qmc", 3, space=space, anchors=False)
    run(other, 5)
    points = [list(study.ask(number).params.values()) for number in range(64)]
    assert list(other.ask(8).params.values()) == points[8]
    shares = np.log(np.array(points) / 0.02) / np.log(1 / 0.02)  # of a log-uniform dimension, in [0, 1)
    for column in shares.T:
        assert sorted(np.floor(64 * column).astype(int)) == list(range(64)), "one point in every 64th"


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_warm_start_teaches_the_sampler_and_nobody_else(sampler: str, tmp_path: Path) -> None:
    earlier = run(make("random", 5), 40)
    cold, warm = make(sampler, 1, anchors=False), make(sampler, 1, anchors=False, database=tmp_path / "s.db")
    warm.warm_start(earlier)
    assert cold.ask(0) != warm.ask(0)
    warm.tell(finish(0, make(sampler, 1).ask(0)))
    warm.close()
    assert [trial.user_attrs["trial"] for trial in stored(tmp_path / "s.db").trials] == [0]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_of_a_warm_start_too_no_more_is_learnt_than_a_sampler_can_afford(sampler: str) -> None:
    earlier = run(make("random", 5), 60)
    study = make(sampler, 1, anchors=False)
    with patch.dict(HISTORY, {sampler: 20}):
        study.warm_start(earlier)
    assert len(study._optuna.trials) == 20


def test_a_warm_start_of_another_space_is_refused() -> None:
    other = run(make("random", space=space_of()), 3)
    with pytest.raises(UserError, match=r"trial 0 .* prunes decoder\.0, encoder\.0, latent, this one a, b"):
        make(space=nine_decisions()).warm_start(other)


def test_replay_keeps_the_numbers_and_asks_for_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    before = make(database=path)
    results = run(before, 6)
    before.close()
    after = make(database=path)
    after.replay([result for result in results if result.number != 2])
    assert after.ask(2).origin == "anchor: uniform 75 %"
    with pytest.raises(ValueError, match="trial 5 was asked for before"):
        after.ask(5)
    with pytest.raises(ValueError, match="trial 5 was asked for before"):
        after.replay(results[5:])
    after.tell(finish(7, after.ask(7)))
    after.close()
    numbers = [trial.user_attrs["trial"] for trial in stored(path).trials]
    assert numbers == [0, 1, 3, 4, 5, 7]  # what was replayed, and nothing twice


def test_replayed_decisions_are_not_proposed_again() -> None:
    space = nine_decisions()
    first = make("random", space=space, anchors=False)
    proposals = [first.ask(number) for number in range(3)]
    second = make("random", seed=5, space=space, anchors=False)
    second.replay([finish_any(number, proposal) for number, proposal in enumerate(proposals)])
    new = {space.decision(second.ask(number).plan) for number in range(3, 5)}
    assert not new & {space.decision(proposal.plan) for proposal in proposals}


def finish_any(number: int, proposal: Proposal) -> TrialResult:
    objectives = {"parameters": 10.0 + number, "score": 0.5}
    return TrialResult(
        number,
        "complete",
        proposal.plan,
        proposal.origin,
        seed=0,
        options=proposal.options,
        objectives=objectives,
    )
