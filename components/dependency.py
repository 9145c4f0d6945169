"""The dependency graph of a model: which parameter slices have to be removed together.

`trace` (in `components.tracing`) makes a `DependencyGraph`; everything else reads it. A *channel* is the
smallest removable unit: every parameter slice, in every layer it touches, that must go together. Channels
of one kind that may be removed independently of one another form a `Group`: one width of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Keep = Mapping[str, Tensor]
"""For every group name, a bool tensor of shape `(group.size,)`: True keeps the channel."""

Scores = dict[str, Tensor]
"""For every group name, a float tensor of shape `(group.size,)`: higher means keep."""


@dataclass(frozen=True)
class Member:
    """The slices of one parameter (or buffer) axis that belong to the channels of one group.

    Attributes:
        parameter: name in the model's `state_dict`.
        axis: the axis of that tensor.
        indices: long tensor, `(group.size, k)`: the k positions along `axis` that channel c owns; k > 1 where
            a channel is repeated (convolution -> flatten -> linear) or tied.
        consumes: True where the axis is contracted with an activation, so the tensor *reads* the channels
            (the input axis of a linear layer); False where it makes or accompanies them (its output axis,
            a bias, normalisation parameters and statistics).
    """

    parameter: str
    axis: int
    indices: Tensor
    consumes: bool


@dataclass(frozen=True)
class Group:
    """Channels of one kind that may be removed independently of one another: one width of the model."""

    name: str
    components: frozenset[str]
    size: int
    members: tuple[Member, ...]

    @property
    def is_coupling(self) -> bool:
        """True where the group touches more than one component."""
        return len(self.components) > 1


@dataclass(frozen=True)
class Consumer:
    """A parameter that contracts an activation: `y = W x (+ b)`, in any layout.

    Attributes:
        weight: name of the weight in the state_dict.
        kind: `linear` (a matrix), `batched` (a stack of matrices, batch axis first), `convolution` or
            `transposed_convolution`.
        input_axis: the contracted axis of the weight.
        output_axis: the axis of the weight that its result carries.
        bias: name of the bias added by the same operator, or None.
        groups: of a grouped convolution; 1 otherwise.
    """

    weight: str
    kind: str
    input_axis: int
    output_axis: int
    bias: str | None
    groups: int = 1


@dataclass(frozen=True)
class DependencyGraph:
    """What may be removed from a model, and what has to go with it.

    Attributes:
        groups: in the order in which their producers are registered in the model.
        components: component name -> module path prefixes.
        shapes: every traced parameter and buffer, by state_dict name.
        consumers: every parameter that contracts an activation, in the order of the computation.
        aliases: second names of shared parameters -> the name the members use.
    """

    groups: tuple[Group, ...]
    components: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, torch.Size]
    consumers: tuple[Consumer, ...] = ()
    aliases: Mapping[str, str] | None = None

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """The groups by name."""
        return {group.name: group for group in self.groups}

    @cached_property
    def widths(self) -> dict[str, int]:
        """The size of every group, by name."""
        return {group.name: group.size for group in self.groups}

    def component_of(self, parameter: str) -> str:
        """The component that owns a parameter.

        Raises:
            KeyError: no component's prefixes cover it.
        """
        component = owner(parameter, self.components)
        if component is None:
            raise KeyError(f"parameter {parameter!r} belongs to none of {sorted(self.components)}")
        return component

    def keep_all(self) -> dict[str, Tensor]:
        """The keep masks that remove nothing."""
        return {group.name: torch.ones(group.size, dtype=torch.bool) for group in self.groups}


def owner(parameter: str, components: Mapping[str, Iterable[str]]) -> str | None:
    """The component whose longest module path prefix covers a parameter, or None."""
    best, longest = None, -1
    for component, prefixes in components.items():
        for prefix in prefixes:
            covers = parameter == prefix or parameter.startswith(prefix + ".") or prefix == ""
            if covers and len(prefix) > longest:
                best, longest = component, len(prefix)
    return best
