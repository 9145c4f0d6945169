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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from components.dependency import Consumer, DependencyGraph, Group, Member, owner
from components.errors import UserError

Ids = NDArray[np.int64]
PINNED = 0
"""The id of everything that is never removed: input data, external outputs, batch and spatial axes."""


class UnsupportedOperatorError(RuntimeError):
    """The model runs an operator on prunable channels for which there is no rule."""


@dataclass(frozen=True)
class Tag:
    """What tracing knows of one tensor.

    Attributes:
        ids: for every axis, the id of every index along it.
        parameter: name of the parameter this tensor is a view of, or None.
        axes: for every axis, the axis of `parameter` it shows, or None.
        result_of: index of the consumer whose product this is (before a bias), or None.
    """

    ids: tuple[Ids, ...]
    parameter: str | None = None
    axes: tuple[int | None, ...] = ()
    result_of: int | None = None

    def plain(self) -> Tag:
        """The same ids without provenance: what a new tensor computed from this one gets."""
        return Tag(self.ids)


Rule = Callable[["Tracer", "Call"], "Tag | Sequence[Tag | None]"]


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


class Tracer(TorchDispatchMode):
    """Joins ids while a call program runs; the rules call `join`, `pin`, `tag` and `consume`."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        # A union-find over ids; the smallest id of a set is its root, so pinned (0) wins every union.
        self._parent: list[int] = [PINNED]
        self._touched: set[int] = set()
        self._tags: dict[int, Tag] = {}
        # Tensors stay alive while traced, so that an `id()` is never used twice.
        self._alive: list[Tensor] = []
        self._consumed: set[tuple[str, int]] = set()
        self._storages: dict[int, str] = {}
        self._by_view: dict[tuple[Any, ...], Tag] = {}
        self.consumers: list[Consumer] = []
        self._module_stack: list[str] = []
        self.parameter_ids: dict[str, tuple[Ids, ...]] = {}
        for name, tensor in state.items():
            self._register(name, tensor)
        self._last_parameter_id = len(self._parent) - 1

    def _register(self, name: str, tensor: Tensor) -> None:
        tag = Tag(
            tuple(self.fresh(size) for size in tensor.shape),
            parameter=name,
            axes=tuple(range(tensor.dim())),
        )
        self.parameter_ids[name] = tag.ids
        self._attach(tensor, tag)
        if tensor.numel():
            self._storages[tensor.untyped_storage().data_ptr()] = name
            self._by_view[_view_key(tensor)] = tag

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
        return np.fromiter((self._find(int(i)) for i in ids.ravel()), np.int64, ids.size).reshape(ids.shape)

    def join(self, first: Ids, second: Ids) -> None:
        """State that two runs of ids stand for the same channels, index by index."""
        for a, b in {(int(a), int(b)) for a, b in zip(first.ravel(), second.ravel(), strict=True)}:
            low, high = sorted((self._find(a), self._find(b)))
            self._parent[high] = low

    def pin(self, ids: Ids) -> None:
        """State that these channels are never removed."""
        for item in np.unique(ids):
            self._parent[self._find(int(item))] = PINNED

    def is_free(self, ids: Ids) -> bool:
        """True where any of the ids may still be removed."""
        return bool((self.roots(ids) != PINNED).any())

    def is_of_parameter(self, ids: Ids) -> bool:
        """True where any of the free ids belongs to a parameter (and not to a constant alone)."""
        roots = self.roots(ids)
        return bool(((roots != PINNED) & (roots <= self._last_parameter_id)).any())

    # --- tags --------------------------------------------------------------------------------------------

    def tag(self, tensor: Tensor) -> Tag:
        """The tag of a tensor; one that tracing never saw is input data, so all of it is pinned.

        Raises:
            UnsupportedOperatorError: it is a view of a parameter that was made outside the program.
        """
        known = self._tags.get(id(tensor))
        if known is not None:
            return known
        if tensor.numel() and tensor.layout == torch.strided and tensor.device.type != "meta":
            same = self._by_view.get(_view_key(tensor))
            if same is not None:
                return same
            name = self._storages.get(tensor.untyped_storage().data_ptr())
            if name is not None:
                raise UnsupportedOperatorError(
                    f"the program uses a view of parameter {name!r} (shape {tuple(tensor.shape)}) that was made "
                    f"before tracing, in {self.module_path}; take the view inside the program"
                )
        return Tag(tuple(np.zeros(size, dtype=np.int64) for size in tensor.shape))

    def _attach(self, tensor: Tensor, tag: Tag) -> None:
        if len(tag.ids) != tensor.dim() or any(len(i) != n for i, n in zip(tag.ids, tensor.shape, strict=True)):
            found = tuple(len(ids) for ids in tag.ids)
            raise AssertionError(f"a rule gave ids of shape {found} to a tensor of shape {tuple(tensor.shape)}")
        for ids in tag.ids:
            if len(ids) == 1:
                self.pin(ids)
        earlier = self._tags.get(id(tensor))
        if earlier is not None:  # written in place: old and new contents share the channels
            for old, new in zip(earlier.ids, tag.ids, strict=True):
                self.join(old, new)
            return
        self._tags[id(tensor)] = tag
        self._alive.append(tensor)

    def touch(self, tag: Tag) -> None:
        """Note that an operator computes with these ids; what nothing ever computes with is pinned."""
        for ids in tag.ids:
            self._touched.update(int(i) for i in np.unique(ids))

    def consume(self, tag: Tag, axis: int) -> None:
        """Note that this axis of a parameter is contracted with an activation."""
        if tag.parameter is not None and tag.axes[axis] is not None:
            self._consumed.add((tag.parameter, int(tag.axes[axis])))  # type: ignore[arg-type]

    def add_consumer(self, consumer: Consumer) -> int:
        """Record a consumer once; returns its index."""
        for index, known in enumerate(self.consumers):
            if known.weight == consumer.weight:
                if known.bias is None and consumer.bias is not None:
                    self.consumers[index] = replace(known, bias=consumer.bias)
                return index
        self.consumers.append(consumer)
        return len(self.consumers) - 1

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
        from components.operators import VIEWS, rule_for  # the rules are written against this module

        result = operator(*args, **(kwargs or {}))
        outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
        call = Call(operator, _bind(operator, args, kwargs or {}), outputs)
        tags = [self.tag(tensor) for tensor in call.tensors()]
        rule = rule_for(operator)
        free = any(self.is_free(ids) for tag in tags for ids in tag.ids)
        if rule is None:
            if free:
                raise UnsupportedOperatorError(
                    f"operator {operator} in {self.module_path} works on prunable channels and has no pruning "
                    "rule; write that step with supported operators, move it out of the program, or add a rule "
                    "to components/operators.py"
                )
            return result  # nothing here can be pruned, and what comes out is input data to the rest
        if call.name not in VIEWS:
            for tag in tags:
                self.touch(tag)
        given = rule(self, call)
        assigned = (given,) if isinstance(given, Tag) else tuple(given)
        for output, tag_out in zip(outputs, assigned, strict=False):
            if isinstance(output, Tensor) and tag_out is not None:
                self._attach(output, tag_out)
        return result

    # --- reading the result ------------------------------------------------------------------------------

    def channels(self) -> dict[int, dict[tuple[str, int], list[int]]]:
        """Root id -> (parameter, axis) -> the indices along that axis that belong to the channel."""
        found: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for name, axes in self.parameter_ids.items():
            for axis, ids in enumerate(axes):
                for index, root in enumerate(self.roots(ids)):
                    if root != PINNED:
                        found[int(root)][name, axis].append(index)
        return found

    def pin_untouched(self) -> None:
        """Pin every parameter index that no operator computed with: unused rows have unknown readers."""
        for axes in self.parameter_ids.values():
            for ids in axes:
                self.pin(np.array([i for i in ids if int(i) not in self._touched], dtype=np.int64))

    def consumes(self, parameter: str, axis: int) -> bool:
        """True where the axis was contracted with an activation."""
        return (parameter, axis) in self._consumed


def trace(
    model: nn.Module,
    program: Callable[[nn.Module], Mapping[str, Tensor]],
    *,
    components: Mapping[str, Sequence[str]],
    ties: Iterable[tuple[str, str]] = (),
) -> DependencyGraph:
    """Run `program(model)` once and find the model's channels, groups and couplings.

    The model is not changed: buffers that running it updates (batch-norm statistics) are restored.

    Args:
        model: any module; it needs no `forward`.
        program: calls everything the agent uses (for a recurrence, at least two steps) and returns named
            tensors. Those named in a tie are internal; all others are external outputs and pinned.
        components: component name -> module path prefixes, e.g. `{"q": ["_q1", "_q2"]}`; "" covers all.
        ties: pairs of output names whose last axes are the same channels (a recurrence). A pair of equal
            names ties nothing: it marks an output as internal, and names its group.

    Raises:
        UnsupportedOperatorError: an operator without a rule works on prunable channels.
        UserError: a parameter belongs to no component, a component covers no parameter, or a tie names an
            output that the program does not return or joins outputs of different sizes.
    """
    prefixes = {name: tuple([paths] if isinstance(paths, str) else paths) for name, paths in components.items()}
    state, aliases = _named_state(model)
    _check_components(state, prefixes)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    tracer = Tracer(state)
    try:
        with torch.no_grad(), tracer.following(model), tracer:
            outputs = dict(program(model))
    finally:
        for name, buffer in model.named_buffers():
            buffer.data.copy_(before[name])
    names = _apply_ties(tracer, outputs, tuple(ties))
    tracer.pin_untouched()
    groups = _groups(tracer, list(state), prefixes, names)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return DependencyGraph(groups, prefixes, shapes, tuple(tracer.consumers), aliases)


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
    empty = sorted(set(components) - set(owners.values()))  # type: ignore[arg-type]
    if empty:
        raise UserError(f"component {empty[0]!r} covers no parameter: no name starts with {components[empty[0]]}")


def _apply_ties(
    tracer: Tracer, outputs: Mapping[str, Tensor], ties: tuple[tuple[str, str], ...]
) -> list[tuple[str, Ids]]:
    """Join tied outputs, pin the external ones; returns the internal names with their last axis' ids."""
    for pair in ties:
        for name in pair:
            if name not in outputs:
                raise UserError(f"tie {pair} names {name!r}, which the program does not return: {sorted(outputs)}")
        first, second = (tracer.tag(outputs[name]).ids[-1] for name in pair)
        if len(first) != len(second):
            raise UserError(f"tie {pair} joins last axes of {len(first)} and {len(second)} channels")
        tracer.join(first, second)
    internal = dict.fromkeys(name for first, second in ties for name in (second, first))
    for name, output in outputs.items():
        if name not in internal:
            tag = tracer.tag(output)
            tracer.touch(tag)
            for ids in tag.ids:
                tracer.pin(ids)
    return [(name, tracer.tag(outputs[name]).ids[-1]) for name in internal]


