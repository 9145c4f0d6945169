"""ELU and tanh as fast as a CPU can make them: torch's own take longer than the products around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, elu_

MANY = 6_000
"""Numbers from which ELU is faster by an exponential, in passes: torch's takes up to twice as long.

Its expm1 takes five times as long as its exp."""


class ELU(nn.Module):
    """ELU with alpha 1. On a CPU, many numbers of single precision or less are made by an exponential."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The same shape and type."""
        if not _by_exp(inputs):
            return elu(inputs)
        outputs: Tensor = _ELUByExp.apply(inputs)  # type: ignore[no-untyped-call]
        return outputs


class Tanh(nn.Module):
    """tanh(x) = 2 sigmoid(2x) - 1: on a CPU, torch's sigmoid takes a tenth of its tanh's time."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The same shape and type, in [-1, 1]."""
        if inputs.device.type != "cpu":
            return torch.tanh(inputs)
        if not inputs.requires_grad:
            return 2 * torch.sigmoid(2 * inputs) - 1
        outputs: Tensor = _SigmoidTanh.apply(inputs)  # type: ignore[no-untyped-call]
        return outputs


def elu_in_place(x: Tensor) -> Tensor:
    """ELU of a tensor that needs no gradient, which is overwritten and returned."""
    if not _by_exp(x):
        return elu_(x)
    if x.dtype == torch.float32:
        return torch.maximum(x, _negative_part(x), out=x)
    return x.copy_(_elu_by_exp(x))


def tanh_in_place(x: Tensor) -> Tensor:
    """tanh, as `Tanh` computes it, of a tensor that needs no gradient, which is overwritten and returned."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1) if x.device.type == "cpu" else x.tanh_()


def _by_exp(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() >= MANY


def _negative_part(x: Tensor) -> Tensor:
    """exp(min(x, 0)) - 1."""
    return x.clamp(max=0).exp_().sub_(1)


def _elu_by_exp(x: Tensor) -> Tensor:
    """ELU in single precision, wrong by 1e-7 at most."""
    x = x.float()
    negative = _negative_part(x)
    return torch.maximum(x, negative, out=negative)


class _ELUByExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        outputs = _elu_by_exp(inputs).to(inputs.dtype)
        ctx.save_for_backward(outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (outputs,) = ctx.saved_tensors
        # alpha, scale and input scale 1; from the result, without another exponential
        inner: Tensor = torch.ops.aten.elu_backward(gradients[0], 1.0, 1.0, 1.0, True, outputs)
        return inner


class _SigmoidTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        outputs = tanh_in_place(inputs.clone())
        ctx.save_for_backward(outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (outputs,) = ctx.saved_tensors
        inner: Tensor = torch.ops.aten.tanh_backward(gradients[0], outputs)
        return inner
