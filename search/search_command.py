"""`prunefront search`: run an experiment while people watch, say what came of it and where to look next."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from search.base import Base
from search.checked_experiment import CheckedExperiment, check
from search.config import ExperimentConfig
from search.driver import SearchOutcome, describe
from search.experiment import ReadySearch, make_ready
from search.feasibility import possible_models, require_reachable
from search.front import Front
from search.front_table import (
    base_line,
    early_stopping_line,
    failure_lines,
    front_lines,
    front_table,
    retention_table,
    stage_line,
)
from search.interruption import Interruption
from search.paste import command_name
from search.progress import SearchProgress, TrainingProgress, duration
from search.ray_connection import require_room
from search.report import Report, write_report
from search.run_directory import RunDirectory
from search.selection import unmet
from search.trial_types import TrialResult
from search.wandb_logger import WandbLogger, require_account
from search.wandb_plots import Tried

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

FRONT_SECONDS = 20.0
"""Between two live fronts that are logged to W&B."""

INTERRUPTED_SECONDS = 5.0
"""What W&B gets to finish after Ctrl-C; `prunefront sync` and trials.jsonl have the rest."""


def run(
    config: ExperimentConfig, path: Path, address: str | None, console: Console, *, resume: bool = False
) -> int:
    """Search, print the front, and return the exit code: 0, or 130 after Ctrl-C.

    Args:
        config: the experiment.
        path: of the run directory.
        address: of a running cluster; None starts one on this machine.
        console: where everything is shown.
        resume: go on with the search in the run directory.

    Raises:
        UserError: the experiment cannot run, or no trial was completed.
    """
    checked = check(config, path, resume=resume)
    constraints = config.search.constraints
    models = possible_models(config.agent.kind, checked.agent, checked.space) if constraints else ()

    def require_bounds(base: Base | None = None) -> None:
        if models:
            require_reachable(constraints, models[0], models[-1], checked.agent.performance, base)

    # Before a base is trained for nothing.
    require_bounds()
    with Interruption():  # Ray takes SIGTERM for itself
        require_room(address, config.resources.cpus, config.resources.given_gpus)
    require_account(config.wandb.mode, config.wandb.entity)
    console.print(plan_line(checked), soft_wrap=True, highlight=False)
    with kept_training(path), TrainingProgress("base", console) as progress:
        ready = make_ready(checked, progress)
    try:
        require_bounds(ready.base)  # and before trials run for nothing
        return _run(ready, address, console)
    finally:
        ready.run.release()


def _run(ready: ReadySearch, address: str | None, console: Console) -> int:
    """See `run`."""
    config = ready.checked.config
    warn = partial(print_note, console)
    for notice in ready.notices:
        warn(notice)
    if ready.base.trained:
        console.print(base_line(ready.base, ready.dense.agent.performance.name), highlight=False)
    if ready.keeper.results:
        console.print(resumption_line(ready), soft_wrap=True, highlight=False)
    if config.search.chosen_sampler == "gradient":
        with TrainingProgress("sweep", console) as progress:
            ready.plan(progress)
    wandb = config.wandb
    with WandbLogger(
        ready.run.path,
        experiment=ready.run.path.name,
        mode=wandb.mode,
        project=wandb.project,
        entity=wandb.entity,
        config=config.without_secrets().model_dump(mode="json"),
        warn=warn,
    ) as logger:
        with SearchProgress(config.search.trials, console) as display:
            outcome = ready.search([Watcher(ready, display, logger)], address)
        try:
            with TrainingProgress("test", console) as progress:
                front = ready.finish(outcome, progress)
        except KeyboardInterrupt:
            logger.close(INTERRUPTED_SECONDS)
            print(interruption_line(ready), file=sys.stderr)
            return INTERRUPTED
        results = ready.keeper.results
        complete = sum(result.complete for result in results)
        counts = {
            "complete": complete,
            "stopped": sum(result.stopped for result in results),
            "failed": sum(result.failed for result in results),
        }
        report = write(ready, console) if complete and not outcome.interrupted else None
        summary = {**front.hypervolumes(), **counts, **stability_summary(front)}
        log_results(ready, front, summary, report, logger)
        if complete:
            print_results(ready, front, outcome, console)
            print_steps(next_steps(ready, front, report), console)
        if outcome.interrupted:
            logger.close(INTERRUPTED_SECONDS)
    if complete:  # where runs have gone is known when the last of them has
        print_steps(wandb_steps(ready, logger), console)
    if outcome.interrupted:
        print(interruption_line(ready), file=sys.stderr)
        return INTERRUPTED
    return 0


@contextmanager
def kept_training(path: Path) -> Iterator[None]:
    """Say how to go on, where the training of a base is interrupted that has left a checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        if RunDirectory(path).training.exists():
            again = "the same command with --resume goes on from there"
            print(f"prunefront: the training of the base is kept in {path}; {again}", file=sys.stderr)
        raise


