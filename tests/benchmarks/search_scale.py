"""What the driver costs at scale: `python tests/benchmarks/search_scale.py --json [--sampler tpe]`.

Empty trials with 16 workers, through all that a trial of a search goes through but its work: proposal,
specification, worker, a result with a state of 100,000 parameters, fsynced record, telling the study.
`driver_ms` is the driver's own processor time per trial, over the last half of each size, `wall_ms` the wall
time there: on a machine with fewer cores than workers these compete with the driver. `growth_mb` is how much
the driver's resident memory has grown from its first trial to its last.

`quality` compares `tpe` as it is, with a bounded history, and unbounded: the hypervolume of a synthetic
search of `--quality-trials` trials, as a mean over seeds, and the seconds that its proposals took.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
from figures import run
from fronts import interval
from trial_cost import SETTINGS, empty_trial, space

from agents.agent import Objective
from components.mixing import kept_count
from search.cluster import run_search
from search.pareto import hypervolume_log
from search.run_directory import RunDirectory
from search.study import HISTORY, Study
from search.trial_types import Proposal, TrialResult, TrialSpec, trial_seed

WORKERS = 16
OBJECTIVES = (Objective("parameters", "minimize", "parameters"), Objective("error", "minimize", "mse"))
UNBOUNDED = 10**9


def resident_mb() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def scale(trials: int, sampler: str) -> dict[str, float]:
    """Run so many empty trials."""
    marks: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = RunDirectory.create(Path(scratch) / "run", "name: nothing\n")
        study = Study(space(trials), OBJECTIVES, sampler, trials=trials)  # type: ignore[arg-type]

        def specify(number: int, proposal: Proposal) -> TrialSpec:
            directory.append_proposal(number, proposal)
            return TrialSpec.of(number, proposal, trial_seed(0, number), SETTINGS)

        def record(result: TrialResult) -> None:
            directory.append_trial(result)
            marks.append((time.process_time(), time.monotonic(), resident_mb()))
            if len(marks) % 500 == 0:
                print(f"{sampler}: {len(marks)}/{trials}", file=sys.stderr, flush=True)

        outcome = run_search(
            range(trials),
            study=study,
            make_spec=specify,
            run_trial=empty_trial,
            base={"model": np.zeros(1_000_000, np.float32)},
            record=record,
            cpus=len(os.sched_getaffinity(0)) / WORKERS,
            concurrency=WORKERS,
        )
        study.close()
        directory.release()
    assert (outcome.complete, outcome.concurrency) == (trials, WORKERS)
    (cpu, wall, _), (last_cpu, last_wall, last_mb) = marks[len(marks) // 2], marks[-1]
    counted = len(marks) - 1 - len(marks) // 2
    return {
        "driver_ms": round(1000 * (last_cpu - cpu) / counted, 2),
        "wall_ms": round(1000 * (last_wall - wall) / counted, 2),
        "growth_mb": round(last_mb - marks[0][2], 1),
    }


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
    for trials, figures in by_size.items():
        found |= {f"{name}_{trials}": figure for name, figure in figures.items()}
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
