"""An experiment from its configuration to its front: check, train the base, run trials, measure the front.

A search that ended early goes on from its run directory: with `resume`, `check` makes sure that it is the
same search, and `make_ready` takes in what has finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import agents
import components
from agents.agent import (
    Agent,
    Objective,
    agent_class,
    rung_methods,
    searchable_options,
    shared_ratios,
    source_of,
)
from components import UserError
from components.errors import nearest
from search.base import TRACE_ROWS, Base, Progress, trace_agent, train_base, untrained_base
from search.base_files import load_base, save_base
from search.cluster import run_search
from search.config import ExperimentConfig, changes, parse_experiment, resolve_objectives
from search.config_errors import shown
from search.determinism import deterministic
from search.driver import SearchOutcome
from search.durable_files import write_text
from search.front import Front
from search.front_keeper import FrontKeeper
from search.gpu_memory import trial_share
from search.prepared_base import PreparedBase, prepare
from search.run_directory import RunDirectory
from search.scheduler import EarlyStopping
from search.space import OptionRange, SearchSpace
from search.study import Study
from search.study_database import StudyDatabase
from search.trial import run_trial
from search.trial_types import Proposal, TrialResult, TrialSettings, TrialSpec, trial_seed

HURRIED_SECONDS = 3.0
"""What the study's database gets to take the last trials after Ctrl-C; `--resume` adds the others."""


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

    def make_ready(self, progress: Progress) -> ReadySearch:
        """Make the run directory, train the base and store it, or go on with what is there.

        What is there is the base that `train` left or, with `resume`, whatever an earlier search left.

        Args:
            progress: is told how far the training of the base is.

        Raises:
            UserError: the run directory is in use, or the base did not learn; nothing is left behind then.
        """
        database = self.database()
        identity = RunDirectory(self.path).read_identity() if self.resume else None
        database.require_ready(identity)
        run, base = self._run_and_base(progress)
        database.identity = run.read_identity()
        dense = prepare(base)
        settings = self.trial_settings()
        keeper = FrontKeeper(run, dense, self.objectives, self.config.search.constraints, settings.threads)
        notices = run.mend()
        if not self.resume:
            run.forget_proposals()
            run.write_warm_start(self.earlier)
        keeper.restore(run.read_trials())
        proposals = run.read_proposals()
        return ReadySearch(
            self.config,
            run,
            base,
            dense,
            self.objectives,
            self.space,
            settings,
            keeper,
            database,
            proposals,
            tuple(notices),
            self.earlier,
        )

    def database(self) -> StudyDatabase:
        """Where the Optuna study is written."""
        return StudyDatabase(self.config.storage or RunDirectory(self.path).study, self.path.name)

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
            base_mode=self.config.base.mode,
            threads=_threads(self.config),
        )

    def stored_base(self) -> Base | None:
        """The base in the run directory, if it is what the experiment asks for; None otherwise.

        Raises:
            CorruptFileError: a file of it is damaged.
        """
        return load_base(RunDirectory(self.path).base) if _holds_base(self.path, self.config) else None

    @property
    def device(self) -> str:
        """Where the base is trained: on the GPU if there is one and trials may use it."""
        return _device(self.config)

    def train(self, progress: Progress) -> tuple[RunDirectory, Base]:
        """Make a run directory that holds the experiment and its base alone; `make_ready` goes on with it.

        Raises:
            UserError: as `make_ready`.
        """
        run = RunDirectory.create(self.path, self._stored_experiment)
        try:
            return run, self._train_into(run, progress)
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)  # made just now, and worth nothing without a base
            raise

    def _run_and_base(self, progress: Progress) -> tuple[RunDirectory, Base]:
        """The run directory, claimed, and its base."""
        shared = self.config.base.mode == "shared"
        if not self.resume and not _holds_base_only(self.path, self.config):
            if shared:
                return self.train(progress)
            return RunDirectory.create(self.path, self._stored_experiment), self._untrained()
        run = RunDirectory.open(self.path)
        run.claim()
        write_text(run.experiment, self._stored_experiment)
        if not shared:
            return run, self._untrained()
        if (run.base / "metrics.json").is_file():
            return run, load_base(run.base)
        return run, self._train_into(run, progress)  # killed before the base was trained

    @property
    def _stored_experiment(self) -> str:
        return self.config.without_secrets().to_yaml()

    def _untrained(self) -> Base:
        config = self.config
        return untrained_base(
            config.agent.kind, self.agent.options, seed=config.base.seed, data=self.agent.data()
        )

    def _train_into(self, run: RunDirectory, progress: Progress) -> Base:
        """Train the base and store it."""
        base = train_base(
            self.config.agent.kind,
            self.agent.options,
            seed=self.config.base.seed,
            metrics=self.config.pruning.metrics,
            reconstruction=self.config.pruning.reconstruction,
            data=self.agent.data(),
            device=_device(self.config),
            threads=_threads(self.config),
            progress=progress,
        )
        save_base(base, run.base)
        return base


