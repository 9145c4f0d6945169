"""What pruning one trial costs, against Torch-Pruning: `python tests/benchmarks/pruning_cost.py --json`.

The model is a world model of six components (about 1.5 million parameters). Ours: score with tracked
metrics, mix, choose and slice the model, a target network and two optimizer moments; the graph is traced
once per base, so it is not part of a trial (its cost is reported beside). Torch-Pruning: build the dependency
graph and prune the model alone, which is what each of its trials has to do. `with_reconstruction` adds
sequential closed-form repair on 2,048 calibration rows, for which Torch-Pruning has no counterpart. Both sides
run in one process with the same threads; times are medians of interleaved repetitions, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from components import importance, trace
from components.calibration import record
from components.mixing import PruningPlan, choose
from components.pruning import kept_indices, slice_state
from components.reconstruction import reconstruct

LATENT, HIDDEN, OBSERVATION, ACTION = 50, 512, 24, 6
SHARES = (0.1, 0.5)
ROWS = 2048


def mlp(inputs: int, hidden: tuple[int, int], outputs: int) -> nn.Sequential:
    """Two hidden layers, as every component of the world model has."""
    return nn.Sequential(
        nn.Linear(inputs, hidden[0]), nn.ELU(), nn.Linear(hidden[0], hidden[1]), nn.ELU(), nn.Linear(hidden[1], outputs)
    )


class WorldModel(nn.Module):
    """Encoder, dynamics, reward, two Q functions and a policy around one latent."""

    def __init__(self, widths: dict[str, int] | None = None) -> None:
        super().__init__()

        def width(name: str) -> int:
            return HIDDEN if widths is None else widths[name]

        latent = LATENT if widths is None else widths["latent"]
        inputs = {"encoder": OBSERVATION, "policy": latent}
        outputs = {"encoder": latent, "dynamics": latent, "policy": ACTION}
        for name in ("encoder", "dynamics", "reward", "q1", "q2", "policy"):
            hidden = (width(f"{name}.0"), width(f"{name}.2"))
            setattr(self, name, mlp(inputs.get(name, latent + ACTION), hidden, outputs.get(name, 1)))

    def program(self, observation: Tensor, action: Tensor) -> dict[str, Tensor]:
        """Everything the agent uses, one step from every observation."""
        latent = self.encoder(observation)
        joint = torch.cat([latent, action], dim=-1)
        return {
            "latent": latent,
            "next_latent": self.dynamics(joint),
            "reward": self.reward(joint),
            "q1": self.q1(joint),
            "q2": self.q2(joint),
            "action": self.policy(latent).tanh(),
        }

    def forward(self, observation: Tensor, action: Tensor) -> dict[str, Tensor]:
        """The same, with a second step, as Torch-Pruning traces `forward`."""
        first = self.program(observation, action)
        joint = torch.cat([first["next_latent"], action], dim=-1)
        return {**first, "second_reward": self.reward(joint), "second_latent": self.dynamics(joint)}


def ours(share: float) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """Functions that run one trial's pruning, pruning with reconstruction, and the trace."""
    model = WorldModel()
    observation, action = torch.randn(ROWS, OBSERVATION), torch.rand(ROWS, ACTION) * 2 - 1
    prefixes = {name: [name] for name, _ in model.named_children()}

    def program(module: WorldModel) -> dict[str, Tensor]:
        return module.program(observation, action)

    def run_trace() -> None:
        trace(
            model,
            lambda m: m.program(observation[:2], action[:2]),
            components=prefixes,
            ties=[("next_latent", "latent")],
        )

    graph = trace(
        model,
        lambda m: m.program(observation[:2], action[:2]),
        components=prefixes,
        ties=[("next_latent", "latent")],
    )
    state = model.state_dict()
    states = [{name: torch.randn_like(tensor) for name, tensor in state.items()} for _ in range(3)]
    recording = record(graph, model, program)
    plan = PruningPlan({"l2": 0.5, "l1": 0.5}, {group.name: 1 - share for group in graph.groups})

    def prune() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        scores = {"l2": importance.l2(graph, state), "l1": importance.l1(graph, state)}
        keep = choose(graph, scores, plan)
        indices = kept_indices(graph, keep)
        sliced = [slice_state(graph, section, indices) for section in (state, *states)]
        return keep, sliced[0]

    def prune_and_repair() -> None:
        keep, sliced = prune()
        small = WorldModel({name: int(mask.sum()) for name, mask in keep.items()})
        small.load_state_dict(sliced)
        reconstruct(graph, state, small, keep, recording=recording, program=program)

    return (lambda: None if prune() else None), prune_and_repair, run_trace


def torch_pruning(share: float) -> tuple[Callable[[], WorldModel], Callable[[WorldModel], None]]:
    """Functions that make a fresh model, and that build its graph and prune it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning as tp

    example = (torch.randn(2, OBSERVATION), torch.rand(2, ACTION))

    def prune(model: WorldModel) -> None:
        ignored = [model.reward[-1], model.q1[-1], model.q2[-1], model.policy[-1]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tp.pruner.BasePruner(
                model,
                example,
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=1 - share,
                ignored_layers=ignored,
            ).step()

    return WorldModel, prune


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def pruning_cost(repeats: int = 15) -> dict[str, float]:
    """Medians in milliseconds and their ratios; ratios above 1 mean that we are faster."""
    torch.manual_seed(0)
    figures: dict[str, float] = {"parameters": sum(p.numel() for p in WorldModel().parameters())}
    for share in SHARES:
        prune, repair, run_trace = ours(share)
        fresh, theirs = torch_pruning(share)
        for function in (prune, repair, run_trace):
            function()
        theirs(fresh())
        times: dict[str, list[float]] = {"prune": [], "prune_and_repair": [], "trace": [], "torch_pruning": []}
        for _ in range(repeats):  # interleaved, so that a noisy moment hits all alike
            times["prune"].append(timed(prune))
            times["prune_and_repair"].append(timed(repair))
            times["trace"].append(timed(run_trace))
            model = fresh()
            times["torch_pruning"].append(timed(lambda model=model: theirs(model)))
        medians = {name: statistics.median(values) for name, values in times.items()}
        suffix = f"{share:.0%}_kept"
        figures |= {f"{name}_ms_{suffix}": round(value, 2) for name, value in medians.items()}
        figures[f"speedup_prune_{suffix}"] = round(medians["torch_pruning"] / medians["prune"], 2)
        figures[f"speedup_with_reconstruction_{suffix}"] = round(
            medians["torch_pruning"] / medians["prune_and_repair"], 2
        )
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    figures = pruning_cost(arguments.repeats)
    print(json.dumps(figures, indent=2) if arguments.json else "\n".join(f"{k}: {v}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
