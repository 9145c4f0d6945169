"""The agent of a trial: pruned at once, or step by step while it is fine-tuned or trained from scratch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.agent import Agent, Comparing, Progress, Shrinkable, Student, agent_class, unwatched
from components import DependencyGraph
from components.choosing import choose
from components.dependency import Scores
from components.pruning import kept_indices, slice_state
from components.reconstruction import reconstruct
from search.arrays import to_tensors
from search.base import TRACE_ROWS, Base, trace_agent, train_base
from search.gradual import GradualPruning
from search.prepared_base import prepare
from search.stages import Stages
from search.trial_types import GradualSettings, RepairedBy, TrialSpec


@dataclass(frozen=True)
class PrunedAgent:
    """An agent that was pruned, or that will be in the course of its fine-tuning.

    Attributes:
        agent: the agent.
        graph: of the dense model.
        base: what it is compared with.
        kept: group -> indices of the dense channels that it has, ascending; as of now.
        fine_tune: as the agent's; prunes along the way where that is not done.
        repaired_by: what the present weights are from; empty where it is still to be pruned, or is whole.
        is_whole: nothing was removed from a trained agent: there is nothing to repair.
    """

    agent: Agent
    graph: DependencyGraph
    base: Base
    kept: Callable[[], Mapping[str, Tensor]]
    fine_tune: Callable[[str, int, int, Progress], Mapping[str, float] | None]
    repaired_by: RepairedBy
    is_whole: bool = False


def pruned_agent(spec: TrialSpec, base: Base, device: str, stages: Stages) -> PrunedAgent:
    """The agent of a trial, pruned as far as that comes before fine-tuning."""
    settings = spec.pruning
    if settings.gradual is not None:
        if settings.base_mode == "per_trial":
            return _pruned_in_training(spec, settings.gradual, base, device, stages)
        return _to_be_pruned_in_fine_tuning(spec, settings.gradual, base, device, stages)
    if settings.base_mode == "per_trial":
        stages.enter("train")
        base = train_base(
            base.kind,
            base.options,
            seed=spec.seed,
            metrics=settings.metrics,
            reconstruction=settings.reconstruction,
            tracking=settings.tracking,
            data=to_tensors(base.data),
            device=device,
            threads=settings.threads,
        )
    return _pruned_at_once(spec, base, device, stages)


def _pruned_at_once(spec: TrialSpec, base: Base, device: str, stages: Stages) -> PrunedAgent:
    """Score and mix, choose what to keep, slice the model and what mirrors it, reconstruct."""
    settings = spec.pruning
    stages.enter("score")
    dense = prepare(base, device)

    stages.enter("mix")
    keep = choose(dense.graph, dense.scores, spec.plan, settings.ranking)

    stages.enter("slice")
    indices = kept_indices(dense.graph, keep)
    sliced = {section: slice_state(dense.graph, state, indices) for section, state in dense.states.items()}
    agent = dense.build({group: int(mask.sum()) for group, mask in keep.items()}, spec.options)
    agent.load_states(sliced)
    kept = {group: mask.nonzero().flatten() for group, mask in keep.items()}
    if isinstance(agent, Student):
        agent.learn_from(dense.agent, {group: channels.to(device) for group, channels in kept.items()})

    if all(bool(mask.all()) for mask in keep.values()):
        return PrunedAgent(agent, dense.graph, base, lambda: kept, agent.fine_tune, "", is_whole=True)

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
    return PrunedAgent(agent, dense.graph, base, lambda: kept, agent.fine_tune, "reconstruction")


def _to_be_pruned_in_fine_tuning(
    spec: TrialSpec, gradual: GradualSettings, base: Base, device: str, stages: Stages
) -> PrunedAgent:
    """The base itself, which loses its channels step by step while it is fine-tuned."""
    stages.enter("score")
    dense = prepare(base, device)
    agent = dense.build(base.widths, spec.options)
    agent.load_states(dense.states)
    if isinstance(agent, Student):
        agent.learn_from(
            dense.agent,
            {group: torch.arange(size, device=device) for group, size in dense.graph.widths.items()},
        )
    pruning = _gradual_pruning(spec, gradual, agent, dense.graph, stages, dense.scores)

    def fine_tune(method: str, updates: int, seed: int, progress: Progress) -> Mapping[str, float] | None:
        assert isinstance(agent, Shrinkable)
        told = agent.fine_tune(method, updates, seed, pruning.during(progress), pruning.tracker)
        pruning.require_finished()
        return told

    return PrunedAgent(agent, dense.graph, base, lambda: pruning.kept, fine_tune, "")


def _pruned_in_training(
    spec: TrialSpec, gradual: GradualSettings, base: Base, device: str, stages: Stages
) -> PrunedAgent:
    """A new agent that is trained from scratch and loses its channels on the way; compared with the base."""
    stages.enter("train")
    agent = agent_class(base.kind)({**base.options, **spec.options}, None, to_tensors(base.data), device)
    graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, spec.seed))
    assert isinstance(agent, Shrinkable)
    updates_per_step = agent.training_updates / agent.training_steps
    pruning = _gradual_pruning(spec, gradual, agent, graph, stages, None, updates_per_step)
    agent.train(spec.seed, pruning.tracker, pruning.during(unwatched))
    pruning.require_finished()
    if isinstance(agent, Comparing):
        agent.compare_with(prepare(base, device).agent)
    return PrunedAgent(agent, graph, base, lambda: pruning.kept, agent.fine_tune, "training")


def _gradual_pruning(
    spec: TrialSpec,
    gradual: GradualSettings,
    agent: Agent,
    graph: DependencyGraph,
    stages: Stages,
    scores: Mapping[str, Scores] | None,
    updates_per_step: float = 1.0,
) -> GradualPruning:
    settings = spec.pruning
    return GradualPruning(
        agent,
        graph,
        spec.plan,
        gradual,
        ranking=settings.ranking,
        reconstruction=settings.reconstruction,
        seed=spec.seed,
        stages=stages,
        updates_per_step=updates_per_step,
        scores=scores,
    )