@dataclass(frozen=True)
class ReadySearch:
    """A search whose base is trained and stored; nothing is left but its trials.

    Attributes:
        config: the experiment.
        run: its directory.
        base: trained, or untrained where every trial trains its own.
        dense: the base, ready on the CPU of the driver.
        objectives: with directions and units.
        space: what is searched.
        settings: what all trials share.
        keeper: takes in results; its `results` and `members` are the state of the search.
        database: where the Optuna study is written.
        proposals: what an earlier search had proposed, by trial number.
        notices: sentences about what was mended.
        earlier: trials of another search, from which the sampler learns.
    """

    config: ExperimentConfig
    run: RunDirectory
    base: Base
    dense: PreparedBase
    objectives: tuple[Objective, ...]
    space: SearchSpace
    settings: TrialSettings
    keeper: FrontKeeper
    database: StudyDatabase
    proposals: Mapping[int, Proposal] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    earlier: tuple[TrialResult, ...] = ()

    @property
    def numbers(self) -> list[int]:
        """Of the trials that are still to run; those that an earlier search was running come first."""
        finished = {result.number for result in self.keeper.results}
        open_ones = [number for number in range(self.config.search.trials) if number not in finished]
        return sorted(open_ones, key=lambda number: number not in self.proposals)

    def search(
        self, observers: Sequence[Callable[[TrialResult], None]] = (), address: str | None = None
    ) -> SearchOutcome:
        """Run all trials on a Ray cluster; returns early, with what is finished, on Ctrl-C.

        Args:
            observers: called with every result, without its state, after it was stored.
            address: of a running cluster; None starts one on this machine.

        Raises:
            UserError: no cluster answers, or it cannot hold a trial.
        """
        search = self.config.search
        gpus = self.config.resources.gpus
        rule = search.early_stopping
        stopping = None if rule is None else EarlyStopping(self.objectives, rule.reduction)
        if stopping is not None:
            stopping.replay(self.keeper.results)
        study = Study(
            self.space,
            self.objectives,
            search.sampler,
            search.seed,
            search.constraints,
            self.database,
            trials=search.trials,
            anchors=search.anchors,
        )
        try:
            study.warm_start(self.earlier)
            study.replay(self.keeper.results, self.proposals)
            # One thread here: the cores are the workers', and a sampler's bits depend on the thread count.
            with deterministic(search.seed, threads=1):
                outcome = run_search(
                    self.numbers,
                    study=study,
                    make_spec=self.specify,
                    run_trial=run_trial,
                    base=self.base,
                    record=self.keeper.record,
                    observers=observers,
                    cpus=self.config.resources.cpus,
                    gpus=None if gpus == "auto" else gpus,
                    least_gpus=trial_share(self.base.gpu_share),
                    concurrency=search.concurrency,
                    address=address,
                    early_stopping=stopping,
                    code=own_code(self.config.agent.kind),
                    retries=search.retries,
                    trial_timeout=search.trial_timeout,
                    seconds=None if search.hours is None else 3600 * search.hours,
                )
        except BaseException:
            study.close(HURRIED_SECONDS)
            raise
        study.close(HURRIED_SECONDS if outcome.interrupted else None)
        return outcome

    def specify(self, number: int, proposal: Proposal) -> TrialSpec:
        """The specification of one trial, which is noted in the run directory."""
        if number not in self.proposals:
            self.run.append_proposal(number, proposal)
        return TrialSpec.of(number, proposal, trial_seed(self.config.search.seed, number), self.settings)

    def finish(self, outcome: SearchOutcome) -> Front:
        """The final front; its trials are measured on test data unless the search was interrupted.

        Raises:
            UserError: not one trial was completed; the sentence says why the first failed.
        """
        if outcome.out_of_time and not self.keeper.results:
            raise UserError(
                f"the time was up before a trial had finished: search.hours is {self.config.search.hours:g}"
            )
        if not outcome.interrupted and not any(result.complete for result in self.keeper.results):
            failures = [result for result in self.keeper.results if result.failed]
            first = min(failures, key=lambda result: result.number)
            raise UserError(
                f"none of the {len(self.keeper.results)} trials was completed, so there is no front: "
                f"trial {first.number} failed in {first.reason}"
            )
        return self.keeper.finish(measure_again=not outcome.interrupted)


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
        UserError: an unknown agent, option, fine-tuning method or objective, an option that cannot be
            searched, early stopping of an agent without a rung loss, nothing to prune, a budget too small for
            the space, a run directory that is in use, or one that is to be resumed and is of another search.
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
    objectives = resolve_objectives(config.search.objectives, config.search.constraints, agent.performance)
    if resume:
        _require_same_search(path, config)
    elif path.exists() and not may_exist and not _holds_base_only(path, config):
        raise RunDirectory.in_use(path)
    graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, config.base.seed))
    space = SearchSpace.build(
        graph.groups,
        metrics=config.pruning.metrics,
        max_ratio=config.pruning.max_ratio,
        coefficients=config.pruning.coefficients,
        trials=config.search.trials,
        force=config.pruning.coefficients_force,
        shared=shared_ratios(agent),
        options=_option_ranges(config, agent),
    )
    earlier = _earlier_trials(config, path, space, objectives, resume=resume)
    return CheckedExperiment(config, path, agent, objectives, space, resume, earlier)


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
    if resume:
        return tuple(RunDirectory(path).read_warm_start())
    place = Path(wish) if Path(wish).is_dir() else path.parent / wish
    try:
        results = tuple(RunDirectory.open(place).read_trials())
        Study(space, objectives, "random", constraints=config.search.constraints).warm_start(results)
    except UserError as error:
        raise UserError(f"search.warm_start is {wish!r}: {error}") from None
    if not any(result.complete for result in results):
        raise UserError(f"search.warm_start is {wish!r}: no trial of it was completed")
    return results


