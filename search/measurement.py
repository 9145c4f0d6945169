"""What an agent achieves, and what one decision of it costs."""

from __future__ import annotations

from agents.agent import Agent, Split
from components.size import latency, macs

LATENCIES = frozenset({"latency_median_ms", "latency_p99_ms"})
"""Objectives whose value depends on the machine and on what else it does."""


def performance_of(agent: Agent, split: Split) -> float:
    """The agent's performance measure on a split."""
    return float(agent.evaluate(split)[agent.performance.name])


def decision_macs(agent: Agent) -> int:
    """Multiply-accumulate operations of one decision."""
    one = agent.example_inputs(1)
    return macs(lambda: agent.act(one))


def decision_latency(agent: Agent) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds, of one decision on this machine, now."""
    one = agent.example_inputs(1)
    measured = latency(lambda: agent.act(one))
    return {"latency_median_ms": measured.median_ms, "latency_p99_ms": measured.p99_ms}
