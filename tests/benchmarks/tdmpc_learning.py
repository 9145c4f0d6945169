"""Learning curves of TD-MPC, beside those that its authors published.

    python tests/benchmarks/tdmpc_learning.py --json [--curves small cartpole walker] [--seeds 3] [--into DIR]
        [--full] [--device cuda] [--set batch_size=256]

- `small`: the shipped experiment `cartpole`; goals: a mean return of 800 at 30,000 environment steps and of
  850 at 60,000.
- `cartpole`, `walker`: the paper's schedules, batches and planner, with widths halved (`--full` for the
  paper's). The references are the lowest of the five seeds that Hansen, Wang and Su (2022, arXiv 2203.04955)
  published at those steps, 10 episodes each.

Returns are those of 10 episodes in evaluation mode, with seeds that training never uses. With `--into` a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from figures import run

import search
from agents.tdmpc.agent import TDMPC
from agents.tdmpc.episodes import episode_seeds

SAVE_EVERY = 20
"""Episodes between two checkpoints."""

REFERENCE = {"cartpole": {60_000: 786.0, 100_000: 852.0}, "walker": {40_000: 943.0}}
GOALS = {"small": {30_000: 800.0, 60_000: 850.0}}


def options_of(curve: str, full: bool, changes: Sequence[str]) -> dict[str, Any]:
    """The agent's options for a curve."""
    changed = {name: yaml.safe_load(value) for name, value in (change.split("=", 1) for change in changes)}
    if curve == "small":
        text = (Path(next(iter(search.__path__)), "experiments", "cartpole.yaml")).read_text(encoding="utf-8")
        options = {key: value for key, value in yaml.safe_load(text)["agent"].items() if key != "kind"}
        return {**options, "steps": max(GOALS["small"]), **changed}
    widths = {} if full else {"encoder_width": 128, "mlp_width": 256}
    task = {"cartpole": "cartpole-swingup", "walker": "walker-walk"}[curve]
    return {"task": task, **widths, "steps": max(REFERENCE[curve]), **changed}


def learn(curve: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one seed; returns at every step of interest, and the seconds that training took."""
    marks = sorted({**REFERENCE.get(curve, {}), **GOALS.get(curve, {})})
    agent = TDMPC(options_of(curve, options.full, options.set), device=options.device)
    training = agent.start_training(seed)
    name = "_".join([curve, *(["full"] if options.full else []), *options.set, str(seed)])
    place = None if options.into is None else options.into / name
    if place is not None and (place / "checkpoint.safetensors").exists():
        training.load(place)
    repeat = agent.spec.action_repeat
    returns: dict[int, float] = {}
    seconds = 0.0
    kept = None if place is None else place / "returns.json"
    if kept is not None and kept.exists():
        stored = json.loads(kept.read_text())
        returns, seconds = {int(mark): value for mark, value in stored["returns"].items()}, stored["seconds"]
    while not training.done:
        before = training.decisions * repeat
        start = time.perf_counter()
        training.run_episode()
        seconds += time.perf_counter() - start
        now = training.decisions * repeat
        print(
            f"{curve} {seed}: {now} {training.latest_return:.0f} {seconds:.0f} s", file=sys.stderr, flush=True
        )
        for mark in marks:
            if before < mark <= now:
                returns[mark] = training.evaluate(episode_seeds("test", 0, 10)).mean
                print(f"{curve} {seed}: at {mark}: {returns[mark]:.1f}", file=sys.stderr, flush=True)
        if place is not None and kept is not None and (training.played % SAVE_EVERY == 0 or training.done):
            training.save(place)
            kept.write_text(json.dumps({"returns": returns, "seconds": seconds}))
    if sorted(returns) != marks:
        raise SystemExit(f"{curve} {seed}: {place} was trained without measuring all of {marks}: delete it")
    return {"returns": returns, "seconds": round(seconds)}


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """All curves asked for."""
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    for curve in options.curves:
        trained = [
            learn(curve, seed, options) for seed in range(options.first, options.first + options.seeds)
        ]
        wanted = REFERENCE.get(curve, {}) or GOALS.get(curve, {})
        for mark, least in wanted.items():
            values = [result["returns"][mark] for result in trained if mark in result["returns"]]
            found[f"{curve}_{mark}"] = {
                "returns": [round(value, 1) for value in values],
                "mean": round(statistics.fmean(values), 1) if values else None,
                "reference_minimum" if curve in REFERENCE else "goal": least,
            }
        found[f"{curve}_seconds"] = [result["seconds"] for result in trained]
    return found


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--curves", nargs="+", default=["small"], choices=["small", "cartpole", "walker"])
    parser.add_argument("--full", action="store_true", help="the paper's widths")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="change an option of the agent"
    )
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument("--into", type=Path, default=None, help="keep checkpoints here, and go on from them")


if __name__ == "__main__":
    run(__doc__, measure, _configure, seeds=3, first=0)
