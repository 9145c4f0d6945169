"""The base: the trained, unpruned agent with everything that trials take from it.

Trained once, or inside every trial (`base: {mode: per_trial}`), handed to all workers and stored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import components
from agents.agent import Agent, Progress, Resumable, Split, agent_class, calibration_program, unwatched
from components import DependencyGraph, UserError, importance
from components.calibration import record
from components.size import parameter_count
from components.tracker import USUAL, ImportanceTracker, Tracking
from search.arrays import Arrays, to_arrays
from search.determinism import deterministic
from search.gpu_memory import peak_share
from search.measurement import decision_macs

SPLITS: tuple[Split, ...] = ("validation", "test")

CALIBRATION_ROWS = 1024
"""Rows of calibration inputs: what reconstruction is fitted on."""

TRACE_ROWS = 2
"""Rows that the model is traced with; the graph does not depend on them."""


@dataclass(frozen=True, eq=False)
class Base:
    """A trained, unpruned agent as plain values: what a worker needs to run any trial.

    Arrays may be read-only (they come from shared memory). Compared and hashed by identity.

    Attributes:
        kind: the agent's kind, as in `agent: {kind: ...}`.
        options: its complete options.
        widths: group -> channels.
        seed: of the training.
        states: section -> name -> array: `model` and, mirroring it, the optimizer's moments.
        scores: importance metric -> group -> `(channels,)` scores; higher means keep.
        history: the course of the importance over training, as the tracker recorded it.
        calibration: inputs of the agent's call program, rows first; of a trained base, taken after training.
        grams: Gram matrices of every consumer's input, for `reconstruction: gram`; None otherwise.
        data: what the agent fine-tunes and evaluates on; of a trained base, taken after training.
        parameters: scalars that training could change.
        macs: multiply-accumulate operations of one decision.
        performance: split -> the agent's performance measure; empty where the base is not trained.
        trivial: split -> the same measure for a trivial agent.
        reported: everything that the agent's evaluation reports on validation data, finite; empty where the
            base is not trained.
        training_seconds: wall time of the training; 0 where the base is not trained.
        gpu_share: of its GPU's memory, what training and evaluation took at their peak; None without a GPU.
    """

    kind: str
    options: Mapping[str, Any]
    widths: Mapping[str, int]
    seed: int
    states: Mapping[str, Arrays]
    scores: Mapping[str, Arrays]
    history: Arrays
    calibration: Arrays
    grams: Arrays | None
    data: Arrays
    parameters: int
    macs: int
    performance: Mapping[str, float]
    trivial: Mapping[str, float]
    training_seconds: float
    gpu_share: float | None = None
    reported: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """False for the base of a `per_trial` search: every trial trains one of its own from it."""
        return bool(self.performance)

    def retention(self, performance: float, split: Split = "validation") -> float:
        """(J - J0) / (J_base - J0): 1 is as good as the base, 0 as the trivial agent; higher is better.

        The sign of the measure cancels, so it holds for errors and for returns alike.
        """
        return retention(performance, self.performance[split], self.trivial[split])


def retention(performance: float, base: float, trivial: float) -> float:
    """How much of the base's advantage over a trivial agent is left; all three measured the same way."""
    return (performance - trivial) / (base - trivial)


def train_base(
    kind: str,
    options: Mapping[str, Any],
    *,
    seed: int,
    metrics: Sequence[str],
    reconstruction: str = "sequential",
    tracking: Tracking = USUAL,
    data: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = unwatched,
    checkpoint: Path | None = None,
) -> Base:
    """Train an agent, tracking importance along the way, score its channels and measure it.

    Args:
        kind: of the agent, as `agents.agent.agent_class` knows it.
        options: of the agent; defaults are filled in.
        seed: of everything random.
        metrics: importance metrics to score by.
        reconstruction: `gram` also keeps the Gram matrices.
        tracking: how closely importance is followed.
        data: of the agent; None loads it.
        device: torch device.
        threads: CPU threads; the result is bit-reproducible for one thread count.
        progress: is told how far the training is.
        checkpoint: directory of an agent that is `Resumable`, which goes on from what is there; None keeps
            none. The time that training took is then that since it last went on.

    Raises:
        UserError: unknown kind, metric or option, or the trained agent is no better than a trivial one.
    """
    with deterministic(seed, threads), peak_share(device) as gpu_share:
        here = None if data is None else {name: tensor.to(device) for name, tensor in data.items()}
        agent = agent_class(kind)(options, None, here, device)
        graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, seed))
        tracker = ImportanceTracker(graph, agent.model, **asdict(tracking))
        start = time.perf_counter()
        if checkpoint is not None and isinstance(agent, Resumable):
            agent.train_from(seed, tracker, progress, checkpoint)
        else:
            agent.train(seed, tracker, progress)
        seconds = time.perf_counter() - start
        scored = scored_base(kind, agent, graph, tracker, seed, metrics, reconstruction)
        reports = {split: agent.evaluate(split) for split in SPLITS}
        base = replace(
            scored,
            performance={split: float(report[agent.performance.name]) for split, report in reports.items()},
            training_seconds=seconds,
            reported={
                name: float(value) for name, value in reports["validation"].items() if math.isfinite(value)
            },
        )
        base = replace(base, gpu_share=gpu_share())
    _require_better_than_trivial(base, agent)
    return base


