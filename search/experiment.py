"""A search from its checked experiment to its front: train the base, run trials, measure the front.

A search that ended early goes on from its run directory: with `resume`, `check` has made sure that it is the
same search, and `make_ready` takes in what has finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from agents.agent import Progress, unwatched
from components import UserError
from search.base import Base
from search.base_files import load_base, save_base
from search.checked_experiment import CheckedExperiment
from search.cluster import run_search
from search.determinism import deterministic
from search.driver import SearchOutcome
from search.durable_files import write_text
from search.front import Front
from search.front_keeper import FrontKeeper
from search.gpu_memory import trial_share
from search.gradient_sweep import GradientSweep, read_sweep
from search.optimisers import Optimiser
from search.own_code import own_code
from search.prepared_base import PreparedBase, prepare
from search.run_directory import RunDirectory
from search.study_database import StudyDatabase
from search.trial import run_trial
from search.trial_types import Proposal, TrialResult, TrialSpec

HURRIED_SECONDS = 3.0
"""What the study's database gets to take the last trials after Ctrl-C; `--resume` adds the others."""


@dataclass(frozen=True)
class ReadySearch:
    """A search whose base is trained and stored; nothing is left but its trials. Made by `make_ready`.

    Attributes:
        checked: the experiment.
        run: its directory.
        base: trained, or untrained where every trial trains its own.
        dense: the base, ready on the CPU of the driver.
        keeper: takes in results; its `results` and `members` are the state of the search.
        database: where the Optuna study is written.
        proposals: what an earlier search had proposed, by trial number.
        notices: sentences about what was mended.
    """

    checked: CheckedExperiment
    run: RunDirectory
    base: Base
    dense: PreparedBase
    keeper: FrontKeeper
    database: StudyDatabase
    proposals: Mapping[int, Proposal] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def numbers(self) -> list[int]:
        """Of the trials that are still to run; those that an earlier search was running come first."""
        finished = {result.number for result in self.keeper.results}
        budget = range(self.checked.config.search.trials)
        open_ones = [number for number in budget if number not in finished]
        return sorted(open_ones, key=lambda number: number not in self.proposals)

    def plan(self, progress: Progress = unwatched) -> Optimiser | None:
        """What proposes trials where the sampler is `gradient`: its sweep, made once and kept; else None.

        Args:
            progress: is told how far the sweep is.

        Raises:
            UserError: soft masks cannot follow the agent's model.
        """
        checked, search = self.checked, self.checked.config.search
        if search.chosen_sampler != "gradient":
            return None
        from search.gradient_optimiser import sweep, sweep_points

        count = sweep_points(search.trials - checked.anchors)
        kept = read_sweep(self.run.sweep)
        if kept is not None and len(kept) == count and all(checked.space.holds(p.params) for p in kept):
            return GradientSweep(kept, checked.space, checked.anchors)
        # One thread: the same bits however many cores there are.
        with deterministic(search.seed, threads=1):
            points = sweep(self.dense, checked.space, count, progress)
        found = GradientSweep(points, checked.space, checked.anchors)
        found.write(self.run.sweep)
        return found

    def search(
        self, observers: Sequence[Callable[[TrialResult], None]] = (), address: str | None = None
    ) -> SearchOutcome:
        """Run all trials on a Ray cluster; returns early, with what is finished, on Ctrl-C.

        Args:
            observers: called with every result, without its state, after it was stored.
            address: of a running cluster; None starts one on this machine.

        Raises:
            UserError: no cluster answers, it cannot hold a trial, or soft masks cannot follow the agent.
        """
        config = self.checked.config
        search, resources = config.search, config.resources
        stopping = self.checked.new_early_stopping()
        if stopping is not None:
            stopping.replay(self.keeper.results)
        study = self.checked.new_study(self.database, self.plan())
        try:
            study.warm_start(self.checked.earlier)
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
                    cpus=resources.cpus,
                    gpus=resources.given_gpus,
                    least_gpus=trial_share(self.base.gpu_share),
                    concurrency=search.concurrency,
                    address=address,
                    early_stopping=stopping,
                    code=own_code(config.agent.kind),
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
        return self.checked.specify(number, proposal)

    def finish(self, outcome: SearchOutcome, progress: Progress = unwatched) -> Front:
        """The final front; its trials are measured on test data unless the search was interrupted.

        Args:
            outcome: how the search ended.
            progress: is told how many have been measured.

        Raises:
            UserError: not one trial was completed; the sentence says why the first failed.
        """
        if outcome.out_of_time and not self.keeper.results:
            hours = self.checked.config.search.hours
            raise UserError(f"the time was up before a trial had finished: search.hours is {hours:g}")
        if not outcome.interrupted and not any(result.complete for result in self.keeper.results):
            failures = [result for result in self.keeper.results if result.failed]
            first = min(failures, key=lambda result: result.number)
            raise UserError(
                f"none of the {len(self.keeper.results)} trials was completed, so there is no front: "
                f"trial {first.number} failed in {first.reason}"
            )
        return self.keeper.finish(not outcome.interrupted, progress)