class Watcher:
    """Shows and logs a search's progress after every trial."""

    def __init__(self, ready: ReadySearch, display: SearchProgress, logger: WandbLogger) -> None:
        self._keeper = ready.keeper
        self._display = display
        self._logger = logger
        self._logs_trials = logs_every_trial(ready)
        self._began = time.monotonic()
        self._finished_here = 0
        self._front_logged = -math.inf
        self._front_changed = False
        self._counts = {"finished": 0, "failed": 0, "stopped": 0}
        self._last_failure: str | None = None
        for result in ready.keeper.results:
            self._count(result)
        logger.log_tried([_tried(result) for result in ready.keeper.results if result.complete])
        self._hypervolume = self._present_hypervolume()

    def __call__(self, result: TrialResult) -> None:
        """Take in a trial that the keeper has recorded."""
        self._count(result)
        members = self._keeper.members
        on_front = any(member.number == result.number for member in members)
        if on_front:  # or it is as it was
            self._hypervolume = self._present_hypervolume()
        self._display.update(
            **self._counts,
            front_size=len(members),
            hypervolume=self._hypervolume,
            last_failure=self._last_failure,
            front=[(member.size_ratio or 1.0, member.retention or 0.0) for member in members],
        )
        self._finished_here += 1
        now = time.monotonic()
        if self._logs_trials:
            self._logger.log_trial(result.to_record(), on_front)
            if on_front:
                self._logger.log_members([member.number for member in members])
        if result.complete:
            self._logger.log_tried([_tried(result)])
        self._front_changed = self._front_changed or on_front
        if self._front_changed and now - self._front_logged > FRONT_SECONDS:
            self._front_logged, self._front_changed = now, False
            self._logger.log_front(self._keeper.front().to_json()["trials"])
        self._logger.begin_dashboard(result.to_record)
        row = {
            **self._counts,
            "front_size": len(members),
            "hypervolume": self._hypervolume,
            "trials_per_minute": 60 * self._finished_here / max(now - self._began, 1e-3),
        }
        self._logger.log_search(row)

    def _present_hypervolume(self) -> float | None:
        return self._keeper.front().hypervolumes()["hypervolume"] if self._keeper.members else None

    def _count(self, result: TrialResult) -> None:
        self._counts["finished"] += 1
        self._counts["failed"] += result.failed
        self._counts["stopped"] += result.stopped
        if result.failed:
            self._last_failure = result.reason


def _tried(result: TrialResult) -> Tried:
    return result.number, result.origin, result.size_ratio or 1.0, result.retention or 0.0


def plan_line(checked: CheckedExperiment) -> str:
    """What is about to happen, in a few sentences."""
    config = checked.config
    base = "a base"
    if config.base.mode == "per_trial":
        gradual = checked.trial_settings().gradual is not None
        base = "a base to compare with, and one in every trial" if gradual else "a base in every trial"
    objectives = " against ".join(objective.name for objective in checked.objectives)
    options = f"; choose its {', '.join(checked.space.options)}" if checked.space.options else ""
    metrics = ", ".join(config.pruning.metrics)
    first = checked.ratios_first
    if first >= config.search.trials:
        metrics += ", mixed alike"
    elif first:
        metrics += f", mixed alike in the first {first} trials"
    return (
        f"{config.name}: train {base} ({config.agent.kind}); prune it in {config.search.trials} ways, which "
        f"{config.search.chosen_sampler} proposes in {len(checked.space.dimensions)} dimensions "
        f"({len(checked.space.keeps)} groups to cut, scored by {metrics}){options}; "
        f"repair and measure each; keep the front of {objectives}. Everything goes to {checked.path}."
    )


def resumption_line(ready: ReadySearch) -> str:
    """What a resumed search starts from."""
    finished, left = len(ready.keeper.results), len(ready.numbers)
    again = sum(number in ready.proposals for number in ready.numbers)
    repeated = f", {again} of which had begun and run again first" if again else ""
    return (
        f"Resumed with {finished} finished trials, of which {len(ready.keeper.members)} are on the front; "
        + (f"{left} are to run{repeated}." if left else "none is left to run.")
    )


