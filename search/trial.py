"""One trial: a plan in, a pruned, repaired and measured agent out."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from agents.agent import Agent, Objective, Rankable, Student, rung_methods
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
from search.usage import Usage

__all__ = ["NonFiniteError", "TrialResult", "TrialSettings", "TrialSpec", "run_trial", "trial_seed"]


STAGES = ("train", "score", "mix", "slice", "reconstruct", "fine_tune", "report", "evaluate")
"""The stages of a trial; `train` only where it trains its own base, `report` waits at rungs."""


class NonFiniteError(ArithmeticError):
    """A measurement of a trial is NaN or infinite: a failure, never a number to learn from."""


def _unheard(rung: TrialResult) -> None:
    """Nobody stops this trial."""


def run_trial(
    spec: TrialSpec, base: Base, device: str = "cpu", report: Callable[[TrialResult], None] = _unheard
) -> TrialResult:
    """Prune, repair, fine-tune and measure one plan.

    Of the reconstructed and the fine-tuned agent, the one that performs better on validation data is kept.
    Every fault of the trial ends as a failed result that names the stage, so that the worker survives it. The
    same specification, base, device and thread count give the same result, bit for bit, but for timings;
    rungs change nothing but what is said of them.

    Args:
        spec: what to do.
        base: the shared base; in `per_trial` mode the untrained one, from which the trial trains its own.
        device: torch device.
        report: called during fine-tuning at every rung of the specification, with what the result is if the
            trial is stopped there. It stops the trial by raising what is no `Exception`. An agent without a
            rung loss, or whose fine-tuning tells no progress, reaches no rung.
    """
    stages = Stages()
    started = timestamp()
    usage = Usage(device)

    def signed(result: TrialResult) -> TrialResult:
        return replace(
            result,
            updates=stages.updates,
            timings=stages.seconds,
            usage=usage.so_far(),
            device=device,
            host=platform.node(),
            started=started,
            finished=timestamp(),
        )

    try:
        with deterministic(spec.seed, spec.pruning.threads):
            result = _pipeline(spec, base, device, stages, lambda rung: report(signed(rung)))
    except Exception as error:
        reason = f"{stages.current}: {type(error).__name__}: {one_line(error)}"
        result = TrialResult.failure(spec, reason)
    return signed(result)


def _pipeline(
    spec: TrialSpec, base: Base, device: str, stages: Stages, report: Callable[[TrialResult], None]
) -> TrialResult:
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

    parameters = parameter_count(agent.model)
    unmeasured = replace(
        TrialResult.of(spec, "stopped"),
        parameters=parameters,
        size_ratio=parameters / base.parameters,
        macs=decision_macs(agent) if settings.rungs and "macs" in settings.wanted else None,
        base_performance=dict(base.performance),
        component_sizes=component_sizes(dense.graph, agent.model),
        widths=widths,
        kept={group: tuple(channels.tolist()) for group, channels in kept.items()},
    )

    measure = agent.performance
    tuned: dict[str, float] = {}
    tuned_state: dict[str, Tensor] = {}
    facts: dict[str, float] = {}
    course = Course(agent, settings, stages, lambda losses: report(replace(unmeasured, rung_losses=losses)))
    if settings.fine_tune_updates > 0:
        stages.enter("fine_tune")
        try:
            told = agent.fine_tune(course.method, settings.fine_tune_updates, spec.seed, course) or {}
            stages.updates = settings.fine_tune_updates  # of one that tells no progress, too
            stages.enter("evaluate")
            tuned = dict(agent.evaluate("validation"))
            _require_finite({**told, **tuned})
            facts = {name: float(value) for name, value in told.items()}
            tuned_state = {name: tensor.clone() for name, tensor in agent.states()["model"].items()}
        except ArithmeticError:  # it diverged: what reconstruction made is still there
            facts = {"diverged": 1.0}
        agent.load_states({"model": repaired})

    # After fine-tuning, because a trial that is stopped there needs none of it.
    stages.enter("evaluate")
    performance = agent.evaluate("validation")
    reached = float(performance[measure.name])
    rungs = [(0, reached)]
    repaired_by: RepairedBy = "reconstruction"
    if settings.fine_tune_updates > 0:
        after = float(tuned.get(measure.name, math.nan))
        rungs.append((settings.fine_tune_updates, after))
        if tuned_state and _as_good(after, reached, measure):
            performance, reached, repaired_by = tuned, after, "fine_tuning"
            agent.load_states({"model": tuned_state})

    decision = decision_macs(agent)
    latencies = decision_latency(agent) if LATENCIES & settings.wanted else {}
    measured = {"parameters": float(parameters), "macs": float(decision), measure.name: reached, **latencies}
    retention = base.retention(reached)
    _require_finite({**performance, **measured, "retention": retention})
    stages.leave()
    return replace(
        unmeasured,
        status="complete",
        objectives={name: measured[name] for name in settings.objectives},
        macs=decision,
        retention=retention,
        performance={name: float(value) for name, value in performance.items()},
        latencies=latencies,
        rungs=tuple(rung for rung in rungs if math.isfinite(rung[1])),
        rung_losses=course.losses,
        fine_tuning=facts,
        repaired_by=repaired_by,
        state=to_arrays(agent.states()["model"]),
    )


class Course:
    """What fine-tuning tells its progress to: counts updates, and at rungs measures the loss and reports it.

    Args:
        agent: being fine-tuned.
        settings: which method, and which rungs.
        stages: gets the updates and the time.
        report: called at every rung with `losses`.

    Attributes:
        method: of the fine-tuning.
        losses: (updates, rung loss) of the rungs that were reached, ascending.
    """

    def __init__(
        self,
        agent: Agent,
        settings: TrialSettings,
        stages: Stages,
        report: Callable[[tuple[tuple[int, float], ...]], None],
    ) -> None:
        self.method = settings.fine_tune_method or agent.fine_tune_methods[0]
        self.losses: tuple[tuple[int, float], ...] = ()
        self._agent = agent if isinstance(agent, Rankable) and self.method in rung_methods(agent) else None
        self._rungs = settings.rungs
        self._stages = stages
        self._report = report

    def __call__(self, done: int, total: int, note: str) -> None:
        """`done` updates are made.

        Raises:
            NonFiniteError: the rung loss is NaN or infinite; what has diverged is not worth further updates.
        """
        self._stages.updates = done
        reached = self.losses[-1][0] if self.losses else 0
        if self._agent is None or done not in self._rungs or done <= reached:
            return
        loss = float(self._agent.rung_loss())
        _require_finite({"the rung loss": loss})
        self.losses += ((done, loss),)
        self._stages.enter("report")
        self._report(self.losses)
        self._stages.enter("fine_tune")


class Stages:
    """A stopwatch that knows which stage of a trial is under way; a stage entered again goes on.

    Attributes:
        current: the stage under way.
        updates: of fine-tuning that were made.
    """

    def __init__(self) -> None:
        self.current = "start"
        self.updates = 0
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


def _as_good(tuned: float, reconstructed: float, measure: Objective) -> bool:
    """Whether the fine-tuned performance is no worse; what is not finite is worse than what is."""
    if not (math.isfinite(tuned) and math.isfinite(reconstructed)):
        return not math.isfinite(reconstructed)
    return tuned >= reconstructed if measure.direction == "maximize" else tuned <= reconstructed


def _require_finite(measured: Mapping[str, float]) -> None:
    for name, value in measured.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value}")
