"""Second moments of what each consumer reads: all that closed-form repair needs to know about the data.

A consumer is seen as a matrix W that reads columns: `y = W x + b`. The columns are the weight's input
channels; in a convolution every channel owns one column per kernel position, so channel c owns the columns
`c * positions ... (c + 1) * positions - 1`, exactly as in `weight.flatten(1)`.

| kind | weight | matrix, with n = groups and p = positions |
|---|---|---|
| `linear` | `(out, in)` or `(in, out)`, as its axes say | `(1, out, in)` |
| `batched` | `(E, out, in)` or `(E, in, out)` | `(E, out, in)` |
| `convolution` | `(out, in / n, *kernel)` | `(n, out / n, in / n * p)` |
| `transposed_convolution` | `(in, out / n, *kernel)` | `(n, out / n, in / n * p)` |

The Gram matrices have the same leading axis: `(E, d, d)`, with E = 1 for everything that is neither a stack
nor a grouped convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from components.dependency import Consumer, Member
from components.errors import UserError


@dataclass(frozen=True, eq=False)
class Gram:
    """The centred second moment of the rows that a consumer reads.

    Attributes:
        gram: `(E, d, d)` float64, `(X - mean)^T (X - mean) / rows` for each matrix of the stack.
        mean: `(E, d)` float64, the mean row.
        rows: the number of rows (samples times positions) it was made from; > 0.
    """

    gram: Tensor
    mean: Tensor
    rows: int

    def __post_init__(self) -> None:
        d = self.mean.shape[-1]
        if self.gram.shape != (*self.mean.shape, d) or self.mean.dim() != 2:
            raise ValueError(
                f"gram has to be (E, d, d) and mean (E, d), not {tuple(self.gram.shape)} "
                f"and {tuple(self.mean.shape)}"
            )
        if self.rows < 1:
            raise ValueError(f"a Gram matrix needs at least one row, not {self.rows}")

    @classmethod
    def of(cls, rows: Tensor) -> Gram:
        """From the rows themselves: `(n, d)`, or `(E, n, d)` for a stack. Computed in float64."""
        x = rows.double() if rows.dim() == 3 else rows.double().unsqueeze(0)  # (E, n, d)
        mean = x.mean(1)
        centred = x - mean.unsqueeze(1)
        return cls(gram=centred.mT @ centred / x.shape[1], mean=mean, rows=x.shape[1])

    def pooled(self, other: Gram) -> Gram:
        """The Gram matrix of both sets of rows together (Chan et al., 1983)."""
        rows = self.rows + other.rows
        ours, theirs = self.rows / rows, other.rows / rows
        shift = other.mean - self.mean  # (E, d)
        between = shift.unsqueeze(2) * shift.unsqueeze(1)  # (E, d, d)
        return Gram(
            gram=ours * self.gram + theirs * other.gram + ours * theirs * between,
            mean=ours * self.mean + theirs * other.mean,
            rows=rows,
        )


@dataclass(frozen=True, eq=False)
class SplitGram:
    """The moments of one consumer's input on rows to fit on and on rows held out to choose the ridge by."""

    fit: Gram
    held_out: Gram

    def pooled(self) -> Gram:
        """The moments over all rows."""
        return self.fit.pooled(self.held_out)


