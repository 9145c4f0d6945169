"""Trace a model once and find out which parameter slices have to be removed together.

Every index of every axis of every parameter and buffer gets an *id*. The call program runs once under
`no_grad` inside a dispatch mode that sees each operator the model really executes, whatever wrote it
(modules, functional calls, `vmap`), and joins ids that stand for the same channel; the rules per operator
are in `components.operators`. Connected ids are a channel; id 0 is "pinned": never removed.

The meaning of the ids: element `(i, j, ...)` of a tensor is there after pruning exactly if the channels of
all its axis ids are kept. An operator's rule has to join or pin ids until slicing its inputs and running it
gives its sliced output. Where no rule says how, `UnsupportedOperatorError` is raised: nothing is guessed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from components.dependency import Consumer, DependencyGraph, Group, Member, owner
from components.errors import UserError, nearest

Ids = NDArray[np.int64]
PINNED = 0
"""The id of everything that is never removed: input data, external outputs, batch and spatial axes."""


class UnsupportedOperatorError(RuntimeError):
    """The model runs an operator on prunable channels for which there is no rule."""


@dataclass(frozen=True, eq=False)
class Tag:
    """What tracing knows of one tensor.

    Attributes:
        ids: for every axis, the id of every index along it.
        parameter: name of the parameter this tensor is a view of, or None.
        axes: for every axis, the axis of `parameter` it shows, or None.
        result_of: index of the consumer whose product this is (before a bias), or None.
        is_weight: True where it comes from parameters, buffers and constants alone (a scaled weight, a
            product of two): a contraction of an activation with it reads the activation's channels.
    """

    ids: tuple[Ids, ...]
    parameter: str | None = None
    axes: tuple[int | None, ...] = ()
    result_of: int | None = None
    is_weight: bool = False

    def plain(self) -> Tag:
        """The same ids without provenance: what a new tensor computed from this one gets."""
        return Tag(self.ids)


Rule = Callable[["Tracer", "Call"], "Tag | Sequence[Tag | None]"]

Slices = dict[tuple[str, int], list[int]]
"""What a channel owns: (parameter, axis) -> indices along that axis."""

Signature = tuple[tuple[tuple[str, int, int], ...], frozenset[int]]
"""What the channels of a group share: (parameter, axis, number of indices), and the parts they lie in."""


@dataclass(frozen=True)
class Call:
    """One operator call: its overload, its arguments by schema name, and what it returned."""

    operator: Any
    arguments: Mapping[str, Any]
    outputs: tuple[Any, ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def name(self) -> str:
        """Such as `aten.addmm`, without the overload."""
        return str(self.operator.overloadpacket)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor among the arguments, in lists too."""
        for value in self.arguments.values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from (item for item in value if isinstance(item, Tensor))


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Joins ids while a call program runs; the rules call `join`, `pin`, `tag` and `consume`."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A union-find over ids; the smallest id of a set is its root, so pinned (0) wins every union.
        self._parent: list[int] = [PINNED]
        self._touched: set[int] = set()
        self._read: set[int] = set()
        self._tags: dict[int, Tag] = {}
        # Tensors stay alive while traced, so that an `id()` is never used twice.
        self._alive: list[Tensor] = []
        self._consumed: set[int] = set()
        self._carried: set[int] = set()
        self._storages: dict[int, str | None] = {}
        self._by_view: dict[tuple[Any, ...], Tag] = {}
        self._parts: dict[bytes, Ids] = {}
        self.consumers: list[Consumer] = []
        self._as_consumer: set[str] = set()
        self._otherwise: set[str] = set()
        self.flexible_axis: int | None = None
        self._module_stack: list[str] = []
        self.parameter_ids: dict[str, tuple[Ids, ...]] = {}
        self._last_parameter_id = sum(n for tensor in state.values() for n in tensor.shape if n != 1)
        for name, tensor in state.items():
            self._register(name, tensor)

    def _register(self, name: str, tensor: Tensor) -> None:
        tag = Tag(
            tuple(self.fresh(size) for size in tensor.shape),
            parameter=name,
            axes=tuple(range(tensor.dim())),
            is_weight=True,
        )
        self.parameter_ids[name] = tag.ids
        self._attach(tensor, tag)

    # --- ids ---------------------------------------------------------------------------------------------

    def fresh(self, size: int) -> Ids:
        """New ids for one axis. An axis of size 1 cannot lose anything, so it is pinned at once."""
        if size == 1:
            return np.zeros(1, dtype=np.int64)
        start = len(self._parent)
        self._parent.extend(range(start, start + size))
        return np.arange(start, start + size, dtype=np.int64)

    def _find(self, item: int) -> int:
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def roots(self, ids: Ids) -> Ids:
        """The root of every id's set; `PINNED` for what may not be removed."""
        return np.array([self._find(item) for item in ids.ravel().tolist()], np.int64).reshape(ids.shape)

    def join(self, first: Ids, second: Ids) -> None:
        """State that two runs of ids stand for the same channels, index by index."""
        for a, b in set(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True)):
            low, high = sorted((self._find(a), self._find(b)))
            self._parent[high] = low

    def pin(self, ids: Ids) -> None:
        """State that these channels are never removed."""
        for item in set(ids.ravel().tolist()):
            self._parent[self._find(item)] = PINNED

    def is_free(self, ids: Ids) -> bool:
        """True where any of the ids may still be removed."""
        return any(self._find(item) != PINNED for item in ids.ravel().tolist())

    def is_of_parameter(self, ids: Ids) -> bool:
        """True where any of the free ids belongs to a parameter (and not to a constant alone)."""
        return any(PINNED < self._find(item) <= self._last_parameter_id for item in ids.ravel().tolist())

    # --- tags --------------------------------------------------------------------------------------------

    def tag(self, tensor: Tensor) -> Tag:
        """The tag of a tensor; one that tracing never saw is input data, so all of it is pinned.

        Raises:
            UnsupportedOperatorError: it shares the memory of a parameter or of a result, but tracing did not
                see how: a view that was made outside the program.
        """
        known = self._tags.get(id(tensor))
        if known is not None:
            return known
        if _has_memory(tensor):
            same = self._by_view.get(_view_key(tensor))
            if same is not None:
                return same
            storage = tensor.untyped_storage().data_ptr()
            if storage in self._storages:
                name = self._storages[storage]
                raise UnsupportedOperatorError(
                    f"the program uses a view of {'a result' if name is None else f'parameter {name!r}'} "
                    f"(shape {tuple(tensor.shape)}) that was made out of sight of tracing, in "
                    f"{self.module_path}; take the view inside the program, with torch operators"
                )
        return Tag(tuple(np.zeros(size, dtype=np.int64) for size in tensor.shape))

    def _attach(self, tensor: Tensor, tag: Tag, view: bool = False) -> None:
        if len(tag.ids) != tensor.dim() or any(
            len(i) != n for i, n in zip(tag.ids, tensor.shape, strict=True)
        ):
            found = tuple(len(ids) for ids in tag.ids)
            raise AssertionError(
                f"a rule gave ids of shape {found} to a tensor of shape {tuple(tensor.shape)}"
            )
        for ids in tag.ids:
            if len(ids) == 1:
                self.pin(ids)
        earlier = self._tags.get(id(tensor))
        if earlier is not None and not view:  # written in place: old and new contents share the channels
            for old, new in zip(earlier.ids, tag.ids, strict=True):
                self.join(old, new)
        else:
            self._tags[id(tensor)] = tag
            self._alive.append(tensor)
        if _has_memory(tensor):
            storage = tensor.untyped_storage().data_ptr()
            if not view and any(self.is_of_parameter(ids) for ids in tag.ids):
                self._storages.setdefault(storage, tag.parameter)
            if storage in self._storages:
                self._by_view[_view_key(tensor)] = self._tags[id(tensor)]

    def divide(self, part: Ids) -> None:
        """Note that the program takes this part of an axis by its size: it is a width of its own."""
        if self.is_free(part):
            self._parts[part.tobytes()] = part

    def leave(self, tensor: Tensor) -> None:
        """Python reads the values and may do anything with them: nothing in the tensor may be removed."""
        for ids in self.tag(_unwrapped(tensor)).ids:
            self.pin(ids)

    def scale_by(self, tensor: Tensor) -> None:
        """The length of the last axis enters the computation as a number, so that axis stays."""
        plain = _unwrapped(tensor)
        for ids in self.tag(plain).ids[-1:] if plain is tensor else self.tag(plain).ids:
            self.pin(ids)

    def touch(self, tag: Tag) -> None:
        """Note that an operator computes with these ids; what nothing ever computes with is pinned."""
        for ids in tag.ids:
            self._touched.update(ids.tolist())

    def read(self, ids: Ids) -> None:
        """Note that a contraction or a sum reads these channels; what nothing ever reads is pinned."""
        self._read.update(ids.ravel().tolist())

    def consume(self, tag: Tag, axis: int) -> None:
        """Note that this axis of a weight is contracted with an activation."""
        if tag.is_weight:
            self._consumed.update(tag.ids[axis].tolist())

    def carry(self, tag: Tag, axis: int) -> None:
        """Note that the result of a contraction has this axis of a weight: the weight makes its channels."""
        if tag.is_weight:
            self._carried.update(tag.ids[axis].tolist())

    def add_consumer(self, consumer: Consumer) -> int:
        """Record a consumer once; returns its index."""
        self._as_consumer |= {consumer.weight, *([consumer.bias] if consumer.bias is not None else [])}
        for index, known in enumerate(self.consumers):
            if known.weight == consumer.weight:
                bias_differs = None not in (known.bias, consumer.bias) and known.bias != consumer.bias
                if bias_differs or replace(known, bias=consumer.bias) != consumer:
                    self._otherwise.add(consumer.weight)
                if known.bias is None and consumer.bias is not None:
                    self.consumers[index] = replace(known, bias=consumer.bias)
                return index
        self.consumers.append(consumer)
        return len(self.consumers) - 1

    def own_consumers(self) -> tuple[Consumer, ...]:
        """The consumers whose weight has no other use (tied to another layer), in the order of computation.

        A bias with another use is left out of its consumer.
        """
        biases = [consumer.bias for consumer in self.consumers]
        shared = self._otherwise | {bias for bias in biases if biases.count(bias) > 1}
        return tuple(
            replace(consumer, bias=None) if consumer.bias in shared else consumer
            for consumer in self.consumers
            if consumer.weight not in self._otherwise
        )

    # --- running -----------------------------------------------------------------------------------------

    @property
    def module_path(self) -> str:
        """Where in the model the current operator runs, for messages."""
        return f"module {self._module_stack[-1]!r}" if self._module_stack else "the program itself"

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the module that runs, so that errors can name it."""
        names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}

        def enter(module: nn.Module, _: Any) -> None:
            self._module_stack.append(names.get(id(module), type(module).__name__))

        def leave(*_: Any) -> None:
            self._module_stack.pop()

        handles = [
            module_hooks.register_module_forward_pre_hook(enter),
            module_hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from components.operators import VIEWS, keeps_weights, rule_for  # written against this module

        result = operator(*args, **(kwargs or {}))
        outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
        call = Call(operator, _bind(operator, args, kwargs or {}), outputs)
        tags = [self.tag(tensor) for tensor in call.tensors()]
        rule = rule_for(operator)
        if rule is None:
            if any(self.is_of_parameter(ids) for tag in tags for ids in tag.ids):
                raise UnsupportedOperatorError(
                    f"operator {operator} in {self.module_path} works on prunable channels and has no "
                    "pruning rule; write that step with supported operators, move it out of the program, or "
                    "add a rule to components/operators.py"
                )
            for tag in tags:  # constants, such as the ones of a causal mask
                for ids in tag.ids:
                    self.pin(ids)
            return result  # nothing here can be pruned, and what comes out is input data to the rest
        self._as_consumer.clear()
        if call.name not in VIEWS:
            for tag in tags:
                self.touch(tag)
        given = rule(self, call)
        assigned = (given,) if isinstance(given, Tag) else tuple(given)
        is_weight = all(tag.is_weight for tag in tags) and keeps_weights(self, rule, tags)
        for output, tag_out in zip(outputs, assigned, strict=False):
            if isinstance(output, Tensor) and tag_out is not None:
                self._attach(output, replace(tag_out, is_weight=is_weight), view=call.name in VIEWS)
        passed_on = any(assigned[:1] == (tag,) for tag in tags)
        if call.name not in VIEWS and not passed_on:
            used = {tag.parameter for tag in tags if tag.parameter is not None}
            self._otherwise |= used - self._as_consumer
        return result

    # --- reading the result ------------------------------------------------------------------------------

    def channels(self) -> dict[int, Slices]:
        """Root id -> (parameter, axis) -> the indices along that axis that belong to the channel."""
        found: dict[int, Slices] = defaultdict(lambda: defaultdict(list))
        for name, axes in self.parameter_ids.items():
            for axis, ids in enumerate(axes):
                for index, root in enumerate(self.roots(ids)):
                    if root != PINNED:
                        found[int(root)][name, axis].append(index)
        return found

    def pin_unused(self, internal: Iterable[Ids]) -> None:
        """Pin parameter indices that no operator computed with, and channels that nothing reads.

        Unused rows and results have unknown readers outside the program. Internal outputs are for others to
        read.
        """
        used = {self._find(item) for item in self._read}
        for ids in internal:
            used.update(self.roots(ids).tolist())
        used &= {self._find(item) for item in self._touched}
        for axes in self.parameter_ids.values():
            for ids in axes:
                self.pin(np.array([i for i in ids.tolist() if self._find(i) not in used], dtype=np.int64))

    def consumes(self, parameter: str, axis: int) -> bool:
        """True where the axis was contracted with an activation."""
        return not self._consumed.isdisjoint(self.parameter_ids[parameter][axis].tolist())

    def produces(self, parameter: str, axis: int) -> bool:
        """True where the axis makes channels: the output axis of a layer (a tied weight may do both)."""
        return not self._carried.isdisjoint(self.parameter_ids[parameter][axis].tolist())

    def parts(self) -> Mapping[int, set[int]]:
        """Root id -> the numbers of the parts (see `divide`) that the channel lies in."""
        found: dict[int, set[int]] = defaultdict(set)
        for number, part in enumerate(self._parts.values()):
            for root in self.roots(part):
                found[int(root)].add(number)
        return found


class PythonCalls(TorchFunctionMode):
    """Sees what happens above the operators: values that Python reads, widths that scale, `-1` in a shape."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _READS_VALUES:
            self._tracer.leave(args[0])
        if function is nn.functional.scaled_dot_product_attention and kwargs.get("scale") is None:
            for tensor in (*args, *kwargs.values())[:2]:  # query and key
                self._tracer.scale_by(tensor)
        if function not in _RESHAPES:
            return function(*args, **kwargs)
        self._tracer.flexible_axis = _flexible_axis(function, args, kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            self._tracer.flexible_axis = None


_READS_VALUES = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.__reduce_ex__,
}
_UNFLATTENS = {torch.Tensor.unflatten, torch.unflatten}
_RESHAPES = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape} | _UNFLATTENS


