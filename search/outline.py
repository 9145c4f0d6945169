"""What a search would choose among: components, groups, couplings and the models that it can make.

Made from an untrained agent; nothing is trained, run or written.
"""

from __future__ import annotations

from dataclasses import dataclass

from agents.agent import Agent, agent_class
from components.dependency import DependencyGraph
from components.size import component_macs, component_sizes
from search.base import TRACE_ROWS, trace_agent
from search.checked_experiment import CheckedExperiment
from search.feasibility import PossibleModel, possible_models
from search.space import SearchSpace


@dataclass(frozen=True)
class ComponentCost:
    """A component of the unpruned agent.

    Attributes:
        name: of the component; `other` has what belongs to none.
        parameters: scalars.
        macs: multiply-accumulates of its weights in one decision.
    """

    name: str
    parameters: int
    macs: int


@dataclass(frozen=True)
class GroupFacts:
    """A pruning group.

    Attributes:
        name: of the group.
        channels: of the unpruned model.
        least: channels that always stay.
        components: whose parameters it cuts; several where it is a coupling group.
        shares_with: groups that are pruned by the same ratio.
        searched: False for a group that always stays whole: of one channel, or no wider than `round_to`.
    """

    name: str
    channels: int
    least: int
    components: tuple[str, ...]
    shares_with: tuple[str, ...]
    searched: bool


@dataclass(frozen=True)
class Outline:
    """What would be searched; made without training or running anything.

    Attributes:
        experiment: its name.
        kind: of the agent.
        trials, sampler, dimensions: of the search.
        components, groups: of the unpruned agent.
        models: the smallest, the middle and the largest possible one.
    """

    experiment: str
    kind: str
    trials: int
    sampler: str
    dimensions: int
    components: tuple[ComponentCost, ...]
    groups: tuple[GroupFacts, ...]
    models: tuple[PossibleModel, ...]


def outline(checked: CheckedExperiment) -> Outline:
    """What an experiment would search."""
    agent, space, config = checked.agent, checked.space, checked.config
    graph = trace_agent(agent, agent.calibration_inputs(TRACE_ROWS, config.base.seed))
    models = possible_models(config.agent.kind, agent, space)
    return Outline(
        experiment=config.name,
        kind=config.agent.kind,
        trials=config.search.trials,
        sampler=config.search.chosen_sampler,
        dimensions=len(space.dimensions),
        components=_components(config.agent.kind, agent, graph),
        groups=_groups(space, graph, models[0]),
        models=models,
    )


def _components(kind: str, agent: Agent, graph: DependencyGraph) -> tuple[ComponentCost, ...]:
    fresh = agent_class(kind)(agent.options, None, agent.data())  # it has made no copies of its weights yet
    one = fresh.example_inputs(1)
    products = component_macs(lambda: fresh.act(one), fresh.model, fresh.components)
    sizes = component_sizes(graph, agent.model)
    names = dict.fromkeys([*sizes, *products])
    return tuple(ComponentCost(name, sizes.get(name, 0), products.get(name, 0)) for name in names)


def _groups(space: SearchSpace, graph: DependencyGraph, smallest: PossibleModel) -> tuple[GroupFacts, ...]:
    return tuple(
        GroupFacts(
            name=group.name,
            channels=group.size,
            least=smallest.widths[group.name],
            components=tuple(name for name in graph.components if name in group.components),
            shares_with=tuple(
                other
                for other, keep in space.keeps.items()
                if keep == space.keeps.get(group.name) and other != group.name
            ),
            searched=group.name in space.keeps,
        )
        for group in graph.groups
    )
