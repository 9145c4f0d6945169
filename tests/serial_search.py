"""Whole searches of the toy agent without Ray: everything but the cluster is the real thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from search.cluster import SearchOutcome
from search.config import parse_experiment
from search.experiment import ReadySearch, check
from search.front import Front

EXPERIMENT = """
agent: {kind: "toy_agents:Toy"}
pruning: {metrics: [l2, fisher], fine_tune: {updates: 10}}
search: {trials: 12}
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
    **resources: Any,
) -> SearchOutcome:
    """What `search.cluster.run_search` does, one trial after the other in this process."""
    failed = complete = 0
    for number in numbers:
        result = run_trial(make_spec(number, study.ask(number)), base)
        record(result)
        study.tell(result)
        for observer in observers:
            observer(result)
        complete, failed = complete + result.complete, failed + (not result.complete)
    return SearchOutcome(complete, failed, interrupted=False, concurrency=1, seconds=0.0)


def make_ready(path: Path, *overrides: str, resume: bool = False) -> ReadySearch:
    """The search of `EXPERIMENT` with overrides, its base trained."""
    config = parse_experiment(EXPERIMENT, name=path.name, overrides=overrides)
    return check(config, path, resume=resume).make_ready(lambda done, total, note: None)


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
