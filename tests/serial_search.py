"""Whole searches of the toy agent without Ray: everything but the cluster is the real thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from search.checked_experiment import check
from search.config import parse_experiment
from search.driver import SearchOutcome
from search.experiment import ReadySearch
from search.experiment import make_ready as make_experiment_ready
from search.front import Front
from search.rungs import SteppedTrial
from search.scheduler import EarlyStopping
from search.trial_types import TrialSpec

EXPERIMENT = """
agent: {kind: "toy_agents:Toy"}
pruning: {metrics: [l2, fisher], fine_tune: {updates: 10}}
search: {trials: 12, sampler: tpe}
wandb: {mode: disabled}
"""


def run_serially(
    numbers: Iterable[int],
    *,
    study: Any,
    make_spec: Callable[..., Any],
    run_trial: Callable[..., Any],
    base: Any,
    record: Callable[[Any], None],
    observers: Sequence[Callable[[Any], None]] = (),
    early_stopping: EarlyStopping | None = None,
    **resources: Any,
) -> SearchOutcome:
    """What `search.cluster.run_search` does, one trial after the other in this process."""
    results = []
    for number in numbers:
        result = run_with_stops(make_spec(number, study.ask(number)), run_trial, base, early_stopping)
        record(result)
        study.tell(result)
        for observer in observers:
            observer(result)
        results.append(result)
    counts = {name: sum(getattr(r, name) for r in results) for name in ("complete", "failed", "stopped")}
    return SearchOutcome(interrupted=False, concurrency=1, seconds=0.0, **counts)


def run_with_stops(
    spec: TrialSpec, run_trial: Callable[..., Any], base: Any, early_stopping: EarlyStopping | None
) -> Any:
    """A trial whose rungs are judged as the cluster would."""
    if early_stopping is None:
        return run_trial(spec, base)
    trial = SteppedTrial(lambda report: run_trial(spec, base, "cpu", report))
    result = trial.step()
    while not trial.over and early_stopping.goes_on(result):
        result = trial.step()
    trial.end()
    early_stopping.finish(result)
    return result


def make_ready(path: Path, *overrides: str, resume: bool = False) -> ReadySearch:
    """The search of `EXPERIMENT` with overrides, its base trained."""
    config = parse_experiment(EXPERIMENT, name=path.name, overrides=overrides)
    return make_experiment_ready(check(config, path, resume=resume), lambda done, total, note: None)


def finish(ready: ReadySearch) -> Front:
    """Run all its trials and measure the front; the run directory is free afterwards, whatever happens."""
    try:
        with patch("search.experiment.run_search", run_serially):
            return ready.finish(ready.search())
    finally:
        ready.run.release()


def search_serially(path: Path, *overrides: str) -> tuple[ReadySearch, Front]:
    """Run all trials of the search of `EXPERIMENT` with overrides, and finish."""
    ready = make_ready(path, *overrides)
    return ready, finish(ready)