def scored_base(
    kind: str,
    agent: Agent,
    graph: DependencyGraph,
    tracker: ImportanceTracker,
    seed: int,
    metrics: Sequence[str],
    reconstruction: str,
) -> Base:
    """What trials take from an agent that has been training, its performance apart.

    Args:
        kind, seed, metrics, reconstruction: as in `train_base`.
        agent: as its training left it.
        graph: of its model.
        tracker: what followed the training.

    Raises:
        MissingStatisticsError: a metric needs what the tracker has not seen.
    """
    states = agent.states()
    # Only now: an agent that gathers its own data, as in reinforcement learning, has them by training.
    calibration = agent.calibration_inputs(CALIBRATION_ROWS, seed)
    needs = {importance.METRICS[metric].needs for metric in metrics if metric in importance.METRICS}
    statistics = tracker.statistics() if "statistics" in needs else None
    grams = None
    if reconstruction == "gram" or "grams" in needs:
        program = calibration_program(agent)
        grams = record(graph, agent.model, lambda model: program(model, calibration)).grams
    scores = {
        metric: importance.score(
            metric, graph, state=states["model"], statistics=statistics, grams=grams, seed=seed
        )
        for metric in metrics
    }
    return replace(
        _describe(kind, agent, graph, calibration, seed),
        states={section: to_arrays(state) for section, state in states.items()},
        scores={metric: to_arrays(by_group) for metric, by_group in scores.items()},
        history=to_arrays(tracker.history().to_tensors()),
        grams=to_arrays(grams.to_tensors()) if grams is not None and reconstruction == "gram" else None,
    )


def untrained_base(
    kind: str,
    options: Mapping[str, Any],
    *,
    seed: int,
    data: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
) -> Base:
    """The base of a `per_trial` search: shape, data and calibration inputs; each trial trains its own.

    It has no scores and no performance. Its size is the size of every base that is trained from it.

    Raises:
        UserError: unknown kind or option.
    """
    with deterministic(seed):
        agent = agent_class(kind)(options, None, data, device)
        calibration = agent.calibration_inputs(CALIBRATION_ROWS, seed)
        return _describe(kind, agent, trace_agent(agent, calibration), calibration, seed)


def trace_agent(agent: Agent, calibration: Mapping[str, Tensor]) -> DependencyGraph:
    """The dependency graph of an agent's model, traced on the first calibration rows."""
    few = {name: rows[:TRACE_ROWS] for name, rows in calibration.items()}
    return components.trace(
        agent.model, lambda model: agent.program(model, few), components=agent.components, ties=agent.ties
    )


def _describe(
    kind: str, agent: Agent, graph: DependencyGraph, calibration: Mapping[str, Tensor], seed: int
) -> Base:
    """The base of an agent as it is, as if untrained."""
    return Base(
        kind=kind,
        options=dict(agent.options),
        widths=graph.widths,
        seed=seed,
        states={},
        scores={},
        history={},
        calibration=to_arrays(calibration),
        grams=None,
        data=to_arrays(agent.data()),
        parameters=parameter_count(agent.model),
        macs=decision_macs(agent),
        performance={},
        trivial={split: float(agent.trivial(split)) for split in SPLITS},
        training_seconds=0.0,
    )


def _require_better_than_trivial(base: Base, agent: Agent) -> None:
    """Retention divides by the base's advantage over the trivial agent, so there has to be one."""
    objective = agent.performance
    for split, reached in base.performance.items():
        trivial = base.trivial[split]
        better = reached > trivial if objective.direction == "maximize" else reached < trivial
        if not better:  # NaN is not better either
            raise UserError(
                f"the trained {base.kind} is no better than a trivial agent: its {split} {objective.name} is "
                f"{reached:.6g}, the trivial one's {trivial:.6g}; train it for longer"
            )
