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

    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS
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
            if name not in self.defaults:
                raise UserError(f"agent.{name} is not an option of the toy: {nearest(name, self.defaults)}")
        self.options = {**self.defaults, **options}
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
    ) -> Mapping[str, float] | None:
        if self.pruned and self.options["fault"] == "raise":
            raise RuntimeError("the toy was told\nto fail")
        if self.pruned and self.options["fault"] == "exit":
            os._exit(1)
        if method == "supervised":
            self._descend(updates, seed, None, progress)
        if self.pruned and self.options["fault"] == "harm":
            with torch.no_grad():
                self.model["decoder"][2].bias += 10.0
        if self.pruned and self.options["fault"] == "nan fact":
            return {"loss": float("nan")}
        return None

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


class Scoring(Toy):
    """The toy with its performance the other way round: higher is better."""

    performance: ClassVar[Objective] = Objective("score", "maximize", "minus the mean squared error")

    def evaluate(self, split: str) -> dict[str, float]:
        return {"score": -super().evaluate(split)["reconstruction_error"]}

    def trivial(self, split: str) -> float:
        return -super().trivial(split)


class Ranked(Toy):
    """The toy with a rung loss; that of pruned ones is NaN with the fault "diverge"."""

    def rung_loss(self) -> float:
        if self.pruned and self.options["fault"] == "diverge":
            return float("nan")
        return self.evaluate("validation")["reconstruction_error"]


class Taught(Toy):
    """A student: tells of its fine-tuning how good its teacher is, and which channels it has of it."""

    def learn_from(self, base: Any, kept: Mapping[str, Tensor]) -> None:
        self.teacher, self.kept = base, kept

    def fine_tune(
        self, method: str, updates: int, seed: int, progress: Callable[[int, int, str], None]
    ) -> Mapping[str, float]:
        super().fine_tune(method, updates, seed, progress)
        for indices in self.kept.values():
            assert indices.dtype == torch.int64
        channels = {group: float(sum(2.0**i for i in kept.tolist())) for group, kept in self.kept.items()}
        return {**channels, "teacher": self.teacher.evaluate("validation")["reconstruction_error"]}


class Steady(Ranked):
    """Reports a stability besides its error: the share of the data's variance that it explains."""

    measurements: ClassVar[Mapping[str, str]] = {
        "stability": "share",
        "stability_low": "share",
        "stability_high": "share",
        "smoothness": "1",
    }

    def evaluate(self, split: str) -> dict[str, float]:
        reported = super().evaluate(split)
        stability = max(0.0, 1 - reported["reconstruction_error"] / self.trivial(split))
        spread = {"stability_low": 0.9 * stability, "stability_high": min(1.0, 1.1 * stability)}
        return {**reported, "stability": stability, **spread, "smoothness": -stability}


class Gathering(Toy):
    """Has the data that it is calibrated on by training alone, as agents in an environment do."""

    def train(self, seed: int, tracker: Any, progress: Callable[[int, int, str], None]) -> None:
        super().train(seed, tracker, progress)
        self._data = {**self.data(), "gathered": self.data()["train"] + seed}

    def calibration_inputs(self, rows: int, seed: int) -> dict[str, Tensor]:
        if "gathered" not in self.data():
            return {"observations": torch.zeros(rows, INPUTS)}
        return {"observations": self.data()["gathered"][:rows]}


class Rolling(Toy):
    """Reconstructs its own reconstruction: its program calls every layer twice, that for calibration once."""

    ties: Sequence[tuple[str, str]] = [("latent", "latent"), ("later", "latent")]

    def program(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert len(inputs["observations"]) <= 2, "this program is for tracing"
        first = super().program(model, inputs)
        second = super().program(model, {"observations": first["reconstruction"]})
        return {**first, "later": second["latent"], "again": second["reconstruction"]}

    def calibration_program(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().program(model, inputs)

    def act(self, inputs: Tensor) -> Tensor:
        return self.calibration_program(self.model, {"observations": inputs})["reconstruction"]


class Repeating(Toy):
    """Acts by reconstructing so many times as the option `passes` says, which a search may choose."""

    defaults: ClassVar[Mapping[str, Any]] = {**DEFAULTS, "passes": 2}
    searchable_options = ("passes",)
    shared_ratios: Mapping[str, str] = {"decoder.0": "encoder.0"}

    def __init__(self, options: Mapping[str, Any], *more: Any, **named: Any) -> None:
        super().__init__(options, *more, **named)
        if self.options["passes"] > 9:
            raise UserError(f"agent.passes is {self.options['passes']}: it must be at most 9")

    def act(self, inputs: Tensor) -> Tensor:
        for _ in range(self.options["passes"]):
            inputs = super().act(inputs)
        return inputs


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
