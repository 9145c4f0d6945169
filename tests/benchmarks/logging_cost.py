"""What logging to W&B costs a search: `python tests/benchmarks/logging_cost.py --json`.

The shipped `autoencoder` experiment on one base, `--trials` trials through Ray with as many workers as there
are CPUs, alternately without W&B, with offline W&B, and with a server on loopback that is `fine`, or is so at
first and then refuses, stalls, limits or drops what it is sent (`--modes` names some of these). The base is
trained beforehand. `*_seconds` are medians over `--repeats` of the wall time of the trials, `*_close_seconds`
of what is waited for afterwards until everything is on the disk, `*_overhead` the share by which the trials
take longer than without W&B, and `*_overhead_with_close` the same of both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the server

from figures import run
from rich.console import Console
from wandb_server import WandbServer, wandb_server

from search.checked_experiment import check
from search.config import load_experiment
from search.experiment import make_ready, train_only
from search.progress import SearchProgress
from search.search_command import Watcher, log_results, write
from search.trial_types import TrialResult
from search.wandb_logger import WandbLogger

MODES = ("disabled", "offline", "fine", "refuse", "stall", "limit", "drop")


def search(mode: str, trials: int, directory: Path, server: WandbServer) -> tuple[float, float]:
    """Seconds of the trials, and of the end of logging."""
    wandb_mode = mode if mode in ("disabled", "offline") else "online"
    config = load_experiment("autoencoder", [f"search.trials={trials}", "wandb.mode=disabled"])
    ready = make_ready(check(config, directory, resume=True), lambda done, total, note: None)
    server.behaviour = "fine"
    with Path(os.devnull).open("w") as nowhere:
        console = Console(file=nowhere)
        logger = WandbLogger(ready.run.path, experiment="cost", mode=wandb_mode)  # type: ignore[arg-type]
        while wandb_mode == "online" and logger.address is None:  # so that a server has begun well
            time.sleep(0.05)
        with SearchProgress(trials, console) as display:
            start = time.perf_counter()
            observers = [Watcher(ready, display, logger), _turning(server, mode, trials)]
            outcome = ready.search(observers)
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


def _turning(server: WandbServer, mode: str, trials: int) -> Callable[[TrialResult], None]:
    """An observer that lets the server misbehave from the first quarter of the trials on."""
    finished = 0

    def observe(result: TrialResult) -> None:
        nonlocal finished
        finished += 1
        if finished == trials // 4 and mode in ("refuse", "stall", "limit", "drop"):
            server.behaviour = mode  # type: ignore[assignment]

    return observe


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """Alternate."""
    modes = [mode for mode in MODES if mode in ("disabled", *options.modes)]
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as scratch, wandb_server() as server:
        os.environ |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": server.url}
        trained = Path(scratch) / "base"
        config = load_experiment("autoencoder", [f"search.trials={options.trials}", "wandb.mode=disabled"])
        train_only(check(config, trained), lambda done, total, note: None)[0].release()
        for repeat in range(options.repeats):
            for mode in modes:
                directory = Path(scratch) / f"{mode}{repeat}"
                shutil.copytree(trained, directory)
                pair = search(mode, options.trials, directory, server)
                found[mode].append(pair)
                print(f"{mode}: {pair[0]:.1f} s, {pair[1]:.1f} s", file=sys.stderr, flush=True)
        server.behaviour = "fine"
    trials = {mode: statistics.median(pair[0] for pair in pairs) for mode, pairs in found.items()}
    closing = {mode: statistics.median(pair[1] for pair in pairs) for mode, pairs in found.items()}
    whole = {mode: statistics.median(sum(pair) for pair in pairs) for mode, pairs in found.items()}
    figures: dict[str, object] = {"trials": options.trials}
    for mode in modes:
        figures[f"{mode}_seconds"] = round(trials[mode], 2)
        figures[f"{mode}_close_seconds"] = round(closing[mode], 2)
        if mode != "disabled":
            figures[f"{mode}_overhead"] = round(trials[mode] / trials["disabled"] - 1, 3)
            figures[f"{mode}_overhead_with_close"] = round(whole[mode] / whole["disabled"] - 1, 3)
    return figures


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which modes."""
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=MODES[1:], help="default: all")


if __name__ == "__main__":
    run(__doc__, measure, add_options, trials=64, repeats=3)
