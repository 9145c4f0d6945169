"""The pruning domain: trace a model, score its channels, slice it, refit what reads the slices."""

from components.dependency import Consumer, DependencyGraph, Group, Member
from components.errors import UserError
from components.pruning import prune
from components.tracing import UnsupportedOperatorError, trace

__all__ = [
    "Consumer",
    "DependencyGraph",
    "Group",
    "Member",
    "UnsupportedOperatorError",
    "UserError",
    "prune",
    "trace",
]
