"""What early stopping saves, and what it costs: `python tests/benchmarks/early_stopping.py --json`.

Without `--experiment`, a simulated search: `--workers` workers run `--trials` trials asynchronously over
learning curves whose front is known in closed form, with and without early stopping (`--rungs`,
`--reduction`, `--first`), `--seeds` times. A trial has a size s, log-uniform in [0.5 %, 100 %], and retains
q R(s): the front is R(s) = 1 - 0.9 (0.005 / s)^0.7, and q in (0, 1] the trial's quality. Its loss falls
exponentially, from a gap of its own and at a rate of its own, to 1 - q R(s); what a rung sees of it is
multiplied by noise.

- `faithful`: gaps and rates nearly alike, 5 % noise: rungs foretell the end;
- `crossing`: gaps and rates differ widely, 20 % noise: curves cross;
- `learning`: as `crossing`, and proposals get better along the search, as those of a sampler that learns;
- `misleading`: what is seen at rungs has nothing to do with quality: the worst case.

With `--experiment autoencoder` or `cartpole`, that experiment: per seed one base, and the same search on it
with and without early stopping, one trial at a time in one process with one thread. The hypervolume is that
of test data (see `autoencoder_front.py`). The intended measurement is 64 trials over 5 seeds (cartpole: 3):
a minute or two a seed for the autoencoder, a quarter of an hour for cartpole, on an idle core.

Work is updates of fine-tuning, seconds are the processor's of all trials, evaluation included, each as a
share of those without early stopping. Intervals are 95 % (Student's t over the seeds; differences and shares
are paired by seed).
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from figures import run
from fronts import Point, hypervolumes, interval

from search.config import EarlyStoppingConfig
from search.pareto import SMALLEST_SIZE, front, hypervolume_log
from search.scheduler import MultiObjectiveHalving

if TYPE_CHECKING:
    from search.checked_experiment import CheckedExperiment

UPDATES = 300
SCENARIOS = ("faithful", "crossing", "learning", "misleading")


# --- simulated -------------------------------------------------------------------------------------------


def best_retention(size: np.ndarray) -> np.ndarray:
    """The known front."""
    return 1 - 0.9 * (SMALLEST_SIZE / size) ** 0.7


@dataclass(frozen=True)
class Curves:
    """The trials of a simulated search, `(n,)` each, and what rungs see of their losses, `(n, rungs)`."""

    size: np.ndarray
    retention: np.ndarray
    seen: np.ndarray


def draw(scenario: str, trials: int, rungs: tuple[int, ...], rng: np.random.Generator) -> Curves:
    """The trials of one search, which early stopping does not change."""
    size = np.exp(rng.uniform(math.log(SMALLEST_SIZE), 0, trials))
    progress = np.arange(trials) / trials if scenario == "learning" else np.full(trials, 0.25)
    quality = rng.beta(1 + 6 * progress, 1.5)
    retention = quality * best_retention(size)
    wide = scenario != "faithful"
    gap = rng.lognormal(-0.5, 0.8 if wide else 0.1, trials)
    rate = rng.lognormal(math.log(5), 0.6 if wide else 0.05, trials)
    share = np.array(rungs) / UPDATES
    seen = (1 - retention)[:, None] + gap[:, None] * np.exp(-rate[:, None] * share)
    if scenario == "misleading":
        seen = rng.uniform(0, 1, (trials, len(rungs)))
    return Curves(size, retention, seen * rng.lognormal(0, 0.2 if wide else 0.05, seen.shape))


def simulate(curves: Curves, rungs: tuple[int, ...], reduction: float, workers: int) -> np.ndarray:
    """How many updates every trial gets, `(n,)`; workers are alike and never idle."""
    halving = MultiObjectiveHalving(
        ["minimize", "minimize"], ["minimize", "maximize"], reduction, [True, False]
    )
    stations = (*rungs, UPDATES)
    made = np.zeros(len(curves.size), dtype=int)
    waiting = iter(range(len(curves.size)))
    running = [(stations[0], trial, 0) for trial, _ in zip(waiting, range(workers), strict=False)]
    heapq.heapify(running)  # (when, trial, which station it reaches then)
    while running:
        now, trial, station = heapq.heappop(running)
        made[trial] = stations[station]
        if station == len(rungs):
            halving.finish(trial, (curves.size[trial], curves.retention[trial]))
        elif halving.report(trial, station, (curves.size[trial], curves.seen[trial, station])):
            step = stations[station + 1] - stations[station]
            heapq.heappush(running, (now + step, trial, station + 1))
            continue
        following = next(waiting, None)
        if following is not None:
            heapq.heappush(running, (now + stations[0], following, 0))
    return made


def synthetic(options: argparse.Namespace) -> dict[str, object]:
    """All scenarios."""
    rule = rule_of(options)
    rungs = rule.rungs_of(UPDATES)
    grid = np.exp((np.arange(100_000) + 0.5) / 100_000 * math.log(SMALLEST_SIZE))
    figures: dict[str, object] = {
        "trials": options.trials,
        "seeds": options.seeds,
        "known_front": round(float(best_retention(grid).mean()), 4),
    }
    for scenario in SCENARIOS:
        columns: dict[str, list[float]] = {}
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            curves = draw(scenario, options.trials, rungs, np.random.default_rng(seed))
            made = simulate(curves, rungs, rule.reduction, options.workers)
            complete = made == UPDATES
            whole = front(np.stack([curves.size, curves.retention], axis=1), ["minimize", "maximize"])
            volumes = (
                hypervolume_log(curves.size, curves.retention),
                hypervolume_log(curves.size[complete], curves.retention[complete]),
            )
            # As many updates without early stopping are so many trials: what the same work would have found.
            afford = round(made.sum() / UPDATES)
            found = {
                "hypervolume_without": volumes[0],
                "hypervolume_with": volumes[1],
                "difference": volumes[1] - volumes[0],
                "hypervolume_without_of_equal_work": hypervolume_log(
                    curves.size[:afford], curves.retention[:afford]
                ),
                "share_of_work": float(made.sum() / (UPDATES * options.trials)),
                "share_of_trials_stopped": float(1 - complete.mean()),
                "share_of_front_stopped": float(1 - complete[whole].mean()),
            }
            for name, value in found.items():
                columns.setdefault(name, []).append(value)
        figures[scenario] = {name: interval(values) for name, values in columns.items()}
    return figures


# --- real ------------------------------------------------------------------------------------------------


def run_seed(arguments: tuple[str, int, int, EarlyStoppingConfig, tuple[str, ...]]) -> dict[str, float]:
    """One base and two searches on it, in a process of its own with one thread."""
    experiment, seed, trials, rule, overrides = arguments
    import torch

    torch.set_num_threads(1)
    from search.arrays import to_tensors
    from search.checked_experiment import check
    from search.config import load_experiment
    from search.determinism import deterministic
    from search.prepared_base import prepare
    from search.rungs import SteppedTrial
    from search.trial import run_trial
    from search.trial_types import TrialResult

    settings = [f"base.seed={seed}", f"search.seed={seed}", f"search.trials={trials}", *overrides]
    stops = [f"search.early_stopping.{name}={value}" for name, value in rule.model_dump().items()]
    plain, stopping_early = (
        check(load_experiment(experiment, [*settings, *more]), Path("nowhere"), may_exist=True)
        for more in ([], stops)
    )
    base = plain.train_base()
    dense = prepare(base)
    performance = dense.agent.performance

    def search(checked: CheckedExperiment) -> tuple[list[TrialResult], float]:
        stopping, study = checked.new_early_stopping(), checked.new_study()
        results = []
        seconds = 0.0
        for number in range(trials):
            with deterministic(seed, 1):
                proposal = study.ask(number)
            spec = checked.specify(number, proposal)
            start = time.process_time()
            trial = SteppedTrial(lambda report, spec=spec: run_trial(spec, base, "cpu", report))
            result = trial.step()
            while not trial.over and stopping is not None and stopping.goes_on(result):
                result = trial.step()
            trial.end()
            seconds += time.process_time() - start
            if stopping is not None:
                stopping.finish(result)
            study.tell(result)
            results.append(result)
        study.close()
        return results, seconds

    def volume(results: list[TrialResult]) -> float:
        """Of the trials that validate best at some size; only those need be tested."""
        complete = [result for result in results if result.complete]
        values = [[result.size_ratio, result.retention] for result in complete]
        points = []
        for index in front(values, ["minimize", "maximize"]):
            result = complete[index]
            agent = dense.build(result.widths)
            agent.load_states({"model": to_tensors(result.state)})
            with deterministic(0, 1):
                test = agent.evaluate("test")[performance.name]
            points.append(Point(result.size_ratio, result.retention, base.retention(test, "test")))
        return hypervolumes(points)["log"]

    (without, seconds_without), (with_stopping, seconds_with) = search(plain), search(stopping_early)
    updates = [sum(result.updates for result in results) for results in (without, with_stopping)]
    found = {
        "hypervolume_without": volume(without),
        "hypervolume_with": volume(with_stopping),
        "share_of_seconds": seconds_with / seconds_without,
        "share_of_work": updates[1] / updates[0],
        "share_of_trials_stopped": sum(result.stopped for result in with_stopping) / trials,
        "seconds_without": seconds_without,
        "seconds_with": seconds_with,
    }
    found["difference"] = found["hypervolume_with"] - found["hypervolume_without"]
    print(f"seed {seed}: {found}", file=sys.stderr, flush=True)
    return found


def real(options: argparse.Namespace) -> dict[str, object]:
    """The experiment over seeds, one process each."""
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    rule = rule_of(options)
    jobs = [(options.experiment, seed, options.trials, rule, tuple(options.set)) for seed in seeds]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        by_seed: list[Mapping[str, float]] = list(pool.map(run_seed, jobs))
    figures: dict[str, object] = {"experiment": options.experiment, "trials": options.trials}
    figures["seeds"] = options.seeds
    return figures | {name: interval([found[name] for found in by_seed]) for name in by_seed[0]}


def rule_of(options: argparse.Namespace) -> EarlyStoppingConfig:
    """The early stopping that is measured."""
    return EarlyStoppingConfig(rungs=options.rungs, reduction=options.reduction, first=options.first)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The simulation, or an experiment."""
    return synthetic(options) if options.experiment is None else real(options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to run, and the rule that is measured."""
    parser.add_argument("--experiment", help="name or YAML file; without it, the simulation")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the experiment"
    )
    defaults = EarlyStoppingConfig()
    parser.add_argument("--rungs", type=int, default=defaults.rungs, help=f"default: {defaults.rungs}")
    for name in ("reduction", "first"):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=float, default=default, help=f"default: {default}")


if __name__ == "__main__":
    # The shipped experiments were settled on seeds below 100.
    run(
        __doc__,
        measure,
        add_options,
        seeds=5,
        first_seed=100,
        trials=64,
        workers=8,
        processes=os.cpu_count(),
    )
