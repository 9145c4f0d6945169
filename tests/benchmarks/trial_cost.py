"""What a trial costs beyond its own work: `python tests/benchmarks/trial_cost.py --json`.

Two halves, in one process, one after the other:

- `ray_*`: wall time per empty trial, with as many workers as the machine has CPUs and with one. Ours is the
  whole way of a trial but its work: proposal (random sampler), specification, worker, a result with a state
  of 100,000 parameters, fsynced record, telling the study. The other side is a function trainable under
  Tune's defaults that imports torch, as any function that trains would, and reports one number.
- `prune_*` and the like: score, mix and slice against Torch-Pruning; see `pruning_cost.py`.

Times are medians in milliseconds; a ratio is theirs over ours.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from pruning_cost import pruning_cost
from ray import tune
from torch import Tensor, nn

from agents.agent import Objective
from components import trace
from search.cluster import run_search
from search.run_directory import RunDirectory
from search.space import SearchSpace
from search.study import Study
from search.trial_types import TrialResult, TrialSettings, TrialSpec, trial_seed

SETTINGS = TrialSettings(metrics=("l2", "fisher", "random"), objectives=("parameters", "error"))
PARAMETERS = 100_000


def empty_trial(spec: TrialSpec, base: object, device: str) -> TrialResult:
    """A trial that does nothing, and returns as much as one that does."""
    state = {f"layer{i}.weight": np.zeros((100, PARAMETERS // 1000), np.float32) for i in range(10)}
    return replace(
        TrialResult.of(spec, "complete"),
        objectives={"parameters": float(PARAMETERS - spec.number), "error": 0.01 + spec.seed / 2**34},
        parameters=PARAMETERS - spec.number,
        size_ratio=0.5,
        macs=PARAMETERS,
        retention=0.9,
        performance={"error": 0.1},
        component_sizes={"encoder": PARAMETERS // 2, "decoder": PARAMETERS // 2},
        widths=dict.fromkeys(spec.plan.ratios, 64),
        kept={group: tuple(range(64)) for group in spec.plan.ratios},
        rungs=tuple((updates, 0.1) for updates in range(0, 150, 30)),
        timings=dict.fromkeys(("score", "prune", "reconstruct", "fine_tune", "evaluate"), 0.0),
        state=state,
    )


def empty_function(config: dict[str, Any]) -> None:
    """What a user would hand to Tune, without the work."""
    import torch

    tune.report({"error": float(torch.zeros(1))})


def space(trials: int) -> SearchSpace:
    """That of an autoencoder with five groups."""
    sizes = (64, 256, 128, 16, 128, 256, 64)
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    model = nn.ModuleDict({"encoder": nn.Sequential(*layers[:3]), "decoder": nn.Sequential(*layers[3:])})
    inputs = torch.zeros(2, sizes[0])

    def program(model: nn.Module) -> dict[str, Tensor]:
        assert isinstance(model, nn.ModuleDict)
        latent = model["encoder"](inputs)
        return {"latent": latent, "output": model["decoder"](latent)}

    graph = trace(
        model,
        program,
        components={"encoder": ["encoder"], "decoder": ["decoder"]},
        ties=[("latent", "latent")],
    )
    return SearchSpace.build(graph.groups, metrics=SETTINGS.metrics, max_ratio=0.98, trials=trials)


def our_times(trials: int, workers: int) -> list[float]:
    """When each trial was stored, in seconds."""
    objectives = [Objective("parameters", "minimize", "parameters"), Objective("error", "minimize", "mse")]
    stored: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        run = RunDirectory.create(Path(scratch) / "run", "name: nothing\n")
        study = Study(space(trials), objectives, "random", trials=trials)

        def record(result: TrialResult) -> None:
            run.append_trial(result)
            stored.append(time.monotonic())

        outcome = run_search(
            range(trials),
            study=study,
            make_spec=lambda number, proposal: TrialSpec.of(
                number, proposal, trial_seed(0, number), SETTINGS
            ),
            run_trial=empty_trial,
            base={"model": np.zeros(1_000_000, np.float32)},
            record=record,
            concurrency=workers,
        )
        study.close()
    assert (outcome.complete, outcome.concurrency) == (trials, workers)
    return stored


class Clock(tune.Callback):
    """Notes when trials end."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ended.append(time.monotonic())


def function_times(trials: int, workers: int) -> list[float]:
    """When each trial of a plain function trainable ended, in seconds."""
    clock = Clock()
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        # Tune's announcement is not one of the figures.
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
            tune.Tuner(
                empty_function,
                tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=workers),
                run_config=tune.RunConfig(storage_path=scratch, callbacks=[clock], verbose=0),
            ).fit()
    finally:
        ray.shutdown()
    assert len(clock.ended) == trials
    return clock.ended


def per_trial(ended: list[float], workers: int) -> float:
    """Median wall time per trial in milliseconds: the time in which `workers` trials ended, over `workers`.

    The first trials, which wait for processes that are reused afterwards, are left out.
    """
    ended = ended[workers:]
    spans = [b - a for a, b in zip(ended, ended[workers:], strict=False)]
    return 1000 * statistics.median(spans) / workers


def ray_overhead(trials: int = 300, function_trials: int = 16) -> dict[str, float]:
    """Wall time per empty trial on all CPUs and on one, ours and that of a function trainable."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cpus = len(os.sched_getaffinity(0))
    figures: dict[str, float] = {"ray_cpus": cpus}
    for name, workers in (("all_cpus", cpus), ("one_worker", 1)):
        ours = per_trial(our_times(trials, workers), workers)
        function = per_trial(function_times(function_trials, workers), workers)
        figures[f"ray_ours_ms_{name}"] = round(ours, 2)
        figures[f"ray_function_ms_{name}"] = round(function, 1)
        figures[f"ray_ratio_{name}"] = round(function / ours, 1)
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", choices=["ray", "pruning"], help="one half")
    parser.add_argument("--trials", type=int, default=300, help="empty trials of ours")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    figures: dict[str, float] = {}
    if arguments.only != "pruning":
        figures |= ray_overhead(arguments.trials)
    if arguments.only != "ray":
        figures |= pruning_cost()
    print(
        json.dumps(figures, indent=2)
        if arguments.json
        else "\n".join(f"{k}: {v}" for k, v in figures.items())
    )


if __name__ == "__main__":
    main()
