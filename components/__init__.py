"""The pruning domain: trace a model, score its channels, slice it, refit what reads the slices.

graph = components.trace(model, program, components={"encoder": ["encoder"], ...}, ties=[...])
scores = {"l2": components.importance.l2(graph, model.state_dict())}
plan = components.PruningPlan(coefficients={"l2": 1.0}, ratios={"encoder.0": 0.5})
keep = components.choose(graph, scores, plan)
state = components.prune(graph, model.state_dict(), keep)
"""

from components import importance
from components.calibration import record
from components.choosing import choose
from components.dependency import Consumer, DependencyGraph, Group, Member
from components.errors import UserError
from components.plan import PruningPlan
from components.pruning import prune
from components.reconstruction import reconstruct
from components.tracing import UnsupportedOperatorError, trace

__all__ = [
    "Consumer",
    "DependencyGraph",
    "Group",
    "Member",
    "PruningPlan",
    "UnsupportedOperatorError",
    "UserError",
    "choose",
    "importance",
    "prune",
    "reconstruct",
    "record",
    "trace",
]
