"""What pruning one trial costs, against Torch-Pruning: `python tests/benchmarks/pruning_cost.py --json`.

The model is a world model of six components (about 1.5 million parameters). Ours (`prune`): score with
tracked metrics, mix, choose and slice the model, a target network and two optimizer moments; the graph is
traced once per base, so it is not part of a trial (its cost is reported beside). `mix_and_slice` leaves the
scores out too, which a search also computes once per base. Torch-Pruning: build the dependency
graph and prune the model alone, which is what each of its trials has to do. `with_reconstruction` adds
sequential closed-form repair on 1,024 calibration rows, for which Torch-Pruning has no counterpart. Both
sides run in one process with the same threads; times are medians of interleaved repetitions, in milliseconds.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from figures import run
from torch import Tensor, nn

from components import importance, trace
from components.calibration import record
from components.choosing import choose
from components.dependency import Scores
from components.plan import PruningPlan
from components.pruning import kept_indices, slice_state
from components.reconstruction import reconstruct

LATENT, HIDDEN, OBSERVATION, ACTION = 50, 466, 24, 6
SHARES = (0.1, 0.5)
ROWS = 1024  # as many as a search calibrates on


def mlp(inputs: int, hidden: tuple[int, int], outputs: int) -> nn.Sequential:
    """Two hidden layers, as every component of the world model has."""
    first, second = hidden
    return nn.Sequential(
        nn.Linear(inputs, first), nn.ELU(), nn.Linear(first, second), nn.ELU(), nn.Linear(second, outputs)
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


class Ours:
    """One dense model with its graph and recording, and what a trial does with them.

    Its states are the model, a target network and two optimizer moments; its scores are the parameters' norms
    and two metrics of statistics gathered during training, here random numbers of the same shapes.
    """

    def __init__(self, share: float) -> None:
        self._model = WorldModel()
        self._inputs = torch.randn(ROWS, OBSERVATION), torch.rand(ROWS, ACTION) * 2 - 1
        self.trace()
        self._state = self._model.state_dict()
        noise = [{name: torch.rand_like(tensor) for name, tensor in self._state.items()} for _ in range(3)]
        self._states = [self._state, *noise]
        self._tracked = noise[:2]
        self._recording = record(self._graph, self._model, self._program)
        metrics = ("l2", "first tracked", "second tracked")
        ratios = {group.name: 1 - share for group in self._graph.groups}
        self._plan = PruningPlan(dict.fromkeys(metrics, 1 / 3), ratios)

    def _program(self, model: nn.Module) -> dict[str, Tensor]:
        return model.program(*self._inputs)

    def trace(self) -> None:
        """What is done once per base."""
        observation, action = (rows[:2] for rows in self._inputs)
        self._graph = trace(
            self._model,
            lambda model: model.program(observation, action),
            components={name: [name] for name, _ in self._model.named_children()},
            ties=[("next_latent", "latent")],
        )

    def score(self) -> dict[str, Scores]:
        """The norms, and what tracked statistics come to per channel. A search does this once per base."""
        tracked = [importance.channel_sums(self._graph, values) for values in self._tracked]
        l2 = importance.l2(self._graph, self._state)
        return dict(zip(self._plan.coefficients, (l2, *tracked), strict=True))

    def mix_and_slice(self, scores: dict[str, Scores]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Mix, choose and slice all four states; the masks and the model's state."""
        keep = choose(self._graph, scores, self._plan)
        indices = kept_indices(self._graph, keep)
        sliced, *_ = [slice_state(self._graph, state, indices) for state in self._states]
        return keep, sliced

    def prune(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Score, mix, choose and slice."""
        return self.mix_and_slice(self.score())

    def prune_and_repair(self) -> None:
        """The same, and build and repair the small model."""
        keep, sliced = self.prune()
        small = WorldModel({name: int(mask.sum()) for name, mask in keep.items()})
        small.load_state_dict(sliced)
        reconstruct(self._graph, self._state, small, keep, recording=self._recording, program=self._program)


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
        ours = Ours(share)
        fresh, theirs = torch_pruning(share)
        scores = ours.score()
        for warm_up in (ours.prune, ours.prune_and_repair, ours.trace):
            warm_up()
        theirs(fresh())
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats):  # interleaved, so that a noisy moment hits all alike
            times["prune"].append(timed(ours.prune))
            times["mix_and_slice"].append(timed(partial(ours.mix_and_slice, scores)))
            times["prune_and_repair"].append(timed(ours.prune_and_repair))
            times["trace"].append(timed(ours.trace))
            times["torch_pruning"].append(timed(partial(theirs, fresh())))
        medians = {name: statistics.median(values) for name, values in times.items()}
        suffix = f"{share:.0%}_kept"
        figures |= {f"{name}_ms_{suffix}": round(value, 2) for name, value in medians.items()}
        figures[f"speedup_prune_{suffix}"] = round(medians["torch_pruning"] / medians["prune"], 2)
        figures[f"speedup_mix_and_slice_{suffix}"] = round(
            medians["torch_pruning"] / medians["mix_and_slice"], 2
        )
        figures[f"speedup_with_reconstruction_{suffix}"] = round(
            medians["torch_pruning"] / medians["prune_and_repair"], 2
        )
    return figures


if __name__ == "__main__":
    run(__doc__, lambda options: pruning_cost(options.repeats), repeats=15)
