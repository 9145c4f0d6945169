"""What the driver costs at scale: `python tests/benchmarks/search_scale.py --json [--sampler tpe]`.

Empty trials with 16 workers, through all that a trial of the `autoencoder` search goes through but its work:
proposal, specification, worker, a result with a state of 103,248 parameters, bundle and front where it joins
that, fsynced record, telling the study and its SQLite database, progress; but for W&B, which has a process of
its own. `driver_ms` is the driver's own processor time per trial, all its threads together, over the last
half of each size, `wall_ms` the wall time there: on a machine with fewer cores than workers these compete
with the driver. `growth_mb` is how much the driver's resident memory has grown from its first trial to its
last, `workers` how many processes ran trials.

`bare_driver_ms` is the same of Tune alone, with as many reused workers, which sample at random, return a
number and are not told of; `driver_ratio` is ours over that, at the smallest size.

`quality` compares `tpe` as it is, with a bounded history, and unbounded: the hypervolume of a synthetic
search of `--quality-trials` trials, as a mean over seeds, and the seconds that its proposals took.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from figures import run
from fronts import interval
from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console
from trial_cost import space

from agents.agent import Objective
from components.choosing import kept_count
from search.base import Base
from search.checked_experiment import check
from search.config import load_experiment
from search.experiment import make_ready
from search.pareto import hypervolume_log
from search.progress import SearchProgress
from search.ray_connection import connected, quiet_ray, ray_environment
from search.search_command import Watcher
from search.study import HISTORY, Study
from search.trial_types import TrialResult, TrialSpec
from search.wandb_logger import WandbLogger

WORKERS = 16
OBJECTIVES = (Objective("parameters", "minimize", "parameters"), Objective("error", "minimize", "mse"))
UNBOUNDED = 10**9


def resident_mb() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def empty_trial(spec: TrialSpec, base: Base, device: str) -> TrialResult:
    """A trial that does nothing and returns as much as one that does: a dense model, made-up measures."""
    size, error = np.random.default_rng(spec.seed).random(2)
    return replace(
        TrialResult.of(spec, "complete"),
        objectives={"parameters": 1.0 + round(size * base.parameters), "reconstruction_error": float(error)},
        parameters=1 + round(size * base.parameters),
        size_ratio=float(size),
        macs=base.macs,
        retention=1.0 - float(error),
        performance={"reconstruction_error": float(error)},
        base_performance=base.performance,
        component_sizes={"encoder": base.parameters // 2, "decoder": base.parameters // 2},
        widths=base.widths,
        kept={group: tuple(range(width)) for group, width in base.widths.items()},
        rungs=((0, 0.1), (150, 0.1)),
        updates=150,
        repaired_by="fine_tuning",
        timings=dict.fromkeys(("score", "mix", "slice", "reconstruct", "fine_tune", "evaluate"), 0.0),
        device=device,
        host=str(os.getpid()),
        state=base.states["model"],
    )


def scale(trials: int, sampler: str) -> dict[str, float]:
    """Run so many empty trials through the search of the autoencoder."""
    marks: list[tuple[float, float, float]] = []

    def mark(result: TrialResult) -> None:
        marks.append((time.process_time(), time.monotonic(), resident_mb()))
        if len(marks) % 500 == 0:
            print(f"{sampler}: {len(marks)}/{trials}", file=sys.stderr, flush=True)

    settings = [
        f"search.trials={trials}",
        f"search.sampler={sampler}",
        f"search.concurrency={WORKERS}",
        f"resources.cpus={len(os.sched_getaffinity(0)) / WORKERS}",
    ]
    with tempfile.TemporaryDirectory() as scratch, Path(os.devnull).open("w") as nowhere:
        config = load_experiment("autoencoder", settings)
        ready = make_ready(check(config, Path(scratch) / "scale"), lambda done, total, note: None)
        console = Console(file=nowhere)
        with (
            patch("search.experiment.run_trial", empty_trial),
            WandbLogger(ready.run.path, experiment="scale", mode="disabled") as logger,
            SearchProgress(trials, console) as display,
        ):
            outcome = ready.search([Watcher(ready, display, logger), mark])
        workers = len({line["host"] for line in map(json.loads, ready.run.trials.read_text().splitlines())})
        ready.run.release()
    assert (outcome.complete, outcome.concurrency) == (trials, WORKERS)
    (cpu, wall, _), (last_cpu, last_wall, last_mb) = marks[len(marks) // 2], marks[-1]
    counted = len(marks) - 1 - len(marks) // 2
    return {
        "driver_ms": round(1000 * (last_cpu - cpu) / counted, 2),
        "wall_ms": round(1000 * (last_wall - wall) / counted, 2),
        "growth_mb": round(last_mb - marks[0][2], 1),
        "workers": workers,
    }


class Bare(tune.Trainable):
    """A worker that returns a number."""

    def step(self) -> dict[str, object]:
        return {"error": self.config["x"], "done": True}

    def reset_config(self, new_config: dict[str, object]) -> bool:
        self.config = new_config
        return True


def bare(trials: int) -> float:
    """Milliseconds of the driver's processor time per trial with Tune alone, over the last half."""
    marks: list[float] = []

    class Marking(tune.Callback):
        def on_trial_complete(
            self, iteration: int, trials: list[Trial], trial: Trial, **info: object
        ) -> None:
            marks.append(time.process_time())

    cpus = len(os.sched_getaffinity(0)) / WORKERS
    with ray_environment(), quiet_ray(), tempfile.TemporaryDirectory() as scratch, connected(None):
        tune.run(
            tune.with_resources(Bare, {"cpu": cpus}),
            config={"x": tune.uniform(0, 1)},
            num_samples=trials,
            max_concurrent_trials=WORKERS,
            callbacks=[Marking()],
            storage_path=scratch,
            reuse_actors=True,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        )
    half = len(marks) // 2
    return 1000 * (marks[-1] - marks[half]) / (len(marks) - 1 - half)


