"""Take channels from a model that is being trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def narrowed(widths: Mapping[str, int], kept: Mapping[str, Tensor]) -> dict[str, int]:
    """Group -> size with the kept channels only, `(width,)` by group; groups that are not named stay."""
    return {group: len(kept[group]) if group in kept else size for group, size in widths.items()}


def take_layers(model: nn.Module, narrower: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the layers of a narrower one of its class, with a state: it stays the same object.

    Args:
        model: gets the layers; keeps its mode, and has new parameters afterwards.
        narrower: built from smaller widths; not to be used any more.
        state: of the narrower model.
    """
    for name, layer in narrower.named_children():
        setattr(model, name, layer)
    model.load_state_dict(dict(state))
    model.train(model.training)
