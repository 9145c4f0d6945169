"""Pruning step by step against at once: `python tests/benchmarks/gradual.py --json`.

For several base seeds and sizes, all groups pruned alike, every metric of the experiment mixed equally:

- fine-tuning: `one_shot`, `cosine` and `cubic` with the same number of updates of the same base;
- training from scratch: `cosine` and `cubic` over as many steps as the dense base trains for, against
  `one_shot_scratch`: a dense agent that trains for two thirds of them, is pruned, and is fine-tuned for the
  rest, with the batches and the learning rate of fine-tuning (only where the agent counts its training in
  updates).

Reported are the test retention at every size and the processor time of a trial from scratch, as a share of
that of training the dense base, which is done once more beside every size; both score, repair and measure
what they end with. `slower` is a method's time of a whole trial with fine-tuning over that of `one_shot`.
Intervals are 95 % (Student's t) over the seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from figures import run
from fronts import interval

SIZES = (0.02, 0.05, 0.10)
CURVES = ("cosine", "cubic")

Figures = dict[str, float]
"""`method/size` -> retention; `train/method/size` and `tune/method/size` -> processor seconds."""


def run_seed(
    experiment: str, overrides: tuple[str, ...], updates: int | None, from_scratch: bool, seed: int
) -> Figures:
    """All methods on one base seed, in a process of its own with one thread."""
    import torch

    torch.set_num_threads(1)
    from dataclasses import replace
    from pathlib import Path

    from agents.agent import agent_class
    from components.choosing import kept_count
    from components.plan import PruningPlan
    from components.schedule import PruningSchedule
    from components.size import parameter_count
    from search.arrays import to_tensors
    from search.base import Base, train_base
    from search.checked_experiment import check
    from search.config import load_experiment
    from search.measurement import performance_of
    from search.trial import run_trial
    from search.trial_types import GradualSettings, TrialResult, TrialSpec

    config = load_experiment(experiment, [*overrides, f"base.seed={seed}"])
    checked = check(config, Path("runs/nowhere"), may_exist=True)
    settings = checked.trial_settings()
    updates = updates or settings.fine_tune_updates
    kind = config.agent.kind

    def tell(what: str) -> None:
        print(f"seed {seed}: {what}", file=sys.stderr)

    def trained(options: Mapping[str, object]) -> tuple[Base, float]:
        start = time.process_time()
        made = train_base(
            kind,
            options,
            seed=seed,
            metrics=config.pruning.metrics,
            reconstruction=settings.reconstruction,
            data=checked.agent.data(),
        )
        return made, time.process_time() - start

    def plan_of(base: Base, size: float) -> PruningPlan:
        """The same kept share everywhere, as large as the size allows."""
        low, high = 0.0, 1.0
        for _ in range(30):
            share = (low + high) / 2
            widths = {group: kept_count(width, 1 - share) for group, width in base.widths.items()}
            model = agent_class(kind)(base.options, widths, to_tensors(base.data)).model
            low, high = (share, high) if parameter_count(model) <= size * base.parameters else (low, share)
        return PruningPlan(dict.fromkeys(config.pruning.metrics, 1.0), dict.fromkeys(base.widths, 1 - low))

    def timed(spec: TrialSpec, base: Base) -> tuple[TrialResult, float]:
        start = time.process_time()
        result = run_trial(spec, base)
        return result, time.process_time() - start

    def test_retention(base: Base, result: TrialResult, reference: Base) -> float:
        if not result.complete:
            raise SystemExit(f"seed {seed}: {result.reason}")
        assert result.state is not None
        agent = agent_class(kind)(base.options, result.widths, to_tensors(base.data))
        agent.load_states({"model": to_tensors(result.state)})
        return reference.retention(performance_of(agent, "test"), "test")

    def schedule(curve: str, steps: int) -> GradualSettings:
        end = 2 * steps // 3
        return GradualSettings(PruningSchedule(curve, 0, end, max(1, end // 10)))  # type: ignore[arg-type]

    figures: Figures = {}
    base, seconds = trained(checked.agent.options)
    tell(f"the base took {seconds:.0f} s")
    shorter = None
    if from_scratch and "updates" in base.options:
        total = base.options["updates"]
        shorter, _ = trained({**base.options, "updates": 2 * total // 3})
    for size in SIZES:
        plan = plan_of(base, size)
        ways = {"one_shot": None} | {curve: schedule(curve, updates) for curve in CURVES}
        # What a worker prepares once for all of its trials is not part of the first one's time.
        run_trial(TrialSpec(0, plan, "first", seed, replace(settings, fine_tune_updates=1)), base)
        for name, gradual in ways.items():
            spec = TrialSpec(
                0, plan, name, seed, replace(settings, fine_tune_updates=updates, gradual=gradual)
            )
            result, figures[f"tune/{name}/{size}"] = timed(spec, base)
            figures[f"{name}/{size}"] = test_retention(base, result, base)
        if from_scratch:
            _, figures[f"train/dense/{size}"] = trained(checked.agent.options)
            steps = checked.agent.training_steps  # type: ignore[attr-defined]
            for curve in CURVES:
                own = replace(
                    settings, base_mode="per_trial", fine_tune_updates=0, gradual=schedule(curve, steps)
                )
                result, seconds = timed(TrialSpec(0, plan, curve, seed, own), base)
                figures[f"{curve}_scratch/{size}"] = test_retention(base, result, base)
                figures[f"train/{curve}_scratch/{size}"] = seconds
            if shorter is not None:
                rest = replace(settings, fine_tune_updates=base.options["updates"] - total * 2 // 3)
                result = run_trial(TrialSpec(0, plan, "one_shot", seed, rest), shorter)
                figures[f"one_shot_scratch/{size}"] = test_retention(shorter, result, base)
        tell(", ".join(f"{name} {value:.3f}" for name, value in figures.items() if name.endswith(f"/{size}")))
    return figures


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    work = partial(
        run_seed,
        options.experiment,
        tuple(options.set),
        options.updates or None,
        not options.fine_tuning_only,
    )
    seeds = range(100, 100 + options.seeds)
    if options.processes == 1:
        by_seed = [work(seed) for seed in seeds]
    else:
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            by_seed = list(pool.map(work, seeds))
    methods = dict.fromkeys(name.split("/")[0] for name in by_seed[0])

    def over_seeds(above: str, below: str | None = None) -> dict[str, object] | None:
        """By size, the mean and interval of a figure, or of its ratio to another; None if it is not there.

        In either name `SIZE` stands for the size.
        """
        if above.replace("SIZE", str(SIZES[0])) not in by_seed[0]:
            return None
        found: dict[str, object] = {}
        for size in SIZES:
            numerator = above.replace("SIZE", str(size))
            denominator = None if below is None else below.replace("SIZE", str(size))
            found[f"{100 * size:g}%"] = interval(
                [one[numerator] / (1.0 if denominator is None else one[denominator]) for one in by_seed]
            )
        return found

    def present(figures: Mapping[str, object]) -> dict[str, object]:
        return {name: value for name, value in figures.items() if value is not None}

    return {
        "experiment": options.experiment,
        "seeds": options.seeds,
        "test_retention": present({method: over_seeds(f"{method}/SIZE") for method in methods}),
        "training_time_to_dense": present(
            {method: over_seeds(f"train/{method}/SIZE", "train/dense/SIZE") for method in methods}
        ),
        "slower": {curve: over_seeds(f"tune/{curve}/SIZE", "tune/one_shot/SIZE") for curve in CURVES},
    }


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", default="autoencoder", help="default: autoencoder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as the command's")
    parser.add_argument("--fine-tuning-only", action="store_true", help="leave out training from scratch")


if __name__ == "__main__":
    run(__doc__, measure, configure, seeds=5, processes=1, updates=0)
