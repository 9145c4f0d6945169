"""An experiment in which nothing is wrong, and what follows from it before any work has begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from agents.agent import (
    Agent,
    Objective,
    Progress,
    Shrinkable,
    agent_class,
    measurements,
    rung_methods,
    searchable_options,
    shared_ratios,
    taught_methods,
    unwatched,
)
from components import Group, UserError
from components.choosing import Ranking, comparable_groups
from components.errors import nearest
from components.schedule import PruningSchedule
from search.base import TRACE_ROWS, Base, trace_agent, train_base, untrained_base
from search.base_files import load_base
from search.config import PLANNED, ExperimentConfig, changes, parse_experiment, resolve_objectives
from search.config_errors import shown
from search.front import feasible
from search.grid import Grid, grid_for
from search.measurement import LATENCIES
from search.optimisers import Optimiser
from search.run_directory import RunDirectory
from search.scheduler import EarlyStopping
from search.space import OptionRange, SearchSpace
from search.study import LEARNING_SAMPLERS, Study
from search.study_database import StudyDatabase
from search.trial_types import GradualSettings, Proposal, TrialResult, TrialSettings, TrialSpec, trial_seed


@dataclass(frozen=True)
class CheckedExperiment:
    """An experiment in which nothing is wrong that can be seen before the work begins; made by `check`.

    Attributes:
        config: the experiment.
        path: of the run directory, which may not exist yet.
        agent: the untrained, unpruned agent.
        objectives: with directions and units.
        space: what is searched.
        resume: whether to go on with what is in the run directory.
        earlier: trials of another search, from which the sampler learns.
    """

    config: ExperimentConfig
    path: Path
    agent: Agent
    objectives: tuple[Objective, ...]
    space: SearchSpace
    resume: bool = False
    earlier: tuple[TrialResult, ...] = ()

    def database(self) -> StudyDatabase:
        """Where the Optuna study is written."""
        return StudyDatabase(self.config.storage or RunDirectory(self.path).study, self.path.name)

    def new_study(self, database: StudyDatabase | None = None, optimiser: Optimiser | None = None) -> Study:
        """The study of the search, with nothing told yet.

        Args:
            database: where it is written; None writes it nowhere.
            optimiser: what proposes where the sampler is `gradient`; `grid` has one of its own.
        """
        search = self.config.search
        return Study(
            self.space,
            self.objectives,
            search.chosen_sampler,
            search.seed,
            search.constraints,
            database,
            trials=search.trials,
            anchors=search.anchors,
            optimiser=optimiser or _grid(self.config, self.space),
            ratios_first=self.ratios_first,
        )

    @property
    def ratios_first(self) -> int:
        """How many trials mix all metrics alike before coefficients are searched as well; anchors do not."""
        search, coefficients = self.config.search, self.config.pruning.coefficients
        if search.chosen_sampler not in LEARNING_SAMPLERS or not self.space.mixtures.searched:
            return 0
        if search.ratios_first is not None:
            return search.ratios_first
        return 0 if coefficients in ("per_component", "per_group") else RATIOS_FIRST

    @property
    def anchors(self) -> int:
        """How many anchors the search starts with."""
        return _anchors(self.config, self.space)

    def new_early_stopping(self) -> EarlyStopping | None:
        """What stops trials of the search early, with nothing learnt yet; None where none are."""
        rule = self.config.search.early_stopping
        if rule is None:
            return None
        return EarlyStopping(
            self.objectives, rule.reduction, partial(feasible, self.config.search.constraints)
        )

    def trial_settings(self) -> TrialSettings:
        """What all trials of the search share."""
        pruning, early_stopping = self.config.pruning, self.config.search.early_stopping
        return TrialSettings(
            metrics=pruning.metrics,
            objectives=tuple(objective.name for objective in self.objectives),
            reconstruction=pruning.reconstruction,
            fine_tune_method=pruning.fine_tune.method,
            fine_tune_updates=pruning.fine_tune.updates,
            rungs=early_stopping.rungs_of(pruning.fine_tune.updates) if early_stopping else (),
            ranking=Ranking(pruning.ranking, pruning.round_to, pruning.max_ratio),
            gradual=self._gradual,
            base_mode=self.config.base.mode,
            tracking=self.config.base.importance.tracking,
            threads=self.threads,
            constrained=tuple(dict.fromkeys(bound.name for bound in self.config.search.constraints)),
        )

    @property
    def _gradual(self) -> GradualSettings | None:
        chosen, schedule = self.config.pruning.schedule, _schedule(self.config, self.agent)
        return (
            None if schedule is None else GradualSettings(schedule, chosen.smoothing, chosen.reconstruction)
        )

    def specify(self, number: int, proposal: Proposal) -> TrialSpec:
        """The specification of one trial."""
        return TrialSpec.of(
            number, proposal, trial_seed(self.config.search.seed, number), self.trial_settings()
        )

    def train_base(self, progress: Progress = unwatched, checkpoint: Path | None = None) -> Base:
        """Train the base; nothing but checkpoints is written.

        Args:
            progress: is told how far the training is.
            checkpoint: directory of an agent that is `Resumable`; None keeps none.

        Raises:
            UserError: the trained agent is no better than a trivial one.
        """
        return train_base(
            self.config.agent.kind,
            self.agent.options,
            seed=self.config.base.seed,
            metrics=self.config.pruning.metrics,
            reconstruction=self.config.pruning.reconstruction,
            tracking=self.config.base.importance.tracking,
            data=self.agent.data(),
            device=self.device,
            threads=self.threads,
            progress=progress,
            checkpoint=checkpoint,
        )

    def untrained_base(self) -> Base:
        """The base of a search whose trials train bases of their own."""
        return untrained_base(
            self.config.agent.kind,
            self.agent.options,
            seed=self.config.base.seed,
            data=self.agent.data(),
        )

    def stored_base(self) -> Base | None:
        """The base in the run directory, if it is what the experiment asks for; None otherwise.

        Raises:
            CorruptFileError: a file of it is damaged.
        """
        return load_base(RunDirectory(self.path).base) if _holds_base(self.path, self.config) else None

    @property
    def holds_base_only(self) -> bool:
        """Whether the run directory holds the base that the experiment asks for, and no trials."""
        return _holds_base_only(self.path, self.config)

    @property
    def device(self) -> str:
        """Where the base is trained: on the GPU if there is one and trials may use it."""
        return "cuda" if self.config.resources.gpus != 0 and torch.cuda.is_available() else "cpu"

    @property
    def threads(self) -> int:
        """CPU threads of a trial, and of the training of the base."""
        return _threads(self.config)


def check(
    config: ExperimentConfig, path: Path, *, resume: bool = False, may_exist: bool = False
) -> CheckedExperiment:
    """Everything that can be checked before the work begins; nothing is written.

    Args:
        config: the experiment.
        path: of the run directory.
        resume: go on with what is there; it has to be the same search, but for its budget and resources.
        may_exist: a run directory that is in use is no fault, as nothing will be written to it.

    Raises:
        UserError: an unknown agent, option, fine-tuning method or objective, a pruning schedule that does
            not fit the training, an option that cannot be searched, early stopping of an agent without a
            rung loss, nothing to prune, a budget too small for the space or the grid, a run directory that
            is in use, or one that is to be resumed and is of another search.
    """
    kind = config.agent.kind
    agent = agent_class(kind)(config.agent.options)
    method = config.pruning.fine_tune.method
    if method is not None and method not in agent.fine_tune_methods:
        known = nearest(method, agent.fine_tune_methods)
        raise UserError(f"pruning.fine_tune.method is {method!r}, which {kind} does not have: {known}")
    ranked = rung_methods(agent)
    if config.search.early_stopping is not None and (method or agent.fine_tune_methods[0]) not in ranked:
        instead = f"one of {', '.join(ranked)}, or " if ranked else ""
        raise UserError(
            f"search.early_stopping ranks trials by a rung loss, which {kind} does not have when it is "
            f"fine-tuned by {method or agent.fine_tune_methods[0]!r}: choose {instead}null"
        )
    _schedule(config, agent)
    _require_enough_tracking(config, agent)
    search = config.search
    objectives = resolve_objectives(
        search.objectives, search.constraints, agent.performance, measurements(agent)
    )
    slow = [objective.name for objective in objectives if objective.name in LATENCIES]
    if slow and config.search.early_stopping is not None:
        raise UserError(
            f"search.early_stopping cannot tell how a trial will do in {slow[0]}, which is measured at its "
            "end: take that out of search.objectives, or choose null"
        )
    if resume:
        _require_same_search(path, config)
    elif path.exists() and not may_exist and not _holds_base_only(path, config):
        raise RunDirectory.in_use(path)
    graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, config.base.seed))
    space = SearchSpace.build(
        graph.groups,
        metrics=config.pruning.metrics,
        max_ratio=config.pruning.max_ratio,
        coefficients=config.pruning.mixtures,
        trials=config.search.trials,
        force=config.pruning.coefficients_force,
        shared=_shared_ratios(config, agent, graph.groups),
        round_to=config.pruning.round_to,
        options=_option_ranges(config, agent),
    )
    _require_what_gradient_needs(config, space)
    _grid(config, space)
    earlier = _earlier_trials(config, path, space, objectives, resume=resume)
    return CheckedExperiment(config, path, agent, objectives, space, resume, earlier)


def _anchors(config: ExperimentConfig, space: SearchSpace) -> int:
    return len(space.anchors()) if config.search.anchors else 0


def _grid(config: ExperimentConfig, space: SearchSpace) -> Grid | None:
    """The grid of a search by the sampler `grid`; None by any other.

    Raises:
        UserError: it does not fit the budget.
    """
    search = config.search
    if search.chosen_sampler != "grid":
        return None
    return grid_for(space, search.trials, _anchors(config, space), search.grid)


def _require_what_gradient_needs(config: ExperimentConfig, space: SearchSpace) -> None:
    """Refuse what would make of a sweep's points other models than its masks say, and a sweep of none.

    Raises:
        UserError: the sampler is `gradient`, and the rest does not go with it.
    """
    search, pruning = config.search, config.pruning
    if search.chosen_sampler != "gradient":
        return
    asked = {"ranking": pruning.ranking, "round_to": pruning.round_to, "schedule": pruning.schedule.kind}
    for key, needed in {"ranking": "group", "round_to": 1, "schedule": "one_shot"}.items():
        if asked[key] != needed:
            raise UserError(
                "search.sampler is 'gradient', which finds a threshold for every group and prunes there at "
                f"once, and pruning.{key} is {asked[key]!r}: choose {needed!r}, or another sampler"
            )
    anchors = _anchors(config, space)
    if search.trials <= anchors:
        raise UserError(
            f"search.sampler is 'gradient', and {search.trials} trials leave nothing to it after {anchors} "
            "anchors: raise search.trials, or set search.anchors to false"
        )


def _require_enough_tracking(config: ExperimentConfig, agent: Agent) -> None:
    """Refuse to follow a training so coarsely that a metric has nothing to go by at its end.

    Raises:
        UserError: fewer than two updates would be tracked, and `bayesian` is wanted.
    """
    every = config.base.importance.every
    if not isinstance(agent, Shrinkable) or "bayesian" not in config.pruning.metrics:
        return
    if agent.training_updates <= every:
        raise UserError(
            f"base.importance.every is {every} and the training makes {agent.training_updates} updates, of "
            f"which pruning.metrics 'bayesian' needs at least two tracked: let every be at most "
            f"{max(1, agent.training_updates - 1)}"
        )


def _schedule(config: ExperimentConfig, agent: Agent) -> PruningSchedule | None:
    """When how much is pruned; None where everything goes at once.

    Raises:
        UserError: the agent cannot be pruned step by step, or not so.
    """
    kind, wish, pruning = config.agent.kind, config.pruning.schedule, config.pruning
    if wish.kind == "one_shot":
        return None
    if not isinstance(agent, Shrinkable):
        raise UserError(
            f"pruning.schedule is {wish.kind!r}, but {kind} cannot lose channels while it trains: choose "
            "'one_shot'"
        )
    if config.base.mode == "per_trial":
        method = pruning.fine_tune.method or agent.fine_tune_methods[0]
        if pruning.fine_tune.updates and method in taught_methods(agent):
            others = [name for name in agent.fine_tune_methods if name not in taught_methods(agent)]
            instead = f"pruning.fine_tune.method one of {', '.join(others)}, or " if others else ""
            raise UserError(
                f"pruning.fine_tune.method is {method!r}, which learns from the trained base, and with "
                f"base.mode 'per_trial' and pruning.schedule {wish.kind!r} there is none: choose {instead}"
                "pruning.fine_tune.updates 0"
            )
        return wish.over(agent.training_steps, "steps of training")
    if pruning.fine_tune.updates == 0:
        raise UserError(
            f"pruning.schedule is {wish.kind!r}, which prunes during fine-tuning, and "
            "pruning.fine_tune.updates is 0: raise that, or choose 'one_shot'"
        )
    schedule = wish.over(pruning.fine_tune.updates, "updates of fine-tuning")
    stopping = config.search.early_stopping
    if schedule is not None and stopping is not None:
        first = stopping.rungs_of(pruning.fine_tune.updates)[0]
        if first < schedule.end:
            raise UserError(
                f"search.early_stopping has its first rung after {first} updates, before pruning.schedule "
                f"ends, at {schedule.end}: let that end sooner, or set search.early_stopping.first higher"
            )
    return schedule


def _shared_ratios(config: ExperimentConfig, agent: Agent, groups: Sequence[Group]) -> Mapping[str, str]:
    """Which groups are pruned by one ratio: those whose channels compete, or those that the agent ties."""
    if config.pruning.ranking == "isomorphic":
        return comparable_groups(groups)
    return shared_ratios(agent)


def _earlier_trials(
    config: ExperimentConfig,
    path: Path,
    space: SearchSpace,
    objectives: Sequence[Objective],
    *,
    resume: bool,
) -> tuple[TrialResult, ...]:
    """The trials of `search.warm_start`, if it names a run; in a resumed search those that it began with.

    Raises:
        UserError: there is no such run, or this search can learn nothing from it.
    """
    wish = config.search.warm_start
    if wish is None:
        return ()
    kept = RunDirectory(path).read_warm_start() if resume else None
    if kept is not None:
        return tuple(kept)
    sampler = config.search.chosen_sampler
    if sampler not in LEARNING_SAMPLERS:
        raise UserError(
            f"search.warm_start has nothing to teach the sampler {sampler!r}: choose one of "
            f"{', '.join(LEARNING_SAMPLERS)}"
        )
    place = Path(wish) if Path(wish).is_dir() else path.parent / wish
    try:
        results = tuple(RunDirectory.open(place).read_trials())
        Study(space, objectives, "random", constraints=config.search.constraints).warm_start(results)
    except UserError as error:
        raise UserError(f"search.warm_start is {wish!r}: {error}") from None
    if not any(result.complete for result in results):
        raise UserError(f"search.warm_start is {wish!r}: no trial of it was completed")
    return results


RATIOS_FIRST = 32
"""`search.ratios_first` where it is left open and groups do not mix separately: see docs/methods.md."""

FREE_KEYS = (
    "search.trials",
    "search.sampler",
    "search.grid",
    "search.seed",
    "search.ratios_first",
    "search.concurrency",
    "search.early_stopping",
    "search.hours",
    "search.trial_timeout",
    "search.retries",
    "resources.",
    "wandb.",
    "storage",
)
"""What may change when a search goes on: its trials stay comparable with those that have finished."""

PLAN_KEYS = ("search.trials", "search.sampler", "search.grid")
"""But not for a sampler that plans all trials of the budget together."""


def _require_same_search(path: Path, config: ExperimentConfig) -> None:
    """Refuse to go on with a search by other rules, naming every difference.

    Raises:
        UserError: there is nothing to go on with, or it is another search.
    """
    run = RunDirectory.open(path)
    try:
        content = run.experiment.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{run.experiment} is corrupt: {error}") from None
    before = parse_experiment(content, source=str(run.experiment))
    changed = {
        key: f"{key} was {shown(old)} and is now {shown(new)}"
        for key, (old, new) in changes(before, config).items()
    }
    planned = [sentence for key, sentence in changed.items() if key.startswith(PLAN_KEYS)]
    if planned and config.search.sampler in PLANNED:
        raise UserError(
            f"{path} cannot be resumed by {config.search.sampler!r}, which plans all its trials together: "
            f"{'; '.join(planned)}: take that back, or go on with another sampler"
        )
    different = [sentence for key, sentence in changed.items() if not key.startswith(FREE_KEYS)]
    if different:
        raise UserError(
            f"{path} cannot be resumed as another search: {'; '.join(different)}: take that back, or start a "
            "search of its own with --name"
        )


def _option_ranges(config: ExperimentConfig, agent: Agent) -> dict[str, OptionRange]:
    """The options to search, with what the agent itself has.

    Raises:
        UserError: not one of the agent's searchable options, or a bound that the agent does not take.
    """
    kind, known = config.agent.kind, searchable_options(agent)
    ranges = {}
    for bounds in config.search.options:
        key = f"search.options.{bounds.name}"
        if not known:
            raise UserError(f"{key} cannot be searched: {kind} has no options for a search to choose")
        if bounds.name not in known:
            raise UserError(f"{key} is no option of {kind} to search: {nearest(bounds.name, known)}")
        own = agent.options.get(bounds.name)
        if type(own) is not int:
            raise UserError(f"{key} cannot be searched: {kind} has {own!r} there, no whole number")
        for bound in (bounds.low, bounds.high):
            try:
                agent_class(kind)({**agent.options, bounds.name: bound})
            except UserError as error:
                raise UserError(f"{key} may not become {bound}: {error}") from None
        ranges[bounds.name] = OptionRange(bounds.low, bounds.high, own)
    return ranges


def _holds_base_only(path: Path, config: ExperimentConfig) -> bool:
    """Whether `prunefront train` made this directory, and what it trained is what the experiment asks for."""
    return not RunDirectory(path).trials.exists() and _holds_base(path, config)


def _holds_base(path: Path, config: ExperimentConfig) -> bool:
    """Whether a run directory has the base that the experiment asks for."""
    run = RunDirectory(path)
    if not (run.base / "metrics.json").is_file() or not run.experiment.is_file():
        return False
    try:
        before = parse_experiment(run.experiment.read_text(encoding="utf-8"), source=str(run.experiment))
    except (UserError, UnicodeDecodeError):
        return False
    return _base_settings(before) == _base_settings(config)


def _base_settings(config: ExperimentConfig) -> tuple[object, ...]:
    """Everything that a base depends on."""
    needs_grams = config.pruning.reconstruction == "gram"
    return (config.agent, config.base, config.pruning.metrics, needs_grams, _threads(config))


def _threads(config: ExperimentConfig) -> int:
    return max(1, int(config.resources.cpus))
