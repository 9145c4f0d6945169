"""What the empirical stability tells apart: `python tests/benchmarks/stability.py --json --base RUN/base`.

A trained base of TD-MPC, agents that were pruned from it and repaired, and wrecked ones play the same
episodes; the stability of each is measured by both candidates and with windows of several lengths. Then what
measuring it costs, as a share of a trial. Without `--base` one is trained: `--experiment`, as it is.

Shares are of the channels of every group, kept by L2.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from figures import run

WINDOWS = (1, 3, 5, 10, 20)
REPEATS = 20


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Stability of every agent, and the cost."""
    import torch

    torch.set_num_threads(1)
    from agents.tdmpc import stability
    from agents.tdmpc.agent import TDMPC
    from agents.tdmpc.episodes import Returns, episode_seeds
    from agents.tdmpc.world_model import WorldModel
    from components.plan import PruningPlan
    from search.arrays import to_tensors
    from search.base import Base, train_base
    from search.base_files import load_base
    from search.config import load_experiment
    from search.determinism import deterministic
    from search.prepared_base import prepare
    from search.trial import run_trial
    from search.trial_types import TrialSettings, TrialSpec

    def base_of() -> Base:
        if options.base is not None:
            return load_base(options.base)
        config = load_experiment(options.experiment, options.set)
        return train_base("tdmpc", config.agent.options, seed=config.base.seed, metrics=("l2",))

    base = base_of()
    dense = prepare(base)
    teacher = dense.agent
    assert isinstance(teacher, TDMPC)
    repaired = TrialSettings(metrics=("l2",), objectives=("parameters", "return"), fine_tune_updates=300)
    sliced = replace(repaired, reconstruction="none", fine_tune_updates=0)
    seconds: list[float] = []

    def pruned(share: float, settings: TrialSettings) -> TDMPC:
        plan = PruningPlan({"l2": 1.0}, {group.name: 1.0 - share for group in dense.graph.groups})
        result = run_trial(TrialSpec(0, plan, "", 0, settings), base)
        assert result.complete, result.reason
        if settings.fine_tune_updates:
            seconds.append(sum(result.timings.values()))
        agent = dense.build(result.widths)
        agent.load_states({"model": to_tensors(result.state or {})})
        kept = {group: torch.tensor(channels) for group, channels in result.kept.items()}
        assert isinstance(agent, TDMPC)
        agent.learn_from(teacher, kept)
        return agent

    def random_weights() -> TDMPC:
        agent = dense.build(base.widths)
        assert isinstance(agent, TDMPC)
        agent.model.reset_parameters()  # type: ignore[operator]
        return agent

    agents = {
        "base": lambda: teacher,
        "half kept, repaired": lambda: pruned(0.5, repaired),
        "a tenth kept, repaired": lambda: pruned(0.1, repaired),
        "half kept, not repaired": lambda: pruned(0.5, sliced),
        "a tenth kept, not repaired": lambda: pruned(0.1, sliced),
        "2 % kept, not repaired": lambda: pruned(0.02, sliced),
        "random weights": random_weights,
    }
    seeds = episode_seeds("test", 0, options.episodes)
    step = teacher.spec.control_step_s or 1.0
    kinds = ("value", "quadratic")
    made = {"value": stability.value_candidate, "quadratic": stability.quadratic_candidate}
    reference = teacher._replay.last_episodes(stability.REFERENCE_EPISODES)
    world = teacher.model
    assert isinstance(world, WorldModel)
    candidates = {kind: made[kind](world, reference) for kind in kinds}
    found: dict[str, Any] = {}
    for name, make in agents.items():
        with deterministic(0, 1):
            played = make().play(seeds)
        episodes = [torch.as_tensor(trajectory.observations) for trajectory in played]
        found[name] = {
            "return": Returns.of(played).mean,
            **{
                f"{kind}, {window} decisions": stability.measure(candidates[kind], episodes, window, step)
                for kind in kinds
                for window in WINDOWS
            },
        }
    with deterministic(0, 1):
        played = teacher.play(teacher.evaluation_seeds("validation"))
    costs = {}
    for kind in kinds:
        start = time.perf_counter()
        made[kind](world, reference)
        once = time.perf_counter() - start
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            rows = [torch.as_tensor(trajectory.observations) for trajectory in played]
            stability.measure(candidates[kind], rows, 5, step)
            times.append(time.perf_counter() - start)
        costs[kind] = {
            "seconds_of_candidate": once,
            "seconds_of_evaluation": median(times),
            "share_of_trial": 2 * median(times) / median(seconds),  # a trial evaluates twice
        }
    return {
        "episodes": options.episodes,
        "agents": found,
        "seconds_of_trial": median(seconds),
        "costs": costs,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which base."""
    parser.add_argument("--base", type=Path, help="folder of a trained base, such as runs/cartpole/base")
    parser.add_argument("--experiment", default="cartpole", help="whose base is trained without --base")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the experiment"
    )


if __name__ == "__main__":
    run(__doc__, measure, add_options, episodes=10)
