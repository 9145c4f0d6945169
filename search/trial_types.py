"""What travels between the driver and its workers: a `TrialSpec` out, a `TrialResult` back.

Plain, picklable values; a result without its model's state is a record, one line of `trials.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import numpy as np

from components.choosing import PER_GROUP, Ranking
from components.plan import PruningPlan
from components.schedule import PruningSchedule
from components.tracker import USUAL, Tracking
from search.measured import look_up

Status = Literal["complete", "stopped", "failed"]
"""Of a trial that is over: measured, given up at a rung of its fine-tuning, or broken."""

RepairedBy = Literal["reconstruction", "training", "fine_tuning", ""]
"""Which step left the state that a trial returns; empty where there is none. `training` is one in which the
agent was pruned step by step."""


@dataclass(frozen=True)
class GradualSettings:
    """How an agent is pruned step by step while it trains, not at once before.

    Attributes:
        schedule: in updates of fine-tuning or, where trials train their own base, in steps of that training.
        smoothing: how much of its old scores a metric keeps at a step, in [0, 1).
        reconstruction: refit what read the channels that are gone, at every step.
    """

    schedule: PruningSchedule
    smoothing: float = 0.5
    reconstruction: bool = True


@dataclass(frozen=True)
class TrialSettings:
    """What is the same for every trial of a search.

    Attributes:
        metrics: importance metrics that plans may mix (a trial that trains its own base computes these).
        reconstruction: `none`, `gram` or `sequential`.
        fine_tune_method: one of the agent's `fine_tune_methods`; None takes the first.
        fine_tune_updates: gradient steps after reconstruction; 0 for none.
        rungs: numbers of updates after which a trial reports how far it has come, and may be stopped:
            ascending, below `fine_tune_updates`. Empty where no trial is stopped early.
        objectives: names of what is measured: `parameters`, `macs`, `latency_median_ms`, `latency_p99_ms` or
            the agent's performance.
        constrained: names of what the search bounds; measured as well.
        base_mode: `shared` prunes the base handed in; `per_trial` trains a base inside the trial first.
        ranking: which channels compete with one another, and which widths are allowed.
        gradual: prune step by step during fine-tuning or, in `per_trial` mode, during the training from
            scratch; None prunes at once.
        tracking: how closely importance is followed by a trial that trains its own base.
        threads: CPU threads that torch may use; results are bit-reproducible for one thread count.
    """

    metrics: tuple[str, ...]
    objectives: tuple[str, ...]
    reconstruction: Literal["none", "gram", "sequential"] = "sequential"
    fine_tune_method: str | None = None
    fine_tune_updates: int = 150
    rungs: tuple[int, ...] = ()
    base_mode: Literal["shared", "per_trial"] = "shared"
    ranking: Ranking = PER_GROUP
    gradual: GradualSettings | None = None
    tracking: Tracking = USUAL
    threads: int = 1
    constrained: tuple[str, ...] = ()

    @property
    def wanted(self) -> frozenset[str]:
        """Everything that the search asks a trial to measure."""
        return frozenset({*self.objectives, *self.constrained})


@dataclass(frozen=True)
class Proposal:
    """What a search decides about one trial.

    Attributes:
        plan: what to prune, and by which mixture of importance metrics.
        origin: who proposed it: `anchor: dense`, `anchor: uniform 50 %`, `tpe` ...
        options: options of the agent that are searched, and their values; the others are those of the base.
        params: the point of the search space that this is, as the sampler sees it: more than the plan, which
            leaves the scale of mixing coordinates open. Empty where it is not known.
    """

    plan: PruningPlan
    origin: str
    options: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, float] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """The JSON-able form, exact, floats included."""
        return {
            "origin": self.origin,
            "coefficients": _plain(self.plan.coefficients),
            "ratios": dict(self.plan.ratios),
            "options": dict(self.options),
            "params": dict(self.params),
        }

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Proposal:
        """The proposal of a record.

        Raises:
            KeyError, TypeError, ValueError, UserError: the record was not made by `to_record`.
        """
        plan = PruningPlan(coefficients=record["coefficients"], ratios=record["ratios"])
        # Records of before lack options and params.
        return Proposal(plan, record["origin"], record.get("options", {}), record.get("params", {}))


@dataclass(frozen=True)
class TrialSpec:
    """One configuration to run.

    Attributes:
        number: the trial's number in its search, from 0.
        plan, origin, options: as in the `Proposal`.
        seed: of everything random in the trial; see `trial_seed`.
        pruning: what every trial of the search shares.
    """

    number: int
    plan: PruningPlan
    origin: str
    seed: int
    pruning: TrialSettings
    options: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(number: int, proposal: Proposal, seed: int, pruning: TrialSettings) -> TrialSpec:
        """What is proposed, as a trial of a search."""
        return TrialSpec(number, proposal.plan, proposal.origin, seed, pruning, proposal.options)


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial. Measurements are None in a failed one.

    One that was stopped early has the size and shape of its model, and its `rung_losses`; it has neither
    objectives nor performance, because nothing was evaluated, and no state. A running trial reports that
    result at every rung, and whoever stops it there keeps it.

    Attributes:
        number, plan, origin, options, seed: as in the `TrialSpec`.
        status: `complete`, `stopped` or `failed`.
        reason: of a failure, one line; None otherwise.
        objectives: declared objective -> finite measured value, on validation data.
        parameters: stored scalars of the pruned model that training could change.
        size_ratio: `parameters` over those of the base, in (0, 1].
        macs: multiply-accumulate operations of one decision; of a stopped trial only where the search asks
            for it.
        retention: (J - J0) / (J_base - J0) on validation data: 1 as good as the base, 0 as the trivial agent.
        performance: everything that the agent's evaluation reports, on validation data.
        latencies: `latency_median_ms` and `latency_p99_ms`; empty where the search asks for neither.
        base_performance: split -> the performance measure of the base that was pruned.
        component_sizes: component -> parameters.
        widths: group -> channels kept.
        kept: group -> indices of the kept channels, ascending.
        rungs: (updates of fine-tuning done, performance on validation data): before it, unless what came
            after was most likely better, and after it.
        rung_losses: (updates of fine-tuning done, the agent's rung loss then, lower is better), of every rung
            that was reached; finite.
        updates: updates of fine-tuning that were made; those of a worker that was lost are not known, and 0.
        fine_tuning: what the agent tells of its fine-tuning, by name.
        repaired_by: `fine_tuning`, or what came before it where that is measured and performs better, or
            there was no fine-tuning; everything measured is of that state. Empty in a failed trial, and where
            nothing was removed.
        timings: stage -> seconds.
        usage: what the trial took of its worker: `cpu_seconds`; `memory_mb`, the most that the process has
            ever held, in MiB; on a GPU `gpu_memory_mb`, the most that the trial held there.
        device, host: where it ran.
        started, finished: ISO 8601, UTC.
        state: the pruned model's state, which is not part of the record; None once stored, and of a failure.
    """

    number: int
    status: Status
    plan: PruningPlan
    origin: str
    seed: int
    options: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    objectives: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    size_ratio: float | None = None
    macs: int | None = None
    retention: float | None = None
    performance: Mapping[str, float] = field(default_factory=dict)
    latencies: Mapping[str, float] = field(default_factory=dict)
    base_performance: Mapping[str, float] = field(default_factory=dict)
    component_sizes: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rungs: tuple[tuple[int, float], ...] = ()
    rung_losses: tuple[tuple[int, float], ...] = ()
    updates: int = 0
    fine_tuning: Mapping[str, float] = field(default_factory=dict)
    repaired_by: RepairedBy = ""
    timings: Mapping[str, float] = field(default_factory=dict)
    usage: Mapping[str, float] = field(default_factory=dict)
    device: str = ""
    host: str = ""
    started: str = ""
    finished: str = ""
    state: Mapping[str, np.ndarray] | None = None

    @staticmethod
    def of(spec: TrialSpec, status: Status) -> TrialResult:
        """The result of a specification, with nothing measured yet."""
        return TrialResult(
            number=spec.number,
            status=status,
            plan=spec.plan,
            origin=spec.origin,
            seed=spec.seed,
            options=spec.options,
        )

    @staticmethod
    def failure(spec: TrialSpec, reason: str, *, started: str = "", finished: str = "") -> TrialResult:
        """A trial without measurements, and why, in one line."""
        failed = TrialResult.of(spec, "failed")
        return replace(failed, reason=reason, started=started, finished=finished)

    def light(self) -> TrialResult:
        """This without what is large and on the disk once it is stored: a search may have ten thousand."""
        return replace(self, state=None, kept={})

    @property
    def complete(self) -> bool:
        """True where every objective was measured."""
        return self.status == "complete"

    @property
    def stopped(self) -> bool:
        """True where the trial was given up early, or is a report of one that may be."""
        return self.status == "stopped"

    @property
    def failed(self) -> bool:
        """True where something broke; `reason` says what."""
        return self.status == "failed"

    def measurement(self, name: str) -> float | None:
        """An objective, a size, a latency, the retention, or what the evaluation reports.

        None where it was not measured.
        """
        return look_up(name, self, {**self.performance, **self.latencies})

    def to_record(self) -> dict[str, Any]:
        """The JSON-able form that `trials.jsonl` holds: everything but the state; exact, floats included."""
        return {
            "trial": self.number,
            "status": self.status,
            "reason": self.reason,
            "origin": self.origin,
            "seed": self.seed,
            "objectives": dict(self.objectives),
            "parameters": self.parameters,
            "size_ratio": self.size_ratio,
            "macs": self.macs,
            "retention": self.retention,
            "performance": dict(self.performance),
            "latencies": dict(self.latencies),
            "base_performance": dict(self.base_performance),
            "component_sizes": dict(self.component_sizes),
            "widths": dict(self.widths),
            "coefficients": _plain(self.plan.coefficients),
            "ratios": dict(self.plan.ratios),
            "options": dict(self.options),
            "kept": {group: list(indices) for group, indices in self.kept.items()},
            "rungs": [list(rung) for rung in self.rungs],
            "rung_losses": [list(rung) for rung in self.rung_losses],
            "updates": self.updates,
            "fine_tuning": dict(self.fine_tuning),
            "repaired_by": self.repaired_by,
            "timings": dict(self.timings),
            "usage": dict(self.usage),
            "device": self.device,
            "host": self.host,
            "started": self.started,
            "finished": self.finished,
        }

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> TrialResult:
        """The result of a record, without its state.

        Raises:
            KeyError, TypeError, ValueError: the record was not made by `to_record`.
        """
        if record["status"] not in get_args(Status):
            raise ValueError(f"status is {record['status']!r}, not one of {', '.join(get_args(Status))}")
        rungs = _rungs(record["rungs"])
        return TrialResult(
            number=record["trial"],
            status=record["status"],
            plan=PruningPlan(coefficients=record["coefficients"], ratios=record["ratios"]),
            origin=record["origin"],
            seed=record["seed"],
            options=record.get("options", {}),  # records of before lack what is got like this
            reason=record["reason"],
            objectives=record["objectives"],
            parameters=record["parameters"],
            size_ratio=record["size_ratio"],
            macs=record["macs"],
            retention=record["retention"],
            performance=record["performance"],
            latencies=record.get("latencies", {}),
            base_performance=record["base_performance"],
            component_sizes=record["component_sizes"],
            widths=record["widths"],
            kept={group: tuple(indices) for group, indices in record["kept"].items()},
            rungs=rungs,
            rung_losses=_rungs(record.get("rung_losses", ())),
            updates=record.get("updates", rungs[-1][0] if rungs else 0),
            fine_tuning=record.get("fine_tuning", {}),
            repaired_by=record.get("repaired_by", ""),
            timings=record["timings"],
            usage=record.get("usage", {}),
            device=record["device"],
            host=record["host"],
            started=record["started"],
            finished=record["finished"],
        )


def timestamp() -> str:
    """Now, as results say when they started and finished: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def trial_seed(search_seed: int, number: int) -> int:
    """The seed of one trial: a hash of the search's seed and the trial's number, in [0, 2**32)."""
    return int(np.random.SeedSequence([search_seed, number]).generate_state(1)[0])


def _rungs(pairs: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(updates), float(value)) for updates, value in pairs)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
