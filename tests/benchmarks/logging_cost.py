"""What logging to W&B costs a search: `python tests/benchmarks/logging_cost.py --json`.

The shipped `autoencoder` experiment on one base, `--trials` trials through Ray with as many workers as there
are CPUs, alternately with offline W&B and with none, `--repeats` times each. `*_seconds` are medians of the
wall time of the trials, `*_close_seconds` of what is waited for afterwards until everything is on the disk,
`overhead` the share by which the trials take longer with W&B, and `overhead_with_close` the same of both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from figures import run
from rich.console import Console

from search.checked_experiment import check
from search.config import load_experiment
from search.experiment import make_ready, train_only
from search.progress import SearchProgress
from search.search_command import Watcher, log_results, write
from search.wandb_logger import WandbLogger


def search(mode: Literal["offline", "disabled"], trials: int, directory: Path) -> tuple[float, float]:
    """Seconds of the trials, and of the end of logging."""
    config = load_experiment("autoencoder", [f"search.trials={trials}", f"wandb.mode={mode}"])
    checked = check(config, directory)
    run, _ = train_only(checked, lambda done, total, note: None)
    run.release()
    ready = make_ready(checked, lambda done, total, note: None)
    with Path(os.devnull).open("w") as nowhere:
        console = Console(file=nowhere)
        logger = WandbLogger(ready.run.path, experiment="cost", mode=mode)
        with SearchProgress(trials, console) as display:
            start = time.perf_counter()
            outcome = ready.search([Watcher(ready, display, logger)])
            took = time.perf_counter() - start
        front = ready.finish(outcome)
        report = write(ready, console)
        start = time.perf_counter()
        log_results(ready, front, front.hypervolumes(), report, logger)
        logger.close()
        closing = time.perf_counter() - start
    ready.run.release()
    assert outcome.complete == trials
    return took, closing


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """Alternate."""
    found: dict[str, list[tuple[float, float]]] = {"disabled": [], "offline": []}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            for mode in ("disabled", "offline"):
                pair = search(mode, options.trials, Path(scratch) / f"{mode}{repeat}")  # type: ignore[arg-type]
                found[mode].append(pair)
                print(f"{mode}: {pair[0]:.1f} s, {pair[1]:.1f} s", file=sys.stderr, flush=True)
    trials = {mode: statistics.median(pair[0] for pair in pairs) for mode, pairs in found.items()}
    whole = {mode: statistics.median(sum(pair) for pair in pairs) for mode, pairs in found.items()}
    return {
        "trials": options.trials,
        **{f"{mode}_seconds": round(value, 2) for mode, value in trials.items()},
        **{
            f"{mode}_close_seconds": round(statistics.median(pair[1] for pair in pairs), 2)
            for mode, pairs in found.items()
        },
        "overhead": round(trials["offline"] / trials["disabled"] - 1, 3),
        "overhead_with_close": round(whole["offline"] / whole["disabled"] - 1, 3),
    }


if __name__ == "__main__":
    run(__doc__, measure, trials=64, repeats=3)
