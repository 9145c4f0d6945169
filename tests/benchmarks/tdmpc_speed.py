"""The speed of TD-MPC against the plain one: `python tests/benchmarks/tdmpc_speed.py --json`.

The plain side is `tests/plain_tdmpc.py`, the pseudocode written out: the oracle that our update and our
planner equal to ten digits in the tests. Both sides run in one process on one thread with the same weights
and sizes; times are medians of interleaved repetitions, in milliseconds; ratios above 1 mean that we are
faster.

- `update`: one gradient update, its noise included, replay not. Our gain at float32: whatever does not depend
  on the decision before is computed for all decisions at once; fused Adam; the target's move in one call; a
  fast tanh.
- `plan`: one decision of one episode, its noise included. Our gain at float32: policy trajectories once per
  decision instead of in every iteration, rewards of all decisions at once, stacked twins, activations in
  place, blocks that stay in the cache.
- `evaluation`: ten episodes of cartpole-swingup, shortened, environment time included. `one_by_one` is our
  planner at float32 with one episode after the other, as the plain side has them; `float32` and `bfloat16`
  have all of them in the same tensors. What `float32` gains beyond `one_by_one` is the batching of episodes.
  `simulator` decides nothing and waits for the same environments: nobody's speedup can be larger than its.

On a GPU (`--device cuda`) our side runs each of these as one CUDA graph; the plain side launches all kernels.

bfloat16 is measured where the hardware multiplies it: elsewhere it is emulated, tens of times slower.

`small` is the shipped experiment `cartpole`, `pruned` the same with about 2 % of the parameters, `paper` has
the paper's widths, batch and samples. `auto` is what the agent does of its own accord on this machine, one of
the two precisions: `auto_small` and the like name it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from figures import run

import search
from agents.cuda_graphs import WARM_UPS
from agents.environments import make_environment
from agents.tdmpc.agent import TDMPC, multiplies_bfloat16
from agents.tdmpc.config import TDMPCOptions, elites
from agents.tdmpc.episodes import Episodes, episode_seeds
from agents.tdmpc.learning import Learner, UpdateNoise
from agents.tdmpc.planner import PlanMemory, Planner
from agents.tdmpc.replay_buffer import Batch
from agents.tdmpc.training import planner_settings
from agents.tdmpc.world_model import WorldModel, dense_widths

sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_tdmpc import Draws, Experience, Numbers, Plain, returns

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
PRUNED = 0.13
"""Share of every width that leaves about 2 % of the parameters."""
EPISODES, DECISIONS = 10, 15

Measured = dict[str, float]


def small_options() -> dict[str, Any]:
    """Of the shipped experiment, with the paper's batches and half its planning samples."""
    text = Path(next(iter(search.__path__)), "experiments", "cartpole.yaml").read_text(encoding="utf-8")
    options = {key: value for key, value in yaml.safe_load(text)["agent"].items() if key != "kind"}
    return {**options, "batch_size": 512, "samples": 256}