def _flexible_axis(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The axis of the result whose size the program leaves open by writing -1, or None."""
    sizes: Any = kwargs.get("sizes", kwargs.get("shape", kwargs.get("size")))
    first = 0
    if function in _UNFLATTENS:
        first = kwargs["dim"] if "dim" in kwargs else args[1]
        first = first % args[0].dim() if isinstance(first, int) else 0
        sizes = args[2] if sizes is None and len(args) > 2 else sizes
    elif sizes is None:
        sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    open_axes = [axis for axis, size in enumerate(sizes or ()) if isinstance(size, int) and size == -1]
    return first + open_axes[0] if open_axes else None


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a run does to parameters, buffers (batch-norm statistics), modes and torch's random state."""
    registered = [(m, dict(m._parameters), dict(m._buffers), m.training) for m in model.modules()]
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}.values()
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, parameters, buffers, training in registered:
            for name, parameter in parameters.items():
                module._parameters[name] = parameter
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
            module.training = training
        for tensor, value in values:
            tensor.data.copy_(value)


def trace(
    model: nn.Module,
    program: Callable[[nn.Module], Mapping[str, Tensor]],
    *,
    components: Mapping[str, Sequence[str]],
    ties: Iterable[tuple[str, str]] = (),
) -> DependencyGraph:
    """Run `program(model)` once and find the model's channels, groups and couplings.

    The model is not changed: what running it updates (batch-norm statistics, torch's random state) is put
    back. A `-1` in a reshape says which of the axes that it splits changes its size; without one it is the
    outermost (heads, blocks, channels of a decoder), and the inner ones keep theirs. The bounds of a slice
    and the sizes of a split are taken for widths. Sizes that Python reads from a shape
    (`h.shape[-1] ** -0.5`) cannot be followed: they are those of the kept channels. The branches that a run
    does not take are not seen.

    Args:
        model: any module; it needs no `forward`.
        program: calls everything the agent uses (for a recurrence, at least two steps) and returns named
            tensors. Those named in a tie are internal; all others are external outputs and pinned.
        components: component name -> module path prefixes, e.g. `{"q": ["_q1", "_q2"]}`; "" covers all.
        ties: pairs of output names whose last axes are the same channels (a recurrence). A pair of equal
            names ties nothing: it marks an output as internal, and names its group.

    Raises:
        UnsupportedOperatorError: an operator without a rule works on prunable channels.
        UserError: a parameter belongs to no component, a component covers no parameter, the program does not
            return named tensors, or a tie names an output that it does not return or joins different sizes.
    """
    prefixes = {
        name: tuple([paths] if isinstance(paths, str) else paths) for name, paths in components.items()
    }
    state, aliases = _named_state(model)
    _check_components(state, prefixes)
    tracer = Tracer(state)
    with torch.no_grad(), _unchanged(model), tracer.following(model), tracer, PythonCalls(tracer):
        outputs = program(model)
    _check_outputs(outputs)
    names = _apply_ties(tracer, outputs, tuple(ties))
    tracer.pin_unused(ids for _, ids in names)
    groups = _groups(tracer, list(state), prefixes, names)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return DependencyGraph(groups, prefixes, shapes, tracer.own_consumers(), aliases)


