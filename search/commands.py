"""What the commands do: one function each, from parsed arguments to an exit code."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from components import UserError
from components.errors import nearest
from search.config import ExperimentConfig, load_experiment
from search.front import Front, percent
from search.front_table import (
    WIDTH,
    base_line,
    front_lines,
    front_table,
    retention_table,
    verification_table,
)
from search.paste import command_name
from search.run_directory import RunDirectory
from search.selection import Wish, unmet
from search.selection import select as choose


def search(options: argparse.Namespace) -> int:
    """Run an experiment and print its front; see `search.search_command`."""
    from search.search_command import run

    config, path = load(options)
    return run(config, path, options.address, make_console(), resume=options.resume)


def train(options: argparse.Namespace) -> int:
    """Train the base of an experiment and store it."""
    from search.checked_experiment import check
    from search.experiment import train_only
    from search.progress import TrainingProgress
    from search.search_command import kept_training

    checked = check(*load(options), resume=options.resume)
    with kept_training(checked.path), TrainingProgress("base", make_console()) as progress:
        run, base = train_only(checked, progress)
    run.release()
    print(base_line(base, checked.agent.performance.name))
    print(f"Stored in {run.base}; a search of the same experiment and name continues with it.")
    return 0


def front(options: argparse.Namespace) -> int:
    """Print the front of a run, as tables or as JSON."""
    run = find_run(options.run, options.runs_dir)
    content = run.read_front()
    found = Front.from_json(run.front, content)
    if options.json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return 0
    print_front(found, make_console())
    return 0


def importance(options: argparse.Namespace) -> int:
    """Print how importance moved while the base of a run was trained: as tables, JSON or CSV."""
    from search.importance_table import csv_lines, importance_tables, notes, to_json
    from search.stored_importance import read_course

    run = find_run(options.run, options.runs_dir)
    course = read_course(run)
    if options.csv:
        for line in csv_lines(course):
            print(line)
        return 0
    if options.json:
        print(json.dumps(to_json(course), allow_nan=False, ensure_ascii=False))
        return 0
    console = make_console()
    for table in importance_tables(course):
        console.print(table)
    for line in notes(course):
        console.print(line, highlight=False, markup=False)
    return 0


def report(options: argparse.Namespace) -> int:
    """Write the report of a run."""
    from search.report import write_report

    print(f"Report: {write_report(find_run(options.run, options.runs_dir)).path}")
    return 0


def sync(options: argparse.Namespace) -> int:
    """Upload the W&B runs of a run that are on the disk only."""
    from search.wandb_logger import account_fault

    run = find_run(options.run, options.runs_dir)
    if not any(run.wandb.glob("*run-*")):
        raise UserError(
            f"{run.path} has no W&B runs to upload: its wandb.mode was 'disabled', or no trial ran"
        )
    run.claim()  # a search that still logs would be uploaded in part
    try:
        if fault := account_fault(load_experiment(str(run.experiment)).wandb.entity):
            raise UserError(f"nothing is uploaded: {fault}")
        command = [sys.executable, "-P", "-m", "wandb", "sync", "--include-online", "--yes", str(run.wandb)]
        code = subprocess.run(command, check=False).returncode
    finally:
        run.release()
    left = [
        file for file in run.wandb.glob("*run-*/*.wandb") if not file.with_suffix(".wandb.synced").exists()
    ]
    if left:
        print(f"prunefront: {len(left)} W&B runs in {run.wandb} were not uploaded whole", file=sys.stderr)
    return 1 if code or left else 0


def dashboard(options: argparse.Namespace) -> int:
    """Make the dashboard of a run in W&B, or make it anew."""
    from search.wandb_logger import make_dashboard

    run = find_run(options.run, options.runs_dir)
    wandb = load_experiment(str(run.experiment)).wandb
    trials = run.read_trials()
    if not trials:
        raise UserError(f"{run.path} has no trials yet: a dashboard has nothing to show")
    address = make_dashboard(
        run.path,
        experiment=run.path.resolve().name,
        project=wandb.project,
        entity=wandb.entity,
        trial=next((trial for trial in trials if trial.complete), trials[0]).to_record(),
    )
    print(f"Dashboard: {address}")
    return 0


def select(options: argparse.Namespace) -> int:
    """Copy the bundle of the trial that meets a wish."""
    from search.bundle import copy_bundle

    run = find_run(options.run, options.runs_dir)
    found = Front.from_json(run.front, run.read_front())
    trial = choose(found, _wish(options))
    copy_bundle(run.path / trial.bundle, options.out)
    test = "" if trial.test_retention is None else f", on test data {trial.test_retention:.3f}"
    print(
        f"Trial {trial.trial} of {run.path}: {trial.parameters:,} parameters, {percent(trial.size_ratio)} of "
        f"the base; retention {trial.retention:.3f}{test}.\n"
        f"Copied to {options.out}. Check it with: {command_name()} verify {options.out}"
    )
    return 0


def verify(options: argparse.Namespace) -> int:
    """Reproduce a bundle's outputs and measure it again; 1 if the outputs are others."""
    from search.verification import verify_bundle

    report = verify_bundle(options.bundle)
    make_console().print(verification_table(report))
    for change in report.changes:
        print(f"Environment: {change}")
    if report.not_measured is not None:
        print(f"Performance was not measured again: {report.not_measured}")
    if report.identical:
        print(f"{options.bundle}: the outputs for {report.rows} stored inputs are the same, bit for bit.")
        return 0
    difference = f"the outputs differ from the stored ones by up to {report.difference:.2g} of their largest"
    if report.passed:
        print(f"{options.bundle}: {difference}, which another environment explains.")
        return 0
    print(
        f"prunefront: {options.bundle}: {difference}; this is not the agent that was stored", file=sys.stderr
    )
    return 1