def quality(trials: int, seeds: int) -> dict[str, object]:
    """Hypervolume of synthetic searches with a bounded and an unbounded history."""
    volumes: dict[str, list[float]] = {"bounded": [], "unbounded": []}
    seconds: dict[str, list[float]] = {"bounded": [], "unbounded": []}
    for seed in range(seeds):
        for name, limit in (("bounded", HISTORY["tpe"]), ("unbounded", UNBOUNDED)):
            with patch.dict(HISTORY, {"tpe": limit}):
                start = time.process_time()
                volumes[name].append(synthetic_search(trials, seed))
                seconds[name].append(time.process_time() - start)
        print(f"quality: seed {seed}", file=sys.stderr, flush=True)
    ratios = [b / u for b, u in zip(volumes["bounded"], volumes["unbounded"], strict=True)]
    return {
        "hypervolume": {name: interval(values) for name, values in volumes.items()},
        "ratio": interval(ratios),
        "seconds": {name: interval(values) for name, values in seconds.items()},
    }


def synthetic_search(trials: int, seed: int) -> float:
    """A search in which a layer's size is the product of its widths, and groups need some channels each."""
    places = space(trials)
    study = Study(places, OBJECTIVES, "tpe", seed, trials=trials)
    needs = np.random.default_rng(seed).uniform(2, 20, len(places.sizes))
    full = math.prod(places.sizes.values()) ** (2 / len(places.sizes)) * (len(places.sizes) + 1)
    sizes, retention = [], []
    for number in range(trials):
        proposal = study.ask(number)
        kept = [kept_count(size, proposal.plan.ratios[name]) for name, size in places.sizes.items()]
        widths = [64, *kept, 64]
        parameters = sum(a * b for a, b in itertools.pairwise(widths))
        good = math.prod(1 - math.exp(-own / need) for own, need in zip(kept, needs, strict=True))
        sizes.append(min(1.0, parameters / full))
        retention.append(good)
        study.tell(
            TrialResult(
                number,
                "complete",
                proposal.plan,
                proposal.origin,
                seed=0,
                objectives={"parameters": float(parameters), "error": 1 - good},
            )
        )
    return hypervolume_log(sizes, retention)


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """All figures."""
    found: dict[str, object] = {"sampler": options.sampler, "workers": WORKERS}
    by_size = {trials: scale(trials, options.sampler) for trials in options.sizes}
    found["bare_driver_ms"] = round(bare(min(options.sizes)), 2)
    for trials, figures in by_size.items():
        found |= {f"{name}_{trials}": figure for name, figure in figures.items()}
    smallest = by_size[min(by_size)]
    found["driver_ratio"] = round(smallest["driver_ms"] / found["bare_driver_ms"], 2)  # type: ignore[operator]
    if len(by_size) > 1:
        first, last = by_size[min(by_size)], by_size[max(by_size)]
        found["driver_ratio_largest_to_smallest"] = round(last["driver_ms"] / first["driver_ms"], 2)
    if options.quality_trials:
        found["quality"] = quality(options.quality_trials, options.seeds)
    return found


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", default="tpe", choices=["tpe", "nsga2", "random"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 1000, 10_000], help="numbers of trials")


if __name__ == "__main__":
    run(__doc__, measure, _configure, quality_trials=2000, seeds=5)