def _has_memory(tensor: Tensor) -> bool:
    ordinary = tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor._is_zerotensor()
    return ordinary and tensor.numel() > 0 and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of `vmap` and its like."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _view_key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _bind(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their names in the operator's schema, defaults filled in."""
    bound: dict[str, Any] = {}
    for index, argument in enumerate(operator._schema.arguments):
        if index < len(args):
            bound[argument.name] = args[index]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def _named_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state_dict's tensors by their first name, and the other names of shared ones."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        elif isinstance(tensor, Tensor):
            first[id(tensor)] = name
            state[name] = tensor
    return state, aliases


def _check_components(state: Mapping[str, Tensor], components: Mapping[str, tuple[str, ...]]) -> None:
    owners = {name: owner(name, components) for name in state}
    orphans = [name for name, component in owners.items() if component is None]
    if orphans:
        raise UserError(
            f"parameter {orphans[0]!r} belongs to no component; components cover "
            f"{ {name: list(paths) for name, paths in components.items()} }"
        )
    empty = sorted(set(components) - set(owners.values()))
    if empty:
        raise UserError(
            f"component {empty[0]!r} covers no parameter: no name starts with {components[empty[0]]}"
        )


def _check_outputs(outputs: Any) -> None:
    if not isinstance(outputs, Mapping):
        raise UserError(
            f"the program returned {type(outputs).__name__}; it has to return a dict of named tensors"
        )
    for name, output in outputs.items():
        if not isinstance(output, Tensor):
            raise UserError(
                f"the program's output {name!r} is {type(output).__name__}; it has to be a tensor"
            )


