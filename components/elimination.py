"""Greedy Optimal Brain Surgeon on the consumers of one group: which channel can go next, at what cost.

All consumers of the group are kept as matrices over the columns that its channels own, with the inverse Gram
matrix of their input; removing a channel refits every one of them in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from components.errors import UserError
from components.gram import Gram


@dataclass
class Reader:
    """One consumer while channels go: the inverse Gram matrix on top of the weight matrix.

    Attributes:
        stack: `(E, n * k + out, n * k)` float64 for the n channels still there; columns channel by channel.
        columns: k, how many columns each channel owns.
        variance: the centred variance of the dense output, which costs are relative to.
    """

    stack: Tensor
    columns: int
    variance: float

    @classmethod
    def of(cls, name: str, matrix: Tensor, gram: Gram, inverse: Tensor, columns: Tensor) -> Reader:
        """Before anything is removed.

        Args:
            name: of the weight, for messages.
            matrix: `(E, out, d)`.
            gram: of the consumer's input, for the variance of its output.
            inverse: `(E, d, d)`, from `inverse_moments`.
            columns: `(n, k)` long: those that each channel of the group owns. All others stay for good.
        """
        if matrix.shape[0] != inverse.shape[0] or matrix.shape[2] != inverse.shape[2]:
            raise UserError(
                f"the Gram matrix of {name!r} is {tuple(inverse.shape)}, which does not fit its weight "
                f"matrix {tuple(matrix.shape)}"
            )
        matrix = matrix.double()
        variance = float(((matrix @ gram.gram) * matrix).sum())
        if not math.isfinite(variance):
            raise UserError(f"the weight {name!r} is not finite")
        chosen = columns.flatten().to(matrix.device)
        weight = matrix[:, :, chosen]  # (E, out, n * k)
        if weight.shape[1] > weight.shape[2]:  # costs depend on W^T W alone: a smaller factor of it will do
            weight = torch.linalg.qr(weight, mode="r").R
        return cls(torch.cat([inverse[:, chosen][:, :, chosen], weight], dim=1), columns.shape[1], variance)

    def costs(self) -> Tensor:
        """`(n,)`: the output error of removing each channel and refitting, over the output's variance."""
        width, k = self.stack.shape[2], self.columns
        inverse, weight = self.stack[:, :width], self.stack[:, width:]
        if self.variance <= 0.0:
            return torch.zeros(width // k, dtype=torch.float64, device=self.stack.device)
        if k == 1:
            errors = weight.square().sum(1) / inverse.diagonal(dim1=1, dim2=2)
        else:
            e, n = inverse.shape[0], width // k
            blocks = inverse.reshape(e, n, k, n, k).diagonal(dim1=1, dim2=3).movedim(3, 1)  # (E, n, k, k)
            rows = weight.reshape(e, -1, n, k).permute(0, 2, 3, 1)  # (E, n, k, out)
            factor, _ = torch.linalg.cholesky_ex(blocks)
            errors = torch.linalg.solve_triangular(factor, rows, upper=False).square_().sum((2, 3))
        return errors.sum(0).div_(self.variance)

    def remove(self, index: int) -> None:
        """Refit what is left without one channel, whose rows and columns become zero (until `compact`)."""
        gone = slice(index * self.columns, (index + 1) * self.columns)
        rows = self.stack[:, gone].clone()  # (E, k, n * k)
        block, beside = rows[:, :, gone], self.stack[:, :, gone]  # (E, k, k), (E, n * k + out, k)
        solved = beside / block if self.columns == 1 else torch.linalg.solve(block, beside, left=False)
        self.stack.baddbmm_(solved, rows, alpha=-1.0)

    def compact(self, remaining: Tensor) -> None:
        """Drop the rows and columns of all channels but the remaining ones, a long tensor of places."""
        width, k = self.stack.shape[2], self.columns
        columns = (remaining.unsqueeze(1) * k + torch.arange(k, device=remaining.device)).flatten()
        outputs = torch.arange(width, self.stack.shape[1], device=remaining.device)
        self.stack = self.stack[:, torch.cat([columns, outputs])][:, :, columns]


def inverse_moments(name: str, gram: Gram, has_bias: bool, ridge: float) -> Tensor:
    """`(G + ridge * mean diagonal * I)^-1`, `(E, d, d)`; the ridge grows until that is positive definite.

    Where a bias can take over the mean of what is removed, G is centred; otherwise the mean counts.

    Raises:
        UserError: the Gram matrix is not finite.
    """
    moments = gram.gram if has_bias else gram.gram + gram.mean.unsqueeze(2) * gram.mean.unsqueeze(1)
    if not bool(torch.isfinite(moments).all()):
        raise UserError(f"the Gram matrix of {name!r} is not finite")
    scale = moments.diagonal(dim1=1, dim2=2).mean(1)  # (E,)
    scale = torch.where(scale > 0, scale, 1.0)  # an input that is always the same
    eye = torch.eye(moments.shape[-1], dtype=torch.float64, device=moments.device)
    while True:
        factor, info = torch.linalg.cholesky_ex(moments + (ridge * scale).reshape(-1, 1, 1) * eye)
        if not bool(info.any()):
            return torch.cholesky_inverse(factor)
        ridge *= 10.0


def elimination_order(readers: list[Reader], size: int) -> Tensor:
    """Remove the cheapest channel until one is left. The readers are used up.

    Returns:
        `(size,)`: when each channel went, from 1; the last one has `size`. All ones where nothing reads them.
    """
    if not readers:
        return torch.ones(size)
    device = readers[0].stack.device
    order = torch.full((size,), float(size), device=device)
    channels = torch.arange(size, device=device)  # which channel is at each place of the readers
    gone = torch.zeros(size, dtype=torch.bool, device=device)  # removed since the readers were last compacted
    removed = 0
    for step in range(1, size):
        costs = torch.stack([reader.costs() for reader in readers]).sum(0)
        index = int(costs.masked_fill_(gone, math.inf).argmin())
        order[channels[index]] = step
        gone[index] = True
        removed += 1
        for reader in readers:
            reader.remove(index)
        if 4 * removed >= len(channels):
            remaining = torch.nonzero(~gone).flatten()
            for reader in readers:
                reader.compact(remaining)
            channels, gone, removed = channels[remaining], gone[remaining], 0
    return order