class Case:
    """Both sides with the same weights, none of them zero.

    Args:
        options: of the agent.
        share: of every width.
        device: of both sides.
    """

    def __init__(self, options: Mapping[str, Any], share: float, device: torch.device) -> None:
        self.options, self.device = TDMPCOptions(**options), device
        dense = dense_widths(self.options)
        widths = {name: max(1, round(share * size)) for name, size in dense.items()}
        self.agent = TDMPC(options, widths, device=str(device))
        self.spec = self.agent.spec
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model().parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.02 * noise.to(device))
        in_hardware = device.type != "cpu" or multiplies_bfloat16()
        self.precisions = PRECISIONS if in_hardware else {"float32": None}
        self.state = {name: tensor.clone() for name, tensor in self.model().state_dict().items()}

    def model(self) -> WorldModel:
        """The agent's."""
        model = self.agent.model
        assert isinstance(model, WorldModel)
        return model

    def copy(self) -> WorldModel:
        """A model of its own for every learner."""
        model = WorldModel(self.agent.widths, self.spec.observation_shape, self.spec.action_size)
        model.load_state_dict(self.state)
        return model.to(self.device)

    @property
    def auto(self) -> str:
        """The precision that the agent takes of its own accord."""
        return "float32" if self.agent._precision is None else "bfloat16"

    def planner(self, precision: str) -> Planner:
        """As the agent plans after its training."""
        return Planner(
            self.model(), planner_settings(self.options, self.options.steps), PRECISIONS[precision]
        )

    def plain(self) -> Plain:
        """With the same numbers."""
        chosen = self.options
        numbers = Numbers(
            samples=chosen.samples,
            iterations=chosen.iterations,
            horizon=chosen.horizon,
            elites=elites(chosen.samples, chosen.elite_share),
            policy_trajectories=int(chosen.policy_share * chosen.samples),
        )
        return Plain(self.state, numbers)

    def updates(self) -> dict[str, Callable[[], object]]:
        """One update of either side, on random experience."""
        h, b = self.options.horizon, self.options.batch_size
        generator = torch.Generator(self.device).manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        batch = Batch(
            observations=normal(h + 1, b, *self.spec.observation_shape),
            actions=normal(h, b, self.spec.action_size).clamp(-1, 1),
            rewards=normal(h, b).abs(),
            terminated=torch.zeros(h, b, device=self.device),
            indices=torch.arange(b, device=self.device),
            weights=torch.ones(b, device=self.device),
        )
        experience = Experience(
            batch.observations, batch.actions, batch.rewards, batch.terminated, batch.weights
        )
        plain, size = self.plain(), self.spec.action_size

        def ours(precision: str) -> Callable[[], object]:
            learner = Learner(self.copy(), self.options, precision=PRECISIONS[precision])
            return lambda: learner.update(batch, UpdateNoise.draw(batch, generator, None), 0)

        def theirs() -> object:
            plain.updates = 0  # the target moves every time, as on our side
            return plain.update(experience, normal(h, b, size), normal(h + 1, b, size))

        return {"plain": theirs, **{precision: ours(precision) for precision in self.precisions}}

    def plans(self) -> dict[str, Callable[[], object]]:
        """One decision of one episode, of either side."""
        observation = torch.randn(1, *self.spec.observation_shape, device=self.device)
        plain, generator = self.plain(), torch.Generator(self.device).manual_seed(1)
        before = torch.zeros(self.options.horizon, self.spec.action_size, device=self.device)

        def ours(precision: str) -> Callable[[], object]:
            planner, memory = self.planner(precision), PlanMemory.start([1], self.device)
            return lambda: planner.plan(observation, memory)

        def theirs() -> object:
            return plain.plan(
                observation[0], before, Draws.draw(plain.numbers, self.spec.action_size, generator)
            )

        return {"plain": theirs, **{precision: ours(precision) for precision in self.precisions}}

    def evaluations(self) -> dict[str, Callable[[], object]]:
        """Episodes in lockstep, and one after the other."""
        limit = DECISIONS * self.spec.action_repeat
        environment = make_environment(self.options.task, step_limit=limit)
        episodes = Episodes(self.options.model_copy(update={"step_limit": limit}))
        seeds = episode_seeds("test", 0, EPISODES)
        plain, size = self.plain(), self.spec.action_size

        def ours(precision: str, at_once: int) -> Callable[[], object]:
            act = self.planner(precision).plan
            waves = [seeds[i : i + at_once] for i in range(0, EPISODES, at_once)]
            return lambda: [episodes.play(wave, act, self.device) for wave in waves]

        def theirs() -> object:
            return returns(
                plain,
                environment,
                seeds,
                lambda generator: Draws.draw(plain.numbers, size, generator),
                self.device,
            )

        def simulator() -> object:
            still = torch.zeros(EPISODES, size, device=self.device)
            return episodes.play(seeds, lambda observations, memory: still, self.device)

        together = {precision: ours(precision, EPISODES) for precision in self.precisions}
        return {"plain": theirs, "simulator": simulator, "one_by_one": ours("float32", 1), **together}


def medians(sides: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> Measured:
    """Milliseconds of every side, interleaved so that a noisy moment hits all alike."""
    times: dict[str, list[float]] = defaultdict(list)
    for side in sides.values():
        for _ in range(WARM_UPS + 2):  # on a GPU, the one after the first few is recorded
            side()
    for _ in range(repeats):
        for name, side in sides.items():
            _finish(device)
            start = time.perf_counter()
            side()
            _finish(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    small = small_options()
    paper = {
        "task": small["task"],
        "steps": small["steps"],
        "exploration_decisions": 1,
        "horizon_decisions": 1,
    }
    cases = {
        "small": Case(small, 1.0, device),
        "pruned": Case(small, PRUNED, device),
        "paper": Case(paper, 1.0, device),
    }
    sizes = {name: sum(p.numel() for p in case.model().parameters()) for name, case in cases.items()}
    found: dict[str, object] = {
        **{f"parameters_{name}": size for name, size in sizes.items()},
        "pruned_share": round(sizes["pruned"] / sizes["small"], 4),
        **{f"auto_{name}": case.auto for name, case in cases.items()},
    }
    few = max(1, options.repeats // 4)
    work: list[tuple[str, str, Callable[[Case], Mapping[str, Callable[[], object]]], int]] = [
        ("small", "update", Case.updates, options.repeats),
        ("small", "plan", Case.plans, options.repeats),
        ("pruned", "update", Case.updates, options.repeats),
        ("pruned", "plan", Case.plans, options.repeats),
        ("small", "evaluation", Case.evaluations, few),
        ("pruned", "evaluation", Case.evaluations, few),
        ("paper", "update", Case.updates, few),
        ("paper", "plan", Case.plans, few),
    ]
    for case, kind, sides, repeats in work:
        times = medians(sides(cases[case]), repeats, device)
        times["auto"] = times[cases[case].auto]
        for side, milliseconds in times.items():
            found[f"{kind}_{case}_{side}_ms"] = round(milliseconds, 2)
        for side in times:
            if side != "plain":
                found[f"speedup_{kind}_{case}_{side}"] = round(times["plain"] / times[side], 2)
    return found


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="of both sides: cpu (one thread) or cuda")


if __name__ == "__main__":
    run(__doc__, measure, _configure, repeats=20)
