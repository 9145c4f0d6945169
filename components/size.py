"""How large and how fast a model is: parameters, multiply-accumulates, latency."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from components.dependency import DependencyGraph, owner
from components.errors import UserError

UNOWNED = "other"
"""The key of parameters that belong to no component, in `component_sizes`."""


@dataclass(frozen=True)
class Latency:
    """How long one call takes.

    Attributes:
        median_ms: the median, in milliseconds; lower is better.
        p99_ms: the 99th percentile, in milliseconds; lower is better.
        host: the machine it was measured on.
        repeats: the number of calls measured.
    """

    median_ms: float
    p99_ms: float
    host: str
    repeats: int


def parameter_count(model: nn.Module | Mapping[str, Tensor]) -> int:
    """The number of scalars that a model's parameters have.

    Args:
        model: a module: all its `nn.Parameter`s, frozen ones too, as they take room all the same; buffers,
            such as the running statistics of a BatchNorm, do not count. Or named parameters: everything that
            is given. A parameter with two names counts once.
    """
    return sum(parameter.numel() for parameter in _distinct(model).values())


def component_sizes(graph: DependencyGraph, model: nn.Module | Mapping[str, Tensor]) -> dict[str, int]:
    """The number of parameters of every component; they add up to `parameter_count(model)`.

    A parameter shared by two components counts for the one in which it is registered first; parameters of no
    component are under `"other"`, which is there only if it has any.
    """
    sizes = dict.fromkeys(graph.components, 0)
    for name, parameter in _distinct(model).items():
        component = owner(name, graph.components) or UNOWNED
        sizes[component] = sizes.get(component, 0) + parameter.numel()
    return sizes


def macs(call: Callable[[], object]) -> int:
    """The multiply-accumulates of one call: those of its matrix products and convolutions.

    Half of what `torch.utils.flop_counter` counts; elementwise operators do not count. No gradients are
    recorded.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def component_macs(
    call: Callable[[], object], model: nn.Module, components: Mapping[str, Iterable[str]]
) -> dict[str, int]:
    """The multiply-accumulates of one call, by the component whose weights they multiply.

    They add up to `macs(call)`. Copies of weights that are made during the call (casts, transposes, stacks)
    belong to the component of what they were copied from; the products of a stack of several components'
    weights are shared out equally. What belongs to no component, such as products with copies that were made
    before, is under `"other"`, which is there only if it has any.

    Args:
        call: one decision of a model that was just built, or whose weights were just changed.
        model: whose parameters are used.
        components: component -> module path prefixes.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Attribution(counter) as attribution:
        for name, parameter in model.named_parameters():
            attribution.own(parameter, frozenset({owner(name, components) or UNOWNED}))
        call()
    found = {name: attribution.flops.get(name, 0) // 2 for name in [*components, UNOWNED]}
    return {name: count for name, count in found.items() if count or name != UNOWNED}


class _Attribution(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows weights through a call, by their memory, and notes whose weights the products multiply."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, int] = {}
        self._counter = counter
        self._owners: dict[int, frozenset[str]] = {}  # address of a tensor's memory -> components
        self._alive: list[Tensor] = []  # so that no address is used again

    def own(self, tensor: Tensor, components: frozenset[str]) -> None:
        """Note whose a tensor is."""
        if address := tensor.untyped_storage().data_ptr():
            self._owners[address] = components
            self._alive.append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        made = self._counter.get_total_flops() - before
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        owners = [self._owners.get(tensor.untyped_storage().data_ptr()) for tensor in inputs]
        known = sorted(frozenset().union(*(found for found in owners if found)))
        if made:
            each, rest = divmod(made // 2, max(len(known), 1))
            for place, name in enumerate(known or [UNOWNED]):
                share = each + (place < rest)
                self.flops[name] = self.flops.get(name, 0) + 2 * share
        elif known and all(owners) and not _is_new(func):
            for output in tree_leaves(result):
                if isinstance(output, Tensor):
                    self.own(output, frozenset(known))
        return result


def _is_new(func: Any) -> bool:
    """Whether an operator takes only shape and type from its input."""
    name = func.__name__.partition(".")[0]
    return bool(name.startswith("new_") or name.endswith("_like"))


def latency(call: Callable[[], object], repeats: int = 200, warmup: int = 20) -> Latency:
    """How long one call takes on this machine, now: measure on an idle one.

    Args:
        call: what to measure: one decision at batch 1, its inputs made beforehand. No gradients are recorded,
            and work queued on a CUDA device is waited for.
        repeats: the number of calls measured; >= 1.
        warmup: the number of calls made before; >= 0.

    Raises:
        UserError: repeats or warmup is too small.
    """
    if repeats < 1 or warmup < 0:
        raise UserError(f"latency needs repeats >= 1 and warmup >= 0, not {repeats} and {warmup}")
    milliseconds = []
    on_cuda = torch.cuda.is_available()
    with torch.no_grad():
        for index in range(warmup + repeats):
            start = time.perf_counter_ns()
            call()
            if on_cuda:
                torch.cuda.synchronize()
            if index >= warmup:
                milliseconds.append((time.perf_counter_ns() - start) / 1e6)
    median, p99 = torch.tensor(milliseconds, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.99], dtype=torch.float64)
    )
    return Latency(median_ms=float(median), p99_ms=float(p99), host=platform.node(), repeats=repeats)


def _distinct(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter under its first name only."""
    if isinstance(model, nn.Module):
        return dict(model.named_parameters())  # leaves second names out
    seen: set[tuple[object, ...]] = set()
    distinct = {}
    for name, parameter in model.items():
        place = (parameter.data_ptr(), parameter.shape, parameter.stride())
        if parameter.numel() and place in seen:
            continue
        seen.add(place)
        distinct[name] = parameter
    return distinct
