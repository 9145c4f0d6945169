"""Every operator's rule against brute force: remove a channel, run what is left, compare.

A program is run twice: with sliced parameters, and at full size with the same slices set to zero. A graph
that takes a wrong slice, or one too few, changes the result or its shape. The programs say by `-1`, `shape`
or a fraction what depends on the width; numbers written in them are theirs and stay.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import components
from components import DependencyGraph, UnsupportedOperatorError

Step = Callable[[Tensor], Tensor]
Program = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

BATCH = 4


pytestmark = pytest.mark.usefixtures("one_thread")


class Bag(nn.Module):
    """Named parameters and buffers, and nothing else: the program does the rest."""

    def __init__(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value.clone())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def traced(bag: Bag, program: Program) -> DependencyGraph:
    return components.trace(bag, lambda m: program(m.state_dict(keep_vars=True)), components={"all": [""]})


def zeroed(
    graph: DependencyGraph, state: Mapping[str, Tensor], keep: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state at full size, with every slice of every removed channel set to zero."""
    result = {name: tensor.clone() for name, tensor in state.items()}
    for group in graph.groups:
        for member in group.members:
            removed = member.indices[~keep[group.name]].flatten()
            result[member.parameter].movedim(member.axis, 0)[removed] = 0
    return result


def assert_removable(graph: DependencyGraph, bag: Bag, program: Program, keep: Mapping[str, Tensor]) -> None:
    state = {name: tensor.detach() for name, tensor in bag.state_dict().items()}
    with torch.no_grad():
        expected = program(zeroed(graph, state, keep))
        actual = program(components.prune(graph, state, keep))
    for name, output in expected.items():
        assert actual[name].shape == output.shape
        if output.numel():
            scale = float(output.abs().max()) + 1e-3
            assert float((actual[name] - output).abs().max()) <= 1e-11 * scale, name