def _groups(
    tracer: Tracer,
    order: Sequence[str],
    components: Mapping[str, tuple[str, ...]],
    internal: Sequence[tuple[str, Ids]],
) -> tuple[Group, ...]:
    """Channels with one signature form a group; those that nothing produces are inputs and stay."""
    by_signature: dict[tuple[tuple[str, int, int], ...], list[dict[tuple[str, int], list[int]]]] = defaultdict(list)
    root_of: dict[tuple[tuple[str, int, int], ...], set[int]] = defaultdict(set)
    for root, slices in tracer.channels().items():
        if all(tracer.consumes(name, axis) for name, axis in slices):
            continue
        signature = tuple((name, axis, len(indices)) for (name, axis), indices in slices.items())
        by_signature[signature].append(slices)
        root_of[signature].add(root)
    position = {name: index for index, name in enumerate(order)}
    groups: list[tuple[int, str, Group]] = []
    for signature, channels in by_signature.items():
        members = tuple(
            Member(
                name,
                axis,
                torch.tensor([channel[name, axis] for channel in channels], dtype=torch.long),
                tracer.consumes(name, axis),
            )
            for name, axis, _ in signature
        )
        producer = min((m for m in members if not m.consumes), key=lambda m: position[m.parameter])
        touched = frozenset(str(owner(member.parameter, components)) for member in members)
        name = _module_of(producer.parameter)
        for output, ids in internal:
            if root_of[signature] & set(tracer.roots(ids).tolist()):
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
