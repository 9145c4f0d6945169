"""Small models of every family that pruning has to handle, with an oracle that knows nothing of graphs.

Every model is built from widths, `{group name: size}`, exactly as `components.trace` should report them. It
calls `self.mask(group, x)` wherever the group's channels exist as activations: the identity, until a test
sets `model.masks`; from then on the model is the *masked* one, in which removed channels are zero after every
activation and normalisation statistics run over the kept channels only. A sliced model, built from smaller
widths, has to compute exactly what the masked one does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Widths = Mapping[str, int]


class Maskable(nn.Module):
    """A model without `forward` that runs on its own fixed data: `run` returns its named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[str, Tensor] = {}
        self._draws = 0

    def data(self, *shape: int) -> Tensor:
        """Input data: a plain tensor, no buffer; the same for every width."""
        self._draws += 1
        noise = torch.Generator().manual_seed(self._draws)
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    def mask(self, group: str, x: Tensor, axis: int = -1, each: int = 1, tiles: int = 1) -> Tensor:
        """Zero what the group's removed channels hold; each owns `each` places in a row, `tiles` times."""
        if group not in self.masks:
            return x
        kept = self.masks[group].repeat_interleave(each).repeat(tiles)
        shape = [1] * x.dim()
        shape[axis] = -1
        return x * kept.to(x.dtype).reshape(shape)

    def kept(self, group: str, each: int = 1, tiles: int = 1) -> Tensor | None:
        """The mask of a layer's places, or None."""
        return self.masks[group].repeat_interleave(each).repeat(tiles) if group in self.masks else None

    def run(self) -> dict[str, Tensor]:
        raise NotImplementedError


