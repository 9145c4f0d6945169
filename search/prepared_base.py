"""A base made ready for pruning in this process: loaded, traced, moved to a device once for many trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor, nn

from agents.agent import Agent, agent_class, calibration_program
from components import DependencyGraph
from components.calibration import Recording, record
from components.dependency import Scores
from components.gram import Grams
from search.arrays import to_tensors
from search.base import Base, trace_agent


@dataclass(frozen=True, eq=False)
class PreparedBase:
    """What trials read and never change.

    Attributes:
        base: where it comes from.
        agent: the dense agent.
        graph: of `agent.model`.
        states, scores, calibration, grams: as in the base, as tensors; states and calibration on the device.
        device: torch device.
    """

    base: Base
    agent: Agent
    graph: DependencyGraph
    states: Mapping[str, Mapping[str, Tensor]]
    scores: Mapping[str, Scores]
    calibration: Mapping[str, Tensor]
    grams: Grams | None
    device: str

    @cached_property
    def recording(self) -> Recording:
        """What the dense model makes of the calibration inputs, for sequential reconstruction."""
        return record(self.graph, self.agent.model, self.program, with_grams=False)

    def program(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What reconstruction runs: the agent's calls, on the calibration inputs."""
        return calibration_program(self.agent)(model, self.calibration)

    def build(self, widths: Mapping[str, int], options: Mapping[str, int] | None = None) -> Agent:
        """A new agent with other widths and the same data; its weights are random.

        Args:
            widths: group -> channels.
            options: those in which it differs from the base.
        """
        chosen = {**self.base.options, **(options or {})}
        return agent_class(self.base.kind)(chosen, widths, self.agent.data(), self.device)


@lru_cache(maxsize=1)
def prepare(base: Base, device: str = "cpu") -> PreparedBase:
    """Make a base ready. The latest one is remembered, by identity, for the next trial of this process."""
    agent = agent_class(base.kind)(base.options, base.widths, to_tensors(base.data), device)
    states = {section: to_tensors(state, device) for section, state in base.states.items()}
    if states:  # an untrained base has none
        agent.load_states(states)
    calibration = to_tensors(base.calibration, device)
    return PreparedBase(
        base=base,
        agent=agent,
        graph=trace_agent(agent, calibration),
        states=states,
        scores={metric: to_tensors(by_group) for metric, by_group in base.scores.items()},
        calibration=calibration,
        grams=None if base.grams is None else Grams.from_tensors(to_tensors(base.grams, device)),
        device=device,
    )
