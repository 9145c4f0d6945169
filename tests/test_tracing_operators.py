"""Every operator's rule against brute force: remove a channel, run what is left, compare.

A program is run twice: with sliced parameters, and at full size with the same slices set to zero. A graph that
takes a wrong slice, or one too few, changes the result or its shape. The programs say by `-1`, `shape` or a
fraction what depends on the width; numbers written in them are theirs and stay.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import components
from components import DependencyGraph, UnsupportedOperatorError

Step = Callable[[Tensor], Tensor]
Program = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

BATCH = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Operators this small only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        scale = float(output.abs().max()) + 1e-3
        assert actual[name].shape == output.shape
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
INDEX = torch.tensor([3, 0, 0, 6])
KEEPS_ALL = [
    Case("relu", torch.relu, (8,)),
    Case("gelu", F.gelu, (8,)),
    Case("sigmoid", torch.sigmoid, (8,)),
    Case("softplus", F.softplus, (8,)),
    Case("hardswish", F.hardtanh, (8,)),
    Case("add scalar", lambda h: 3 + h - 0.5, (8,)),
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
    Case(
        "cosine similarity", lambda h: F.cosine_similarity(h, h.flip(0) if False else h.tanh())[:, None], (8,)
    ),
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
    Case("rows by slice", lambda h: h[1:] - h[:-1] + h[::2][:1], (8,)),
    Case("causal mask", causal, (8,)),
    Case("unsqueeze and squeeze", lambda h: h[:, None].squeeze(1).unsqueeze(-1).squeeze(), (8,)),
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
    Case("complex and back", lambda h: torch.view_as_real(torch.complex(h, h).conj()).flatten(1), (8,)),
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
    Case("kth value", lambda h: h - h.mode(-1, keepdim=True).values, ()),
    Case("numbered channels", lambda h: h + torch.arange(h.shape[1]), ()),
    Case("numbered by linspace", lambda h: h * torch.linspace(0, 1, h.shape[1]), ()),
    Case("every second by mask", lambda h: torch.where(torch.arange(h.shape[1]) % 2 == 0, h, -h), ()),
    Case("identity matrix", lambda h: h @ torch.eye(h.shape[1], dtype=h.dtype), ()),
    Case("triangular matrix", lambda h: h @ torch.ones(8, 8, dtype=h.dtype).tril(), ()),
    Case("data over channels", lambda h: h * numbers(8), ()),
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
    Case("pooled over channels", lambda h: F.avg_pool1d(h[:, None], 2)[:, 0], ()),
    Case("response norm", spatial(lambda h: F.local_response_norm(h, 2)), ()),
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
    Case("select by mask", lambda h: torch.masked_select(h, h > 0)[:8][None], ()),
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


@pytest.mark.parametrize("case", UNSUPPORTED, ids=str)
def test_unsupported_operator(case: Case) -> None:
    program = Between(case)
    with pytest.raises(UnsupportedOperatorError, match=r"operator aten\.\w+"):
        traced(program.bag, program)