def profile(options: argparse.Namespace) -> int:
    """Say what a search would do and what it would cost; see `search.profile`."""
    from search.checked_experiment import check
    from search.feasibility import require_reachable
    from search.outline import outline
    from search.profile import estimate
    from search.profile_table import (
        basis_lines,
        component_table,
        cost_table,
        group_table,
        model_table,
        stage_table,
        to_json,
    )

    checked = check(*load(options), may_exist=True)
    plan = outline(checked)
    console = make_console()
    if not options.json:
        for table in (component_table(plan), group_table(plan), model_table(plan)):
            console.print(table)
    smallest, _, largest = plan.models
    performance = checked.agent.performance
    require_reachable(checked.config.search.constraints, smallest, largest, performance)
    with telling(aloud=not options.json) as say:
        prediction = estimate(checked, plan, say)
    if options.json:
        print(json.dumps(to_json(plan, prediction), indent=2, ensure_ascii=False))
        return 0
    if prediction.measured is not None:
        console.print(stage_table(prediction, plan.trials))
        console.print(cost_table(prediction, plan.trials))
    for line in basis_lines(plan, prediction):
        console.print(line, highlight=False, markup=False)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Check this machine or every node of a cluster; 1 if there is a problem. See `search.doctor`."""
    from search.doctor import examine
    from search.doctor_table import check_table, to_json, verdict

    with telling(aloud=not options.json) as say:
        say("starting Ray and checking" if options.address is None else f"checking {options.address}")
        machines = examine(options.address, options.runs_dir, options.seconds)
    if options.json:
        print(json.dumps(to_json(machines), indent=2, ensure_ascii=False))
    else:
        console = make_console()
        for machine in machines:
            console.print(check_table(machine))
        console.print(verdict(machines), highlight=False, markup=False)
    return 1 if any(machine.problems for machine in machines) else 0


def find_run(name_or_path: str, runs: Path) -> RunDirectory:
    """The run directory of a path, or of a name in the directory of all runs.

    Raises:
        UserError: there is none; the sentence names the nearest.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return RunDirectory.open(path)
    if path.name == name_or_path:
        if (runs / path).is_dir():
            return RunDirectory.open(runs / path)
        known = [entry.name for entry in runs.iterdir() if entry.is_dir()] if runs.is_dir() else []
        hint = nearest(name_or_path, known) if known else f"there are no runs in {runs}"
        raise UserError(f"there is no run {name_or_path!r}: {hint}")
    raise UserError(f"there is no run directory {path}")


def load(options: argparse.Namespace) -> tuple[ExperimentConfig, Path]:
    """The experiment that the arguments describe, and where its run directory belongs."""
    overrides = list(options.overrides)
    for name in ("trials", "hours"):
        if getattr(options, name, None) is not None:
            overrides.append(f"search.{name}={getattr(options, name)}")
    if options.name is not None:
        overrides.append(f"name={json.dumps(options.name)}")
    config = load_experiment(options.experiment, overrides)
    return config, options.runs_dir / config.name


def print_front(found: Front, console: Console) -> None:
    """A front as tables, with its hypervolumes."""
    if not found.trials:
        print(f"The front of {found.experiment} is empty: {unmet(found)}.")
        return
    console.print(front_table(found, console.width))
    console.print(retention_table(found))
    for line in front_lines(found):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _wish(options: argparse.Namespace) -> Wish:
    if options.min_retention is not None:
        return Wish("min_retention", options.min_retention)
    if options.max_parameters is not None:
        return Wish("max_parameters", options.max_parameters)
    if options.max_latency is not None:
        return Wish("max_latency", options.max_latency)
    if options.trial is not None:
        return Wish("trial", options.trial)
    return Wish("knee")


@contextmanager
def telling(aloud: bool) -> Iterator[Callable[[str], None]]:
    """Says what is being done: in place on a terminal; elsewhere, where `aloud`, as lines of the output."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda words: print(f"{words} ...", flush=True) if aloud else None
        return
    with console.status("") as status:
        yield lambda words: status.update(f"{words} ...")


def make_console() -> Console:
    """Where tables go: the terminal's width, at most 100 columns, and 100 where output is redirected."""
    terminal = Console()
    return Console(width=min(WIDTH, terminal.width) if terminal.is_terminal else WIDTH)