def keeps(graph: DependencyGraph, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Every channel alone removed, every group down to one channel, and random halves."""
    for group in graph.groups:
        for channel in range(group.size):
            keep = graph.keep_all()
            keep[group.name][channel] = False
            yield keep
        lone = torch.zeros(group.size, dtype=torch.bool)
        lone[seed % group.size] = True
        yield {**graph.keep_all(), group.name: lone}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        keep = {group.name: torch.rand(group.size, generator=generator) < 0.5 for group in graph.groups}
        for mask in keep.values():
            mask[torch.randint(len(mask), (), generator=generator)] = True
        yield keep


def check(graph: DependencyGraph, bag: Bag, program: Program) -> None:
    for keep in keeps(graph):
        assert_removable(graph, bag, program, keep)


# --- single operators between two linear layers ------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A step between two linear layers, and the sizes of the groups that it leaves of `width` channels.

    `exact` is False where zero is no removal: the channel count enters (normalisation; checked in
    `test_tracing.py`), or noise.
    """

    name: str
    step: Step
    groups: tuple[int, ...]
    width: int = 8
    exact: bool = True

    def __str__(self) -> str:
        return self.name


def spatial(step: Step) -> Step:
    """A step on `(batch, channels, 2, 2)`."""
    return lambda h: step(h.view(BATCH, -1, 2, 2)).flatten(1)


def write_halves(h: Tensor) -> Tensor:
    n = h.shape[1]
    z = torch.zeros(BATCH, 2 * n, dtype=h.dtype)
    z[:, :n] = h
    z[:, n:] = h.tanh()
    return z


def write_out(h: Tensor) -> Tensor:
    z = torch.empty_like(h)
    torch.add(h, 1.0, out=z)
    return z.mul_(h).relu_()


def accumulate(h: Tensor) -> Tensor:
    z = torch.zeros(BATCH, h.shape[1], dtype=h.dtype)
    z += h
    z[1:] -= h[:-1]
    return z


def one_place(h: Tensor) -> Tensor:
    z = h.clone()
    z[:, 2] = 1.0
    return z


def put(h: Tensor) -> Tensor:
    z = h.clone()
    z[torch.arange(BATCH), torch.tensor([1, 0, 2, 1])] = 0.5
    return z


def branch(h: Tensor) -> Tensor:
    return -h if h.sum().item() > 1e6 else h * 2


def by_maximum(h: Tensor) -> Tensor:
    return h * float(h.max())


def causal(h: Tensor) -> Tensor:
    scores = torch.full((BATCH, BATCH), float("-inf"), dtype=h.dtype).triu(1).softmax(-1)
    return scores @ h


X = numbers(BATCH, 5)
EIGHT = numbers(8)
PLACES = numbers(BATCH, 1, 8, 5)
IMAGE = numbers(BATCH, 2, 3, 3)
attend = F.scaled_dot_product_attention
INDEX = torch.tensor([3, 0, 0, 6])
KEEPS_ALL = [
    Case("relu", torch.relu, (8,)),
    Case("gelu", F.gelu, (8,)),
    Case("sigmoid", torch.sigmoid, (8,)),
    Case("softplus", F.softplus, (8,)),
    Case("hardtanh", F.hardtanh, (8,)),
    Case("add scalar", lambda h: 3 + h - 0.5, (8,)),
    Case(
        "hardswish", lambda h: F.hardswish(h) + F.logsigmoid(h) + F.hardswish(h.clone(), inplace=True), (8,)
    ),
    Case("in place", lambda h: F.mish(F.elu(F.leaky_relu(h.abs_(), 0.1, True), 1.0, True), True), (8,)),
    Case("power", lambda h: h.pow(2) + h**3, (8,)),
    Case("with itself", lambda h: h * h.sigmoid() / (1 + h.abs()), (8,)),
    Case("where", lambda h: torch.where(h > 0, h, -h.exp()), (8,)),
    Case("maximum", lambda h: torch.maximum(h, torch.zeros_like(h)) + torch.max(h, -h), (8,)),
    Case("clamp", lambda h: h.clamp(-1, 1) + h.clamp(min=h.tanh()), (8,)),
    Case("lerp", lambda h: torch.lerp(h, 2 * h, 0.3), (8,)),
    Case("addcmul", lambda h: torch.addcmul(h, h, h, value=0.5), (8,)),
    Case("masked_fill", lambda h: h.masked_fill(h < 0, 0.1), (8,)),
    Case("nan_to_num", lambda h: h.sqrt().nan_to_num(0.0), (8,)),
    Case("single precision and back", lambda h: h.float().double(), (8,)),
    Case("detach", lambda h: h.detach() + h.data.clone().contiguous(), (8,)),
    Case("scalar tensor", lambda h: h * torch.tensor(2.0), (8,)),
    Case("data broadcast over channels", lambda h: h * X[:, :1], (8,)),
    Case("data broadcast over the batch", lambda h: h * X[0, 0], (8,)),
    Case("dropout in training", lambda h: F.dropout(h, 0.5), (8,), exact=False),
    Case("dropout in evaluation", lambda h: F.dropout(h, 0.5, training=False), (8,)),
    Case("noise", lambda h: h + torch.randn_like(h), (8,), exact=False),
    Case("alpha dropout", lambda h: F.alpha_dropout(h, 0.5, training=True), (8,), exact=False),
    Case("constants", lambda h: h * torch.full((h.shape[1],), 2.0) + torch.ones_like(h), (8,)),
    Case("new constants", lambda h: h + h.new_zeros(BATCH, h.shape[1]) + h.new_full((1,), 2.0), (8,)),
    Case("sum over channels", lambda h: h * h.sum(-1, keepdim=True), (8,)),
    Case("sum of all", lambda h: h * h.sum(), (8,)),
    Case("norm", lambda h: h / (1 + h.norm(dim=-1, keepdim=True)), (8,)),
    Case(
        "norms of other orders",
        lambda h: h / torch.linalg.vector_norm(h, ord=1) + h.norm(p=float("inf")),
        (8,),
    ),
    Case("normalize", lambda h: F.normalize(h, dim=-1), (8,)),
    Case("cosine similarity", lambda h: F.cosine_similarity(h, h.tanh())[:, None], (8,)),
    Case("gram matrix of the batch", lambda h: h @ h.t(), (8,)),
    Case("gram matrix of the channels", lambda h: h @ (h.t() @ h).tanh(), (8,)),
    Case("outer product, summed", lambda h: torch.einsum("bi,bj->bij", h, h).sum(-1), (8,)),
    Case("contraction with ones", lambda h: h @ torch.ones(h.shape[1], 3, dtype=h.dtype), (8,)),
    Case("sum of the batch", lambda h: h.sum(0, keepdim=True), (8,)),
    Case("mean of the batch", lambda h: h - h.mean(0), (8,)),
    Case("variance of the batch", lambda h: h / (1 + h.var(0, keepdim=True)), (8,)),
    Case("maximum of the batch", lambda h: h.max(0, keepdim=True).values + h.amin(0), (8,)),
    Case("softmax over the batch", lambda h: h.softmax(0) + h.logsumexp(0), (8,)),
    Case("sums along the batch", lambda h: h.cumsum(0), (8,)),
    Case("sort the batch", lambda h: h.sort(0).values + h.topk(2, dim=0).values.sum(0), (8,)),
    Case("median of the batch", lambda h: h + h.median(0).values, (8,)),
    Case("rows by number", lambda h: h[[2, 0]] + h[1] + h.select(0, 0), (8,)),
    Case("rows by index", lambda h: h.index_select(0, INDEX[1:3]), (8,)),
    Case("rows by mask", lambda h: h[X[:, 0] > X[:, 0].min()], (8,)),
    Case("rows by slice", lambda h: h[1:] - h[:-1] + h[::2][:1], (8,)),
    Case("causal mask", causal, (8,)),
    Case("unsqueeze and squeeze", lambda h: h[:, None].squeeze(1).unsqueeze(-1).squeeze(-1), (8,)),
    Case("repeat interleave", lambda h: h.repeat_interleave(3, -1), (8,)),
    Case("expand and flatten", lambda h: h.unsqueeze(1).expand(-1, 3, -1).flatten(1), (8,)),
    Case("repeat", lambda h: h.repeat(1, 2), (8,)),
    Case("tile", lambda h: h.tile(3), (8,)),
    Case("concatenate with itself", lambda h: torch.cat([h, h.tanh()], -1), (8,)),
    Case("concatenate data", lambda h: torch.cat([X, h, X[:, :2]], -1), (8,)),
    Case("concatenate constants", lambda h: torch.cat([h.new_ones(BATCH, 2), h], -1), (8,)),
    Case("concatenate nothing", lambda h: torch.cat([torch.empty(0), h, h[:, :0]], -1), (8,)),
    Case("concatenate rows", lambda h: torch.cat([h, h.tanh()], 0), (8,)),
    Case("stack and flatten", lambda h: torch.stack([h, h.tanh()], 1).flatten(1), (8,)),
    Case("stack and flatten inside", lambda h: torch.stack([h, h.tanh()], -1).flatten(1), (8,)),
    Case("stack and reduce", lambda h: torch.stack([h, h.tanh(), -h]).amax(0), (8,)),
    Case("pad channels", lambda h: F.pad(h, (1, 2), value=0.3), (8,)),
    Case("flatten the batch as well", lambda h: h.view(-1).reshape(BATCH, -1), (8,)),
    Case("transpose", lambda h: h.t().contiguous().view(-1, BATCH).t(), (8,)),
    Case(
        "permute",
        lambda h: h.view(2, 2, -1).permute(2, 0, 1).movedim(0, -1).swapaxes(0, 1).flatten(0, 1),
        (8,),
    ),
    Case("vmap", lambda h: torch.vmap(lambda row: row.tanh() * row.sum())(h), (8,)),
    Case("kronecker product with a constant", lambda h: torch.kron(h, torch.ones(1, 2)), (8,)),
    Case("write halves", write_halves, (8,)),
    Case("out=", write_out, (8,)),
    Case("accumulate in place", accumulate, (8,)),
    Case("value read by Python", branch, (8,)),
    Case("attention over rows", lambda h: (h @ h.t()).softmax(-1) @ h, (8,)),
    Case("batch norm", lambda h: F.batch_norm(h, None, None, training=True), (8,)),
    Case("instance norm", spatial(F.instance_norm), (4,), width=16),
    Case("layer norm", lambda h: F.layer_norm(h, h.shape[1:]), (8,), exact=False),
]
BLOCKS = [
    Case("softmax in blocks", lambda h: h.view(BATCH, -1, 4).softmax(-1).flatten(1), (2,)),
    Case("softmax over blocks", lambda h: h.view(BATCH, -1, 4).softmax(1).flatten(1), ()),
    Case("blocks turned", lambda h: h.view(BATCH, -1, 2).transpose(1, 2).flatten(1), (4,)),
    Case("an inner axis left open", lambda h: h.reshape(BATCH, 2, -1).softmax(1).flatten(1), (4,)),
    Case("unflatten", lambda h: h.unflatten(1, (2, -1)).softmax(1).flatten(1), (4,)),
    Case("unflatten by keyword", lambda h: h.unflatten(dim=-1, sizes=(-1, 2)).softmax(2).flatten(1), (4,)),
    Case("blocks of places by number", lambda h: h.view(BATCH, -1, 2)[..., 0], (4,)),
    Case(
        "blocks unbound",
        lambda h: torch.stack([-v for v in h.view(BATCH, -1, 4).unbind(2)], -1).flatten(1),
        (2,),
    ),
    Case("blocks averaged", lambda h: h.view(BATCH, -1, 2).mean(2), (4,)),
    Case("blocks sorted", lambda h: h.view(BATCH, -1, 4).sort(-1).values.flatten(1), (2,)),
    Case("chunk", lambda h: torch.mul(*h.chunk(2, -1)), (4,)),
    Case("chunk and concatenate", lambda h: torch.cat(h.chunk(4, -1)[::-1], -1), (2,)),
    Case("glu", lambda h: F.glu(h), (4,)),
    Case("complex pairs", lambda h: torch.view_as_complex(h.view(BATCH, -1, 2)).abs(), (4,)),
    Case(
        "complex and back",
        lambda h: torch.view_as_real(torch.complex(h, h).conj().resolve_conj()).flatten(1),
        (8,),
    ),
    Case("max pool", spatial(lambda h: F.max_pool2d(h, 2)), (2,)),
    Case("max pool with indices", spatial(lambda h: F.max_pool2d(h, 2, return_indices=True)[0]), (2,)),
    Case("average pool", spatial(lambda h: F.avg_pool2d(h, 2, padding=1)), (2,)),
    Case(
        "adaptive pools", spatial(lambda h: F.adaptive_avg_pool2d(h, 3) + F.adaptive_max_pool2d(h, 3)), (2,)
    ),
    Case("global pool", spatial(lambda h: F.adaptive_avg_pool2d(h, 1)), (2,)),
    Case("pool in one dimension", lambda h: F.avg_pool1d(h.view(BATCH, -1, 4), 2).flatten(1), (2,)),
    Case("max pool in one dimension", lambda h: F.max_pool1d(h.view(BATCH, -1, 4), 2).flatten(1), (2,)),
    Case("norm pool", spatial(lambda h: F.lp_pool2d(h, 2, 2)), (2,)),
    Case("nearest", spatial(lambda h: F.interpolate(h, scale_factor=2)), (2,)),
    Case("bilinear", spatial(lambda h: F.interpolate(h, size=3, mode="bilinear")), (2,)),
    Case("bicubic", spatial(lambda h: F.interpolate(h, size=3, mode="bicubic", align_corners=True)), (2,)),
    Case("reflect", spatial(lambda h: F.pad(h, (1, 1, 0, 1), mode="reflect")), (2,)),
    Case("replicate", spatial(lambda h: F.pad(h, (1, 1, 0, 1), mode="replicate")), (2,)),
    Case("circular", spatial(lambda h: F.pad(h, (1, 1, 0, 1), mode="circular")), (2,)),
    Case("crop", spatial(lambda h: F.pad(h, (-1, 0, 0, -1))), (2,)),
    Case("pixel shuffle", lambda h: F.pixel_shuffle(h.view(BATCH, -1, 1, 1), 2).flatten(1), (2,)),
    Case("places averaged", spatial(lambda h: h.mean((2, 3), keepdim=True) * h), (2,)),
    Case("places maximal", spatial(lambda h: h.flatten(2).max(-1).values), (2,)),
    Case("spatial softmax", spatial(lambda h: h.flatten(2).softmax(-1)), (2,)),
    Case("channel dropout", spatial(lambda h: F.dropout2d(h, 0.5)), (2,), exact=False),
    Case("group norm", spatial(lambda h: F.group_norm(h, 2)), (2,), width=16, exact=False),
    Case("group norm of single channels", spatial(lambda h: F.group_norm(h, 4)), (), width=16),
    Case(
        "grid sample",
        spatial(lambda h: F.grid_sample(h, X.new_zeros(BATCH, 2, 2, 2), align_corners=False)),
        (2,),
    ),
    Case("all but the first", lambda h: h[:, 1:], (7,)),
    Case("all but the last", lambda h: h[:, :-1], (7,)),
    Case("all but the ends", lambda h: h[:, 1:-1] * 2, (6,)),
    Case("the first beside all", lambda h: h * h[:, :1], (7,)),
    Case("the last beside all", lambda h: h * h[:, -1:], (7,)),
    Case("halves by shape", lambda h: h[:, : h.shape[1] // 2] * h[:, h.shape[1] // 2 :], (4,)),
]
PINNED = [
    Case("differences of neighbours", lambda h: h[:, 1:] - h[:, :-1], ()),
    Case("every second", lambda h: h[:, ::2], ()),
    Case("one by slice", lambda h: h * h[:, 3:4], ()),
    Case("one by number", lambda h: h * h[:, 3, None], ()),
    Case("negative number", lambda h: h[:, -1, None] * h, ()),
    Case("unbind", lambda h: sum(h.unbind(-1))[:, None], ()),
    Case("list of numbers", lambda h: h[:, [0, 2, 2]], ()),
    Case("index_select", lambda h: h.index_select(1, INDEX), ()),
    Case("boolean mask", lambda h: h[:, torch.arange(8) > 3], ()),
    Case("two indices", lambda h: h[torch.arange(4), INDEX][:, None], ()),
    Case("gather", lambda h: h.gather(1, INDEX[:, None]), ()),
    Case("gather rows", lambda h: h.gather(0, torch.zeros(1, 8, dtype=torch.long)), ()),
    Case("take_along_dim", lambda h: torch.take_along_dim(h, INDEX[:, None], 1), ()),
    Case("softmax", lambda h: h.softmax(-1), ()),
    Case("log_softmax", lambda h: h.log_softmax(-1), ()),
    Case("logsumexp", lambda h: h - h.logsumexp(-1, keepdim=True), ()),
    Case("mean", lambda h: h - h.mean(-1, keepdim=True), ()),
    Case("mean of all", lambda h: h - h.mean(), ()),
    Case("variance", lambda h: h / h.var(-1, keepdim=True), ()),
    Case("deviation of all", lambda h: h / h.std(), ()),
    Case("variance and mean", lambda h: h / sum(torch.var_mean(h, -1, keepdim=True)), ()),
    Case("root mean square norm", lambda h: F.rms_norm(h, (8,)), ()),
    Case("product", lambda h: h + h.prod(-1, keepdim=True), ()),
    Case("maximum", lambda h: h - h.max(-1, keepdim=True).values, ()),
    Case("amin", lambda h: h - h.amin(-1, keepdim=True), ()),
    Case("minimum of all", lambda h: h - h.min(), ()),
    Case("argmax", lambda h: h.argmax(-1, keepdim=True).double(), ()),
    Case("one-hot of argmax", lambda h: F.one_hot(h.argmax(-1), 8).double(), ()),
    Case("count of positives", lambda h: h * torch.linalg.vector_norm(h, ord=0), ()),
    Case("smallest magnitude", lambda h: h * torch.linalg.vector_norm(h, ord=-1, dim=1, keepdim=True), ()),
    Case("any", lambda h: h * (h > 0).any(-1, keepdim=True), ()),
    Case("sums along channels", lambda h: h.cumsum(-1), ()),
    Case("products along channels", lambda h: h.cumprod(-1), ()),
    Case("running maximum", lambda h: h.cummax(-1).values, ()),
    Case("sort", lambda h: h.sort(-1).values, ()),
    Case("argsort", lambda h: h.argsort(-1).double(), ()),
    Case("topk", lambda h: h.topk(3).values, ()),
    Case("median", lambda h: h - h.median(-1, keepdim=True).values, ()),
    Case("mode", lambda h: h - h.mode(-1, keepdim=True).values, ()),
    Case("numbered channels", lambda h: h + torch.arange(h.shape[1]), ()),
    Case("numbered by linspace", lambda h: h * torch.linspace(0, 1, h.shape[1]), ()),
    Case("every second by mask", lambda h: torch.where(torch.arange(h.shape[1]) % 2 == 0, h, -h), ()),
    Case("identity matrix", lambda h: h @ torch.eye(h.shape[1], dtype=h.dtype), ()),
    Case("triangular matrix", lambda h: h @ torch.ones(8, 8, dtype=h.dtype).tril(), ()),
    Case("data over channels", lambda h: h * EIGHT, ()),
    Case("reinterpreted", lambda h: h.t().reshape(BATCH, 8), ()),
    Case("negative padding", lambda h: F.pad(h, (-1, 0)), ()),
    Case("reflected channels", lambda h: F.pad(h[:, None], (1, 1), mode="reflect")[:, 0], ()),
    Case("one place written", one_place, ()),
    Case("places written", put, ()),
    Case("scatter", lambda h: h.scatter(1, INDEX[:, None], 1.0), ()),
    Case("scatter_add", lambda h: torch.zeros(4, 8).double().scatter_add(1, INDEX.repeat(4, 2), h), ()),
    Case("index_add", lambda h: h.index_add(1, INDEX, h[:, :4]), ()),
    Case("element read by Python", by_maximum, ()),
    Case("list read by Python", lambda h: h * sum(h[0].tolist()), ()),
    Case("array read by Python", lambda h: torch.from_numpy(h.numpy() * 2), ()),
    Case("convolved over channels", lambda h: F.conv1d(h[:, None], X.new_ones(1, 1, 3))[:, 0], ()),
    Case("batch norm over channels", lambda h: F.batch_norm(h[:, None], None, None, training=True)[:, 0], ()),
    Case("group norm over channels", lambda h: F.group_norm(h[:, None], 1)[:, 0], ()),
    Case("channels as tokens", lambda h: attend(*[h.t()[None]] * 3)[0].t(), ()),
    Case(
        "channels as tokens of a head",
        lambda h: attend(*[h.t()[None, None].contiguous()] * 3)[0, 0].t(),
        (),
    ),
    Case(
        "channels as a mask",
        lambda h: attend(X[:, None, None], *[PLACES] * 2, attn_mask=h[:, None, None]).flatten(1),
        (),
    ),
    Case("complex along an open axis", lambda h: torch.view_as_complex(h.view(BATCH, 4, -1)).abs(), ()),
    Case("two indices beside channels", lambda h: h[:, None].expand(-1, 3, -1)[[0, 1], [1, 2]], ()),
    Case("channels as positions", lambda h: F.interpolate(h[:, None], scale_factor=2)[:, 0], ()),
    Case(
        "channels as pixels",
        lambda h: F.pixel_shuffle(h[:, None, None].expand(-1, 4, -1, -1), 2).flatten(1),
        (),
    ),
    Case(
        "channels as coordinates",
        lambda h: F.grid_sample(IMAGE, h.view(BATCH, -1, 1, 2).tanh(), align_corners=True)[:, 0, 0],
        (),
    ),
    Case("comparison by Python", lambda h: h * float(torch.equal(h, h + 1)), ()),
    Case("numbers from channels", lambda h: h[:, h.argmax(-1)] if h.shape[0] else h, ()),
    Case(
        "two indices by channels",
        lambda h: IMAGE.flatten(1)[torch.arange(BATCH)[:, None], (h > 0).long()],
        (),
    ),
    Case("pooled over channels", lambda h: F.avg_pool1d(h[:, None], 2)[:, 0], ()),
    Case("response norm", spatial(lambda h: F.local_response_norm(h, 2)), ()),
    Case("select by mask", lambda h: torch.masked_select(h, h > 0)[:8][None], ()),
    Case("uneven chunks", lambda h: torch.cat(h.chunk(3, -1), -1), ()),
    Case("bytes", lambda h: h.view(torch.float32).double(), ()),
]
UNSUPPORTED = [
    Case("flip", lambda h: h.flip(-1), ()),
    Case("flip of the batch", lambda h: h.flip(0), ()),
    Case("roll", lambda h: h.roll(1, -1), ()),
    Case("lower triangle", lambda h: h.tril(), ()),
    Case("diagonal", lambda h: h.diagonal()[None], ()),
    Case("diagonal matrix", lambda h: h.diag_embed().flatten(1), ()),
    Case("distances", lambda h: torch.cdist(h, h), ()),
    Case("unfold", lambda h: h.unfold(1, 2, 2).flatten(1), ()),
    Case("image to columns", spatial(lambda h: F.unfold(h, 2)), ()),
    Case("pixel unshuffle", spatial(lambda h: F.pixel_unshuffle(h, 2)), ()),
    Case("fourier transform", lambda h: torch.fft.fft(h).real, ()),
    Case("search", lambda h: torch.searchsorted(torch.linspace(-1, 1, 5).double(), h).double(), ()),
    Case("trilinear", lambda h: F.bilinear(h, h, torch.ones(2, 8, 8).double()), ()),
    Case("loss", lambda h: F.mse_loss(h, torch.zeros_like(h))[None, None], ()),
    Case("list operators", lambda h: torch._foreach_mul([h, h], 2.0)[0], ()),
]


class Between:
    """`b(step(a(x)))`."""

    def __init__(self, case: Case) -> None:
        self.case = case
        a = {"a.weight": numbers(case.width, 5, seed=1), "a.bias": numbers(case.width, seed=2)}
        with torch.no_grad():
            wide = case.step(F.linear(X, a["a.weight"], a["a.bias"])).shape[-1]
        self.bag = nn.Module()
        self.bag.a, self.bag.b = nn.Linear(5, case.width).double(), nn.Linear(wide, 3).double()
        self.bag.load_state_dict({**a, "b.weight": numbers(3, wide, seed=3), "b.bias": numbers(3, seed=4)})

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        h = self.case.step(F.linear(X, state["a.weight"], state["a.bias"]))
        return {"y": F.linear(h, state["b.weight"], state["b.bias"])}


@pytest.mark.parametrize("case", [*KEEPS_ALL, *BLOCKS, *PINNED], ids=str)
def test_operator(case: Case) -> None:
    program = Between(case)
    graph = traced(program.bag, program)
    assert tuple(group.size for group in graph.groups) == case.groups
    if case.exact:
        check(graph, program.bag, program)


@pytest.mark.parametrize("case", PINNED, ids=str)
def test_operator_beside_another_reader(case: Case) -> None:
    """The channels are pinned by what the operator does, not because nothing else could read them."""
    program = Between(case)
    program.bag.c = nn.Linear(case.width, 2).double()

    def beside(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        h = F.linear(X, state["a.weight"], state["a.bias"])
        return {**program(state), "z": F.linear(h, state["c.weight"], state["c.bias"])}

    assert traced(program.bag, beside).widths == {}


@pytest.mark.parametrize("case", UNSUPPORTED, ids=str)
def test_unsupported_operator(case: Case) -> None:
    program = Between(case)
    with pytest.raises(UnsupportedOperatorError, match=r"operator aten\.\w+"):
        traced(program.bag, program)


# --- programs of several parameters ------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Parameters by shape, in the order of registration, a program of them, and the widths it has to have."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    program: Program
    widths: dict[str, int]

    def __str__(self) -> str:
        return self.name


def conv_in_both_orders(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    h = F.conv2d(IMAGE, p["a"]).tanh()
    return {"y": h.flatten(1) @ p["b"] + h.permute(0, 2, 3, 1).flatten(1) @ p["c"]}


def conv_in_both_orders_to_one_layer(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    h = F.conv2d(IMAGE, p["a"]).tanh()
    return {"y": h.flatten(1) @ p["b"], "z": h.permute(0, 2, 3, 1).flatten(1) @ p["b"]}


def siamese(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first, second = (F.conv2d(IMAGE, p[name]) for name in ("a", "b"))
    normal = [F.batch_norm(h, p["mean"], p["mean"].square(), p["scale"], None) for h in (first, second)]
    return {"y": torch.cat(normal, 1).mean((2, 3)) @ p["c"]}


def halves_of_a_parameter(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    n = p["a"].shape[0] // 2
    return {"y": ((X @ p["a"][:n].t()) * (X @ p["a"][n:].t()).tanh()) @ p["b"]}


def experts(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    h = (X @ p["a"]).tanh()
    return {"y": torch.einsum("be,bi,eio->bo", (h @ p["gate"]).softmax(-1), h, p["b"])}


def heads(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    h = torch.einsum("bi,hik->bhk", (X @ p["a"]).relu(), p["b"]).tanh()
    return {"y": torch.einsum("bhk,hko->bo", h, p["c"])}


def head_views(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One matrix seen as heads of three rows."""
    h = torch.einsum("bi,hki->bhk", X, p["a"].view(-1, 3, 5)).softmax(-1)
    return {"y": (h * p["scale"]).flatten(1) @ p["b"]}


def overlapping(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    h = (X @ p["a"]).tanh()
    first, last = p["b"].shape[0], p["c"].shape[0]
    return {"y": h[:, :first] @ p["b"], "z": h[:, -last:] @ p["c"]}


def untaken_branch(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    h = (X @ p["a"]).relu()
    return {"y": h @ p["b"] if h.sum().item() > -1 else h.tanh() @ p["c"] @ p["b"]}


def memory(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Data written into places of a buffer made in the program, then read whole."""
    h = (X @ p["a"]).tanh()
    z = torch.zeros(3, BATCH, h.shape[1], dtype=h.dtype)
    z[0] = h
    z[1, 1:] = h[:-1]
    z[2].copy_(h * 2)
    return {"y": torch.einsum("sbi,sio->bo", z, p["b"])}


def stack_of_weights(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    h = torch.einsum("bi,eio->ebo", X, torch.stack([p["a"], p["b"]])).tanh()
    return {"y": torch.bmm(h, torch.stack([p["c"], p["c"].tanh()]))}


def mean_of_ensemble(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    h = torch.bmm(X.expand(3, -1, -1), p["a"]).tanh()
    return {"y": torch.bmm(h, p["b"]).sum(0)}


def attention(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The width of queries and keys sets the scale; that of values is free; a learned mask stays."""
    q, k, v = (torch.tanh(X @ p[name])[None] for name in ("q", "k", "v"))
    return {"y": F.scaled_dot_product_attention(q, k, v, attn_mask=p["mask"])[0] @ p["b"]}


def product_written_into_memory(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    z = torch.zeros(BATCH, p["a"].shape[1], dtype=X.dtype)
    torch.mm(X, p["a"], out=z)
    return {"y": z.tanh() @ p["b"]}


def repeated_data(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How often data are repeated is the program's business."""
    h = X.repeat_interleave(2, 1)
    return {"y": h @ p["a"] @ p["a"].t() @ p["b"], "z": h @ p["b"]}


def soft_embedding(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A table looked up by data, and mixed by what scores its rows."""
    h = F.embedding(INDEX, p["table"])
    return {"y": (h @ p["table"].t()).relu() @ p["table"] @ p["b"]}


TOKENS = numbers(2, 4, 5)
LAYOUTS = [
    Layout(
        "square weights, one after the other",
        {"a": (5, 5), "b": (5, 5), "c": (5, 5)},
        lambda p: {"y": ((X @ p["a"]).tanh() @ p["b"].t()).tanh() @ p["c"]},
        {"a": 5, "b": 5},
    ),
    Layout(
        "a square weight used both ways",
        {"a": (5, 8), "w": (8, 8), "b": (8, 3)},
        lambda p: {"y": (h := X @ p["a"]) @ p["w"] @ p["b"] + h @ p["w"].t() @ p["b"]},
        {"a": 8},
    ),
    Layout(
        "a square weight applied twice",
        {"a": (5, 8), "w": (8, 8), "b": (8, 3)},
        lambda p: {"y": ((X @ p["a"]) @ p["w"]).tanh() @ p["w"] @ p["b"]},
        {"a": 8},
    ),
    Layout(
        "a bilinear form",
        {"a": (5, 8), "w": (8, 8)},
        lambda p: {"y": torch.einsum("bi,ij,bj->b", h := X @ p["a"], p["w"], h)},
        {"a": 8},
    ),
    Layout(
        "a chain in one einsum",
        {"a": (5, 8), "v": (8,), "w": (8, 6), "u": (6, 4), "b": (4, 3)},
        lambda p: {"y": torch.einsum("bi,ij,j,jk,kl,lo->bo", X, p["a"], p["v"], p["w"], p["u"], p["b"])},
        {"a": 8, "w": 6, "u": 4},
    ),
    Layout(
        "flattened in two orders",
        {"a": (4, 2, 2, 2), "b": (16, 3), "c": (16, 3)},
        conv_in_both_orders,
        {"a": 4},
    ),
    Layout(
        "in two orders to one layer", {"a": (4, 2, 2, 2), "b": (16, 3)}, conv_in_both_orders_to_one_layer, {}
    ),
    Layout(
        "one matrix as layer and as kernel",
        {"a": (5, 8), "v": (8, 3)},
        lambda p: {
            "y": (h := X @ p["a"]) @ p["v"],
            "z": F.conv1d(h[:, :, None].expand(-1, -1, 2), p["v"].t()[:, :, None]),
        },
        {"a": 8},
    ),
    Layout(
        "shared normalisation",
        {"a": (4, 2, 2, 2), "b": (4, 2, 2, 2), "mean": (4,), "scale": (4,), "c": (8, 3)},
        siamese,
        {"a": 4},
    ),
    Layout("halves of a parameter", {"a": (8, 5), "b": (4, 3)}, halves_of_a_parameter, {"a": 4}),
    Layout(
        "two parameters as one weight",
        {"a": (3, 5), "b": (4, 5), "c": (7, 3)},
        lambda p: {"y": (X @ torch.cat([p["a"], p["b"]]).t()).tanh() @ p["c"]},
        {"a": 3, "b": 4},
    ),
    Layout(
        "a weight times a mask",
        {"mask": (8, 5), "a": (8, 5), "mask2": (3, 8), "b": (3, 8)},
        lambda p: {"y": F.linear(F.linear(X, p["a"] * p["mask"]).tanh(), p["mask2"] * p["b"])},
        {"a": 8},
    ),
    Layout(
        "a low-rank update keeps its rank",
        {"a": (5, 8), "left": (5, 4), "right": (4, 8), "b": (8, 3)},
        lambda p: {"y": (X @ (p["a"] + p["left"] @ p["right"])).tanh() @ p["b"]},
        {"a": 8},
    ),
    Layout("mixture of experts", {"a": (5, 8), "gate": (8, 3), "b": (3, 8, 2)}, experts, {"a": 8}),
    Layout("heads by einsum", {"a": (5, 8), "b": (2, 8, 4), "c": (2, 4, 3)}, heads, {"a": 8, "b": 4}),
    Layout(
        "heads by a view of a parameter", {"a": (12, 5), "scale": (4, 1), "b": (12, 2)}, head_views, {"a": 4}
    ),
    Layout(
        "overlapping slices",
        {"a": (5, 8), "b": (5, 3), "c": (6, 3)},
        overlapping,
        {"a:0": 2, "a:1": 3, "a:2": 3},
    ),
    Layout(
        "a vector reads",
        {"v": (8,), "a": (5, 8), "u": (8,)},
        lambda p: {"y": (X @ p["a"]).tanh() @ p["v"] + p["u"] @ (X @ p["a"]).t()},
        {"a": 8},
    ),
    Layout(
        "only a vector reads",
        {"v": (8,), "a": (8, 5)},
        lambda p: {"y": (p["a"] @ X.t()).tanh().t() @ p["v"]},
        {"a": 8},
    ),
    Layout(
        "weights on the left",
        {"b": (3, 8), "a": (8, 5)},
        lambda p: {"y": p["b"] @ (p["a"] @ X.t()).tanh()},
        {"a": 8},
    ),
    Layout(
        "a matrix times a vector of data",
        {"b": (3, 8), "a": (8, 5)},
        lambda p: {"y": torch.addmv(X[:3, 0], p["b"], (p["a"] @ X[0]).tanh())},
        {"a": 8},
    ),
    Layout(
        "attention",
        {"q": (5, 8), "k": (5, 8), "v": (5, 6), "mask": (4, 4), "b": (6, 3)},
        attention,
        {"v": 6},
    ),
    Layout(
        "attention under vmap",
        {"q": (5, 8), "k": (5, 8), "v": (5, 6), "b": (6, 3)},
        lambda p: {"y": torch.vmap(lambda x: attend(x @ p["q"], x @ p["k"], x @ p["v"]))(TOKENS) @ p["b"]},
        {"v": 6},
    ),
    Layout(
        "attention of a stated scale",
        {"q": (5, 8), "k": (5, 8), "v": (5, 6), "b": (6, 3)},
        lambda p: {"y": attend(*(TOKENS @ p[name] for name in "qkv"), scale=0.3) @ p["b"]},
        {"q": 8, "v": 6},
    ),
    Layout(
        "a product written into memory", {"a": (5, 8), "b": (8, 3)}, product_written_into_memory, {"a": 8}
    ),
    Layout("repeated data", {"a": (10, 6), "b": (10, 3)}, repeated_data, {"a": 6}),
    Layout("a soft embedding", {"table": (7, 8), "b": (8, 3)}, soft_embedding, {"table": 8}),
    Layout(
        "a vector makes channels",
        {"v": (8,), "b": (8, 3)},
        lambda p: {"y": torch.tanh(X[:, :1] * p["v"]) @ p["b"]},
        {"v": 8},
    ),
    Layout(
        "one layer for data and channels of one width",
        {"a": (5, 5), "b": (5, 3)},
        lambda p: {"y": (X @ p["a"]).relu() @ p["b"], "z": X @ p["b"]},
        {},
    ),
    Layout(
        "scalars",
        {"temperature": (), "a": (5, 8), "gain": (1,), "b": (8, 3)},
        lambda p: {
            "y": (X @ p["a"] * p["temperature"].exp() + p["gain"]).tanh() @ p["b"],
            "t": p["temperature"],
        },
        {"a": 8},
    ),
    Layout(
        "parameters broadcast along other axes",
        {"a": (5, 8), "s": (8, 1), "t": (1, 8), "u": (1, 1, 8), "b": (8, 3)},
        lambda p: {"y": (((X @ p["a"]).t() * p["s"]).t() * p["t"] + p["u"])[0] @ p["b"]},
        {"a": 8},
    ),
    Layout("an untaken branch", {"a": (5, 8), "b": (8, 3), "c": (8, 8)}, untaken_branch, {"a": 8}),
    Layout("memory written by parts", {"a": (5, 8), "b": (3, 8, 2)}, memory, {"a": 8}),
    Layout(
        "weights stacked in the program", {"a": (5, 8), "b": (5, 8), "c": (8, 2)}, stack_of_weights, {"a": 8}
    ),
    Layout("members of an ensemble stay", {"a": (3, 5, 8), "b": (3, 8, 2)}, mean_of_ensemble, {"a": 8}),
    Layout(
        "width one",
        {"a": (5, 1), "b": (1, 6), "c": (6, 1)},
        lambda p: {"y": X @ p["a"] @ p["b"] @ p["c"]},
        {"b": 6},
    ),
    Layout(
        "an empty parameter",
        {"e": (0, 3), "a": (5, 8), "b": (8, 3)},
        lambda p: {"y": X @ p["a"] @ p["b"], "e": p["e"]},
        {"a": 8},
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout(layout: Layout) -> None:
    bag = Bag({name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(layout.shapes.items())})
    graph = traced(bag, layout.program)
    assert graph.widths == layout.widths
    check(graph, bag, layout.program)


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("only a vector reads", {("v", 0)}),
        ("weights on the left", {("b", 1)}),
        ("a matrix times a vector of data", {("b", 1)}),
        ("a chain in one einsum", {("w", 0), ("u", 0), ("b", 0)}),
        ("a weight times a mask", {("mask2", 1)}),
        ("a low-rank update keeps its rank", {("b", 0)}),
        ("heads by einsum", {("b", 1), ("c", 1)}),
    ],
)
def test_who_reads(name: str, readers: set[tuple[str, int]]) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    bag = Bag({name: numbers(*shape) for name, shape in layout.shapes.items()})
    members = [member for group in traced(bag, layout.program).groups for member in group.members]
    assert {(member.parameter, member.axis) for member in members if member.consumes} == readers


def test_what_a_branch_not_taken_uses_is_pinned() -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "an untaken branch")
    graph = traced(Bag({name: numbers(*shape) for name, shape in layout.shapes.items()}), layout.program)
    assert {member.parameter for member in graph.groups[0].members} == {"a", "b"}


def test_overlapping_slices_are_three_widths() -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "overlapping slices")
    graph = traced(Bag({name: numbers(*shape) for name, shape in layout.shapes.items()}), layout.program)
    of_a = {g.name: g.members[0].indices.flatten().tolist() for g in graph.groups}
    assert of_a == {"a:0": [0, 1], "a:1": [2, 3, 4], "a:2": [5, 6, 7]}


def modules(**layers: nn.Module) -> nn.ModuleDict:
    net = nn.ModuleDict(layers).double()
    for i, tensor in enumerate((*net.parameters(), *net.buffers())):
        if tensor.is_floating_point():
            tensor.data.copy_(numbers(*tensor.shape, seed=i))
    return net


def through(net: nn.Module, run: Callable[[Any], Tensor]) -> Program:
    """A program that runs the modules with whatever state it is given."""

    class Runner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self) -> Tensor:
            return run(self.net)

    runner = Runner()
    return lambda state: {"y": torch.func.functional_call(runner, {f"net.{k}": v for k, v in state.items()})}


@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm(training: bool) -> None:
    """The largest singular value is that of the kept entries: its vectors are buffers, sliced with them."""
    spectral = nn.utils.parametrizations.spectral_norm
    net = modules(a=spectral(nn.Linear(5, 8)), b=spectral(nn.Linear(8, 3))).train(training)
    program = through(net, lambda m: m["b"](m["a"](X).tanh()))
    graph = components.trace(net, lambda m: program(m.state_dict(keep_vars=True)), components={"all": [""]})
    assert graph.widths == {"a": 8}
    members = {(member.parameter, member.axis) for member in graph.groups[0].members}
    assert ("a.parametrizations.weight.0._u", 0) in members
    assert ("b.parametrizations.weight.0._v", 0) in members
    if not training:
        check(graph, net, program)


def test_buffers_follow_when_they_are_saved_and_pin_when_not() -> None:
    """What is not in the state_dict cannot be sliced: the rebuilt model makes it anew, at the dense size."""

    def run(m: Any) -> Tensor:
        return m["b"](m["a"](X).tanh() * m["a"].scale)

    for persistent, widths in ((True, {"a": 8}), (False, {})):
        net = modules(a=nn.Linear(5, 8), b=nn.Linear(8, 3))
        net["a"].register_buffer("scale", numbers(8), persistent=persistent)
        program = through(net, run)
        graph = components.trace(
            net, lambda m, p=program: p(m.state_dict(keep_vars=True)), components={"all": [""]}
        )
        assert graph.widths == widths
        check(graph, net, program)


def test_norm_after_dropout_and_prelu() -> None:
    net = modules(
        a=nn.Linear(5, 8),
        p=nn.PReLU(8),
        q=nn.PReLU(),
        c=nn.Conv1d(8, 6, 1),
        d=nn.Dropout(),
        b=nn.Linear(6, 3),
    )
    net.eval()

    def run(m: Any) -> Tensor:
        h = m["p"](m["a"](X))
        return m["b"](m["d"](m["q"](m["c"](h[:, :, None].expand(-1, -1, 2)))).mean(-1))

    program = through(net, run)
    graph = components.trace(net, lambda m: program(m.state_dict(keep_vars=True)), components={"all": [""]})
    assert graph.widths == {"a": 8, "c": 6}
    check(graph, net, program)


def under_inference_mode(net: Any) -> Tensor:
    with torch.inference_mode():
        return net["b"](net["a"](X).tanh())


def copied(net: Any) -> Tensor:
    """A copy made by the program, as of a target network."""
    twin = copy.deepcopy(net)
    return twin["b"](net["a"](X).tanh())


def sampled(net: Any) -> Tensor:
    """Distributions check their arguments by reading them."""
    normal = torch.distributions.Normal(net["a"](X), 1.0)
    return net["b"](normal.mean * normal.log_prob(normal.mean))


def jacobians(net: Any) -> Tensor:
    return torch.vmap(torch.func.jacrev(lambda x: net["b"](net["a"](x).tanh())))(X)


def recomputed(net: Any) -> Tensor:
    return checkpoint(lambda x: net["b"](net["a"](x).tanh()), X, use_reentrant=False)


@pytest.mark.parametrize(
    ("run", "widths"),
    [
        (under_inference_mode, {"a": 8}),
        (copied, {"a": 8}),
        (sampled, {"a": 8}),
        (jacobians, {"a": 8}),
        (recomputed, {"a": 8}),
    ],
)
def test_ways_to_run(run: Callable[[Any], Tensor], widths: dict[str, int]) -> None:
    net = modules(a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    graph = components.trace(net, lambda m: {"y": run(m)}, components={"all": [""]})
    assert graph.widths == widths
    assert ("b.weight", 1) in {(m.parameter, m.axis) for m in graph.groups[0].members if m.consumes}
    check(graph, net, through(net, run))


# --- random programs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One step of a random program, on activations `(batch, n)`.

    Attributes:
        apply: `(operands, parameters) -> (batch, m)`, for any width that pruning may leave.
        shapes: n -> shapes of new parameters.
        fits: whether it can take n channels.
        operands: how many activations of one width it takes; 0 for any number of any widths.
        zero: what becomes of channels that are zero: "kept", "lost" (not zero any more), "new" (others), or
            "needed" where only zero channels add nothing to what the other channels see.
    """

    apply: Callable[[list[Tensor], list[Tensor]], Tensor]
    shapes: Callable[[int], list[tuple[int, ...]]] = lambda n: []
    fits: Callable[[int], bool] = lambda n: True
    operands: int = 1
    zero: str = "kept"
    weight: int = 1


def on_first(step: Step) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    return lambda h, p: step(h[0])


def by(k: int, least: int = 1) -> Callable[[int], bool]:
    return lambda n: n % k == 0 and n // k > least


def in_place(h: list[Tensor], p: list[Tensor]) -> Tensor:
    z = h[0].clone()
    z += h[1]
    return z.mul_(2)


def depthwise(h: list[Tensor], p: list[Tensor]) -> Tensor:
    image = h[0].view(BATCH, -1, 2, 2)
    return F.conv2d(image, p[0], groups=image.shape[1]).flatten(1)


def head_attention(h: list[Tensor], p: list[Tensor]) -> Tensor:
    q = h[0].view(1, BATCH, -1, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(BATCH, -1)


OPERATIONS = [
    *(
        Operation(
            lambda h, p: F.linear(h[0], p[0], p[1]), lambda n, m=m: [(m, n), (m,)], zero="new", weight=5
        )
        for m in (4, 8, 12)
    ),
    Operation(lambda h, p: F.linear(h[0], p[0]), lambda n: [(8, n)], zero="new", weight=3),
    Operation(lambda h, p: h[0] @ p[0], lambda n: [(n, 4)], zero="new", weight=3),
    Operation(lambda h, p: h[0] @ p[0] @ p[0].t(), lambda n: [(n, 6)], zero="new"),
    Operation(lambda h, p: F.linear(h[0], torch.cat([p[0], p[1]])), lambda n: [(3, n), (4, n)], zero="new"),
    Operation(lambda h, p: torch.einsum("bi,eio->beo", h[0], p[0]).sum(1), lambda n: [(3, n, 4)], zero="new"),
    Operation(
        lambda h, p: torch.bmm(h[0].expand(3, -1, -1), p[0]).transpose(0, 1).reshape(BATCH, -1),
        lambda n: [(3, n, 4)],
        zero="new",
    ),
    Operation(
        lambda h, p: torch.einsum("bi,hki->bhk", h[0], p[0].view(-1, 3, p[0].shape[1])).flatten(1),
        lambda n: [(6, n)],
        zero="new",
    ),
    Operation(on_first(torch.tanh), weight=2),
    Operation(on_first(torch.relu)),
    Operation(on_first(torch.sigmoid), zero="lost"),
    Operation(on_first(torch.square)),
    Operation(lambda h, p: h[0] + h[1], operands=2, weight=3),
    Operation(lambda h, p: h[0] * h[1], operands=2),
    Operation(lambda h, p: torch.maximum(h[0], h[1]), operands=2),
    Operation(in_place, operands=2),
    Operation(lambda h, p: torch.stack(h, 1).amax(1), operands=2),
    Operation(lambda h, p: torch.stack(h, -1).flatten(1), operands=2),
    Operation(lambda h, p: torch.cat(h, -1), operands=0, weight=5),
    Operation(on_first(lambda h: torch.mul(*h.chunk(2, -1))), fits=by(2)),
    Operation(on_first(F.glu), fits=by(2)),
    Operation(on_first(lambda h: h.view(BATCH, -1, 4).softmax(-1).flatten(1)), fits=by(4), zero="lost"),
    Operation(on_first(lambda h: h.view(BATCH, -1, 2).transpose(1, 2).reshape(BATCH, -1)), fits=by(2)),
    Operation(on_first(lambda h: h.reshape(BATCH, 2, -1).transpose(1, 2).reshape(BATCH, -1)), fits=by(2)),
    Operation(on_first(lambda h: h.reshape(BATCH, 2, -1).softmax(1).sum(1)), fits=by(2), zero="lost"),
    Operation(on_first(lambda h: sum(v.tanh() for v in h.view(BATCH, -1, 3).unbind(-1))), fits=by(3)),
    Operation(on_first(lambda h: h.repeat(1, 2))),
    Operation(on_first(lambda h: h.repeat_interleave(2, 1))),
    Operation(on_first(lambda h: h.unsqueeze(1).expand(BATCH, 2, -1).reshape(BATCH, -1))),
    Operation(on_first(lambda h: h[:, 1:]), fits=by(1, 4)),
    Operation(on_first(lambda h: h[:, :-1]), fits=by(1, 4)),
    Operation(on_first(lambda h: h[:, 1:-1]), fits=by(1, 4)),
    Operation(on_first(lambda h: h[:, 1:] - h[:, :-1]), fits=by(1, 4)),
    Operation(on_first(lambda h: h * h[:, 3:4]), fits=by(1, 4)),
    Operation(on_first(lambda h: h * h[:, 0, None])),
    Operation(on_first(lambda h: h[:, [0, 2, 2, 1]]), fits=by(1, 3)),
    Operation(on_first(lambda h: F.pad(h, (1, 2), value=0.5)), zero="lost"),
    Operation(on_first(lambda h: F.pad(h[:, None], (1, 1), mode="circular")[:, 0]), fits=by(1, 4)),
    Operation(lambda h, p: h[0] * p[0] + p[1], lambda n: [(1, n), (n,)]),
    Operation(lambda h, p: (h[0][..., None] + p[0])[..., 0], lambda n: [(n, 1)]),
    Operation(on_first(lambda h: h.softmax(-1)), zero="lost"),
    Operation(on_first(lambda h: h - h.mean(-1, keepdim=True)), zero="lost"),
    Operation(on_first(lambda h: h * h.sum(-1, keepdim=True).tanh()), zero="needed"),
    Operation(on_first(lambda h: F.normalize(h, dim=-1)), zero="needed"),
    Operation(on_first(lambda h: h @ h.t()), zero="needed"),
    Operation(head_attention, fits=by(2)),
    Operation(
        lambda h, p: F.conv2d(h[0].view(BATCH, -1, 2, 2), p[0], p[1], padding=1).flatten(1),
        lambda n: [(4, n // 4, 2, 2), (4,)],
        by(4),
        zero="new",
    ),
    Operation(
        lambda h, p: F.conv2d(h[0].view(BATCH, -1, 2, 2), p[0]).permute(0, 2, 3, 1).reshape(BATCH, -1),
        lambda n: [(6, n // 4, 1, 1)],
        by(4),
        zero="new",
    ),
    Operation(depthwise, lambda n: [(n // 2, 1, 2, 2)], by(4)),
    Operation(
        lambda h, p: F.conv2d(h[0].view(BATCH, -1, 2, 1), p[0], groups=2).flatten(1),
        lambda n: [(8, n // 4, 2, 1)],
        by(4),
        zero="new",
    ),
    Operation(
        lambda h, p: F.conv_transpose2d(h[0].view(BATCH, -1, 1, 2), p[0], groups=2).flatten(1),
        lambda n: [(n // 2, 3, 1, 2)],
        by(4),
        zero="new",
    ),
    Operation(on_first(lambda h: F.max_pool2d(h.view(BATCH, -1, 2, 2), 2).flatten(1)), fits=by(4)),
    Operation(on_first(lambda h: F.pixel_shuffle(h.view(BATCH, -1, 1, 1), 2).flatten(1)), fits=by(4)),
]


@dataclass(frozen=True)
class Step_:
    operation: Operation
    operands: tuple[int, ...]
    parameters: tuple[str, ...]


class RandomProgram:
    """A random composition of the operations, with weights used again where their shapes allow it."""

    def __init__(self, seed: int, length: int = 8) -> None:
        self._random, self.steps = random.Random(seed), list[Step_]()
        self.state: dict[str, Tensor] = {}
        activations, zero = [X, numbers(BATCH, 6)], [False, False]
        self.data = tuple(activations)
        weights = [operation.weight for operation in OPERATIONS]
        while len(self.steps) < length:
            operation = self._random.choices(OPERATIONS, weights)[0]
            recent = range(max(0, len(activations) - 4), len(activations))
            first = self._random.choice(recent)
            n = activations[first].shape[1]
            alike = [i for i, h in enumerate(activations) if h.shape[1] == n]
            operands = [first, *self._random.choices(alike, k=operation.operands - 1)]
            if operation.operands == 0:
                operands = [*self._random.choices(range(len(activations)), k=2), first]
            made = not operation.shapes(n) and first < 2  # the size of what is made of data is the program's
            all_zero = all(zero[i] for i in operands)
            if n > 48 or made or not operation.fits(n) or (operation.zero == "needed" and not all_zero):
                continue
            step = Step_(operation, tuple(operands), tuple(map(self._parameter, operation.shapes(n))))
            self.steps.append(step)
            activations.append(self._apply(step, activations, self.state))
            zero.append(operation.zero == "new" or (operation.zero != "lost" and all_zero))
        self.outputs = {len(activations) - 1, self._random.randrange(2, len(activations))}
        for i in self.outputs:
            self.state[f"out{i}"] = numbers(3, activations[i].shape[1], seed=seed)

    def _parameter(self, shape: tuple[int, ...]) -> str:
        alike = [name for name, value in self.state.items() if value.shape == shape]
        if alike and self._random.random() < 0.3:
            return self._random.choice(alike)
        name = f"p{len(self.state)}"
        self.state[name] = numbers(*shape, seed=len(self.state)) / 2
        return name

    @staticmethod
    def _apply(step: Step_, activations: list[Tensor], state: Mapping[str, Tensor]) -> Tensor:
        operands = [activations[i] for i in step.operands]
        return step.operation.apply(operands, [state[name] for name in step.parameters])

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        activations = list(self.data)
        for step in self.steps:
            activations.append(self._apply(step, activations, state))
        return {f"y{i}": F.linear(activations[i], state[f"out{i}"]) for i in self.outputs}


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_random_programs(start: int) -> None:
    found = 0
    for seed in range(start, start + 50):
        program = RandomProgram(seed)
        bag = Bag(program.state)
        graph = traced(bag, program)
        found += len(graph.groups)
        try:
            check(graph, bag, program)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"program {seed}: {error}; groups {graph.widths}") from error
    assert found > 40  # not all is pinned
