"""Things that learn and act: the `Agent` protocol, and the agents that come with it."""

from agents.agent import Agent, Objective, Progress, Split, Tracker, agent_class

__all__ = ["Agent", "Objective", "Progress", "Split", "Tracker", "agent_class"]
