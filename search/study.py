"""The study: proposes trials and learns from results; with `samplers` and `study_database`, the sole owner of
Optuna.

The sampler works on a study in memory. `ask` gives every proposal a fresh sampler seeded from (seed, trial
number), so that a proposal depends on the seed and on what was told, never on how a process came there. The
database is a projection for people to look at: see `study_database`.

Not thread-safe: one thread asks and tells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from components.errors import UserError
from search.estimates import Estimates
from search.history import worth_keeping
from search.optimisers import Optimiser, QuasiRandom
from search.outcomes import Judge, Outcome, attributes_of
from search.samplers import GaussianProcesses, ParzenEstimators
from search.space import Anchor, Dimension, Params, SearchSpace
from search.study_database import StudyDatabase
from search.trial_types import Proposal, TrialResult

if TYPE_CHECKING:
    from agents.agent import Objective
    from search.config import Sampler
    from search.constraints import Constraint

logger = logging.getLogger(__name__)

STARTUP_TRIALS = 10
"""Results that a model-based sampler waits for; anchors count, and where they are more, it waits for them."""

LEARNING_SAMPLERS = ("tpe", "gp")
"""Samplers that learn from the trials of another search: `Study.warm_start`."""

AHEAD = ("qmc", "grid", "gradient")
"""Samplers that follow a plan, made before the first trial, and learn nothing from results."""

HISTORY = {"tpe": 200, "gp": 250}
"""How many finished trials a sampler learns from at least; half as many more are the most."""

PROPOSALS = 8
"""Attempts at a proposal that was not made before."""


class Study:
    """Asks a sampler for proposals and tells it what became of them.

    The first trials are the anchors of the space. No decision is proposed twice while there are others:
    running trials repel the proposals of `tpe` and `gp`, and a repeated proposal is drawn again. However many
    trials there are, `tpe` and `gp` learn from a bounded number of them: see `HISTORY`.

    Args:
        space: what may be chosen.
        objectives: what is traded off, with directions.
        sampler: `tpe` (multivariate), `nsga2`, `gp`, `random`, `qmc` (quasi-random: a Sobol sequence), `grid`
            or `gradient`.
        seed: of all proposals.
        constraints: what feasible trials meet; samplers prefer those.
        database: where finished trials are written for people to look at; None writes none.
        trials: the budget; it sizes the population of `nsga2`.
        anchors: start with the space's anchors.
        optimiser: of `grid` and `gradient`, what proposes; quasi-random points are what it leaves open.
        ratios_first: how many trials, from the first, `tpe` and `gp` mix all metrics alike in and search the
            rest alone: coefficients matter less than ratios, and a space of all of them is hard to learn.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        sampler: Sampler = "tpe",
        seed: int = 0,
        constraints: Sequence[Constraint] = (),
        database: StudyDatabase | None = None,
        *,
        trials: int = 64,
        anchors: bool = True,
        optimiser: Optimiser | None = None,
        ratios_first: int = 0,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._sampler_name = sampler
        self._seed = seed
        self._judge = Judge(objectives, constraints)
        self._population = min(max(trials // 5, 8), 50)
        self._anchors: tuple[Anchor, ...] = space.anchors() if anchors else ()
        self._ratios_first = ratios_first if sampler in LEARNING_SAMPLERS else 0
        self._optimisers: tuple[Optimiser, ...] = () if optimiser is None else (optimiser,)
        if sampler in AHEAD:
            self._optimisers += (QuasiRandom(space.dimensions, seed),)
        self._distributions: dict[str, BaseDistribution] = {
            dimension.name: _distribution(dimension) for dimension in space.dimensions
        }
        directions = [objective.direction for objective in objectives]
        self._directions = directions
        self._optuna = optuna.create_study(directions=directions, sampler=RandomSampler())
        self._running: dict[int, Trial] = {}
        self._finished: set[int] = set()
        self._decisions: set[tuple[object, ...]] = set()
        self._estimates = Estimates()
        self._stopped: list[tuple[TrialResult, Params]] = []
        self._remembered: Mapping[int, Proposal] = {}
        self._database = database
        if database is not None:
            database.start(directions, self._judge.names)

    def ask(self, number: int) -> Proposal:
        """What trial `number` is to do, and who proposed it: `anchor: dense`, `tpe`...

        Equal seeds, numbers and results told before, in equal order, give equal proposals, bit for bit.

        Raises:
            ValueError: the number was asked for before.
        """
        if number in self._running or number in self._finished:
            raise ValueError(f"trial {number} was asked for before")
        earlier = self._remembered.get(number)
        if earlier is not None:
            trial, origin = self._enqueue(self._params_of(earlier)), earlier.origin
        elif number < len(self._anchors):
            anchor = self._anchors[number]
            trial, origin = self._enqueue(anchor.params), f"anchor: {anchor.label}"
        else:
            trial, origin = self._propose(number)
        params = dict(trial.params)
        proposal = Proposal(self._space.to_plan(params), origin, self._space.to_options(params), params)
        self._decisions.add(self._space.decision(proposal.plan, proposal.options))
        self._running[number] = trial
        return proposal

    def tell(self, result: TrialResult) -> None:
        """Record a result. A failed trial, or one with a missing or non-finite number, becomes FAIL.

        One that was stopped early becomes PRUNED, without values: `tpe` counts it among the worse trials as
        long as one trial in ten is complete, `gp` models it with what it would have measured by the look of
        its last rung (`Estimates`), and `nsga2` learns nothing from it.

        Telling a trial again changes nothing.

        Raises:
            ValueError: the trial was never asked for.
        """
        if result.number in self._finished:
            return
        if result.number not in self._running:
            raise ValueError(f"trial {result.number} was never asked for")
        finished = self._tell(result)
        if self._database is not None:
            self._database.put(finished)

    def replay(self, results: Iterable[TrialResult], proposals: Mapping[int, Proposal] | None = None) -> None:
        """Rebuild the study from earlier results of the same search, in the order of their numbers.

        Anchors and proposals continue with the numbers that are not among them.

        Args:
            results: of all trials that have finished.
            proposals: what was proposed earlier, by trial number. Those of unfinished trials are proposed
                again under their numbers. Those of finished ones say what the sampler saw; without them the
                scale of mixing coordinates is lost, and later proposals need not equal, bit for bit, those of
                a search that was never interrupted.

        Raises:
            ValueError: a number was asked for before.
            UserError: a plan does not fit the space.
        """
        self._remembered = dict(proposals or {})
        finished = []
        for result in sorted(results, key=lambda result: result.number):
            if result.number in self._running or result.number in self._finished:
                raise ValueError(f"trial {result.number} was asked for before")
            proposal = self._remembered.get(result.number)
            if proposal is None or proposal.plan != result.plan:
                proposal = Proposal(result.plan, result.origin, result.options)
            self._running[result.number] = self._enqueue(self._params_of(proposal))
            self._decisions.add(self._space.decision(result.plan, result.options))
            finished.append(self._tell(result))
        if self._database is not None:
            self._database.put(*finished)

    def warm_start(self, results: Iterable[TrialResult]) -> None:
        """Let the sampler learn from the complete trials of another search of the same space.

        They are no trials of this search: its numbers, its front and its database know nothing of them.
        Before anything is asked for or replayed.

        Raises:
            UserError: a plan does not fit the space, or the trials measured other objectives.
        """
        for result in results:
            if not result.complete:
                continue
            outcome = self._judge.result(result)
            if outcome.values is None:
                raise UserError(f"trial {result.number} of the other search is of no use: {outcome.reason}")
            if set(result.plan.ratios) != set(self._space.sizes):
                raise UserError(
                    f"trial {result.number} of the other search prunes {_listed(result.plan.ratios)}, "
                    f"this one {_listed(self._space.sizes)}"
                )
            self._optuna.add_trial(
                create_trial(
                    values=outcome.values,
                    params=self._space.params_of(result.plan, result.options),
                    distributions=dict(self._distributions),
                    constraints=outcome.violations,
                )
            )
            self._estimates.learn(result)
        self._forget()

    def close(self, seconds: float | None = None) -> None:
        """Wait for the database, as `StudyDatabase.close` does; the study may be used no more."""
        if self._database is not None:
            self._database.close(seconds)

    def _tell(self, result: TrialResult) -> tuple[int, FrozenTrial]:
        """Tell the sampler of a trial that runs; returns what the database is to hold of it."""
        trial = self._running.pop(result.number)
        self._finished.add(result.number)
        outcome = self._judge.result(result)
        self._estimates.learn(result)
        if result.stopped:
            self._stopped.append((result, trial.params))
        attributes = attributes_of(result, outcome)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        if outcome.values is None:
            self._optuna.tell(trial, state=outcome.state)
        else:
            for key, violation in outcome.violations.items():
                trial.set_constraint(key, violation)
            self._optuna.tell(trial, outcome.values)
        params = dict(trial.params)
        self._forget()
        return result.number, self._projected(result, params, outcome, attributes)

    def _forget(self) -> None:
        """Once there are half as many more trials than a sampler needs, keep those that are worth it."""
        limit = HISTORY.get(self._sampler_name)
        if limit is None:
            return
        known = self._optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if 2 * len(known) < 3 * limit:
            return
        nothing = [math.nan] * len(self._directions)
        values = np.array([trial.values if trial.values and _feasible(trial) else nothing for trial in known])
        kept = worth_keeping(values, self._directions, limit)
        self._optuna = optuna.create_study(directions=self._directions, sampler=RandomSampler())
        self._optuna.add_trials([known[index] for index in kept])
        self._stopped = self._stopped[-limit:]
        self._running = {number: self._enqueue(trial.params) for number, trial in self._running.items()}

    def _params_of(self, proposal: Proposal) -> Params:
        """The point of the space that was proposed: as it was noted, if it fits, or else from the plan."""
        if self._space.holds(proposal.params):
            return dict(proposal.params)
        return self._space.params_of(proposal.plan, proposal.options)

    def _enqueue(self, params: Params) -> Trial:
        """A trial with given params."""
        self._optuna.sampler = (
            self._make_sampler(0, self._distributions) if self._sampler_name == "nsga2" else RandomSampler(0)
        )
        self._optuna.enqueue_trial(params)
        trial = self._optuna.ask(self._distributions)
        if self._sampler_name == "nsga2":
            _ = trial.relative_params  # enters the trial into a generation, which fixed params alone do not
        return trial

    def _propose(self, number: int) -> tuple[Trial, str]:
        """A trial whose decision is new, as far as there are new ones to be found, and who proposed it."""
        for optimiser in self._optimisers:
            params = optimiser.propose(number)
            if params is not None and self._is_new(params):
                return self._enqueue(params), optimiser.origin
        given = self._space.mixed_equally() if number < self._ratios_first else {}
        for attempt in range(PROPOSALS):
            last = attempt == PROPOSALS - 1
            if 2 * attempt >= PROPOSALS:  # there may be no new ratios left
                given = {}
            seed = int(np.random.SeedSequence([self._seed, number, attempt]).generate_state(1)[0])
            searched = {name: of for name, of in self._distributions.items() if name not in given}
            self._optuna.sampler = RandomSampler(seed) if last else self._make_sampler(seed, searched)
            if given:
                self._optuna.enqueue_trial(given)
            with _one_torch_thread():
                trial = self._optuna.ask(self._distributions)
            if last or self._is_new(trial.params):
                break
            self._optuna.tell(trial, state=TrialState.FAIL)  # samplers pass over failed trials
        return trial, "random" if self._optimisers else self._sampler_name

    def _is_new(self, params: Params) -> bool:
        """Whether no trial has decided the same."""
        return self._space.decision_at(params) not in self._decisions

    def _make_sampler(self, seed: int, searched: Mapping[str, BaseDistribution]) -> BaseSampler:
        startup = max(len(self._anchors), STARTUP_TRIALS)
        match self._sampler_name:
            case "tpe":
                return ParzenEstimators(
                    searched,
                    multivariate=True,
                    constant_liar=True,
                    n_startup_trials=startup,
                    seed=seed,
                )
            case "nsga2":
                return NSGAIISampler(population_size=self._population, seed=seed)
            case "gp":
                return GaussianProcesses(
                    searched,
                    self._estimated(),
                    n_startup_trials=max(1, startup - len(self._stopped)),
                    seed=seed,
                    warn_independent_sampling=False,
                )
            case "random" | "qmc" | "grid" | "gradient":
                return RandomSampler(seed)
        raise ValueError(f"unknown sampler {self._sampler_name!r}")

    def _estimated(self) -> list[FrozenTrial]:
        """The stopped trials that can be estimated, as if they had been measured so: for a model alone."""
        found = []
        for result, params in self._stopped:
            outcome = self._judge.measured(partial(self._estimates.of, result))
            if outcome.values is not None:
                found.append(
                    create_trial(
                        values=outcome.values,
                        params=params,
                        distributions=dict(self._distributions),
                        constraints=outcome.violations,
                    )
                )
        return found

    def _projected(
        self, result: TrialResult, params: Params, outcome: Outcome, attributes: Mapping[str, object]
    ) -> FrozenTrial:
        trial = create_trial(
            state=outcome.state,
            values=outcome.values,
            params=params,
            distributions=dict(self._distributions),
            user_attrs=dict(attributes),
            constraints=outcome.violations,
        )
        trial.datetime_start = _local_time(result.started) or trial.datetime_start
        trial.datetime_complete = _local_time(result.finished) or trial.datetime_complete
        return trial


def _feasible(trial: FrozenTrial) -> bool:
    return all(violation <= 0 for violation in trial.constraints.values())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _local_time(iso: str) -> datetime | None:
    """Optuna keeps times naive and local."""
    try:
        return datetime.fromisoformat(iso).astimezone().replace(tzinfo=None)
    except ValueError:
        return None


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The small tensors of `gp` gain little from a second thread and lose much where trials use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