def layer_norm(norm: nn.LayerNorm, x: Tensor, kept: Tensor | None) -> Tensor:
    """Layer normalisation over the last axis whose statistics are those of the kept channels."""
    if kept is None:
        return norm(x)
    weights = kept.to(x.dtype)
    mean = (x * weights).sum(-1, keepdim=True) / weights.sum()
    variance = ((x - mean).square() * weights).sum(-1, keepdim=True) / weights.sum()
    return ((x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias) * weights


def group_norm(norm: nn.GroupNorm, x: Tensor, kept: Tensor | None) -> Tensor:
    """Group normalisation of `(batch, channels, *spatial)` over the kept channels of every group."""
    if kept is None:
        return norm(x)
    batch, channels = x.shape[:2]
    grouped = x.reshape(batch, norm.num_groups, channels // norm.num_groups, -1)
    weights = kept.to(x.dtype).reshape(1, norm.num_groups, -1, 1).expand_as(grouped)
    count = weights.sum((2, 3), keepdim=True)
    mean = (grouped * weights).sum((2, 3), keepdim=True) / count
    variance = ((grouped - mean).square() * weights).sum((2, 3), keepdim=True) / count
    normal = ((grouped - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    tail = [1] * (x.dim() - 2)
    return (normal * norm.weight.reshape(-1, *tail) + norm.bias.reshape(-1, *tail)) * kept.to(
        x.dtype
    ).reshape(-1, *tail)


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter and buffer values that hide nothing: no ones, no zeros, no equal rows."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if not tensor.is_floating_point():
            values = values.abs() * 10
        elif name.endswith("running_var"):
            values = values.abs() + 0.3
        elif tensor.dim() > 1:
            values = values / 3
        tensor.data.copy_(values)


# --- dense layers ------------------------------------------------------------------------------------------


class MLP(Maskable):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, widths["a"]), nn.Linear(widths["a"], widths["b"])
        self.c = nn.Linear(widths["b"], 3)
        self.x = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("a", F.elu(self.a(self.x)))
        h = self.mask("b", torch.sigmoid(self.b(h)))
        return {"y": self.c(h)}


class BatchNormMLP(Maskable):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(5, widths["a"]), nn.BatchNorm1d(widths["a"])
        self.b = nn.Linear(widths["a"], widths["b"], bias=False)
        self.norm2 = nn.BatchNorm1d(widths["b"])
        self.c = nn.Linear(widths["b"], 3)
        self.x = self.data(7, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("a", torch.tanh(self.norm(self.a(self.x))))
        h = self.mask("b", torch.relu(self.norm2(self.b(h))))
        return {"y": self.c(h)}


class LayerNormMLP(Maskable):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(5, widths["a"]), nn.LayerNorm(widths["a"])
        self.b, self.norm2 = nn.Linear(widths["a"], widths["b"]), nn.LayerNorm(widths["b"])
        self.c = nn.Linear(widths["b"], 3)
        self.x = self.data(2, 6, 5)

    def run(self) -> dict[str, Tensor]:
        h = layer_norm(self.norm, self.a(self.x), self.kept("a"))
        h = self.mask("a", F.silu(h))
        h = layer_norm(self.norm2, self.b(h), self.kept("b"))
        return {"y": self.c(self.mask("b", torch.tanh(h)))}


class Residual(Maskable):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.stem = nn.Linear(5, widths["stem"])
        self.up = nn.ModuleList(nn.Linear(widths["stem"], widths[f"up.{i}"]) for i in range(2))
        self.down = nn.ModuleList(nn.Linear(widths[f"up.{i}"], widths["stem"]) for i in range(2))
        self.head = nn.Linear(widths["stem"], 3)
        self.x = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("stem", self.stem(self.x))
        for i in range(2):
            inner = self.mask(f"up.{i}", F.gelu(self.up[i](h)))
            h = self.mask("stem", h + self.down[i](inner))
        return {"y": self.head(h)}


class Cat(Maskable):
    """Concatenation in both orders, with slots of input data in front, between and behind."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        a, b, c = widths["a"], widths["b"], widths["c"]
        self.a, self.b = nn.Linear(5, a), nn.Linear(3, b)
        self.c = nn.Linear(a + 3 + b, c)
        self.norm = nn.LayerNorm(b + a)
        self.d = nn.Linear(b + a, 2)
        self.e = nn.Linear(3 + c + a, 2)
        self.x, self.z = self.data(4, 5), self.data(4, 3)

    def run(self) -> dict[str, Tensor]:
        a = self.mask("a", torch.relu(self.a(self.x)))
        b = self.mask("b", torch.tanh(self.b(self.z)))
        c = self.mask("c", torch.sigmoid(self.c(torch.cat([a, self.z, b], -1))))
        kept = torch.cat([self.masks["b"], self.masks["a"]]) if "a" in self.masks else None
        both = layer_norm(self.norm, torch.cat([b, a], -1), kept)
        return {"d": self.d(both), "e": self.e(torch.cat([self.z, c, a], -1))}


class TwoParts(Maskable):
    """One layer taken apart by sizes: two widths with the same readers, to be pruned apart."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.sizes = [widths["a:0"], widths["a:1"]]
        self.a = nn.Linear(5, sum(self.sizes))
        self.b = nn.Linear(sum(self.sizes), 3)
        self.x = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        first, second = self.a(self.x).split(self.sizes, -1)
        first = self.mask("a:0", torch.relu(first))
        second = self.mask("a:1", torch.tanh(second))
        return {"y": self.b(torch.cat([first, second], -1))}


class Gates(Maskable):
    """GLU, and a chunk into mean and log-deviation, whose halves go together."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a = nn.Linear(5, 2 * widths["a"])
        self.b = nn.Linear(widths["a"], 2 * widths["b"])
        self.c = nn.Linear(widths["b"], 3)
        self.x = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("a", F.glu(self.a(self.x), -1))
        mean, log_std = self.b(h).chunk(2, dim=-1)
        z = mean + 0.5 * torch.ones_like(mean) * log_std.clamp(-5, 2).exp()
        return {"y": self.c(self.mask("b", z))}


class Normalised(Maskable):
    """Activations of unit length, and a linear layer whose rows have unit length."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, widths["a"]), nn.Linear(widths["a"], widths["b"])
        self.c = nn.Linear(widths["b"], 3)
        self.x = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        h = F.normalize(self.mask("a", self.a(self.x)), dim=-1)
        unit = F.normalize(self.mask("a", self.b.weight), dim=1)
        h = self.mask("b", torch.relu(F.linear(h, unit, self.b.bias)))
        return {"y": self.c(h)}


class WeightNorm(Maskable):
    """Weight normalisation; the length of a row is that of its kept entries."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        parametrise = nn.utils.parametrizations.weight_norm
        self.a = parametrise(nn.Linear(5, widths["a"]))
        self.b = parametrise(nn.Linear(widths["a"], widths["b"]))
        self.c = parametrise(nn.Linear(widths["b"], 3))
        self.x = self.data(4, 5)

    def _linear(self, layer: Any, x: Tensor, group: str) -> Tensor:
        if group not in self.masks:
            return layer(x)
        length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        kept = direction * self.masks[group]
        return x @ (length * kept / kept.square().sum(1, keepdim=True).sqrt()).T + layer.bias

    def run(self) -> dict[str, Tensor]:
        h = self.mask("a", torch.tanh(self.a(self.x)))
        h = self.mask("b", torch.tanh(self._linear(self.b, h, "a")))
        return {"y": self._linear(self.c, h, "b")}


class Shared(Maskable):
    """One module called several times, and one parameter that two modules hold."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a = nn.Linear(5, widths["a"])
        self.step = nn.Linear(widths["a"], widths["a"])
        self.step2 = nn.Linear(widths["a"], widths["a"])
        self.step2.weight = self.step.weight
        self.c = nn.Linear(widths["a"], 3)
        self.x = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("a", torch.tanh(self.a(self.x)))
        for layer in (self.step, self.step, self.step2):
            h = self.mask("a", torch.tanh(layer(h)))
        return {"y": self.c(h)}


class Tied(Maskable):
    """An autoencoder whose decoder is the encoder, transposed; the middle layer has no bias at all."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(widths["weight"], 5))
        self.bias = nn.Parameter(torch.empty(widths["weight"]))
        self.inner = nn.Parameter(torch.empty(widths["inner"], widths["weight"]))
        self.out = nn.Parameter(torch.empty(5))
        self.x = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("weight", torch.tanh(F.linear(self.x, self.weight, self.bias)))
        z = self.mask("inner", torch.tanh(F.linear(h, self.inner)))
        h = self.mask("weight", torch.tanh(F.linear(z, self.inner.t())))
        return {"y": F.linear(h, self.weight.T, self.out)}


class SimNorm(Maskable):
    """Softmax within blocks of four: a channel is a block."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4 * widths["a"])
        self.b = nn.Linear(4 * widths["a"], 4 * widths["b"])
        self.c = nn.Linear(4 * widths["b"], 3)
        self.x = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.a(self.x)
        h = self.mask("a", F.softmax(h.view(4, -1, 4), -1).view(4, -1), each=4)
        h = self.b(h)
        h = self.mask("b", F.softmax(h.view(*h.shape[:-1], -1, 4), -1).flatten(-2), each=4)
        return {"y": self.c(h)}


# --- recurrence, attention, tokens -------------------------------------------------------------------------


class GRU(Maskable):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.start = nn.Linear(3, widths["start"])
        self.cell = nn.GRUCell(5, widths["start"])
        self.head = nn.Linear(widths["start"], 2)
        self.x, self.first = self.data(3, 4, 5), self.data(4, 3)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("start", torch.tanh(self.start(self.first)))
        for x in self.x:
            h = self.mask("start", self.cell(x, h))
        return {"y": self.head(h)}


class LSTM(Maskable):
    """Gates taken by slices, a state that starts at zeros."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.size = widths["gates"]
        self.gates = nn.Linear(5 + self.size, 4 * self.size)
        self.head = nn.Linear(self.size, 2)
        self.x = self.data(3, 4, 5)

    def run(self) -> dict[str, Tensor]:
        h = c = torch.zeros(4, self.size, dtype=torch.float64)
        for x in self.x:
            gates, n = self.gates(torch.cat([x, h], -1)), self.size
            i, f = torch.sigmoid(gates[:, :n]), torch.sigmoid(gates[:, n : 2 * n])
            g, o = torch.tanh(gates[:, 2 * n : 3 * n]), torch.sigmoid(gates[:, 3 * n :])
            c = self.mask("gates", f * c + i * g)
            h = self.mask("gates", o * torch.tanh(c))
        return {"y": self.head(h)}


class Attention(Maskable):
    """Tokens, positions and a class token as parameters; heads of fixed width; pre-norm residual stream."""

    def __init__(self, widths: Widths, fused: bool = False) -> None:
        super().__init__()
        d, self.heads = widths["embed"], widths["block.q"]
        self.fused = fused
        self.token = nn.Parameter(torch.empty(1, 1, d))
        self.positions = nn.Parameter(torch.empty(7, d))
        self.embed = nn.Embedding(9, d)
        self.block = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(d),
                "q": nn.Linear(d, 3 * self.heads),
                "k": nn.Linear(d, 3 * self.heads, bias=False),
                "v": nn.Linear(d, 3 * self.heads),
                "o": nn.Linear(3 * self.heads, d),
                "norm2": nn.LayerNorm(d),
                "up": nn.Linear(d, widths["block.up"]),
                "down": nn.Linear(widths["block.up"], d),
            }
        )
        self.head = nn.Linear(d, 2)
        self.ids = self.data(3, 4).abs().mul(3).long().clamp(max=8)

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        q, k, v = (
            self.block[name](x).view(batch, tokens, self.heads, 3).transpose(1, 2) for name in ("q", "k", "v")
        )
        if self.fused:
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(-2, -1) / 3**0.5).masked_fill(later, float("-inf"))
            heads = scores.softmax(-1) @ v
        heads = self.mask("block.q", heads, axis=1)
        return self.block["o"](heads.transpose(1, 2).reshape(batch, tokens, -1))

    def run(self) -> dict[str, Tensor]:
        x = torch.cat([self.token.expand(3, -1, -1), self.embed(self.ids)], 1) + self.positions[:5]
        x, kept = self.mask("embed", x), self.kept("embed")
        x = self.mask("embed", x + self._attend(layer_norm(self.block["norm"], x, kept)))
        inner = self.block["up"](layer_norm(self.block["norm2"], x, kept))
        inner = self.mask("block.up", F.gelu(inner))
        x = self.mask("embed", x + self.block["down"](inner))
        return {"class": self.head(x[:, 0]), "tokens": self.head(x[:, 1:])}


class Embedding(Maskable):
    """An embedding whose table also scores the vocabulary, with parameters added and multiplied directly."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        d = widths["embed"]
        self.gain, self.shift = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(1, d, 1))
        self.embed = nn.Embedding(6, d)
        self.mix = nn.Linear(d, d, bias=False)
        self.ids = self.data(4, 6).abs().mul(2).long().clamp(max=5)  # as many tokens as vocabulary

    def run(self) -> dict[str, Tensor]:
        h = self.mask("embed", self.embed(self.ids) * self.gain)
        h = self.mask("embed", (h.transpose(1, 2) + self.shift).transpose(1, 2))
        h = self.mask("embed", torch.tanh(self.mix(h)))
        return {"scores": h @ self.embed.weight.t()}


# --- ensembles ---------------------------------------------------------------------------------------------


class Critic(Maskable):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, widths["stack:0"]), nn.LayerNorm(widths["stack:0"])
        self.second = nn.Linear(widths["stack:0"], widths["stack:1"])
        self.third = nn.Linear(widths["stack:1"], 1)

    def forward(self, x: Tensor) -> Tensor:
        h = layer_norm(self.norm, self.first(x), self.kept("stack:0"))
        h = self.mask("stack:0", torch.tanh(h))
        h = self.mask("stack:1", F.elu(self.second(h)))
        return self.third(h)


class VmapEnsemble(Maskable):
    """Critics stacked by `torch.func`, held as parameters, called under `vmap`."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        critics = [Critic(widths) for _ in range(3)]
        stacked, _ = torch.func.stack_module_state(critics)
        self.names = list(stacked)
        self.stack = nn.ParameterDict({name.replace(".", "_"): value for name, value in stacked.items()})
        self.__dict__["template"] = copy.deepcopy(critics[0]).to("meta")
        self.x = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        template = self.__dict__["template"]
        template.masks = self.masks
        stacked = {name: self.stack[name.replace(".", "_")] for name in self.names}
        call = torch.func.vmap(
            lambda parameters, x: torch.func.functional_call(template, parameters, (x,)), in_dims=(0, None)
        )
        return {"q": call(stacked, self.x).min(0).values}


class BmmEnsemble(Maskable):
    """Three members as stacked matrices: `baddbmm`, `bmm` of a transposed stack, `einsum`."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        a, b, c = widths["w1"], widths["w2"], widths["w3"]
        self.w1, self.b1 = nn.Parameter(torch.empty(3, 5, a)), nn.Parameter(torch.empty(3, 1, a))
        self.w2, self.b2 = nn.Parameter(torch.empty(3, b, a)), nn.Parameter(torch.empty(3, 1, b))
        self.w3, self.b3 = nn.Parameter(torch.empty(3, b, c)), nn.Parameter(torch.empty(c))
        self.w4 = nn.Parameter(torch.empty(c, 2))
        self.x = self.data(3, 5)  # the batch is as large as the ensemble

    def run(self) -> dict[str, Tensor]:
        h = self.mask("w1", torch.tanh(torch.baddbmm(self.b1, self.x.expand(3, -1, -1), self.w1)))
        h = self.mask("w2", torch.tanh(torch.bmm(h, self.w2.mT) + self.b2))
        h = self.mask("w3", torch.tanh(torch.einsum("ebi,eio->beo", h, self.w3) + self.b3))
        return {"y": torch.einsum("beo,ok->bek", h, self.w4)}


# --- convolutions ------------------------------------------------------------------------------------------


class ConvEncoder(Maskable):
    """Convolutions, batch normalisation and pooling, flattened into linear layers."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, widths["a"], 3, padding=1), nn.BatchNorm2d(widths["a"])
        self.b = nn.Conv2d(widths["a"], widths["b"], 3, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(widths["b"])
        self.c = nn.Linear(widths["b"] * 4, widths["c"])
        self.d = nn.Linear(widths["c"] + widths["a"], 3)
        self.x = self.data(4, 2, 10, 10)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("a", F.max_pool2d(torch.relu(self.norm(self.a(self.x))), 2), axis=1)
        flat = self.mask("b", torch.tanh(self.norm2(self.b(h))), axis=1).flatten(1)
        c = self.mask("c", torch.sigmoid(self.c(flat)))
        pooled = F.adaptive_avg_pool2d(h, 1).flatten(1)
        return {"y": self.d(torch.cat([c, pooled], 1))}


class DeconvDecoder(Maskable):
    """Linear, unflattened into transposed convolutions, upsampling and a padded convolution."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.channels = widths["a"]
        self.a = nn.Linear(5, 4 * self.channels)
        self.b = nn.ConvTranspose2d(self.channels, widths["b"], 3, stride=2, output_padding=1)
        self.norm = nn.BatchNorm2d(widths["b"])
        self.c = nn.Conv2d(widths["b"], widths["c"], 3)
        self.d = nn.ConvTranspose2d(widths["c"], 1, 2)
        self.z = self.data(4, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("a", torch.relu(self.a(self.z).view(4, self.channels, 2, 2)), axis=1)
        h = self.mask("b", torch.tanh(self.norm(self.b(h))), axis=1)
        h = F.pad(F.interpolate(h, scale_factor=2, mode="bilinear"), (1, 0, 0, 2), mode="reflect")
        h = self.mask("c", torch.tanh(self.c(h)), axis=1)
        return {"y": self.d(h)}


class GroupNormConv(Maskable):
    """Group normalisation with two groups: a channel is the same place in both."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 2 * widths["a"], 3), nn.GroupNorm(2, 2 * widths["a"])
        self.b, self.norm2 = nn.Conv2d(2 * widths["a"], widths["b"], 2), nn.GroupNorm(1, widths["b"])
        self.c = nn.Conv2d(widths["b"], 2, 1)
        self.x = self.data(2, 1, 5, 5)

    def run(self) -> dict[str, Tensor]:
        h = group_norm(self.norm, self.a(self.x), self.kept("a", tiles=2))
        h = self.mask("a", torch.relu(h), axis=1, tiles=2)
        h = group_norm(self.norm2, self.b(h), self.kept("b"))
        return {"y": self.c(self.mask("b", torch.relu(h), axis=1))}


class InstanceNormConv(Maskable):
    """As many groups as channels pins them, as their number is in the layer; InstanceNorm need not."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 6, 3), nn.GroupNorm(6, 6)
        self.b = nn.Conv2d(6, widths["b"], 2, bias=False)  # a bias would not matter before the norm
        self.norm2 = nn.InstanceNorm2d(widths["b"], affine=True)
        self.c = nn.Conv2d(widths["b"], 2, 1)
        self.x = self.data(6, 1, 5, 5)

    def run(self) -> dict[str, Tensor]:
        h = torch.relu(self.norm(self.a(self.x)))
        h = self.mask("b", torch.relu(self.norm2(self.b(h))), axis=1)
        return {"y": self.c(h)}


class DepthwiseConv(Maskable):
    """Depthwise convolution with two outputs per channel: the groups are the channels."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        n = widths["a"]
        self.a = nn.Conv2d(1, n, 2)
        self.depth = nn.Conv2d(n, 2 * n, 2, groups=n)
        self.b = nn.Conv2d(2 * n, widths["b"], 1)
        self.depth2 = nn.Conv2d(widths["b"], widths["b"], 2, groups=widths["b"], bias=False)
        self.c = nn.Conv2d(widths["b"], 2, 1)
        self.x = self.data(2, 1, 5, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("a", torch.tanh(self.a(self.x)), axis=1)
        h = self.mask("a", torch.tanh(self.depth(h)), axis=1, each=2)
        h = self.mask("b", torch.tanh(self.b(h)), axis=1)
        h = self.mask("b", torch.sigmoid(self.depth2(h)), axis=1)
        return {"y": self.c(h)}


class GroupedConv(Maskable):
    """Grouped convolution, plain and transposed: a channel is the same place in every group."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        a, b, c = 2 * widths["a"], 2 * widths["b"], 2 * widths["c"]
        self.a = nn.Conv2d(1, a, 2)
        self.b = nn.Conv2d(a, b, 2, groups=2)
        self.c = nn.ConvTranspose2d(b, c, 2, groups=2)
        self.d = nn.Conv2d(c, 2, 1)
        self.x = self.data(2, 1, 5, 5)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("a", torch.tanh(self.a(self.x)), axis=1, tiles=2)
        h = self.mask("b", torch.tanh(self.b(h)), axis=1, tiles=2)
        h = self.mask("c", torch.relu(self.c(h)), axis=1, tiles=2)
        return {"y": self.d(h)}


class Temporal(Maskable):
    """Convolution over time between linear layers, with the axes turned back and forth."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(5, widths["a"]), nn.LayerNorm(widths["a"])
        self.b = nn.Conv1d(widths["a"], 2 * widths["b"], 3, padding=1)
        self.c = nn.Linear(6 * widths["b"], 3)
        self.x = self.data(4, 6, 5)

    def run(self) -> dict[str, Tensor]:
        h = layer_norm(self.norm, self.a(self.x), self.kept("a"))
        h = self.mask("b", F.glu(self.b(h.transpose(1, 2)), 1), axis=1)
        late = F.pad(h[..., 1:] - h[..., :-1], (1, 0))
        return {"y": self.c((h * late.sigmoid()).permute(0, 2, 1).reshape(4, -1))}


# --- models of several components --------------------------------------------------------------------------


def coder(sizes: list[int], activation: Callable[[], nn.Module] = nn.ELU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


class MLPAutoencoder(Maskable):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.encoder = coder([6, widths["encoder.0"], widths["latent"]])
        self.decoder = coder([widths["latent"], widths["decoder.0"], 6])
        self.x = self.data(4, 6)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("encoder.0", self.encoder[1](self.encoder[0](self.x)))
        z = self.mask("latent", self.encoder[2](h))
        h = self.mask("decoder.0", self.decoder[1](self.decoder[0](z)))
        return {"latent": z, "y": self.decoder[2](h)}


class ConvAutoencoder(Maskable):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        a, z, self.channels = widths["encoder.0"], widths["latent"], widths["decoder.0"]
        self.encoder = nn.Sequential(nn.Conv2d(1, a, 3, stride=2), nn.Flatten(), nn.Linear(9 * a, z))
        self.decoder = nn.Sequential(
            nn.Linear(z, 9 * self.channels), nn.ConvTranspose2d(self.channels, 1, 3, stride=2)
        )
        self.x = self.data(4, 1, 7, 7)

    def run(self) -> dict[str, Tensor]:
        h = self.mask("encoder.0", torch.relu(self.encoder[0](self.x)), axis=1)
        z = self.mask("latent", self.encoder[2](self.encoder[1](h)))
        h = torch.relu(self.decoder[0](z)).view(-1, self.channels, 3, 3)
        return {"latent": z, "y": self.decoder[1](self.mask("decoder.0", h, axis=1))}


class WorldModel(Maskable):
    """As in TD-MPC: no `forward`, a latent that six components share, two steps of rolled-out dynamics."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        z = widths["latent"]
        self._encoder = coder([6, widths["_encoder.0"], z])
        self._dynamics = coder([z + 2, widths["_dynamics.0"], z])
        self._reward = coder([z + 2, widths["_reward.0"], 1])
        self._pi = coder([z, widths["_pi.0"], 2])
        for name in ("_q1", "_q2"):
            first, second = widths[f"{name}.0"], widths[f"{name}.3"]
            layers = [
                nn.Linear(2 + z, first),
                nn.LayerNorm(first),
                nn.Tanh(),
                nn.Linear(first, second),
                nn.ELU(),
            ]
            self.add_module(name, nn.Sequential(*layers, nn.Linear(second, 1)))
        self.x, self.actions = self.data(4, 6), self.data(2, 4, 2)

    def _through(self, name: str, x: Tensor) -> Tensor:
        layers = self.get_submodule(name)
        return layers[2](self.mask(f"{name}.0", layers[1](layers[0](x))))

    def _q(self, name: str, z: Tensor, a: Tensor) -> Tensor:
        layers = self.get_submodule(name)
        h = layer_norm(layers[1], layers[0](torch.cat([a, z], -1)), self.kept(f"{name}.0"))
        h = self.mask(f"{name}.0", layers[2](h))
        return layers[5](self.mask(f"{name}.3", layers[4](layers[3](h))))

    def run(self) -> dict[str, Tensor]:
        latent = z = self.mask("latent", self._through("_encoder", self.x))
        outputs: dict[str, Tensor] = {}
        for step, action in enumerate(self.actions):
            outputs[f"reward{step}"] = self._through("_reward", torch.cat([z, action], -1))
            outputs[f"value{step}"] = torch.min(self._q("_q1", z, action), self._q("_q2", z, action))
            outputs[f"action{step}"] = torch.tanh(self._through("_pi", z))
            z = self.mask("latent", self._through("_dynamics", torch.cat([z, action], -1)))
        return {"latent": latent, "next_latent": z, **outputs}


# --- the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Family:
    """A model, and the groups that tracing it has to find, in order.

    Attributes:
        widths: the expected groups and their sizes.
        couplings: group -> the components it touches, where they are not just `model`.
        ties, components: as `components.trace` takes them.
        mode: `train` or `eval`, for batch normalisation.
    """

    name: str
    build: Callable[[Widths], Maskable]
    widths: dict[str, int]
    components: dict[str, list[str]] = field(default_factory=lambda: {"model": [""]})
    couplings: dict[str, set[str]] = field(default_factory=dict)
    ties: tuple[tuple[str, str], ...] = ()
    mode: Literal["train", "eval"] = "train"

    def __str__(self) -> str:
        return self.name

    def empty(self, widths: Widths | None = None) -> Maskable:
        """A model of these widths (None: the family's own), for a state to be loaded into."""
        model = self.build(self.widths if widths is None else widths)
        return model.double().train(self.mode == "train")

    def model(self, widths: Widths | None = None, seed: int = 0) -> Maskable:
        """The same with random parameters and buffers."""
        model = self.empty(widths)
        randomise(model, seed)
        return model

    def external(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs that no tie makes internal."""
        internal = {name for pair in self.ties for name in pair}
        return {name: output for name, output in outputs.items() if name not in internal}


def program(model: nn.Module) -> dict[str, Tensor]:
    """The call program of every family."""
    assert isinstance(model, Maskable)
    return model.run()


_CODERS = {"encoder": ["encoder"], "decoder": ["decoder"]}
_WORLD = {"encoder": ["_encoder"], "dynamics": ["_dynamics"], "reward": ["_reward"], "policy": ["_pi"]}

FAMILIES = (
    Family("mlp", MLP, {"a": 50, "b": 50}),
    Family("batch_norm_train", BatchNormMLP, {"a": 50, "b": 7}),
    Family("batch_norm_eval", BatchNormMLP, {"a": 7, "b": 50}, mode="eval"),
    Family("layer_norm", LayerNormMLP, {"a": 50, "b": 6}),
    Family("residual", Residual, {"stem": 50, "up.0": 8, "up.1": 8}),
    Family("cat", Cat, {"a": 50, "b": 50, "c": 6}),
    Family("two_parts", TwoParts, {"a:0": 50, "a:1": 8}),
    Family("gates", Gates, {"a": 50, "b": 8}),
    Family("normalised", Normalised, {"a": 50, "b": 50}),
    Family("weight_norm", WeightNorm, {"a": 50, "b": 50}),
    Family("shared", Shared, {"a": 50}),
    Family("tied", Tied, {"weight": 50, "inner": 8}),
    Family("simnorm", SimNorm, {"a": 8, "b": 50}),
    Family("gru", GRU, {"start": 50}),
    Family("lstm", LSTM, {"gates": 50}),
    Family("attention", Attention, {"embed": 50, "block.q": 5, "block.up": 50}),
    Family("fused_attention", lambda w: Attention(w, fused=True), {"embed": 8, "block.q": 50, "block.up": 8}),
    Family("embedding", Embedding, {"embed": 50}),
    Family("vmap_ensemble", VmapEnsemble, {"stack:0": 50, "stack:1": 50}),
    Family("bmm_ensemble", BmmEnsemble, {"w1": 50, "w2": 8, "w3": 50}),
    Family("conv_encoder_train", ConvEncoder, {"a": 50, "b": 6, "c": 50}),
    Family("conv_encoder_eval", ConvEncoder, {"a": 6, "b": 50, "c": 4}, mode="eval"),
    Family("deconv_decoder", DeconvDecoder, {"a": 50, "b": 6, "c": 50}),
    Family("group_norm", GroupNormConv, {"a": 50, "b": 50}),
    Family("instance_norm", InstanceNormConv, {"b": 50}),
    Family("depthwise_conv", DepthwiseConv, {"a": 50, "b": 6}),
    Family("grouped_conv", GroupedConv, {"a": 50, "b": 6, "c": 50}),
    Family("temporal", Temporal, {"a": 50, "b": 50}),
    Family(
        "mlp_autoencoder",
        MLPAutoencoder,
        {"encoder.0": 50, "latent": 8, "decoder.0": 50},
        components=_CODERS,
        couplings={"encoder.0": {"encoder"}, "latent": {"encoder", "decoder"}, "decoder.0": {"decoder"}},
        ties=(("latent", "latent"),),
    ),
    Family(
        "conv_autoencoder",
        ConvAutoencoder,
        {"encoder.0": 8, "latent": 50, "decoder.0": 8},
        components=_CODERS,
        couplings={"encoder.0": {"encoder"}, "latent": {"encoder", "decoder"}, "decoder.0": {"decoder"}},
        ties=(("latent", "latent"),),
    ),
    Family(
        "world_model",
        WorldModel,
        {
            "_encoder.0": 50,
            "latent": 50,
            "_dynamics.0": 50,
            "_reward.0": 8,
            "_pi.0": 8,
            "_q1.0": 50,
            "_q1.3": 8,
            "_q2.0": 50,
            "_q2.3": 8,
        },
        components={**_WORLD, "q1": ["_q1"], "q2": ["_q2"]},
        couplings={
            "_encoder.0": {"encoder"},
            "latent": {"encoder", "dynamics", "reward", "policy", "q1", "q2"},
            "_dynamics.0": {"dynamics"},
            "_reward.0": {"reward"},
            "_pi.0": {"policy"},
            "_q1.0": {"q1"},
            "_q1.3": {"q1"},
            "_q2.0": {"q2"},
            "_q2.3": {"q2"},
        },
        ties=(("next_latent", "latent"),),
    ),
)
