"""Which sampler finds most at which budget: `python tests/benchmarks/samplers.py --json`.

Every sampler searches every problem with every budget of trials, one trial at a time and with the anchors
that each search starts with, over several seeds. What counts is the hypervolume (mean retention over log
size), as a share of what there is to be had.

- `synthetic`: eight groups and three metrics. A plan with kept shares s has the size of their geometric mean
  m and retains q R(m), R(m) = 1 - 0.9 (0.02 / m)^0.7. The quality q in (0, 1] is 1 only where the shares lie
  about m as they should, which depends on the group and on m, and all weight is on one of the metrics: the
  front, and its hypervolume, are known.
- `autoencoder`: that experiment on validation data, as a share of 1; one base for each seed. Only here is
  there a model for `gradient`.

All search ratios and coefficients together, from the first trial (`search.ratios_first: 0`).

A search of fewer trials is the beginning of a longer one, but for `nsga2`, `grid` and `gradient`, whose
population or plan goes by the budget: the others are run once, with the largest. `seconds` are those that the
proposals of it took, the sweep of `gradient` included.

Intervals are 95 % (Student's t) over the seeds. `winner` names the best in the mean at each budget. What is
finished is kept in `--into`, if that is given, and a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from figures import run
from fronts import interval

if TYPE_CHECKING:
    from search.study import Study
    from search.trial_types import Proposal, TrialResult

SAMPLERS = ("tpe", "nsga2", "gp", "random", "qmc", "grid", "gradient")
PROBLEMS = ("synthetic", "autoencoder")
METRICS = ("l2", "fisher", "reconstruction")
SMALLEST = 0.02
GROUPS = 8

BUDGETED = frozenset({"nsga2", "grid", "gradient"})
"""Samplers whose proposals depend on how many trials there are going to be."""

Points = list[tuple[float, float]]
"""Size ratio and retention of every trial, in order."""

Measure = Callable[[Mapping[str, float], Mapping[str, float]], tuple[float, float]]
"""Kept shares by group and coefficients by metric -> size ratio and retention."""


def best_retention(size: np.ndarray | float) -> np.ndarray | float:
    """The known front of the synthetic problem."""
    return 1 - 0.9 * (SMALLEST / size) ** 0.7


def synthetic_measure(shares: Mapping[str, float], weights: Mapping[str, float]) -> tuple[float, float]:
    """Size and retention of a plan."""
    logs = np.log(np.clip(list(shares.values()), SMALLEST, 1.0))
    middle = float(logs.mean())
    depth = middle / math.log(SMALLEST)  # 0 keeps everything, 1 as little as can be
    wanted = np.linspace(-1, 1, len(logs)) * 3.2 * depth * (1 - depth)
    quality = math.exp(-float(np.square(logs - middle - wanted).mean()) / 0.5)
    return math.exp(middle), quality * (0.8 + 0.2 * weights["fisher"]) * float(
        best_retention(math.exp(middle))
    )


def known_hypervolume() -> float:
    """Of the synthetic front, by the midpoint rule over the log size that hypervolumes count."""
    from search.pareto import SMALLEST_SIZE

    middles = (np.arange(20_000) + 0.5) / 20_000
    sizes = SMALLEST_SIZE ** (1 - middles)
    return float(np.where(sizes >= SMALLEST, best_retention(sizes), 0.0).mean())


def run_seed(
    arguments: tuple[str, int, tuple[str, ...], tuple[int, ...], Path | None],
) -> dict[tuple[str, int], float]:
    """Hypervolume by sampler and budget, on one seed, in a process of its own with one thread.

    Under budget 0, the seconds of the proposals of the largest one.
    """
    problem, seed, samplers, budgets, into = arguments
    import torch

    torch.set_num_threads(1)
    from search.determinism import deterministic
    from search.pareto import hypervolume_log

    found: dict[tuple[str, int], float] = {}
    share = known_hypervolume() if problem == "synthetic" else 1.0
    search = _synthetic_search if problem == "synthetic" else _autoencoder_search(seed)
    for sampler in samplers:
        kept = None if into is None else into / f"{problem}_{seed}_{sampler}.json"
        if kept is not None and kept.exists():
            stored = {int(budget): value for budget, value in json.loads(kept.read_text()).items()}
            if set(stored) != {0, *budgets}:
                raise SystemExit(f"{kept} is of other budgets: delete it, or choose another --into")
            found.update({(sampler, budget): value for budget, value in stored.items()})
            continue
        points: Points = []
        for budget in sorted(budgets, reverse=True):
            if not points or sampler in BUDGETED:
                with deterministic(seed, 1):
                    points, seconds = search(sampler, budget, seed)
            found.setdefault((sampler, 0), seconds)
            sizes, retentions = zip(*points[:budget], strict=True)
            found[sampler, budget] = hypervolume_log(sizes, retentions) / share
            words = f"{problem} {seed}: {sampler} {budget}: {found[sampler, budget]:.3f}"
            print(words, file=sys.stderr, flush=True)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({budget: found[sampler, budget] for budget in (0, *budgets)}))
    return found


def _synthetic_search(sampler: str, budget: int, seed: int) -> tuple[Points, float]:
    from agents.agent import Objective
    from components.dependency import Group
    from search.grid import grid_for
    from search.space import SearchSpace
    from search.study import Study
    from search.trial_types import TrialResult

    groups = [Group(f"g{i}", frozenset({"net"}), 1000, ()) for i in range(GROUPS)]
    space = SearchSpace.build(groups, metrics=METRICS, max_ratio=1 - SMALLEST, trials=budget)
    objectives = (Objective("parameters", "minimize", "parameters"), Objective("score", "maximize", "points"))
    grid = grid_for(space, budget, len(space.anchors())) if sampler == "grid" else None
    study = Study(space, objectives, sampler, seed, trials=budget, optimiser=grid)  # type: ignore[arg-type]

    def trial(number: int, proposal: Proposal) -> TrialResult:
        plan = proposal.plan
        shares = {group: 1 - ratio for group, ratio in plan.ratios.items()}
        size, retention = synthetic_measure(shares, plan.coefficients)  # type: ignore[arg-type]
        return TrialResult(
            number,
            "complete",
            plan,
            proposal.origin,
            seed=0,
            objectives={"parameters": 1e6 * size, "score": retention},
            size_ratio=size,
            retention=retention,
        )

    return _searched(study, budget, trial)


def _searched(
    study: Study, budget: int, trial: Callable[[int, Proposal], TrialResult]
) -> tuple[Points, float]:
    """What so many trials found, one after the other, and the seconds that their proposals took."""
    points: Points = []
    seconds = 0.0
    for number in range(budget):
        start = time.process_time()
        proposal = study.ask(number)
        seconds += time.process_time() - start
        result = trial(number, proposal)
        # One that fails counts as a trial that found nothing.
        points.append((result.size_ratio or 1.0, result.retention or 0.0))
        study.tell(result)
    return points, seconds


def _autoencoder_search(seed: int) -> Callable[[str, int, int], tuple[Points, float]]:
    from search.checked_experiment import CheckedExperiment, check
    from search.config import load_experiment
    from search.gradient_optimiser import sweep, sweep_points
    from search.gradient_sweep import GradientSweep
    from search.prepared_base import prepare
    from search.trial import run_trial

    def experiment(*overrides: str) -> CheckedExperiment:
        settled = [f"base.seed={seed}", f"search.seed={seed}", "search.ratios_first=0"]
        config = load_experiment("autoencoder", [*settled, *overrides])
        return check(config, Path("nowhere"), may_exist=True)

    base = experiment().train_base()

    def search(sampler: str, budget: int, seed: int) -> tuple[Points, float]:
        checked = experiment(f"search.sampler={sampler}", f"search.trials={budget}")

        def trial(number: int, proposal: Proposal) -> TrialResult:
            return run_trial(checked.specify(number, proposal), base)

        start = time.process_time()
        optimiser = None
        if sampler == "gradient":
            count = sweep_points(budget - checked.anchors)
            optimiser = GradientSweep(
                sweep(prepare(base), checked.space, count), checked.space, checked.anchors
            )
        planning = time.process_time() - start
        points, seconds = _searched(checked.new_study(optimiser=optimiser), budget, trial)
        return points, planning + seconds

    return search


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """All problems, seeds in parallel."""
    found: dict[str, object] = {"known_hypervolume_synthetic": round(known_hypervolume(), 4)}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for problem in options.problems:
        samplers = [name for name in options.samplers if problem != "synthetic" or name != "gradient"]
        jobs = [(problem, seed, tuple(samplers), tuple(options.budgets), options.into) for seed in seeds]
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            by_seed = list(pool.map(run_seed, jobs))
        found[f"{problem}_seconds"] = {
            sampler: interval([volumes[sampler, 0] for volumes in by_seed]) for sampler in samplers
        }
        for budget in options.budgets:
            by_sampler = {
                sampler: interval([volumes[sampler, budget] for volumes in by_seed]) for sampler in samplers
            }
            found[f"{problem}_{budget}"] = {
                **by_sampler,
                "winner": max(by_sampler, key=lambda sampler: by_sampler[sampler]["mean"]),
            }
    return found


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--budgets", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--into", type=Path, default=None, help="keeps what is finished")


if __name__ == "__main__":
    run(__doc__, measure, _configure, seeds=5, first_seed=200, processes=os.cpu_count())
