"""Importance statistics gathered while a model trains, and their course over the training.

The tracker reads gradients, parameters and activations and changes none of them: training with it gives the
same model, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from components import importance
from components.channel_sums import levelled_sums, scored_parameters
from components.dependency import DependencyGraph, Keep
from components.errors import UserError
from components.gates import GateMode, gate_readers
from components.importance import MissingStatisticsError
from components.pruning import kept_indices, slice_state

EVERY = 24
"""How often a step is tracked by default. On an autoencoder of 64-256-128-16 and back, at batch 128 on one
CPU thread, a tracked step costs 1 to 1.5 training steps, so that every 16th would be 12 to 14 % with the
snapshots, and every 24th is 6 to 8 %. Tracking every step or every 20th ranked channels equally well."""

DECAY = 0.99
"""Of the running averages by default, per tracked step: they remember about 1 / (1 - decay) of those."""

SNAPSHOTS = 20
"""About how many snapshots of the scores are kept by default."""

FIRST_INTERVAL = 8.0
"""Tracked steps between two snapshots at first, where the length of the training is not known: a snapshot
costs an autoencoder as much as two training steps, and those that are thinned out later cost it too."""

TAIL_POWER = 3
"""The mean and variance of the weights give step t a weight of about t^3: 94 % of it is in the last half."""


@dataclass(frozen=True)
class Tracking:
    """How closely a tracker follows a training; checked by the tracker that gets it.

    Attributes:
        every: track every so-many-th step of each loss; >= 1.
        decay: of the running averages, per tracked step; in [0, 1).
        snapshots: about how many snapshots of the scores to keep, evenly spread over the training; >= 1. A
            training of fewer than 8 · `every` · `snapshots` steps leaves fewer.
        interval: training steps from one snapshot to the next, all of which are kept; >= 1. None spreads
            `snapshots` of them.
    """

    every: int = EVERY
    decay: float = DECAY
    snapshots: int = SNAPSHOTS
    interval: int | None = None


USUAL = Tracking()
"""What is good enough to prune by, at little cost."""


@dataclass(frozen=True, eq=False)
class GradientStatistics:
    """What a tracker gathered, for each parameter (by state_dict name, of its shape) and each group.

    g is a gradient divided by the running RMS gradient of the loss it comes from; averages are over tracked
    steps. A parameter that never received a gradient has zeros.

    Attributes:
        gradient: EMA of |g|.
        taylor: EMA of |θ g|.
        square: EMA of g².
        weight: θ when the statistics were taken.
        mean: the mean of θ over the training's tail.
        variance: the variance of θ over the training's tail.
        activity: the share of the tail in which the gradient was not zero, in [0, 1].
        gates: for each group `(size,)`: EMA of the mean over samples of the squared gate derivatives, in
            units of the mean square gradient. Empty if nothing was captured.
        steps: the number of tracked steps.
    """

    gradient: Mapping[str, Tensor]
    taylor: Mapping[str, Tensor]
    square: Mapping[str, Tensor]
    weight: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]
    activity: Mapping[str, Tensor]
    gates: Mapping[str, Tensor]
    steps: int

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat, for safetensors: `<attribute>/<parameter or group>`, and `steps`."""
        tensors = {
            f"{field.name}/{name}": tensor
            for field in fields(self)
            if field.name != "steps"
            for name, tensor in getattr(self, field.name).items()
        }
        return {**tensors, "steps": torch.tensor(self.steps)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> GradientStatistics:
        """The inverse of `to_tensors`.

        Raises:
            UserError: the tensors are not those of statistics.
        """
        parts: dict[str, dict[str, Tensor]] = {f.name: {} for f in fields(cls) if f.name != "steps"}
        for key, tensor in tensors.items():
            field, _, name = key.partition("/")
            if field in parts and name:
                parts[field][name] = tensor
            elif key != "steps":
                raise UserError(f"gradient statistics have no {key!r}")
        if "steps" not in tensors:
            raise UserError("gradient statistics lack 'steps'")
        return cls(steps=int(tensors["steps"]), **parts)


@dataclass(frozen=True, eq=False)
class ImportanceHistory:
    """How the scores of the tracked metrics went over the training.

    Attributes:
        steps: `(s,)` long: after how many training steps each snapshot was taken; increasing.
        scores: `{metric: {group: (s, size)}}`, float32: those of the metrics, but that each group's scores of
            `gradient` are scaled, by one factor, to the mean of its channels' plain Σ|g|. The metric divides
            every layer by its mean, which gives a group the same mean whatever its gradients are; mixing
            divides such a factor out again.
    """

    steps: Tensor
    scores: Mapping[str, Mapping[str, Tensor]]

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat, for safetensors: `<metric>/<group>`, and `steps`."""
        flat = {f"{metric}/{name}": t for metric, groups in self.scores.items() for name, t in groups.items()}
        return {**flat, "steps": self.steps}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ImportanceHistory:
        """The inverse of `to_tensors`.

        Raises:
            UserError: the tensors are not those of a history.
        """
        if "steps" not in tensors:
            raise UserError("an importance history lacks 'steps'")
        return cls(tensors["steps"], _nested({k: tensor for k, tensor in tensors.items() if k != "steps"}))


class ImportanceTracker:
    """Gathers importance statistics in a training loop.

        with tracker.capture():
            loss = ...
            loss.backward()
        tracker.update()          # before clipping and the optimizer's step

    A loop with several losses names each: `capture("policy")` and `update("policy")`. Every gradient that a
    parameter holds at `update` counts as this loss's, so clear the others first.

    Not thread-safe; one tracker per model.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        model: nn.Module,
        *,
        decay: float = DECAY,
        every: int = EVERY,
        snapshots: int = SNAPSHOTS,
        interval: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        """For one model, whose parameters have to stay the same objects.

        Args:
            graph: the model's dependency graph.
            model: the model that will be trained.
            decay, every, snapshots, interval: as in `Tracking`; a snapshot is taken at the first tracked step
                at which it is due.
            total_steps: how many steps the training has, if that is known: snapshots are then spaced evenly.
                Otherwise they start close together and are thinned out, which costs some more. Not read
                where there is an interval.

        Raises:
            UserError: a value outside its range, or the model has none of the graph's parameters.
        """
        if not 0.0 <= decay < 1.0:
            raise UserError(f"the tracker's decay has to be in [0, 1), not {decay}")
        counts = {"every": every, "snapshots": snapshots, "interval": interval, "total_steps": total_steps}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise UserError(f"the tracker's {name} has to be at least 1, not {value}")
        self._graph = graph
        parameters = dict(model.named_parameters())
        self._parameters = {n: parameters[n] for n in scored_parameters(graph) if n in parameters}
        if not self._parameters:
            raise UserError("the model has none of the dependency graph's parameters")
        self._records = {name: _Record.zeros(p) for name, p in self._parameters.items()}
        self._readers = gate_readers(graph, model)
        self._decay = decay
        self._every = every
        self._most = math.inf if interval is not None else 2 * snapshots
        spread = FIRST_INTERVAL * every if total_steps is None else total_steps / snapshots
        self._interval = spread if interval is None else float(interval)
        self._updates: dict[str, int] = {}
        self._mean_square: dict[str, _Average] = {}
        self._gates: dict[str, _Average] = {}
        self._pending: dict[str, Tensor] = {}
        self._history: list[tuple[int, dict[str, Mapping[str, Tensor]]]] = []
        self._last_tracked = 0

    def is_due(self, loss: str = "model") -> bool:
        """Whether the next step of a loss is tracked. Of one that is not, only `update` is needed."""
        return self._updates.get(loss, 0) % self._every == 0

    @contextmanager
    def capture(self, loss: str = "model") -> Iterator[None]:
        """Around the forward and backward pass of one step; what it saw is used by the next `update`.

        On a step that is not tracked it does nothing.
        """
        self._pending = {}
        if not self.is_due(loss):
            yield
            return
        with GateMode(self._readers) as mode:
            yield
        self._pending = mode.gates()

    def update(self, loss: str = "model") -> None:
        """Take in the parameters' gradients, after the backward pass and before clipping.

        A step without any gradient, or with one that is not finite, is left out.
        """
        tracked, gates = self.is_due(loss), self._pending
        self._updates[loss] = self._updates.get(loss, 0) + 1
        self._pending = {}
        names = [name for name, p in self._parameters.items() if p.grad is not None] if tracked else []
        if not names:
            return
        with torch.no_grad():
            self._take(loss, names, gates)
        step = max(self._updates.values())
        self._last_tracked = step
        if self.steps >= 2 and step >= self._next_snapshot:
            self._history.append((step, self._scores()))
            if len(self._history) >= self._most:
                self._history = self._history[1::2]
                self._interval *= 2.0

    def shrink(self, graph: DependencyGraph, model: nn.Module, keep: Keep) -> None:
        """Go on with a model that has lost channels: what was gathered of the others stays.

        Snapshots so far are dropped: they are of channels that are gone.

        Args:
            graph: of the narrower model (`components.pruning.restricted`).
            model: the narrower model, with its present parameters.
            keep: for every group of the graph so far, which channels stay.
        """
        indices = kept_indices(self._graph, keep)
        cut = {
            field.name: slice_state(
                self._graph,
                {name: getattr(record, field.name) for name, record in self._records.items()},
                indices,
            )
            for field in fields(_Record)
            if field.name != "count"
        }
        self._records = {
            name: _Record(**{field: by_name[name] for field, by_name in cut.items()}, count=record.count)
            for name, record in self._records.items()
        }
        for group, gate in self._gates.items():
            if gate.total is not None and group in keep:
                gate.total = gate.total[keep[group].to(gate.total.device)]
        parameters = dict(model.named_parameters())
        self._parameters = {name: parameters[name] for name in self._records}
        self._graph = graph
        self._readers = gate_readers(graph, model)
        self._pending = {}
        self._history = []

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything that going on needs, between two steps; a copy, flat, for safetensors.

        `record/<field>/<parameter>`, `gate/<group>`, `mean_square/<loss>`, `updates/<loss>`,
        `history/<number>/<metric>/<group>`; `gate_count` and `mean_square_count` in the same way;
        `history_steps`, `last_tracked` and `interval`.
        """
        found = {
            f"record/{field.name}/{name}": torch.as_tensor(getattr(record, field.name))
            for name, record in self._records.items()
            for field in fields(record)
        }
        averages = {"gate": self._gates, "mean_square": self._mean_square}
        for kind, by_name in averages.items():
            for name, average in by_name.items():
                assert average.total is not None
                found[f"{kind}/{name}"] = average.total
                found[f"{kind}_count/{name}"] = torch.tensor(average.count)
        found |= {f"updates/{loss}": torch.tensor(count) for loss, count in self._updates.items()}
        for number, (_, scores) in enumerate(self._history):
            found |= {
                f"history/{number}/{metric}/{group}": tensor
                for metric, groups in scores.items()
                for group, tensor in groups.items()
            }
        found["history_steps"] = torch.tensor([step for step, _ in self._history], dtype=torch.long)
        found["last_tracked"] = torch.tensor(self._last_tracked)
        found["interval"] = torch.tensor(self._interval, dtype=torch.float64)
        whole = torch.contiguous_format
        return {name: tensor.detach().clone(memory_format=whole) for name, tensor in found.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `to_tensors` of another tracker gave, of the same graph and settings.

        Raises:
            KeyError, RuntimeError: it is of another model.
        """
        nested = _nested(tensors)
        for name, record in self._records.items():
            for field in fields(record):
                stored = nested["record"][f"{field.name}/{name}"]
                if field.name == "count":
                    record.count = int(stored)
                else:
                    getattr(record, field.name).copy_(stored)
        device = next(iter(self._parameters.values())).device
        for kind, averages in (("gate", self._gates), ("mean_square", self._mean_square)):
            averages.clear()
            for name, stored in nested.get(kind, {}).items():
                total = stored.to(device if kind == "gate" else "cpu").clone()
                averages[name] = _Average(self._decay, total, int(nested[f"{kind}_count"][name]))
        self._updates = {loss: int(count) for loss, count in nested.get("updates", {}).items()}
        snapshots = _nested({key: t.to(device).clone() for key, t in nested.get("history", {}).items()})
        self._history = [
            (step, dict(_nested(snapshots[str(number)])))
            for number, step in enumerate(nested["history_steps"][""].tolist())
        ]
        self._last_tracked = int(nested["last_tracked"][""])
        self._interval = float(nested["interval"][""])
        self._pending = {}

    @property
    def steps(self) -> int:
        """The number of steps tracked so far."""
        return max(record.count for record in self._records.values())

    def statistics(self) -> GradientStatistics:
        """What was gathered so far; a copy.

        Raises:
            MissingStatisticsError: no step was tracked.
        """
        if self.steps == 0:
            raise MissingStatisticsError(
                "the tracker has seen no gradients: call update() after each backward pass"
            )
        now = self._now()

        def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.clone() for name, tensor in tensors.items()}

        return replace(
            now,
            weight=copied(now.weight),
            mean=copied(now.mean),
            variance=copied(now.variance),
            activity=copied(now.activity),
        )

    def _now(self) -> GradientStatistics:
        """The statistics, some of them the tracker's and the model's own tensors: to be read at once."""
        records = self._records
        unbias = {name: 1.0 / (1.0 - self._decay**r.count) if r.count else 0.0 for name, r in records.items()}
        return GradientStatistics(
            gradient={name: record.gradient * unbias[name] for name, record in records.items()},
            taylor={name: record.taylor * unbias[name] for name, record in records.items()},
            square={name: record.square * unbias[name] for name, record in records.items()},
            weight={name: p.detach() for name, p in self._parameters.items()},
            mean={name: record.mean for name, record in records.items()},
            variance={name: record.variance for name, record in records.items()},
            activity={name: record.activity for name, record in records.items()},
            gates={name: gate.value for name, gate in self._gates.items()},
            steps=self.steps,
        )

    def history(self) -> ImportanceHistory:
        """The snapshots so far, the last tracked step included; empty before the second tracked step.

        A metric is there if every snapshot has it: `gate_fisher` needs `capture()` from the beginning.
        """
        history = list(self._history)
        if self.steps >= 2 and (not history or history[-1][0] < self._last_tracked):
            history.append((self._last_tracked, self._scores()))
        metrics = [m for m in (history[0][1] if history else {}) if all(m in scores for _, scores in history)]
        return ImportanceHistory(
            torch.tensor([step for step, _ in history], dtype=torch.long),
            {
                metric: {
                    group.name: torch.stack([scores[metric][group.name].float() for _, scores in history])
                    for group in self._graph.groups
                }
                for metric in metrics
            },
        )

    @property
    def _next_snapshot(self) -> float:
        last = self._history[-1][0] if self._history else 0
        return (last // self._interval + 1) * self._interval

    def _scores(self) -> dict[str, Mapping[str, Tensor]]:
        statistics = self._now()
        metrics = {name: m for name, m in importance.METRICS.items() if m.needs == "statistics"}
        if any(group.name not in statistics.gates for group in self._graph.groups):
            del metrics["gate_fisher"]
        scores: dict[str, Mapping[str, Tensor]]
        scores = {
            name: metric.function(self._graph, statistics)
            for name, metric in metrics.items()
            if name != "gradient"
        }
        # By the metric itself, every group would have the same mean.
        return {"gradient": levelled_sums(self._graph, statistics.gradient), **scores}

    def _take(self, loss: str, names: list[str], gates: Mapping[str, Tensor]) -> None:
        records = [self._records[name] for name in names]
        weights = [
            self._parameters[name].detach().to(r.mean.dtype) for name, r in zip(names, records, strict=True)
        ]
        gradients = [
            _gradient(self._parameters[name]).to(w.dtype) for name, w in zip(names, weights, strict=True)
        ]
        square_sum = float(torch.stack(torch._foreach_norm(gradients)).double().square().sum())
        if square_sum == 0.0 or not math.isfinite(square_sum):
            return
        mean_square = self._mean_square.setdefault(loss, _Average(self._decay))
        mean_square.add(torch.tensor(square_sum / sum(g.numel() for g in gradients), dtype=torch.float64))
        scale = float(mean_square.value)

        new = 1.0 - self._decay
        magnitude = list(torch._foreach_abs(gradients))
        torch._foreach_mul_(magnitude, scale**-0.5)
        torch._foreach_lerp_([r.gradient for r in records], magnitude, new)
        products = list(torch._foreach_abs(weights))
        torch._foreach_mul_(products, magnitude)
        torch._foreach_lerp_([r.taylor for r in records], products, new)
        active = list(torch._foreach_sign(magnitude))
        torch._foreach_mul_(magnitude, magnitude)
        torch._foreach_lerp_([r.square for r in records], magnitude, new)
        for record in records:
            record.count += 1
        _follow_tail(records, weights, active)
        for name, gate in gates.items():
            if bool(torch.isfinite(gate).all()):
                self._gates.setdefault(name, _Average(self._decay)).add(gate / scale)


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By the part of a name before its first slash, and by the rest, empty where there is none."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        first, _, rest = key.partition("/")
        found.setdefault(first, {})[rest] = tensor
    return found


@dataclass(eq=False)
class _Record:
    """The running statistics of one parameter; the averages are not yet corrected for their start at zero."""

    gradient: Tensor
    taylor: Tensor
    square: Tensor
    mean: Tensor
    variance: Tensor
    activity: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, parameter: Tensor) -> _Record:
        dtype = torch.promote_types(parameter.dtype, torch.float32)

        def fresh() -> Tensor:
            return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)

        return cls(fresh(), fresh(), fresh(), fresh(), fresh(), fresh())


@dataclass(eq=False)
class _Average:
    """An exponential moving average, corrected for its start at zero."""

    decay: float
    total: Tensor | None = None
    count: int = 0

    def add(self, value: Tensor) -> None:
        old = torch.zeros_like(value) if self.total is None else self.total
        self.total = torch.lerp(old, value, 1.0 - self.decay)
        self.count += 1

    @property
    def value(self) -> Tensor:
        assert self.total is not None
        return self.total / (1.0 - self.decay**self.count)


def _follow_tail(records: list[_Record], weights: list[Tensor], active: list[Tensor]) -> None:
    """Mean and variance with weights growing as t^3 (West, 1979): the n-th value enters with 4 / (n + 3)."""
    shares = [(TAIL_POWER + 1) / (record.count + TAIL_POWER) for record in records]
    means, variances = [r.mean for r in records], [r.variance for r in records]
    difference = torch._foreach_sub(weights, means)
    torch._foreach_addcmul_(variances, difference, difference, shares)
    torch._foreach_mul_(variances, [1.0 - share for share in shares])
    torch._foreach_lerp_(means, weights, shares)
    torch._foreach_lerp_([r.activity for r in records], active, shares)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()
