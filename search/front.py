"""The front: the feasible, non-dominated trials of a search, and `front.json`.

Membership is decided on what the search saw, validation data. What the trials reach on test data, measured
once at the end, stands beside it and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from search import pareto
from search.config_errors import Fault
from search.constraints import Constraint, parse_all, written
from search.durable_files import CorruptFileError, field, number
from search.measured import first_missed, look_up
from search.stability import StableCompression, stability_sentence, stable_compression

if TYPE_CHECKING:
    from agents.agent import Objective
    from components.plan import Coefficients
    from search.base import Base
    from search.trial_types import TrialResult

REFERENCE_POINT = {"size_ratio": 1.0, "retention": 0.0}
"""Where the hypervolume begins: the size of the base and what a trivial agent retains."""


RETAINED = (90, 95, 98)
"""Percentages of retention whose smallest trials have names."""


@dataclass(frozen=True)
class Remeasured:
    """What a trial of the front reaches when the search is over.

    Attributes:
        performance: the agent's performance measure on test data.
        retention: the same as retention, of test data.
        latencies: `latency_median_ms` and `latency_p99_ms`, one trial at a time on an otherwise idle machine;
            empty where no latency was asked for, as an objective or by a constraint.
        host: where that was.
    """

    performance: float
    retention: float
    latencies: Mapping[str, float]
    host: str


@dataclass(frozen=True)
class FrontTrial:
    """A trial of the front, as `front.json` has it.

    Attributes:
        trial: its number.
        origin: who proposed it.
        parameters, size_ratio, macs: its size.
        objectives: declared objective -> value; latencies are those measured at the end, once they are.
        retention: on validation data.
        test_performance, test_retention: on test data; None until the search has ended.
        coefficients, ratios: its plan.
        options: options of the agent that were searched.
        bundle: path of its bundle, relative to the run directory.
        latency_host: where latencies were measured; None where none were.
        measured: what else was: what the agent's evaluation reports on validation data, and latencies.
    """

    trial: int
    origin: str
    parameters: int
    size_ratio: float
    macs: int
    objectives: Mapping[str, float]
    retention: float
    test_performance: float | None
    test_retention: float | None
    coefficients: Coefficients
    ratios: Mapping[str, float]
    options: Mapping[str, int]
    bundle: str
    latency_host: str | None = None
    measured: Mapping[str, float] = dataclass_field(default_factory=dict)

    def measurement(self, name: str) -> float | None:
        """An objective, a size, the retention or what else was measured; None if it was not."""
        return look_up(name, self, self.measured)


@dataclass(frozen=True)
class Front:
    """The feasible, non-dominated trials of a search, smallest first.

    Attributes:
        experiment: the name of the search.
        objectives: each with `name`, `direction` and `unit`.
        performance: which name the agent's performance has.
        base: `parameters`, `macs`, `performance`, `trivial`, `reported`, `seed`, `training_seconds`.
        trials: sorted by parameters, then by retention.
        constraints: of the search, which all trials met in it.
    """

    experiment: str
    objectives: tuple[Mapping[str, str], ...]
    performance: str
    base: Mapping[str, Any]
    trials: tuple[FrontTrial, ...]
    constraints: tuple[Constraint, ...] = ()

    @property
    def tested(self) -> bool:
        """True once the trials were measured on test data, as far as they could be."""
        return not self.trials or any(trial.test_retention is not None for trial in self.trials)

    def missed(self, trial: FrontTrial) -> Constraint | None:
        """The first constraint that a trial misses by what is known of it in the end; None if it meets all.

        All met them when the search measured them; latencies may be others when measured again at its end.
        """
        return first_missed(self.constraints, trial.measurement)

    @property
    def stable_compression(self) -> StableCompression | None:
        """How far down the front the stability of the base holds; None where that was not measured."""
        return stable_compression(self.base.get("reported") or {}, self.trials)

    def hypervolumes(self) -> dict[str, float]:
        """`hypervolume` (over log size), `hypervolume_linear`, and both with `test_` for test data.

        A trial that could not be measured there counts for nothing.
        """
        sizes = [trial.size_ratio for trial in self.trials]
        retention = [trial.retention for trial in self.trials]
        found = {
            "hypervolume": pareto.hypervolume_log(sizes, retention),
            "hypervolume_linear": pareto.hypervolume_linear(sizes, retention),
        }
        if self.tested:
            test = [trial.test_retention or 0.0 for trial in self.trials]
            found["test_hypervolume"] = pareto.hypervolume_log(sizes, test)
            found["test_hypervolume_linear"] = pareto.hypervolume_linear(sizes, test)
        return found

    def aliases(self) -> dict[int, list[str]]:
        """Trial -> what it is known by: `knee`, and `smallest-95` and the like for what it retains."""
        found: dict[int, list[str]] = {}
        if not self.trials:
            return found
        sizes = [trial.size_ratio for trial in self.trials]
        retention = [trial.retention for trial in self.trials]
        found.setdefault(self.trials[pareto.knee(sizes, retention)].trial, []).append("knee")
        for share in RETAINED:
            chosen = pareto.smallest_retaining(sizes, retention, share / 100)
            if chosen.satisfied:
                found.setdefault(self.trials[chosen.index].trial, []).append(f"smallest-{share}")
        return found

    def retention_at(self) -> list[dict[str, Any]]:
        """For sizes up to 1, 2, 5, 10 and 25 % the trial with the best retention, and its test retention."""
        rows = []
        for threshold in pareto.SIZE_THRESHOLDS:
            best: FrontTrial | None = None
            if self.trials:
                sizes = [trial.size_ratio for trial in self.trials]
                chosen = pareto.best_within(sizes, [trial.retention for trial in self.trials], threshold)
                best = self.trials[chosen.index] if chosen.satisfied else None
            rows.append(
                {
                    "size_ratio": threshold,
                    "trial": None if best is None else best.trial,
                    "retention": None if best is None else best.retention,
                    "test_retention": None if best is None else best.test_retention,
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """The content of `front.json`."""
        trials = []
        for trial in self.trials:
            entry: dict[str, Any] = {
                "trial": trial.trial,
                "origin": trial.origin,
                "parameters": trial.parameters,
                "size_ratio": trial.size_ratio,
                "macs": trial.macs,
            }
            entry.update({name: value for name, value in trial.objectives.items() if name not in entry})
            entry.update(
                {
                    "retention": trial.retention,
                    "test_retention": trial.test_retention,
                    f"test_{self.performance}": trial.test_performance,
                    "coefficients": trial.coefficients,
                    "ratios": dict(trial.ratios),
                    "options": dict(trial.options),
                    "bundle": trial.bundle,
                }
            )
            if trial.measured:
                entry["measured"] = dict(trial.measured)
            if trial.latency_host is not None:
                entry["latency_host"] = trial.latency_host
            trials.append(entry)
        stable = self.stable_compression
        return {
            "experiment": self.experiment,
            "objectives": [dict(objective) for objective in self.objectives],
            "performance": self.performance,
            "constraints": written(self.constraints),
            "base": dict(self.base),
            "reference_point": {**REFERENCE_POINT, "smallest_size_ratio": pareto.SMALLEST_SIZE},
            **self.hypervolumes(),
            "retention_at": self.retention_at(),
            "stability": None if stable is None else {**asdict(stable), "words": stability_sentence(stable)},
            "trials": trials,
        }

    @staticmethod
    def from_json(path: Path, content: Mapping[str, Any]) -> Front:
        """The front that `to_json` wrote; `path` is what messages call it.

        Raises:
            CorruptFileError: something is missing or of the wrong type.
        """
        objectives = field(path, content, "objectives", list)
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in objectives):
            raise CorruptFileError(f"{path} is corrupt: 'objectives' is {objectives!r}")
        performance = field(path, content, "performance", str)
        trials = field(path, content, "trials", list)
        if not all(isinstance(entry, dict) for entry in trials):
            raise CorruptFileError(f"{path} is corrupt: 'trials' holds something that is no object")
        names = [entry["name"] for entry in objectives]
        bounds = field(path, content, "constraints", dict) if "constraints" in content else {}
        try:
            constraints = parse_all(bounds)
        except Fault as fault:
            raise CorruptFileError(f"{path} is corrupt: constraints.{fault.key} {fault}") from None
        return Front(
            experiment=field(path, content, "experiment", str),
            objectives=tuple(objectives),
            performance=performance,
            base=field(path, content, "base", dict),
            trials=tuple(_front_trial(path, entry, names, performance) for entry in trials),
            constraints=constraints,
        )


def front_results(
    results: Sequence[TrialResult], objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> list[TrialResult]:
    """The complete, feasible, non-dominated results: smallest first, equal sizes by retention, then number.

    A trial that lacks a measurement that a constraint bounds is not feasible.
    """
    candidates = [result for result in results if result.complete and feasible(constraints, result)]
    if not candidates:
        return []
    values = np.array([[result.objectives[o.name] for o in objectives] for result in candidates])
    chosen = pareto.front(values, [objective.direction for objective in objectives])
    return sorted((candidates[index] for index in chosen), key=_by_size)


def build_front(
    experiment: str,
    objectives: Sequence[Objective],
    performance: str,
    base: Base,
    members: Sequence[TrialResult],
    remeasured: Mapping[int, Remeasured] | None = None,
    constraints: Sequence[Constraint] = (),
) -> Front:
    """The front of these results, as `front_results` gives them.

    Args:
        experiment: the name of the search.
        objectives: declared objectives.
        performance: the name of the agent's performance measure.
        base: what the trials were pruned from.
        members: complete results, sorted.
        remeasured: trial -> what it reached at the end of the search.
        constraints: of the search.
    """
    again = remeasured or {}
    return Front(
        experiment=experiment,
        objectives=tuple({"name": o.name, "direction": o.direction, "unit": o.unit} for o in objectives),
        performance=performance,
        base={
            "parameters": base.parameters,
            "macs": base.macs,
            "performance": dict(base.performance),
            "trivial": dict(base.trivial),
            "reported": dict(base.reported),
            "widths": dict(base.widths),
            "seed": base.seed,
            "training_seconds": base.training_seconds,
        },
        trials=tuple(_member(result, again.get(result.number)) for result in members),
        constraints=tuple(constraints),
    )


def percent(ratio: float) -> str:
    """A size ratio as a percentage with three significant digits at most."""
    value = 100 * ratio
    return f"{value:.0f} %" if value >= 99.95 or value == round(value) else f"{value:.3g} %"


def _member(result: TrialResult, again: Remeasured | None) -> FrontTrial:
    assert result.parameters is not None
    assert result.size_ratio is not None
    assert result.macs is not None
    assert result.retention is not None
    latencies = dict(result.latencies if again is None else again.latencies)
    return FrontTrial(
        trial=result.number,
        origin=result.origin,
        parameters=result.parameters,
        size_ratio=result.size_ratio,
        macs=result.macs,
        objectives={name: latencies.get(name, value) for name, value in result.objectives.items()},
        retention=result.retention,
        test_performance=None if again is None else again.performance,
        test_retention=None if again is None else again.retention,
        coefficients=result.plan.coefficients,
        ratios=result.plan.ratios,
        options=result.options,
        bundle=f"models/{result.number}",
        latency_host=again.host if again is not None and latencies else None,
        measured={
            name: value
            for name, value in {**result.performance, **latencies}.items()
            if name not in result.objectives
        },
    )


def feasible(constraints: Sequence[Constraint], result: TrialResult) -> bool:
    """Whether a result meets all constraints; what was not measured meets none."""
    return first_missed(constraints, result.measurement) is None


def _by_size(result: TrialResult) -> tuple[float, float, int]:
    return (result.parameters or 0, -(result.retention or 0.0), result.number)


def _front_trial(
    path: Path, entry: Mapping[str, Any], objectives: Sequence[str], performance: str
) -> FrontTrial:
    def optional(name: str) -> float | None:
        return None if entry.get(name) is None else number(path, entry, name)

    measured = field(path, entry, "measured", dict) if "measured" in entry else {}
    return FrontTrial(
        trial=field(path, entry, "trial", int),
        origin=field(path, entry, "origin", str),
        parameters=field(path, entry, "parameters", int),
        size_ratio=number(path, entry, "size_ratio"),
        macs=field(path, entry, "macs", int),
        objectives={name: number(path, entry, name) for name in objectives},
        retention=number(path, entry, "retention"),
        test_performance=optional(f"test_{performance}"),
        test_retention=optional("test_retention"),
        coefficients=field(path, entry, "coefficients", dict),
        ratios=field(path, entry, "ratios", dict),
        options=field(path, entry, "options", dict) if "options" in entry else {},  # fronts of before
        bundle=field(path, entry, "bundle", str),
        latency_host=entry.get("latency_host"),
        measured={name: number(path, measured, name) for name in measured},
    )