FREE_KEYS = (
    "search.trials",
    "search.sampler",
    "search.seed",
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


def _require_same_search(path: Path, config: ExperimentConfig) -> None:
    """Refuse to go on with a search by other rules, naming every difference.

    Raises:
        UserError: there is nothing to go on with, or it is another search.
    """
    run = RunDirectory.open(path)
    before = parse_experiment(run.experiment.read_text(encoding="utf-8"), source=str(run.experiment))
    different = [
        f"{key} was {shown(old)} and is now {shown(new)}"
        for key, (old, new) in changes(before, config).items()
        if not key.startswith(FREE_KEYS)
    ]
    if different:
        raise UserError(
            f"{path} cannot be resumed as another search: {'; '.join(different)}: take that back, or start a "
            "search of its own with --name"
        )


def own_code(kind: str) -> list[Path]:
    """What workers need to import, for machines that do not have it: our packages, and a user's own agent."""
    packages = [Path(components.__file__).parent, Path(agents.__file__).parent, Path(__file__).parent]
    mine = source_of(kind)
    return packages if mine is None else [*packages, mine]


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
    """Whether `train` made this directory, and what it trained is what the experiment asks for."""
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


def _device(config: ExperimentConfig) -> str:
    """Where the driver trains the base: on the GPU if there is one and trials may use it."""
    return "cuda" if config.resources.gpus != 0 and torch.cuda.is_available() else "cpu"