def _apply_ties(
    tracer: Tracer, outputs: Mapping[str, Tensor], ties: Sequence[Sequence[str]]
) -> list[tuple[str, Ids]]:
    """Join tied outputs, pin the external ones; returns the internal names with their last axis' ids."""
    for pair in ties:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f"tie {pair!r} is not a pair of output names")
        for name in pair:
            if name not in outputs:
                raise UserError(
                    f"tie {pair} names {name!r}, which the program does not return; {nearest(name, outputs)}"
                )
            if outputs[name].dim() == 0:
                raise UserError(f"tie {pair} names {name!r}, which is a scalar and has no channels")
        first, second = (tracer.tag(outputs[name]).ids[-1] for name in pair)
        if len(first) != len(second):
            raise UserError(f"tie {pair} joins last axes of {len(first)} and {len(second)} channels")
        tracer.join(first, second)
    internal = dict.fromkeys(name for first, second in ties for name in (second, first))
    for name, output in outputs.items():
        if name not in internal:
            for ids in tracer.tag(output).ids:
                tracer.pin(ids)
    return [(name, tracer.tag(outputs[name]).ids[-1]) for name in internal]


def _groups(
    tracer: Tracer,
    order: Sequence[str],
    components: Mapping[str, tuple[str, ...]],
    internal: Sequence[tuple[str, Ids]],
) -> tuple[Group, ...]:
    """Channels with one signature form a group; those that nothing produces are inputs and stay.

    A single channel forms none: something has to stay of every width.
    """
    by_signature: dict[Signature, dict[int, Slices]] = defaultdict(dict)
    parts = tracer.parts()
    places = [(name, axis) for name, axes in tracer.parameter_ids.items() for axis in range(len(axes))]
    made = {(name, axis) for name, axis in places if tracer.produces(name, axis)}
    for root, slices in tracer.channels().items():
        if not made.isdisjoint(slices):
            slots = tuple((name, axis, len(indices)) for (name, axis), indices in slices.items())
            by_signature[slots, frozenset(parts[root])][root] = slices
    position = {name: index for index, name in enumerate(order)}
    groups: list[tuple[int, str, Group]] = []
    for (slots, _), by_root in by_signature.items():
        channels = list(by_root.values())
        if len(channels) == 1:
            continue
        members = tuple(
            Member(
                name,
                axis,
                torch.tensor([channel[name, axis] for channel in channels], dtype=torch.long),
                tracer.consumes(name, axis),
            )
            for name, axis, _ in slots
        )
        producer = min(
            (member for member in members if (member.parameter, member.axis) in made),
            key=lambda member: position[member.parameter],
        )
        touched = frozenset(str(owner(member.parameter, components)) for member in members)
        name = _module_of(producer.parameter)
        for output, ids in internal:
            if by_root.keys() & set(tracer.roots(ids).tolist()):
                name = output
                break
        groups.append((position[producer.parameter], name, Group(name, touched, len(channels), members)))
    groups.sort(key=lambda item: (item[0], int(item[2].members[0].indices.min())))
    return _unique_names(group for _, _, group in groups)


def _module_of(parameter: str) -> str:
    """The path of the module that owns a parameter; the parameter itself where the model owns it."""
    path = parameter.split(".parametrizations.")[0]
    return path if path != parameter else parameter.rpartition(".")[0] or parameter


def _unique_names(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Groups that share a producer (two slices of one layer) are told apart by a number."""
    listed = list(groups)
    counts: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for group in listed:
        total[group.name] += 1
    renamed = []
    for group in listed:
        number = counts[group.name]
        counts[group.name] += 1
        renamed.append(replace(group, name=f"{group.name}:{number}") if total[group.name] > 1 else group)
    return tuple(renamed)