def print_results(ready: ReadySearch, front: Front, outcome: SearchOutcome, console: Console) -> None:
    """The front, what was stopped, what failed and where the time went."""
    results = ready.keeper.results
    console.print()
    if front.trials:
        console.print(front_table(front, console.width))
        console.print(retention_table(front))
        for line in front_lines(front):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    else:
        console.print(f"The front is empty: {unmet(front)}.", soft_wrap=True, highlight=False, markup=False)
    stopped = early_stopping_line(results, ready.checked.config.pruning.fine_tune.updates)
    unmeasured = [
        f"Trial {number} could not be measured on test data: {reason}"
        for number, reason in sorted(ready.keeper.unmeasured.items())
    ]
    for line in (*unmeasured, *filter(None, [stopped]), *failure_lines(results)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print()
    console.print(
        f"{outcome.finished} trials in {duration(outcome.seconds)}, {outcome.concurrency} at a time.",
        highlight=False,
    )
    if outcome.repeated:
        console.print(f"{outcome.repeated} times a trial ran again whose worker was lost.", highlight=False)
    if outcome.out_of_time:
        console.print(
            f"The time was up with {len(ready.numbers)} of {ready.checked.config.search.trials} trials to "
            "go: the same command with --resume goes on.",
            soft_wrap=True,
            highlight=False,
        )
    console.print(stage_line(results), soft_wrap=True, highlight=False)
    console.print()


def write(ready: ReadySearch, console: Console) -> Report | None:
    """Write the report, or say why there is none: the search is over, and nothing is lost."""
    try:
        return write_report(ready.run)
    except Exception as error:
        print_note(console, f"no report was written: {describe(error)}")
        return None


def log_results(
    ready: ReadySearch,
    front: Front,
    summary: Mapping[str, float],
    report: Report | None,
    logger: WandbLogger,
) -> None:
    """Log what the search came to."""
    if not logs_every_trial(ready):
        for result in ready.keeper.members:
            logger.log_trial(result.to_record(), on_front=True)
    logger.log_members([result.number for result in ready.keeper.members])
    logger.finish(
        front.to_json()["trials"],
        summary,
        bundles={trial.trial: ready.run.path / trial.bundle for trial in front.trials},
        aliases=front.aliases(),
        importance=None if report is None else report.content["importance"],
        matters=None if report is None else _shares(report.content["parameters"]),
        report=None if report is None else report.path,
    )


def stability_summary(front: Front) -> dict[str, float]:
    """How far the stability of the base holds, as numbers for a dashboard; empty where it is not known."""
    found = front.stable_compression
    if found is None:
        return {}
    held = {} if found.size_ratio is None else {"stability/size_ratio": found.size_ratio}
    return {"stability/base": found.base, "stability/least": found.least, **held}


def _shares(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: explained["shares"] for name, explained in parameters.items()}


def logs_every_trial(ready: ReadySearch) -> bool:
    """Whether trials have W&B runs as they finish; in a large search those of the front have, at its end."""
    config = ready.checked.config
    return config.search.trials <= config.wandb.trial_runs


def print_note(console: Console, sentence: str) -> None:
    """What is worth knowing and stops nothing."""
    console.print(f"Note: {sentence}", soft_wrap=True, highlight=False, markup=False)


def print_steps(steps: Sequence[tuple[str, str]], console: Console) -> None:
    """A line for each title and what there is to it."""
    for title, value in steps:
        console.print(f"{title + ':':<11}{value}", soft_wrap=True, highlight=False, markup=False)


def next_steps(ready: ReadySearch, front: Front, report: Report | None) -> list[tuple[str, str]]:
    """Where to look next, as (title, path or command to paste)."""
    run, steps = ready.run, []
    if report is not None:
        steps.append(("Report", str(report.path)))
    if front.trials:
        best = max(trial.retention for trial in front.trials)
        wish = "--min-retention 0.9" if best >= 0.9 else "--knee"
        steps.append(("Select", f"{command_name()} select {run.path} {wish} --out selected-{run.path.name}"))
    steps.append(("Front", str(run.front)))
    dashboard = Path(sys.executable).with_name("optuna-dashboard")
    if dashboard.exists() or shutil.which("optuna-dashboard"):
        database = ready.checked.config.without_secrets().storage or f"sqlite:///{run.study}"
        steps.append(("Optuna", f"{command_name('optuna-dashboard')} {database}"))
    return steps


def wandb_steps(ready: ReadySearch, logger: WandbLogger) -> list[tuple[str, str]]:
    """Where the W&B runs are, in the same way."""
    steps = []
    if logger.dashboard is not None:
        steps.append(("Dashboard", logger.dashboard))
    if logger.mode == "online":
        steps.append(("W&B", logger.address or f"online, and in {logger.directory}"))
    elif logger.mode != "disabled":
        steps.append(("W&B", f"{logger.directory}; to upload: {command_name()} sync {ready.run.path}"))
    return steps


def interruption_line(ready: ReadySearch) -> str:
    """What an interrupted search has kept, and how it goes on, in one sentence."""
    finished = len(ready.keeper.results)
    kept = f"the {finished} trials that had finished are" if finished else "nothing but the base is"
    again = "the same command with --resume goes on from there"
    return f"prunefront: interrupted; {kept} kept in {ready.run.path}; {again}"