@dataclass(frozen=True, eq=False)
class Grams(Mapping[str, SplitGram]):
    """The moments of every consumer, by the state_dict name of its weight."""

    consumers: Mapping[str, SplitGram]

    def __getitem__(self, weight: str) -> SplitGram:
        return self.consumers[weight]

    def __iter__(self) -> Iterator[str]:
        return iter(self.consumers)

    def __len__(self) -> int:
        return len(self.consumers)

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat, for safetensors: `<weight>/<fit|held_out>/<gram|mean|rows>`."""
        tensors = {}
        for weight, split in self.consumers.items():
            for part, gram in (("fit", split.fit), ("held_out", split.held_out)):
                tensors[f"{weight}/{part}/gram"] = gram.gram
                tensors[f"{weight}/{part}/mean"] = gram.mean
                tensors[f"{weight}/{part}/rows"] = torch.tensor(gram.rows)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Grams:
        """The inverse of `to_tensors`.

        Raises:
            UserError: a part of a consumer is missing.
            ValueError: the shapes do not fit together.
        """

        def part(weight: str, name: str) -> Gram:
            try:
                gram, mean, rows = (tensors[f"{weight}/{name}/{field}"] for field in ("gram", "mean", "rows"))
            except KeyError as error:
                raise UserError(f"the Gram matrices lack {error.args[0]!r}") from None
            return Gram(gram=gram, mean=mean, rows=int(rows))

        weights = dict.fromkeys(name.rsplit("/", 2)[0] for name in tensors)
        return cls({weight: SplitGram(part(weight, "fit"), part(weight, "held_out")) for weight in weights})


def weight_matrix(consumer: Consumer, weight: Tensor) -> Tensor:
    """A consumer's weight as a stack of matrices `(E, out, d)`; a view wherever the layout allows one."""
    if consumer.kind == "convolution":
        return weight.reshape(consumer.groups, weight.shape[0] // consumer.groups, -1)
    if consumer.kind == "transposed_convolution":
        split = weight.reshape(consumer.groups, -1, *weight.shape[1:])  # (n, in / n, out / n, *kernel)
        return split.transpose(1, 2).flatten(2)
    matrix = weight if consumer.input_axis > consumer.output_axis else weight.mT
    return matrix if consumer.kind == "batched" else matrix.unsqueeze(0)


def from_weight_matrix(consumer: Consumer, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `weight_matrix`: a contiguous tensor of the weight's own shape."""
    if consumer.kind == "convolution":
        return matrix.reshape(shape)
    if consumer.kind == "transposed_convolution":
        positions = shape[2:]
        split = matrix.reshape(consumer.groups, shape[1], shape[0] // consumer.groups, *positions)
        return split.transpose(1, 2).reshape(shape)
    layout = matrix if consumer.input_axis > consumer.output_axis else matrix.mT
    return layout.reshape(shape).contiguous()


def columns_of(consumer: Consumer, member: Member, shape: torch.Size) -> Tensor:
    """The columns of a consumer's matrix that each channel of a group owns.

    Args:
        consumer: the consumer.
        member: a member of the group on the consumer's input axis.
        shape: the shape of the consumer's weight.

    Returns:
        A long tensor `(size, k')`; k' > 1 where a channel owns several columns: the kernel positions of a
        convolution, the pixels of a flattened feature map, a tie.

    Raises:
        ValueError: the member is not on the consumer's input axis, or a channel touches only some of the
            groups of a grouped transposed convolution.
    """
    if member.parameter != consumer.weight or member.axis != consumer.input_axis:
        raise ValueError(
            f"{member.parameter!r} axis {member.axis} is not the input axis {consumer.input_axis} "
            f"of {consumer.weight!r}"
        )
    channels = member.indices  # (size, k)
    if consumer.kind not in ("convolution", "transposed_convolution"):
        return channels
    if consumer.kind == "transposed_convolution" and consumer.groups > 1:
        channels = _shared_by_all_groups(consumer, channels, shape[0] // consumer.groups)
    positions = shape[2:].numel()
    offsets = torch.arange(positions, device=channels.device)
    return (channels.unsqueeze(2) * positions + offsets).flatten(1)  # (size, k * positions)


def _shared_by_all_groups(consumer: Consumer, channels: Tensor, per_group: int) -> Tensor:
    """Positions within one group of a grouped convolution, all of whose groups lose the same ones."""
    size = channels.shape[0]
    ordered = channels.sort(1).values
    local = ordered.remainder(per_group)
    if channels.shape[1] % consumer.groups == 0:
        by_group = ordered.reshape(size, consumer.groups, -1)
        first = by_group[:, :1]
        steps = torch.arange(consumer.groups, device=channels.device).reshape(1, -1, 1) * per_group
        if bool((by_group == first + steps).all()) and bool((first < per_group).all()):
            return local[:, : first.shape[2]]
    raise ValueError(f"a channel of {consumer.weight!r} has to own the same position in each of its groups")
