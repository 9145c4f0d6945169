"""A small agent of our own for tests of the search, and faulty ones.

It is used as a user's would be: `agent: {kind: "toy_agents:Toy"}`. Data and training are seeded, nothing is
downloaded, and training takes a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from agents.agent import Objective
from components.errors import UserError, nearest

DEFAULTS = {"hidden": 12, "latent": 5, "updates": 120, "rows": 240, "fault": None}
INPUTS = 6


class Toy:
    """An autoencoder of six correlated inputs; the option `fault` makes pruned ones fail."""

    performance: ClassVar[Objective] = Objective("reconstruction_error", "minimize", "mean squared error")
    fine_tune_methods: ClassVar[tuple[str, ...]] = ("supervised", "nothing")
    components: Mapping[str, Sequence[str]] = {"encoder": ["encoder"], "decoder": ["decoder"]}
    ties: Sequence[tuple[str, str]] = [("latent", "latent")]

    def __init__(
        self,
        options: Mapping[str, Any],
        widths: Mapping[str, int] | None = None,
        data: Mapping[str, Tensor] | None = None,
        device: str = "cpu",
    ) -> None:
        for name in options:
            if name not in DEFAULTS:
                raise UserError(f"agent.{name} is not an option of the toy: {nearest(name, DEFAULTS)}")
        self.options = {**DEFAULTS, **options}
        full = {
            "encoder.0": self.options["hidden"],
            "latent": self.options["latent"],
            "decoder.0": self.options["hidden"],
        }
        self.widths = dict(widths or full)
        if set(self.widths) != set(full):
            raise UserError(f"the toy has the widths {sorted(full)}, not {sorted(self.widths)}")
        self.device = device
        self.model = nn.ModuleDict(
            {
                "encoder": _mlp(INPUTS, self.widths["encoder.0"], self.widths["latent"]),
                "decoder": _mlp(self.widths["latent"], self.widths["decoder.0"], INPUTS),
            }
        ).to(device)
        self.pruned = self.widths != full
        self._data = dict(data) if data is not None else None
        self._moments: dict[str, dict[str, Tensor]] = {}

    def data(self) -> dict[str, Tensor]:
        if self._data is None:
            generator = torch.Generator().manual_seed(7)
            rows = self.options["rows"]
            causes = torch.randn(3 * rows, 3, generator=generator)
            values = torch.tanh(causes @ torch.randn(3, INPUTS, generator=generator))
            self._data = dict(zip(("train", "validation", "test"), values.split(rows), strict=True))
        return self._data

    def program(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        latent = model["encoder"](inputs["observations"])
        return {"latent": latent, "reconstruction": model["decoder"](latent)}

    def calibration_inputs(self, rows: int, seed: int) -> dict[str, Tensor]:
        order = torch.randperm(len(self.data()["train"]), generator=torch.Generator().manual_seed(seed))
        return {"observations": self.data()["train"][order[:rows]].to(self.device)}

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {"model": self.model.state_dict(), **self._moments}

    def load_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.model.load_state_dict(states["model"])
        self._moments = {name: dict(state) for name, state in states.items() if name != "model"}

    def train(self, seed: int, tracker: Any, progress: Callable[[int, int, str], None]) -> None:
        self._descend(self.options["updates"], seed, tracker, progress)

    def fine_tune(
        self, method: str, updates: int, seed: int, progress: Callable[[int, int, str], None]
    ) -> None:
        if self.pruned and self.options["fault"] == "raise":
            raise RuntimeError("the toy was told\nto fail")
        if self.pruned and self.options["fault"] == "exit":
            os._exit(1)
        if method == "supervised":
            self._descend(updates, seed, None, progress)

    def evaluate(self, split: str) -> dict[str, float]:
        if self.pruned and self.options["fault"] == "nan":
            return {"reconstruction_error": float("nan")}
        if self.pruned and self.options["fault"] == "inf":
            return {"reconstruction_error": 0.1, "extra": float("inf")}
        values = self.data()[split].to(self.device)
        with torch.no_grad():
            return {"reconstruction_error": float((self.act(values) - values).square().mean())}

    def trivial(self, split: str) -> float:
        return float((self.data()[split] - self.data()["train"].mean(0)).square().mean())

    def act(self, inputs: Tensor) -> Tensor:
        return self.program(self.model, {"observations": inputs})["reconstruction"]

    def example_inputs(self, count: int) -> Tensor:
        return self.data()["test"][:count].to(self.device)

    def contract(self) -> dict[str, Any]:
        values = {"shape": [INPUTS], "dtype": "float32", "range": [-1.0, 1.0]}
        return {
            "inputs": [{"name": "observation", **values}],
            "outputs": [{"name": "reconstruction", **values}],
            "control_step_s": None,
        }

    def _descend(
        self, updates: int, seed: int, tracker: Any, progress: Callable[[int, int, str], None]
    ) -> None:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        names = dict(self.model.named_parameters())
        generator = torch.Generator().manual_seed(seed)
        train = self.data()["train"].to(self.device)
        for step in range(updates):
            batch = train[torch.randint(len(train), (64,), generator=generator)]
            optimizer.zero_grad()
            if tracker is None:
                loss = (self.act(batch) - batch).square().mean()
                loss.backward()
            else:
                with tracker.capture():
                    loss = (self.act(batch) - batch).square().mean()
                    loss.backward()
                tracker.update(loss="model")
            optimizer.step()
            progress(step + 1, updates, f"loss {loss.item():.4f}")
        if updates:
            state = optimizer.state
            self._moments = {
                "adam_mean": {name: state[p]["exp_avg"] for name, p in names.items()},
                "adam_square": {name: state[p]["exp_avg_sq"] for name, p in names.items()},
            }


class Untrainable(Toy):
    """Never learns: no better than a trivial agent."""

    def train(self, seed: int, tracker: Any, progress: Callable[[int, int, str], None]) -> None:
        super()._descend(2, seed, tracker, progress)
        with torch.no_grad():
            self.model["decoder"][2].bias += 10.0


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
