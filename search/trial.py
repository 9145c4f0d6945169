"""One trial: a plan in, a pruned, repaired and measured agent out."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping
from dataclasses import replace

from agents.agent import Objective, Student
from components.mixing import choose
from components.pruning import kept_indices, slice_state
from components.reconstruction import reconstruct
from components.size import component_sizes, parameter_count
from search.arrays import to_arrays, to_tensors
from search.base import Base, train_base
from search.determinism import deterministic
from search.durable_files import one_line
from search.measurement import LATENCIES, decision_latency, decision_macs
from search.prepared_base import prepare
from search.trial_types import RepairedBy, TrialResult, TrialSettings, TrialSpec, timestamp, trial_seed

__all__ = ["NonFiniteError", "TrialResult", "TrialSettings", "TrialSpec", "run_trial", "trial_seed"]


STAGES = ("train", "score", "mix", "slice", "reconstruct", "fine_tune", "evaluate")
"""The stages of a trial; `train` only where it trains its own base."""


class NonFiniteError(ArithmeticError):
    """A measurement of a trial is NaN or infinite: a failure, never a number to learn from."""


def run_trial(spec: TrialSpec, base: Base, device: str = "cpu") -> TrialResult:
    """Prune, repair, fine-tune and measure one plan.

    Of the reconstructed and the fine-tuned agent, the one that performs better on validation data is kept.
    Every fault of the trial ends as a failed result that names the stage, so that the worker survives it. The
    same specification, base, device and thread count give the same result, bit for bit, but for timings.

    Args:
        spec: what to do.
        base: the shared base; in `per_trial` mode the untrained one, from which the trial trains its own.
        device: torch device.
    """
    stages = Stages()
    started = timestamp()
    try:
        with deterministic(spec.seed, spec.pruning.threads):
            result = _pipeline(spec, base, device, stages)
    except Exception as error:
        reason = f"{stages.current}: {type(error).__name__}: {one_line(error)}"
        result = TrialResult.failure(spec, reason)
    return replace(
        result,
        timings=stages.seconds,
        device=device,
        host=platform.node(),
        started=started,
        finished=timestamp(),
    )


def _pipeline(spec: TrialSpec, base: Base, device: str, stages: Stages) -> TrialResult:
    """The trial itself: see `run_trial`."""
    settings = spec.pruning
    if settings.base_mode == "per_trial":
        stages.enter("train")
        base = train_base(
            base.kind,
            base.options,
            seed=spec.seed,
            metrics=settings.metrics,
            reconstruction=settings.reconstruction,
            data=to_tensors(base.data),
            device=device,
            threads=settings.threads,
        )

    stages.enter("score")
    dense = prepare(base, device)

    stages.enter("mix")
    keep = choose(dense.graph, dense.scores, spec.plan)
    widths = {group: int(mask.sum()) for group, mask in keep.items()}

    stages.enter("slice")
    indices = kept_indices(dense.graph, keep)
    sliced = {section: slice_state(dense.graph, state, indices) for section, state in dense.states.items()}
    agent = dense.build(widths, spec.options)
    agent.load_states(sliced)
    kept = {group: mask.nonzero().flatten() for group, mask in keep.items()}
    if isinstance(agent, Student):
        agent.learn_from(dense.agent, {group: channels.to(device) for group, channels in kept.items()})

    stages.enter("reconstruct")
    repaired = reconstruct(
        dense.graph,
        dense.states["model"],
        agent.model,
        keep,
        method=settings.reconstruction,
        grams=dense.grams,
        recording=dense.recording if settings.reconstruction == "sequential" else None,
        program=dense.program,
    )
    agent.load_states({**sliced, "model": repaired})

    stages.enter("evaluate")
    measure = agent.performance
    performance = agent.evaluate("validation")
    reached = float(performance[measure.name])
    rungs = [(0, reached)]
    repaired_by: RepairedBy = "reconstruction"
    facts: dict[str, float] = {}

    if settings.fine_tune_updates > 0:
        stages.enter("fine_tune")
        method = settings.fine_tune_method or agent.fine_tune_methods[0]
        tuned: dict[str, float] = {}
        try:
            told = agent.fine_tune(method, settings.fine_tune_updates, spec.seed, _unheard) or {}
            stages.enter("evaluate")
            tuned = dict(agent.evaluate("validation"))
            _require_finite({**told, **tuned})
            facts = {name: float(value) for name, value in told.items()}
        except ArithmeticError:  # it diverged: what reconstruction made is still there
            facts = {"diverged": 1.0}
        after = float(tuned.get(measure.name, math.nan))
        rungs.append((settings.fine_tune_updates, after))
        if "diverged" not in facts and _as_good(after, reached, measure):
            performance, reached, repaired_by = tuned, after, "fine_tuning"
        else:
            agent.load_states({"model": repaired})

    parameters = parameter_count(agent.model)
    decision = decision_macs(agent)
    measured = {"parameters": float(parameters), "macs": float(decision), measure.name: reached}
    if LATENCIES & set(settings.objectives):
        measured.update(decision_latency(agent))
    retention = base.retention(reached)
    _require_finite({**performance, **measured, "retention": retention})
    stages.leave()
    return TrialResult(
        number=spec.number,
        status="complete",
        plan=spec.plan,
        origin=spec.origin,
        seed=spec.seed,
        options=spec.options,
        objectives={name: measured[name] for name in settings.objectives},
        parameters=parameters,
        size_ratio=parameters / base.parameters,
        macs=decision,
        retention=retention,
        performance={name: float(value) for name, value in performance.items()},
        base_performance=dict(base.performance),
        component_sizes=component_sizes(dense.graph, agent.model),
        widths=widths,
        kept={group: tuple(channels.tolist()) for group, channels in kept.items()},
        rungs=tuple(rung for rung in rungs if math.isfinite(rung[1])),
        fine_tuning=facts,
        repaired_by=repaired_by,
        state=to_arrays(agent.states()["model"]),
    )


class Stages:
    """A stopwatch that knows which stage of a trial is under way; a stage entered again goes on."""

    def __init__(self) -> None:
        self.current = "start"
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds, in the order of `STAGES`, those that were not entered left out."""
        return {stage: self._seconds[stage] for stage in STAGES if stage in self._seconds}

    def enter(self, stage: str) -> None:
        """End the current stage and begin another, one of `STAGES`."""
        self.leave()
        self.current = stage

    def leave(self) -> None:
        """End the current stage."""
        now = time.perf_counter()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self._since = now


def _unheard(done: int, total: int, note: str) -> None:
    """Progress inside a trial: nobody listens."""


def _as_good(tuned: float, reconstructed: float, measure: Objective) -> bool:
    """Whether the fine-tuned performance is no worse; what is not finite is worse than what is."""
    if not (math.isfinite(tuned) and math.isfinite(reconstructed)):
        return not math.isfinite(reconstructed)
    return tuned >= reconstructed if measure.direction == "maximize" else tuned <= reconstructed


def _require_finite(measured: Mapping[str, float]) -> None:
    for name, value in measured.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value}")
