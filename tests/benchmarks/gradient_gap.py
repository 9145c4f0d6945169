"""What soft masks promise and what the pruned agent keeps: `python tests/benchmarks/gradient_gap.py --json`.

The sweep of `search.sampler: gradient` on a trained base, and at some of its points, from the whole model to
the smallest, on test images (`autoencoder`) or on episodes with seeds that nothing else uses (`cartpole`):

- `soft_loss`: task loss + λ * size with annealed masks: of everything kept and all metrics mixed equally,
  with which the sweep begins (`whole`), of where this λ began (`before`) and of where it ended (`after`);
  `course` is the soft loss along its steps, while the masks are annealed;
- `promised`: retention of the soft model itself;
- `discretised`: of the channels that the trial keeps, sliced and not repaired;
- `gap`: promised minus discretised, paired by image or episode;
- `rounding`: the same for the soft model whose masks are rounded to 0 and 1, which computes what the sliced
  one does but for rounding errors: what those alone make of it, as in an episode that hangs in the balance;
- `repaired`: of the whole trial, reconstruction and fine-tuning included.

Retention is 1 for the base and 0 for a trivial agent on the same images or episodes; intervals are 95 %, by
bootstrap over those. TD-MPC plans with the soft model: its parameters are loaded as they are, and the layer
normalisation of the planner is replaced by the masked one.

Takes a minute for `autoencoder`. `--experiment cartpole --base DIRECTORY --set KEY=VALUE --points 24 --shown
4`, with a base and what it was trained with, takes fifteen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from figures import run
from torch import Tensor

from agents.tdmpc import planner
from agents.tdmpc.agent import TDMPC
from agents.tdmpc.episodes import episode_seeds
from components.choosing import choose
from components.pruning import prune
from components.soft_masks import masked_normal
from search.arrays import to_tensors
from search.base_files import load_base
from search.checked_experiment import check
from search.config import load_experiment
from search.determinism import deterministic
from search.gradient_optimiser import SoftAgent, sweep
from search.prepared_base import PreparedBase, prepare
from search.trial import run_trial
from search.trial_types import Proposal

RESAMPLES = 4000
FRESH = 1000
"""Seed of the stream of test episodes; 0 is what evaluation uses."""


def bootstrap(values: np.ndarray) -> dict[str, float]:
    """The mean with its 95 % interval."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return {
        "mean": round(float(values.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def image_scores(outputs: Callable[[Tensor], Tensor], images: Tensor) -> np.ndarray:
    """Minus the squared error of every image."""
    with torch.no_grad():
        errors = (outputs(images) - images).double().square().flatten(1).mean(1)
    return -errors.numpy()


def episode_scores(agent: TDMPC, seeds: Sequence[int]) -> np.ndarray:
    """The return of every episode."""
    with deterministic(0, 1):
        return np.array([trajectory.episode_return for trajectory in agent.play(seeds)])


@contextmanager
def masked_planner(masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside it, TD-MPC's planner normalises the Q functions' first layers over their masks."""
    both = torch.stack([masks["q1.0"], masks["q2.0"]]).unsqueeze(1).float()  # (2, 1, width)

    def layer_norm(x: Tensor, shape: Sequence[int]) -> Tensor:
        assert x.shape[0] == 2, "both Q functions have one shape here"
        return masked_normal(x, both.to(x.dtype), (-1,), 1e-5)

    with patch.object(planner, "layer_norm", layer_norm):
        yield


class Scores:
    """Scores of agents that were made of a base, image by image or episode by episode; higher is better."""

    def __init__(self, dense: PreparedBase, episodes: int) -> None:
        self._dense = dense
        agent: Any = dense.agent
        if isinstance(agent, TDMPC):
            self._seeds = episode_seeds("test", FRESH, episodes)
            random = agent._episodes.play_randomly(self._seeds)
            trivial = float(np.mean([trajectory.episode_return for trajectory in random]))
            self._base, self._trivial = episode_scores(agent, self._seeds).mean(), trivial
        else:
            self._images = agent._split("test")
            mean = agent._split("train").mean(0)
            self._trivial = image_scores(lambda images: mean.expand_as(images), self._images).mean()
            self._base = image_scores(agent.act, self._images).mean()

    def retention(self, scores: np.ndarray) -> np.ndarray:
        return (scores - self._trivial) / (self._base - self._trivial)

    def of(self, agent: Any) -> np.ndarray:
        """An agent's retention."""
        if isinstance(agent, TDMPC):
            return self.retention(episode_scores(agent, self._seeds))
        return self.retention(image_scores(agent.act, self._images))

    def of_soft(self, soft: SoftAgent, masks: Mapping[str, Tensor]) -> np.ndarray:
        """The soft model's."""
        dense = self._dense
        if isinstance(dense.agent, TDMPC):
            agent = dense.build(dense.base.widths)
            agent.load_states({"model": soft.model.state(masks)})
            with masked_planner(masks):
                return self.of(agent)

        def outputs(images: Tensor) -> Tensor:
            made = soft.model.outputs(masks, lambda model: dense.agent.program(model, {"images": images}))
            return made["reconstruction"]

        return self.retention(image_scores(outputs, self._images))


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """Sweep, and compare at some of the points."""
    torch.set_num_threads(1)
    checked = check(load_experiment(options.experiment, options.set), Path("nowhere"), may_exist=True)
    base = load_base(options.base) if options.base else checked.train_base()
    dense, space = prepare(base), checked.space
    with deterministic(0, 1):
        points = sweep(dense, space, options.points)
    soft = SoftAgent(dense, space)
    scores = Scores(dense, options.episodes)
    with torch.no_grad():
        whole = soft.masks(1.0)
        task, size = float(soft.loss(whole)), float(soft.model.expected_size(whole))
    found = []
    for index in np.unique(np.linspace(0, len(points) - 1, options.shown).astype(int)):
        point = points[index]
        plan = space.to_plan(point.params)
        soft.load(point.params)
        with torch.no_grad():
            masks = soft.masks(1.0)
        keep = choose(dense.graph, dense.scores, plan)
        differing = sum(int((mask != (masks[group] > 0.5)).sum()) for group, mask in keep.items())
        sliced = dense.build({group: int(mask.sum()) for group, mask in keep.items()})
        sliced.load_states({"model": prune(dense.graph, dense.states["model"], keep)})
        result = run_trial(checked.specify(int(index), Proposal(plan, "gradient")), base)
        repaired = dense.build(result.widths)
        repaired.load_states({"model": to_tensors(result.state or {})})
        promised, discretised = scores.of_soft(soft, masks), scores.of(sliced)
        rounded = scores.of_soft(soft, {group: mask.double() for group, mask in keep.items()})
        found.append(
            {
                "weight": round(point.weight, 4),
                "promised_size": round(point.size, 4),
                "size": round(float(result.size_ratio or 0), 4),
                "soft_loss": {
                    "whole": round(task + point.weight * size, 4),
                    "before": round(point.before, 4),
                    "after": round(point.after, 4),
                    "course": [round(loss, 4) for loss in point.losses],
                },
                "channels_that_differ": differing,
                "masks_between": sum(int(((m > 0.05) & (m < 0.95)).sum()) for m in masks.values()),
                "promised": bootstrap(promised),
                "discretised": bootstrap(discretised),
                "gap": bootstrap(promised - discretised),
                "rounding": bootstrap(rounded - discretised),
                "repaired": bootstrap(scores.of(repaired)),
            }
        )
        print(found[-1], file=sys.stderr, flush=True)
    return {
        "experiment": options.experiment,
        "points_of_sweep": len(points),
        "lower_than_whole": sum(p.after < task + p.weight * size for p in points),
        "lower_than_before": sum(p.after < p.before for p in points),
        "points": found,
    }


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", default="autoencoder", help="name or YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--base", type=Path, help="directory of a trained base; trained anew without")


if __name__ == "__main__":
    run(__doc__, measure, _configure, points=56, shown=8, episodes=20)
