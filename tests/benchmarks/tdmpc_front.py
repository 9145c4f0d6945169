"""Quality of the front of TD-MPC agents: `python tests/benchmarks/tdmpc_front.py --json --into DIR`.

Every method gets the same number of points, over several base seeds of one experiment:

- `prunefront`: the experiment's search as it is, but for its budget and its seeds;
- `uniform_l2`: one pruning ratio for all groups, L2 importance, slicing, then the same distillation;
- `sliced`: the plans of `prunefront` without reconstruction, then the same distillation;
- `scratch`: small dense agents, all widths scaled alike, trained with the base's environment steps;
- `random_weights`: the widths of `prunefront` with new random weights, then the same distillation;
- `cloned`: policies without any planning, trained on the base's planned actions, of the same sizes;
- `policy_only`: the agents of `prunefront`, acting by their policy alone.

The first five plan. Whatever is best at a size is chosen on validation episodes and reported on test
episodes; retention is relative to the base with its planner. Intervals are 95 % over the seeds. What is
finished is kept in `--into`, and a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from figures import run
from fronts import Point, shares, summarise
from searches import trials_of

CLONING_EPISODES = 20
"""Episodes of the base whose decisions are imitated."""

CLONING_NOISE = 0.3
"""Deviation of the noise on the actions of every other of these, so that mistakes are seen and mended."""

CLONING_UPDATES = 3000


def run_seed(arguments: tuple[str, int, int, tuple[str, ...], Path]) -> dict[str, list[Point]]:
    """All methods on one base seed, in a process of its own with one thread."""
    experiment, seed, points, overrides, into = arguments
    import torch

    torch.set_num_threads(1)
    from agents.tdmpc.agent import TDMPC
    from agents.tdmpc.episodes import Returns, episode_seeds
    from components.plan import PruningPlan
    from components.size import parameter_count
    from search.arrays import to_tensors
    from search.base import train_base
    from search.base_files import load_base, save_base
    from search.checked_experiment import check
    from search.config import load_experiment
    from search.determinism import deterministic
    from search.prepared_base import prepare
    from search.trial import run_trial
    from search.trial_types import TrialResult, TrialSpec, trial_seed

    seeds = [f"base.seed={seed}", f"search.seed={seed}", f"search.trials={points}"]
    config = load_experiment(experiment, [*seeds, *overrides])
    pruning = config.pruning
    place = into / f"{config.name}_{seed}"
    assert not config.search.options, "an experiment that searches options is not supported here"
    settled = json.dumps([points, config.to_yaml()])
    if (place / "settings.json").exists() and (place / "settings.json").read_text() != settled:
        raise SystemExit(f"{place} holds results of other settings: delete it, or choose another --into")
    place.mkdir(parents=True, exist_ok=True)
    (place / "settings.json").write_text(settled)
    if not (place / "base" / "metrics.json").exists():
        metrics = tuple(dict.fromkeys([*pruning.metrics, "l2"]))
        new = train_base("tdmpc", config.agent.options, seed=seed, metrics=metrics)
        save_base(new, place / "base")
    base = load_base(place / "base")
    dense = prepare(base)
    assert isinstance(dense.agent, TDMPC)
    teacher = dense.agent
    checked = check(config, place, may_exist=True)
    settings = checked.trial_settings()

    def retained(returns: Mapping[str, float]) -> tuple[float, float]:
        return base.retention(returns["validation"]), base.retention(returns["test"], "test")

    def pruned(result: TrialResult) -> TDMPC:
        agent = dense.build(result.widths)
        agent.load_states({"model": to_tensors(result.state or {})})
        assert isinstance(agent, TDMPC)
        return agent

    def tried(specs: list[TrialSpec]) -> list[Point]:
        found = []
        for spec in specs:
            result = run_trial(spec, base)
            if result.complete:
                with deterministic(0, 1):
                    test = pruned(result).evaluate("test")["return"]
                found.append(
                    Point(
                        float(result.size_ratio or 0),
                        *retained({"validation": result.performance["return"], "test": test}),
                    )
                )
            else:
                print(f"{spec.origin}: {result.reason}", file=sys.stderr, flush=True)
        return found

    plans: list[TrialSpec] = []
    alone: list[Point] = []

    def prunefront() -> list[Point]:
        found = []
        for spec, result in trials_of(checked, base, points, seed):
            if not result.complete:
                print(f"{spec.origin}: {result.reason}", file=sys.stderr, flush=True)
                continue
            plans.append(spec)
            agent = pruned(result)
            with deterministic(0, 1):
                test = agent.evaluate("test")["return"]
                policy = {
                    split: agent.evaluate(split, policy_only=True)["policy_only_return"]
                    for split in ("validation", "test")
                }
            size = float(result.size_ratio or 0)
            found.append(Point(size, *retained({"validation": result.performance["return"], "test": test})))
            alone.append(Point(size, *retained(policy)))
        keep("policy_only", alone)
        (place / "plans.json").write_text(
            json.dumps([[spec.plan.to_json(), dict(spec.options), spec.origin, spec.seed] for spec in plans])
        )
        return found

    def our_plans() -> list[TrialSpec]:
        stored = json.loads((place / "plans.json").read_text())
        return [
            TrialSpec(number, PruningPlan.from_json(plan), origin, spec_seed, settings, options)
            for number, (plan, options, origin, spec_seed) in enumerate(stored)
        ]

    def uniform_l2() -> list[Point]:
        plain = replace(settings, reconstruction="none", metrics=("l2",))
        return tried(
            [
                TrialSpec(
                    number,
                    PruningPlan({"l2": 1.0}, {group.name: 1.0 - share for group in dense.graph.groups}),
                    f"uniform {share:.3f}",
                    trial_seed(seed, number),
                    plain,
                )
                for number, share in enumerate(shares(points, 1 - pruning.max_ratio))
            ]
        )

    def sliced() -> list[Point]:
        return tried(
            [replace(spec, pruning=replace(settings, reconstruction="none")) for spec in our_plans()]
        )

    def learnt(agent: TDMPC, learn: Callable[..., object]) -> list[Point]:
        """The agent after learning; none where it diverged."""
        try:
            learn(lambda *_: None)
            returns = {split: agent.evaluate(split)["return"] for split in ("validation", "test")}
        except ArithmeticError as error:
            print(f"{experiment} {seed}: {error}", file=sys.stderr, flush=True)
            return []
        return [Point(parameter_count(agent.model) / base.parameters, *retained(returns))]

    def random_weights() -> list[Point]:
        from components.choosing import choose

        found = []
        for spec in our_plans():
            keep_masks = choose(dense.graph, dense.scores, spec.plan)
            kept = {group: mask.nonzero().flatten() for group, mask in keep_masks.items()}
            with deterministic(spec.seed, 1):
                agent = dense.build({group: len(channels) for group, channels in kept.items()})
                assert isinstance(agent, TDMPC)
                agent.model.reset_parameters()  # type: ignore[operator]
                agent.learn_from(teacher, kept)
                found += learnt(
                    agent, partial(agent.fine_tune, "distill", settings.fine_tune_updates, spec.seed)
                )
        return found

    def scratch() -> list[Point]:
        found = []
        for number, share in enumerate(shares(points, 1 - pruning.max_ratio)):
            widths = {group.name: max(1, round(share * group.size)) for group in dense.graph.groups}
            with deterministic(trial_seed(seed, number), 1):
                agent = TDMPC(base.options, widths)
                found += learnt(agent, partial(agent.train, trial_seed(seed, number), None))
        return found

    def cloned() -> list[Point]:
        with deterministic(seed, 1):
            observations, actions = lessons()
            found = []
            for share in shares(points, 1 - pruning.max_ratio):
                width = _width_of(share**2 * base.parameters, observations.shape[1], actions.shape[1])
                policy = _clone(observations, actions, width, seed)
                returns = {split: return_of(policy, split) for split in ("validation", "test")}
                size = sum(p.numel() for p in policy.parameters()) / base.parameters
                found.append(Point(size, *retained(returns)))
        return found

    def return_of(policy: torch.nn.Module, split: Literal["validation", "test"]) -> float:
        played = teacher.play(teacher.evaluation_seeds(split), lambda rows, memory: policy(rows).detach())
        return Returns.of(played).mean

    def lessons() -> tuple[torch.Tensor, torch.Tensor]:
        """Observations along episodes, every other one disturbed, and the means that the base plans there."""
        seen, planned = [], []
        generator = torch.Generator().manual_seed(seed)

        def act(rows: torch.Tensor, memory: Any) -> torch.Tensor:
            actions = teacher.act(rows, memory)
            seen.append(rows.clone())
            planned.append(memory.means[:, 0].clone())
            noise = CLONING_NOISE * torch.randn(actions.shape, generator=generator)
            return actions + noise * (torch.arange(len(actions)) % 2).unsqueeze(1)

        teacher.play(episode_seeds("on_policy", 0, CLONING_EPISODES), act)
        return torch.cat(seen), torch.cat(planned)

    def keep(name: str, found: list[Point]) -> None:
        (place / f"{name}.json").write_text(json.dumps([asdict(point) for point in found]))

    methods: dict[str, Callable[[], list[Point]]] = {
        "prunefront": prunefront,
        "uniform_l2": uniform_l2,
        "sliced": sliced,
        "random_weights": random_weights,
        "cloned": cloned,
        "scratch": scratch,
    }
    for name, method in methods.items():
        if not (place / f"{name}.json").exists():
            start = time.perf_counter()
            keep(name, method())
            took = time.perf_counter() - start
            print(f"{config.name} {seed}: {name} took {took:.0f} s", file=sys.stderr, flush=True)
    return {
        name: [Point(**point) for point in json.loads((place / f"{name}.json").read_text())]
        for name in [*methods, "policy_only"]
    }


def _width_of(parameters: float, inputs: int, outputs: int) -> int:
    """The width of two equal hidden layers with at most so many parameters in all; at least 1."""
    width = 1
    while _cloned_size(width + 1, inputs, outputs) <= parameters:
        width += 1
    return width


def _cloned_size(width: int, inputs: int, outputs: int) -> int:
    return (inputs + 1) * width + (width + 1) * width + (width + 1) * outputs


def _clone(observations: Any, actions: Any, width: int, seed: int) -> Any:
    """A policy trained to act as the base plans."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    policy = nn.Sequential(
        nn.Linear(observations.shape[1], width),
        nn.ELU(),
        nn.Linear(width, width),
        nn.ELU(),
        nn.Linear(width, actions.shape[1]),
        nn.Tanh(),
    )
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CLONING_UPDATES)
    for _ in range(CLONING_UPDATES):
        rows = torch.randint(len(observations), (256,))
        optimizer.zero_grad()
        (policy(observations[rows]) - actions[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return policy.eval()


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Run all seeds, one process each, and summarise."""
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    options.into.mkdir(parents=True, exist_ok=True)
    jobs = [(options.experiment, seed, options.points, tuple(options.set), options.into) for seed in seeds]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        by_seed = list(pool.map(run_seed, jobs))
    return summarise(by_seed, "prunefront")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to run, and where to keep it."""
    parser.add_argument("--experiment", default="cartpole", help="name or YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the experiment"
    )
    parser.add_argument("--into", type=Path, default=Path("runs/tdmpc_front"), help="keep everything here")


if __name__ == "__main__":
    # The shipped experiment was settled on seeds below 100.
    run(
        __doc__,
        measure,
        add_options,
        seeds=3,
        first_seed=100,
        points=16,
        processes=os.cpu_count(),
    )
