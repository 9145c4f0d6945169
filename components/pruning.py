"""Slice a model's state, and every state that mirrors it, down to the kept channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.dependency import Consumer, DependencyGraph, Group, Keep
from components.errors import UserError, nearest

KeptIndices = Mapping[str, tuple[Tensor | None, ...]]
"""For every parameter that loses something: per axis the kept indices, or None for all of them."""


def kept_indices(graph: DependencyGraph, keep: Keep) -> dict[str, tuple[Tensor | None, ...]]:
    """Which indices of every parameter axis stay.

    Args:
        graph: from `trace`.
        keep: one bool mask of shape `(group.size,)` per group; groups that are not named keep everything.

    Raises:
        UserError: an unknown group, a mask of another size or dtype, or a mask that keeps nothing.
    """
    unknown = sorted(set(keep) - set(graph.by_name))
    if unknown:
        raise UserError(f"unknown pruning group {unknown[0]!r}; {nearest(unknown[0], graph.by_name)}")
    masks: dict[tuple[str, int], NDArray[np.bool_]] = {}  # NumPy: these are many and small
    for name, kept in keep.items():
        group = graph.by_name[name]
        _check_mask(name, kept, group.size)
        if kept.all():
            continue
        removed = ~kept.cpu().numpy()
        for member in group.members:
            key = member.parameter, member.axis
            if key not in masks:
                masks[key] = np.ones(graph.shapes[member.parameter][member.axis], dtype=np.bool_)
            masks[key][member.indices.numpy()[removed]] = False
    found: dict[str, list[Tensor | None]] = {}
    for (name, axis), mask in masks.items():
        axes = found.setdefault(name, [None] * len(graph.shapes[name]))
        axes[axis] = torch.from_numpy(np.flatnonzero(mask))
    return {name: tuple(axes) for name, axes in found.items()}


def _check_mask(name: str, kept: Any, size: int) -> None:
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape != (size,):
        given = f"{kept.dtype} of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else repr(kept)
        raise UserError(f"the mask of group {name!r} is {given}; it has to be torch.bool of shape ({size},)")
    if not kept.any():
        raise UserError(f"the mask of group {name!r} keeps nothing; at least one of {size} has to stay")


def _check_shape(name: str, tensor: Any, shape: torch.Size) -> None:
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name!r} is {type(tensor).__name__} in the state; it has to be a tensor")
    if tensor.shape != shape:
        raise UserError(
            f"{name!r} has shape {tuple(tensor.shape)} in the state and {tuple(shape)} in the traced model"
        )


def slice_state(
    graph: DependencyGraph, state: Mapping[str, Tensor], indices: KeptIndices
) -> dict[str, Tensor]:
    """Cut every tensor of a state to the kept indices; the tensors returned share no memory with it.

    Raises:
        UserError: a name or shape that the traced model does not have.
    """
    aliases = graph.aliases or {}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        known = aliases.get(name, name)
        if known not in graph.shapes:
            raise UserError(f"the state has {name!r}, which the traced model does not have")
        _check_shape(name, tensor, graph.shapes[known])
        piece = tensor.detach()
        for axis, kept in enumerate(indices.get(known, ())):
            if kept is not None:
                piece = piece.index_select(axis, kept.to(piece.device))
        result[name] = piece if known in indices else piece.clone()
    return result


def restricted(graph: DependencyGraph, keep: Keep) -> DependencyGraph:
    """The graph of the model without its removed channels, as tracing that would give it.

    Groups keep their names, also those of one channel. Nothing passed in is modified.

    Raises:
        UserError: masks that do not fit the graph.
    """
    indices = kept_indices(graph, keep)
    places: dict[tuple[str, int], Tensor] = {}  # per parameter axis: old index -> new index
    shapes = dict(graph.shapes)
    for name, axes in indices.items():
        sizes = list(graph.shapes[name])
        for axis, kept in enumerate(axes):
            if kept is None:
                continue
            place = torch.full((sizes[axis],), -1)
            place[kept] = torch.arange(len(kept))
            places[name, axis] = place
            sizes[axis] = len(kept)
        shapes[name] = torch.Size(sizes)

    def narrowed(group: Group) -> Group:
        kept = keep.get(group.name, torch.ones(group.size, dtype=torch.bool)).cpu()
        members = tuple(
            replace(member, indices=place[chosen] if place is not None else chosen)
            for member in group.members
            for place, chosen in [(places.get((member.parameter, member.axis)), member.indices[kept])]
        )
        return replace(group, size=int(kept.sum()), members=members)

    def regrouped(consumer: Consumer) -> Consumer:
        """Of a grouped convolution, as many groups as have an output left."""
        axes = indices.get(consumer.weight)
        kept = None if axes is None else axes[consumer.output_axis]
        if consumer.groups == 1 or kept is None:
            return consumer
        outputs = graph.shapes[consumer.weight][consumer.output_axis]
        return replace(consumer, groups=len(torch.unique(kept // (outputs // consumer.groups))))

    return replace(
        graph,
        groups=tuple(narrowed(group) for group in graph.groups),
        shapes=shapes,
        consumers=tuple(regrouped(consumer) for consumer in graph.consumers),
    )


def prune(graph: DependencyGraph, state: Mapping[str, Tensor], keep: Keep) -> dict[str, Tensor]:
    """The state of the model without its removed channels. Nothing passed in is modified.

    Args:
        graph: from `trace`.
        state: tensors by state_dict name: the model's, or any that mirrors it (a target network, one
            optimizer moment); it may hold a part of the names only.
        keep: one bool mask of shape `(group.size,)` per group; True stays. Missing groups stay whole.

    Raises:
        UserError: masks or tensors that do not fit the traced model.
    """
    return slice_state(graph, state, kept_indices(graph, keep))
