"""What the agents' uses of Adam have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

WARM_STEPS = 1e6
"""Adam steps after which the moments need no correction for their start at zero."""


def new_adam(
    parameters: Iterable[nn.Parameter], learning_rate: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Adam:
    """Adam in one kernel; on a GPU its steps can be recorded in a CUDA graph (`agents.cuda_graphs`)."""
    chosen = list(parameters)
    on_gpu = chosen[0].device.type == "cuda"
    # A number would be recorded as it was; set_learning_rate writes to a tensor.
    rate = torch.tensor(learning_rate, device=chosen[0].device) if on_gpu else learning_rate
    return torch.optim.Adam(chosen, lr=rate, betas=betas, fused=True, capturable=on_gpu)


def set_learning_rate(optimizer: torch.optim.Adam, learning_rate: float) -> None:
    """Of the steps from now on, those in a CUDA graph too."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def half_cosine(learning_rate: float, step: int, steps: int) -> float:
    """The learning rate at a step: the whole one at the first, falling to 0 along a half cosine."""
    return 0.5 * learning_rate * (1.0 + math.cos(math.pi * step / steps))


def set_moments(
    optimizers: Iterable[torch.optim.Adam],
    named: Mapping[str, nn.Parameter],
    mean: Mapping[str, Tensor],
    square: Mapping[str, Tensor],
    steps: float | None,
) -> None:
    """Let optimizers go on from moments, which are copied.

    Args:
        optimizers: new; every parameter is one of theirs.
        named: the parameters by name.
        mean, square: both moments by the same names.
        steps: that the moments are from; None where that is not known, and any that are not zero are then
            taken to be from many.
    """
    if steps is None:
        steps = WARM_STEPS if any(bool(moment.any()) for moment in square.values()) else 0.0
    owner = {id(p): optimizer for optimizer in optimizers for p in optimizer.param_groups[0]["params"]}
    for name, parameter in named.items():
        owner[id(parameter)].state[parameter] = {
            "step": torch.tensor(float(steps), device=parameter.device),
            "exp_avg": mean[name].to(parameter.device, copy=True),
            "exp_avg_sq": square[name].to(parameter.device, copy=True),
        }


def moments_of(
    optimizers: Iterable[torch.optim.Adam], named: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both moments of parameters, by name; copies, and zeros before the first step."""
    state = {id(p): s for optimizer in optimizers for p, s in optimizer.state.items()}
    mean, square = (
        {
            name: state[id(p)][key].clone() if id(p) in state else torch.zeros_like(p.data)
            for name, p in named.items()
        }
        for key in ("exp_avg", "exp_avg_sq")
    )
    return mean, square