def make_ready(checked: CheckedExperiment, progress: Progress) -> ReadySearch:
    """Make the run directory, train the base and store it, or go on with what is there.

    What is there is the base that `train_only` left or, where the experiment is resumed, whatever an earlier
    search left.

    Args:
        checked: the experiment.
        progress: is told how far the training of the base is.

    Raises:
        UserError: the run directory is in use, or the base did not learn; nothing is left behind then.
    """
    database = checked.database()
    identity = RunDirectory(checked.path).read_identity() if checked.resume else None
    database.require_ready(identity)
    run, base = _run_and_base(checked, progress, checked.config.has_trained_base)
    with _released_by_a_fault(run):
        database.identity = run.read_identity()
        dense = prepare(base)
        constraints = checked.config.search.constraints
        keeper = FrontKeeper(run, dense, checked.objectives, constraints, checked.threads)
        notices = run.mend()
        if not checked.resume:
            run.forget_proposals()
        trials = run.read_trials()
        if checked.config.base.mode == "shared":
            _require_own_base(run, base, trials)
        keeper.restore(trials)
        return ReadySearch(checked, run, base, dense, keeper, database, run.read_proposals(), tuple(notices))


def train_only(checked: CheckedExperiment, progress: Progress) -> tuple[RunDirectory, Base]:
    """Make a run directory that holds the experiment and its base alone; `make_ready` goes on with it.

    Raises:
        UserError: as `make_ready`.
    """
    if checked.resume:
        return _run_and_base(checked, progress, trained=True)
    run = _created(checked)
    with _nothing_left_of(run):
        return run, _train_into(run, checked, progress)


def _run_and_base(checked: CheckedExperiment, progress: Progress, trained: bool) -> tuple[RunDirectory, Base]:
    """The run directory, claimed, and its base, trained or not."""
    if not checked.resume and not checked.holds_base_only:
        run = _created(checked)
        with _nothing_left_of(run):
            # Before the base: a search that is killed while that trains begins with the same trials.
            run.write_warm_start(checked.earlier)
            return run, _train_into(run, checked, progress) if trained else checked.untrained_base()
    run = RunDirectory.open(checked.path)
    run.claim()
    with _released_by_a_fault(run):
        write_text(run.experiment, _to_store(checked))
        run.write_warm_start(checked.earlier)
        if not trained:
            return run, checked.untrained_base()
        if (run.base / "metrics.json").is_file():
            return run, load_base(run.base)
        if run.trials.exists() and run.trials.stat().st_size:
            raise UserError(
                f"{run.base} is gone, which the trials of {run.path} were pruned from: {_INSTEAD}"
            )
        return run, _train_into(run, checked, progress)  # killed before the base was trained


@contextmanager
def _released_by_a_fault(run: RunDirectory) -> Iterator[None]:
    """Let go of a run directory, which stays as it is, if the block fails."""
    try:
        yield
    except BaseException:
        run.release()
        raise


_INSTEAD = "restore it, or start a search of its own with --name"


def _require_own_base(run: RunDirectory, base: Base, trials: Sequence[TrialResult]) -> None:
    """Refuse to go on from another base than the one that finished trials were pruned from."""
    for trial in trials:
        if trial.base_performance and dict(trial.base_performance) != dict(base.performance):
            own, theirs = base.performance["validation"], trial.base_performance["validation"]
            raise UserError(
                f"{run.base} reaches {own:g} on validation data, and the base that trial {trial.number} was "
                f"pruned from {theirs:g}: {_INSTEAD}"
            )


def _created(checked: CheckedExperiment) -> RunDirectory:
    return RunDirectory.create(checked.path, _to_store(checked))


@contextmanager
def _nothing_left_of(run: RunDirectory) -> Iterator[None]:
    """Remove a run directory if the block fails: it was made just now, and is worth nothing yet.

    Unless there is a checkpoint of the base's training in it, and what failed may not fail again.
    """
    try:
        yield
    except BaseException as error:
        certain = isinstance(error, UserError) and not isinstance(error, ArithmeticError)
        if run.training.exists() and not certain:
            run.release()
        else:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _to_store(checked: CheckedExperiment) -> str:
    return checked.config.without_secrets().to_yaml()


def _train_into(run: RunDirectory, checked: CheckedExperiment, progress: Progress) -> Base:
    """Train the base, from where its training was interrupted, and store it."""
    base = checked.train_base(progress, run.training)
    save_base(base, run.base)
    shutil.rmtree(run.training, ignore_errors=True)
    return base
