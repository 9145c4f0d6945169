"""`prunefront profile`: what a search would do and what it would cost, before anything is spent.

Nothing is written. Models are built and counted; one trial of each size is run for real, on the trained base
if there is one and on one that has barely trained otherwise; the rest is arithmetic (`search.cost`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from components.errors import UserError
from search.arrays import to_tensors
from search.base import Base
from search.checked_experiment import CheckedExperiment
from search.cost import MeasuredTrials, SearchCost, predict, settings_of
from search.determinism import deterministic
from search.feasibility import PossibleModel, require_reachable
from search.measurement import performance_of
from search.node_checks import usable_cores
from search.outline import Outline
from search.prepared_base import prepare
from search.rehearsal import TrainingTime, rehearse
from search.remeasurement import processes
from search.study import Study
from search.trial import run_trial
from search.trial_types import TrialResult, TrialSettings, TrialSpec, trial_seed

BUDGET_SECONDS = 60.0
"""For measuring trials: what would exceed it is left out."""

SAMPLED_TRIALS = 1000
"""Longest history of a study that proposals are measured at."""

BUSY_LOAD = 1.5
"""Load average of the last minute from which a machine counts as busy; measuring makes up to 1 of it."""

Say = Callable[[str], None]
"""Told, in a few words, what is being measured."""


@dataclass(frozen=True)
class Prediction:
    """What the search would cost.

    Attributes:
        measured: what trials cost; None where none could be measured.
        trained_base: whether that was measured on the trained base.
        training: how long training a base takes; 0 where there is one already.
        trained_first: whether the search trains one before its trials.
        train_each: seconds of training in every trial, None where that is not known; 0 where none does.
        propose: seconds that all proposals together take.
        device: that trials were measured on.
        costs: with different resources; the first is what a search does here if nothing else is said.
        notes: sentences on what this rests on, and on what to look out for.
    """

    measured: MeasuredTrials | None
    trained_base: bool
    training: TrainingTime
    trained_first: bool
    train_each: float | None
    propose: float
    device: str
    costs: tuple[SearchCost, ...]
    notes: tuple[str, ...]


def estimate(checked: CheckedExperiment, plan: Outline, say: Say) -> Prediction:
    """Measure trials and predict what the search costs; takes a minute or two.

    Args:
        checked: the experiment.
        plan: its outline.
        say: is told what is being measured.

    Raises:
        UserError: no trial can meet the constraints, or a trial on the trained base fails.
    """
    config = checked.config
    smallest, _, largest = plan.models
    base = checked.stored_base()
    require_reachable(config.search.constraints, smallest, largest, checked.agent.performance, base=base)
    notes = []
    if checked.path.exists() and base is None:
        notes.append(f"{checked.path} exists: a search needs another name, with --name.")
    per_trial = config.base.mode == "per_trial"
    settings = replace(checked.trial_settings(), base_mode="shared")
    if per_trial:  # what is gradual there belongs to the training
        settings = replace(settings, gradual=None)
    trained = base is not None
    training = TrainingTime(0.0, "already trained") if trained else TrainingTime(None, "not measured")
    earlier = base.training_seconds if base is not None else None
    measured: MeasuredTrials | None = None
    try:
        if base is None:
            base, training = _rehearsed(checked, settings, say)
        measured, found = measure(base, plan, settings, config.resources.cpus, checked.device, say)
        notes += found
    except UserError as error:
        if trained:
            raise
        notes.append(f"No trial was measured: {error}. Train the base first, then profile again.")
    if not trained and measured is not None:
        notes.append(
            "Trials were measured on a base that has barely trained: their time hardly depends on the "
            "weights, what they achieve does and is not shown."
        )
    if is_busy():
        notes.append(
            f"This machine is busy with other work (load {os.getloadavg()[0]:.1f}): measured times are "
            "longer than they need be, several trials at a time take longer than predicted while it is, and "
            "trials with several threads, which suffer most, were not measured."
        )
    train_each: float | None = 0.0
    if per_trial:
        train_each = training.seconds if earlier is None else earlier
        if config.has_trained_base:
            notes.append(
                "Trainings that prune along the way are predicted to take as long as that of the base: "
                "scoring costs some time at every step, and a narrower model saves some."
            )
    say(f"measuring how fast {config.search.chosen_sampler} proposes")
    propose = proposal_seconds(checked) + (0.0 if base is None else planning_seconds(checked, base))
    costs: tuple[SearchCost, ...] = ()
    if measured is not None:
        cores = usable_cores()
        fit = max(1, int(cores / config.resources.cpus))
        own = min(fit, config.search.concurrency or fit)
        predicted = [
            predict(
                setting,
                measured,
                trials=config.search.trials,
                propose=propose,
                train=training.seconds if config.has_trained_base or training.seconds is None else 0.0,
                cores=cores,
                train_each=train_each or 0.0,
                testers=processes(setting.threads),
            )
            for setting in settings_of(
                config.resources.cpus, list(measured.by_threads), config.search.trials, cores, own
            )
        ]
        predicted.sort(
            key=lambda cost: (cost.setting.cpus, cost.setting.at_once) != (config.resources.cpus, own)
        )
        costs = tuple(predicted)
    return Prediction(
        measured,
        trained,
        training,
        config.has_trained_base,
        train_each,
        propose,
        checked.device,
        costs,
        tuple(notes),
    )


def measure(
    base: Base, plan: Outline, settings: TrialSettings, cpus: float, device: str, say: Say
) -> tuple[MeasuredTrials, list[str]]:
    """Run a trial of each size, as far as the time for it goes, the middle one first.

    Args:
        base: to prune.
        plan: which models.
        settings: of the trials.
        cpus: of a trial.
        device: torch device.
        say: is told what is being measured.

    Returns:
        What was measured, and sentences on what was left out.

    Raises:
        UserError: a trial fails.
    """
    started = time.perf_counter()
    smallest, middle, largest = plan.models
    longest = 0.0

    def run(model: PossibleModel, words: str, threads: int) -> TrialResult:
        nonlocal longest
        say(f"running a trial of the {model.name} model ({model.parameters:,} parameters){words}")
        result = _trial(base, model, replace(settings, threads=threads), device)
        longest = max(longest, sum(result.timings.values()))
        return result

    def room() -> bool:
        return time.perf_counter() - started + longest < BUDGET_SECONDS

    notes: list[str] = []
    cold = run(middle, "", settings.threads)
    low = run(smallest, "", settings.threads).timings if room() else None
    # A trial that removes nothing repairs nothing either: as large as one can be that costs what trials do.
    barely = replace(largest, kept_share=1.0 - settings.ranking.round_to / max(largest.widths.values()))
    high = run(barely, "", settings.threads).timings if room() else None
    warm = run(middle, " once more", settings.threads) if room() else cold
    if low is None or high is None:
        notes.append(
            "A trial takes so long that not all sizes were measured: those take as long as the middle."
        )
    by_threads = {settings.threads: sum(warm.timings.values())}
    for threads in _thread_counts(settings.threads, cpus, device):
        if room():
            by_threads[threads] = sum(run(middle, f" with {threads} threads", threads).timings.values())
    say("measuring it on test data")
    test = _test_seconds(base, cold, settings.threads)
    set_up = max(0.0, sum(cold.timings.values()) - sum(warm.timings.values()))
    return (
        MeasuredTrials(
            smallest=low or warm.timings,
            middle=warm.timings,
            largest=high or warm.timings,
            set_up=set_up,
            test=test,
            by_threads=by_threads,
            threads=settings.threads,
        ),
        notes,
    )


def proposal_seconds(checked: CheckedExperiment) -> float:
    """Seconds that the sampler takes for all proposals of the search, from a few of them.

    Measured at a third, two thirds and all of the trials, with made-up results, and interpolated.
    """
    search, space = checked.config.search, checked.space
    generator = np.random.default_rng(0)
    names = {*(constraint.name for constraint in search.constraints), checked.agent.performance.name}
    known = Study(space, checked.objectives, "random", 0, trials=search.trials, anchors=search.anchors)
    total = min(search.trials, SAMPLED_TRIALS)
    results = []
    for number in range(total):
        proposal = known.ask(number)
        size = 1e5 * float(np.prod([1.0 - ratio for ratio in proposal.plan.ratios.values()])) ** 0.5
        values = {name: float(generator.random()) for name in names}
        costs = {objective.name: size for objective in checked.objectives if objective.name not in values}
        results.append(
            TrialResult(
                number=number,
                status="complete",
                plan=proposal.plan,
                origin=proposal.origin,
                options=proposal.options,
                seed=0,
                parameters=max(1, int(size)),
                size_ratio=min(1.0, size / 1e5),
                macs=max(1, int(size)),
                retention=values[checked.agent.performance.name],
                performance=values,
                objectives={
                    **costs,
                    **{o.name: values[o.name] for o in checked.objectives if o.name in values},
                },
            )
        )
        known.tell(results[-1])
    places, seconds = [0], [0.0]
    with deterministic(search.seed, threads=1):
        for place in sorted({total // 3, 2 * total // 3, total - 1} - {0}):
            study = checked.new_study()
            study.replay(results[:place])
            start = time.perf_counter()
            study.ask(place)
            places.append(place)
            seconds.append(time.perf_counter() - start)
    return float(np.interp(np.arange(search.trials), places, seconds).sum())


def planning_seconds(checked: CheckedExperiment, base: Base) -> float:
    """Seconds that the sweep of `gradient` takes, from its first point; 0 for samplers that sweep nothing."""
    search = checked.config.search
    if search.chosen_sampler != "gradient":
        return 0.0
    from search.gradient_optimiser import sweep, sweep_points, sweep_steps

    dense = prepare(base)
    with deterministic(search.seed, threads=1):
        start = time.perf_counter()
        sweep(dense, checked.space, 1)
        seconds = time.perf_counter() - start
    count = sweep_points(search.trials - checked.anchors)
    return seconds * sweep_steps(count) / sweep_steps(1)


def is_busy() -> bool:
    """Whether this machine does other work besides measuring."""
    return os.getloadavg()[0] > BUSY_LOAD


def _rehearsed(checked: CheckedExperiment, settings: TrialSettings, say: Say) -> tuple[Base, TrainingTime]:
    """A base that has barely trained.

    Raises:
        UserError: it cannot be made.
    """
    say("training a base for a moment")
    config = checked.config
    try:
        return rehearse(
            config.agent.kind,
            checked.agent,
            seed=config.base.seed,
            metrics=config.pruning.metrics,
            reconstruction=config.pruning.reconstruction,
            tracking=settings.tracking,
            device=checked.device,
            threads=settings.threads,
        )
    except Exception as error:  # of an agent of the user's own, anything
        raise UserError(
            f"a training that is cut short leaves no base ({type(error).__name__}: {error})"
        ) from error


def _trial(base: Base, model: PossibleModel, settings: TrialSettings, device: str) -> TrialResult:
    """A trial that makes a model.

    Raises:
        UserError: it fails.
    """
    plan = model.plan(settings.metrics)
    spec = TrialSpec(0, plan, f"profile: {model.name}", trial_seed(0, 0), settings, model.options)
    result = run_trial(spec, base, device)
    if not result.complete:
        raise UserError(f"a trial of the {model.name} model failed in {result.reason}")
    return result


def _test_seconds(base: Base, result: TrialResult, threads: int) -> float:
    """Seconds to measure a trial's agent on test data, on the CPU of the driver."""
    dense = prepare(base, "cpu")
    agent = dense.build(result.widths, result.options)
    agent.load_states({"model": to_tensors(result.state or {})})
    with deterministic(result.seed, threads):
        start = time.perf_counter()
        performance_of(agent, "test")
        return time.perf_counter() - start


def _thread_counts(own: int, cpus: float, device: str) -> list[int]:
    """Numbers of CPU threads of a trial to try besides the experiment's own: powers of 2 that are here."""
    if device != "cpu" or cpus < 1 or is_busy():
        return []
    powers = [2**power for power in range(4) if 2**power <= usable_cores()]
    return [threads for threads in powers if threads != own]
