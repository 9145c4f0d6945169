"""The rules of tracing: for every operator, which ids its inputs and outputs share.

A rule takes the tracer and the call, joins or pins ids, and returns the tag of the output (or one tag for
each output). It is right if slicing the operator's inputs by any choice of kept channels and running it
gives its output sliced by the same choice; statistics of normalisation layers are then those of the kept
channels. Pinning is always right. To support another operator, add a rule here and a case to
`tests/test_tracing_operators.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.dependency import Consumer
from components.tracing import PINNED, Call, Ids, Rule, Tag, Tracer

RULES: dict[str, Rule] = {}

VIEWS: set[str] = set()
"""Operators that only look at a tensor: they compute nothing, so they do not count as a use of it."""


def rule_for(operator: Any) -> Rule | None:
    """The rule of an operator overload, or None. Everything torch tags as pointwise has one."""
    name = str(operator.overloadpacket)
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in operator.tags:
        return pointwise
    packet = getattr(torch.ops.aten, name.removeprefix("aten.")[:-1], None) if name.endswith("_") else None
    if packet is not None:  # in place; some of these lack the tag
        overloads = (getattr(packet, overload) for overload in packet.overloads())
        return pointwise if any(torch.Tag.pointwise in overload.tags for overload in overloads) else None
    return None


def rule(*names: str, view: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for `aten` operators, by name without overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten.{name}"] = function
            if view:
                VIEWS.add(f"aten.{name}")
        return function

    return register


def keeps_weights(tracer: Tracer, rule: Rule, tags: Sequence[Tag]) -> bool:
    """True where an operator on weights alone gives a weight: all but the contraction with a constant."""
    contractions: tuple[Rule, ...] = (matmul, add_matmul, add_vector_product, linear, convolution, attention)
    return rule not in contractions or all(_has_channels(tracer, tag) for tag in tags)


def _has_channels(tracer: Tracer, tag: Tag) -> bool:
    return any(tracer.is_of_parameter(ids) for ids in tag.ids)


def pinned(size: int) -> Ids:
    """The ids of an axis that loses nothing."""
    return np.full(size, PINNED, dtype=np.int64)


def all_pinned(output: Any) -> Tag:
    """The tag of a tensor that loses nothing."""
    return Tag(tuple(pinned(size) for size in output.shape))


def axis_of(axis: int, dimensions: int) -> int:
    """A non-negative axis."""
    return axis % dimensions if dimensions else 0


# --- pointwise -------------------------------------------------------------------------------------------


def broadcast(tracer: Tracer, tags: Sequence[Tag], shape: Sequence[int]) -> tuple[Ids, ...]:
    """Join ids along the axes of a broadcast; axes of size 1 are pinned and take the others' ids."""
    result: list[Ids] = []
    for offset in range(len(shape)):
        size, merged = shape[len(shape) - 1 - offset], None
        for tag in tags:
            if offset >= len(tag.ids):
                continue
            ids = tag.ids[len(tag.ids) - 1 - offset]
            if len(ids) != size:
                continue
            if merged is None:
                merged = ids
            else:
                tracer.join(merged, ids)
        result.append(pinned(size) if merged is None else merged)
    return tuple(reversed(result))


@rule("copy_", "copy", "_to_copy", "clone", "contiguous", "_prelu_kernel", "native_dropout", "masked_fill")
@rule(
    "masked_fill_",
    "bernoulli_",
    "bernoulli",
    "uniform_",
    "normal_",
    "random_",
    "exponential_",
    "fill_",
    "zero_",
)
@rule("fill", "rrelu_with_noise", "rrelu_with_noise_", "nan_to_num", "lerp", "_assert_async", "dropout")
@rule("hardswish", "hardswish_", "log_sigmoid_forward", "complex", "polar", "to")
def pointwise(tracer: Tracer, call: Call) -> Tag | list[Tag | None]:
    """Every output element depends on the input elements of the same (broadcast) place alone.

    In-place noise counts too: its elements are independent and alike, so any choice of them is as good.
    """
    output = call.outputs[0]
    tags = [tracer.tag(tensor) for tensor in call.tensors()]
    ids = broadcast(tracer, tags, output.shape)
    _note_outer_product(tracer, tags)
    if call.name in ("aten.add", "aten.add_"):
        _note_bias(tracer, call, tags)
    if call.name == "aten.mul" and not isinstance(call["other"], Tensor) and call["other"] == 1:
        return tags[0]  # vmap scales a bias by one; it is still that bias
    return [Tag(ids) if isinstance(out, Tensor) else None for out in call.outputs]


def _note_outer_product(tracer: Tracer, tags: Sequence[Tag]) -> None:
    """A weight spread over an axis that the activation does not have makes that axis' channels."""
    data = [len(tag.ids) for tag in tags if not tag.is_weight]
    for tag in tags if data else ():
        for axis in range(-len(tag.ids), 0):
            others = [other.ids[axis] for other in tags if other is not tag and len(other.ids) >= -axis]
            if all(len(ids) == 1 for ids in others):
                tracer.carry(tag, axis)


def _note_bias(tracer: Tracer, call: Call, tags: Sequence[Tag]) -> None:
    """`W x` plus a parameter along the output axis: that parameter is the consumer's bias."""
    if len(tags) != 2 or call["alpha"] != 1:
        return
    for product, added in (tags, tags[::-1]):
        if product.result_of is None or added.parameter is None or product.parameter is not None:
            continue
        consumer = tracer.consumers[product.result_of]
        weight = tracer.parameter_ids[consumer.weight]
        expected = [len(weight[consumer.output_axis])]
        if consumer.kind == "batched":
            expected.insert(0, len(weight[0]))
        bias = [len(ids) for ids in tracer.parameter_ids[added.parameter] if len(ids) > 1]
        on_output_axis = len(added.ids[-1]) == expected[-1] and len(product.ids[-1]) == expected[-1]
        if bias == [size for size in expected if size > 1] and on_output_axis:
            tracer.add_consumer(
                Consumer(
                    consumer.weight, consumer.kind, consumer.input_axis, consumer.output_axis, added.parameter
                )
            )


@rule("_weight_norm_interface")
def weight_norm(tracer: Tracer, call: Call) -> list[Tag | None]:
    """Direction times length; the norm is that of the kept entries, as it does not see zeros."""
    direction, length = tracer.tag(call["v"]), tracer.tag(call["g"])
    ids = broadcast(tracer, [direction, length], call.outputs[0].shape)
    return [Tag(ids), length.plain()]


@rule("glu")
def glu(tracer: Tracer, call: Call) -> Tag:
    """The halves of the axis gate one another: channel i is i and i + n/2."""
    tag = tracer.tag(call["self"])
    axis = axis_of(call["dim"], len(tag.ids))
    half = len(tag.ids[axis]) // 2
    tracer.join(tag.ids[axis][:half], tag.ids[axis][half:])
    return Tag(_replaced(tag.ids, axis, tag.ids[axis][:half]))


# --- contractions ----------------------------------------------------------------------------------------


def contract(
    tracer: Tracer, left: Tag, right: Tag, batched: bool = False
) -> tuple[tuple[Ids, ...], int | None]:
    """`left @ right` for matrices (or stacks of them): the shared axis meets, the others stay.

    Returns the ids of the product and the index of the consumer, where one operand is a parameter.
    """
    tracer.join(left.ids[-1], right.ids[-2])
    tracer.read(left.ids[-1])
    if not (
        left.is_weight and right.is_weight and _has_channels(tracer, left) and _has_channels(tracer, right)
    ):
        tracer.consume(left, -1)  # but a product of two weights is itself a weight
        tracer.consume(right, -2)
        tracer.carry(left, -2)
        tracer.carry(right, -1)
    batch: tuple[Ids, ...] = ()
    if batched:
        tracer.join(left.ids[0], right.ids[0])
        batch = (left.ids[0],)
    consumer = None
    for weight, other, input_axis, output_axis in ((right, left, -2, -1), (left, right, -1, -2)):
        if weight.parameter is None or other.parameter is not None:
            continue
        consumer = _consumer(tracer, weight, input_axis, output_axis, batched)
        break
    return (*batch, left.ids[-2], right.ids[-1]), consumer


def _consumer(tracer: Tracer, weight: Tag, input_axis: int, output_axis: int, batched: bool) -> int | None:
    """Record a parameter that contracts an activation, unless it is seen through a partial view."""
    assert weight.parameter is not None
    axes = [weight.axes[0], weight.axes[input_axis], weight.axes[output_axis]]
    shape = tuple(len(ids) for ids in tracer.parameter_ids[weight.parameter])
    if any(axis is None for axis in axes[1:]) or prod(shape) != prod(len(ids) for ids in weight.ids):
        return None
    if batched and len(shape) == 3:
        if axes[0] != 0:
            return None
        kind = "batched"
    elif len(shape) == 2:
        kind = "linear"
    else:
        return None
    return tracer.add_consumer(Consumer(weight.parameter, kind, int(axes[1]), int(axes[2]), None))  # type: ignore[arg-type]


def _with_bias(tracer: Tracer, consumer: int | None, bias: Tag | None) -> None:
    if consumer is None or bias is None or bias.parameter is None:
        return
    known = tracer.consumers[consumer]
    tracer.add_consumer(
        Consumer(known.weight, known.kind, known.input_axis, known.output_axis, bias.parameter)
    )


@rule("mm", "bmm", "mv", "dot", "vdot")
def matmul(tracer: Tracer, call: Call) -> Tag:
    """Products of matrices, stacks of matrices, and vectors."""
    left = tracer.tag(call["self"])
    right_tensor = next(call[name] for name in ("mat2", "vec", "tensor", "other") if call[name] is not None)
    right = tracer.tag(right_tensor)
    if len(right.ids) == 1:  # mv, dot
        return Tag(_vector_product(tracer, left, right))
    ids, consumer = contract(tracer, left, right, batched=len(left.ids) == 3)
    return Tag(ids, result_of=consumer)


def _vector_product(tracer: Tracer, left: Tag, right: Tag) -> tuple[Ids, ...]:
    tracer.join(left.ids[-1], right.ids[0])
    tracer.read(left.ids[-1])
    tracer.consume(left, -1)
    tracer.consume(right, 0)
    tracer.carry(left, 0)
    return left.ids[:-1]


@rule("addmm", "addmm_", "baddbmm", "baddbmm_", "_addmm_activation")
def add_matmul(tracer: Tracer, call: Call) -> Tag:
    """`bias + left @ right`."""
    names = ("mat1", "mat2") if call["mat1"] is not None else ("batch1", "batch2")
    left, right = (tracer.tag(call[name]) for name in names)
    ids, consumer = contract(tracer, left, right, batched=len(left.ids) == 3)
    bias = tracer.tag(call["self"])
    if call["beta"] == 1 and call["alpha"] == 1:
        _with_bias(tracer, consumer, bias)
    joined = broadcast(tracer, [Tag(ids), bias], [len(axis) for axis in ids])
    return Tag(joined)


@rule("addmv", "addmv_")
def add_vector_product(tracer: Tracer, call: Call) -> Tag:
    """`bias + matrix @ vector`."""
    ids = _vector_product(tracer, tracer.tag(call["mat"]), tracer.tag(call["vec"]))
    return Tag(broadcast(tracer, [Tag(ids), tracer.tag(call["self"])], [len(axis) for axis in ids]))


@rule("linear")
def linear(tracer: Tracer, call: Call) -> Tag:
    """`input @ weight.T + bias` in one operator, as inference mode and some back ends run it."""
    data, weight = tracer.tag(call["input"]), tracer.tag(call["weight"])
    tracer.join(data.ids[-1], weight.ids[1])
    tracer.read(data.ids[-1])
    tracer.consume(weight, 1)
    tracer.carry(weight, 0)
    consumer = _consumer(tracer, weight, 1, 0, batched=False) if weight.parameter is not None else None
    if call["bias"] is not None:
        bias = tracer.tag(call["bias"])
        tracer.join(weight.ids[0], bias.ids[0])
        _with_bias(tracer, consumer, bias)
    return Tag((*data.ids[:-1], weight.ids[0]))


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable")
def convolution(tracer: Tracer, call: Call) -> Tag:
    """Convolution and transposed convolution, of any number of spatial axes and groups.

    Grouped: the number of groups stays, so a channel is the same place in every group, and every group
    loses the same number. Depthwise (one channel in, one or more out per group): the groups are the
    channels, and go with them.
    """
    data, weight = tracer.tag(call["input"]), tracer.tag(call["weight"])
    groups, transposed = int(call["groups"] or 1), bool(call["transposed"])
    inputs, batch = data.ids[1], data.ids[0]
    tracer.read(inputs)
    for ids in (*data.ids[2:], *weight.ids[2:]):
        tracer.pin(ids)
    input_axis, output_axis = (0, 1) if transposed else (1, 0)
    if groups == 1:
        tracer.join(inputs, weight.ids[input_axis])
        outputs = weight.ids[output_axis]
        tracer.consume(weight, input_axis)
        tracer.carry(weight, output_axis)
    else:
        outputs = _grouped(tracer, inputs, weight, groups, transposed)
    bias = tracer.tag(call["bias"]) if call["bias"] is not None else None
    if bias is not None:
        tracer.join(outputs, bias.ids[0])
    spatial = tuple(pinned(size) for size in call.outputs[0].shape[2:])
    if weight.parameter is not None and weight.axes == tuple(range(len(weight.ids))):
        kind = "transposed_convolution" if transposed else "convolution"
        name = bias.parameter if bias is not None else None
        tracer.add_consumer(Consumer(weight.parameter, kind, input_axis, output_axis, name, groups))
    return Tag((batch, outputs, *spatial))


def _grouped(tracer: Tracer, inputs: Ids, weight: Tag, groups: int, transposed: bool) -> Ids:
    """Join the ids of a grouped convolution; returns the ids of its output channels."""
    per_group_in = len(inputs) // groups
    if transposed:  # weight: (inputs, outputs / groups, *kernel)
        per_group_out = len(weight.ids[1])
        outputs = np.tile(weight.ids[1], groups)
        tracer.carry(weight, 1)
        tracer.consume(weight, 0)
        tracer.join(inputs, weight.ids[0])
    else:  # weight: (outputs, inputs / groups, *kernel)
        outputs = weight.ids[0]
        tracer.carry(weight, 0)
        per_group_out = len(outputs) // groups
    if per_group_in == 1 and not transposed:
        tracer.join(outputs, np.repeat(inputs, per_group_out))
        return outputs
    by_group = inputs.reshape(groups, per_group_in)
    for row in by_group[1:]:
        tracer.join(by_group[0], row)
    if transposed:
        return outputs
    tracer.join(by_group[0], weight.ids[1])
    tracer.consume(weight, 1)
    rows = outputs.reshape(groups, per_group_out)
    for row in rows[1:]:
        tracer.join(rows[0], row)
    return outputs


@rule("embedding")
def embedding(tracer: Tracer, call: Call) -> Tag:
    """Rows are looked up by data, so they stay; columns are channels."""
    weight, indices = tracer.tag(call["weight"]), tracer.tag(call["indices"])
    tracer.pin(weight.ids[0])
    tracer.carry(weight, 1)
    return Tag((*indices.ids, weight.ids[1]))


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_fused_sdp_choice",
)
def attention(tracer: Tracer, call: Call) -> list[Tag | None]:
    """Heads are independent; the head width sets the scale and the tokens meet in a softmax: both stay."""
    query, key, value = (tracer.tag(call[name]) for name in ("query", "key", "value"))
    for tag in (query, key):
        tracer.pin(tag.ids[-1])
    for tag in (query, key, value):
        tracer.pin(tag.ids[-2])
    for axis in range(len(query.ids) - 2):
        tracer.join(query.ids[axis], key.ids[axis])
        tracer.join(query.ids[axis], value.ids[axis])
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    if mask is not None:
        for ids in tracer.tag(mask).ids:
            tracer.pin(ids)
    rest: list[Tag | None] = [
        all_pinned(out) if isinstance(out, Tensor) else None for out in call.outputs[1:]
    ]
    return [Tag((*query.ids[:-1], value.ids[-1])), *rest]


# --- normalisation ---------------------------------------------------------------------------------------


@rule("native_layer_norm")
def layer_norm(tracer: Tracer, call: Call) -> list[Tag | None]:
    """Scale and shift go with their channels; the statistics are those of the kept channels."""
    data = tracer.tag(call["input"])
    normalised = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call[name] is not None:
            affine = tracer.tag(call[name])
            for ids, own in zip(data.ids[-normalised:], affine.ids, strict=True):
                tracer.join(ids, own)
    return [data.plain(), *(_leading(data, output) for output in call.outputs[1:])]


def _leading(tag: Tag, output: Any) -> Tag | None:
    """Statistics keep the leading axes of their input; their other axes have size 1."""
    if not isinstance(output, Tensor):
        return None
    return Tag(
        tuple(ids if len(ids) == n else pinned(n) for ids, n in zip(tag.ids, output.shape, strict=False))
    )


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def batch_norm(tracer: Tracer, call: Call) -> list[Tag | None]:
    """Scale, shift and running statistics go with their channel; statistics run over all other axes."""
    data = tracer.tag(call["input"])
    for axis, ids in enumerate(data.ids):
        if axis != 1:
            tracer.pin(ids)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            tracer.join(data.ids[1], tracer.tag(call[name]).ids[0])
    saved: list[Tag | None] = [
        Tag((data.ids[1],)) if isinstance(out, Tensor) and out.shape == (len(data.ids[1]),) else None
        for out in call.outputs[1:]
    ]
    return [data.plain(), *saved]


@rule("native_group_norm")
def group_norm(tracer: Tracer, call: Call) -> list[Tag | None]:
    """The number of groups stays, so a channel is the same place in every group."""
    data, groups = tracer.tag(call["input"]), int(call["group"])
    for axis, ids in enumerate(data.ids):
        if axis > 1:
            tracer.pin(ids)
    channels = data.ids[1]
    for name in ("weight", "bias"):
        if call[name] is not None:
            tracer.join(channels, tracer.tag(call[name]).ids[0])
    if groups > 1:
        by_group = channels.reshape(groups, -1)
        if by_group.shape[1] == 1:
            tracer.pin(channels)  # one channel a group: the number of groups would have to change
        for row in by_group[1:]:
            tracer.join(by_group[0], row)
    statistics: list[Tag | None] = [
        Tag((data.ids[0], pinned(out.shape[1]))) if isinstance(out, Tensor) else None
        for out in call.outputs[1:]
    ]
    return [data.plain(), *statistics]


# --- reductions ------------------------------------------------------------------------------------------


@rule(
    "sum", "linalg_vector_norm", "norm", "mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "prod"
)
@rule(
    "any", "all", "max", "min", "argmax", "argmin", "logsumexp", "median", "cumsum", "cumprod", "topk", "sort"
)
@rule(
    "_softmax",
    "_safe_softmax",
    "_log_softmax",
    "softmax",
    "log_softmax",
    "logcumsumexp",
    "cummax",
    "cummin",
    "mode",
    "argsort",
)
def along_axis(tracer: Tracer, call: Call) -> Tag | Sequence[Tag | None]:
    """Operators along one or more axes.

    A sum, or a norm of order above 0, does not see a channel that is zero, so its axis may lose channels.
    All others (mean, softmax, maximum, ...) depend on how many there are or which: their axes stay.
    """
    tag = tracer.tag(call["self"])
    count = len(tag.ids)
    given = next((call[name] for name in ("dim", "axis") if call[name] is not None), None)
    binary = [value for value in call.arguments.values() if isinstance(value, Tensor)]
    if len(binary) > 1:  # torch.max(a, b)
        return pointwise(tracer, call)
    dims = range(count) if given is None or given == [] else [given] if isinstance(given, int) else given
    axes = {axis_of(axis, count) for axis in dims}
    order = call["ord"] if call.name == "aten.linalg_vector_norm" else call["p"]
    ignores_zeros = call.name == "aten.sum" or (
        call.name in ("aten.linalg_vector_norm", "aten.norm") and (order is None or order > 0)
    )
    for axis in axes:
        if ignores_zeros:
            tracer.read(tag.ids[axis])
        else:
            tracer.pin(tag.ids[axis])
    return [_reduced(tag, axes, output) for output in call.outputs]


def _reduced(tag: Tag, axes: set[int], output: Any) -> Tag | None:
    """The ids after a reduction: dropped, kept with size 1, or (a scan) kept as they are."""
    if not isinstance(output, Tensor):
        return None
    if output.dim() == len(tag.ids):
        return Tag(
            tuple(
                pinned(n) if axis in axes and n != len(ids) else ids
                for axis, (ids, n) in enumerate(zip(tag.ids, output.shape, strict=True))
            )
        )
    return Tag(tuple(ids for axis, ids in enumerate(tag.ids) if axis not in axes))


@rule("_is_all_true", "_is_any_true")
def validate(tracer: Tracer, call: Call) -> Tag:
    """How `torch.distributions` checks its arguments, only to raise an error: fewer of them pass as well."""
    return Tag(())


@rule("_local_scalar_dense", "item", "is_nonzero", "equal")
def read_value(tracer: Tracer, call: Call) -> list[Tag | None]:
    """Python sees the value and may decide by it, so its own axes stay. The branch it takes is all we see."""
    for tensor in call.tensors():
        for ids in tracer.tag(tensor).ids:
            tracer.pin(ids)
    return []


# --- spatial ---------------------------------------------------------------------------------------------

_SPATIAL = {"1d": 1, "2d": 2, "3d": 3, "linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2}


@rule(
    *(
        f"{kind}_pool{n}d"
        for kind in ("avg", "_adaptive_avg", "adaptive_avg", "adaptive_max")
        for n in (1, 2, 3)
    )
)
@rule(*(f"max_pool{n}d_with_indices" for n in (1, 2, 3)), "max_pool1d", "max_pool2d", "max_pool3d")
@rule(*(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))
@rule(*(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "trilinear3d")))
@rule("upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_nearest_exact2d")
@rule("grid_sampler_2d", "grid_sampler_3d")
def spatial(tracer: Tracer, call: Call) -> list[Tag | None]:
    """Batch and channel axes pass; the spatial axes behind them are mixed, and stay."""
    data = tracer.tag(call["self"] if call["self"] is not None else call["input"])
    digits = [character for character in call.name.split(".")[1] if character in "123"]
    axes = int(digits[-1])
    first = len(data.ids) - axes
    for ids in data.ids[first:]:
        tracer.pin(ids)
    for tensor in list(call.tensors())[1:]:
        for ids in tracer.tag(tensor).ids:
            tracer.pin(ids)
    return [
        Tag((*data.ids[:first], *(pinned(size) for size in output.shape[first:])))
        if isinstance(output, Tensor)
        else None
        for output in call.outputs
    ]


@rule("constant_pad_nd")
def constant_pad(tracer: Tracer, call: Call) -> Tag:
    """New places hold a constant and stay; the old ones keep their ids."""
    ids = list(tracer.tag(call["self"]).ids)
    for number in range(len(call["pad"]) // 2):
        axis = len(ids) - 1 - number
        before, after = call["pad"][2 * number : 2 * number + 2]
        if before < 0 or after < 0:
            tracer.pin(ids[axis])
            ids[axis] = pinned(call.outputs[0].shape[axis])
        elif before or after:
            ids[axis] = np.concatenate([pinned(before), ids[axis], pinned(after)])
    return Tag(tuple(ids))


@rule("pixel_shuffle")
def pixel_shuffle(tracer: Tracer, call: Call) -> Tag:
    """Blocks of r*r channels become one channel on a finer grid."""
    data = tracer.tag(call["self"])
    axis = len(data.ids) - 3
    for ids in data.ids[-2:]:
        tracer.pin(ids)
    blocks = data.ids[axis].reshape(-1, int(call["upscale_factor"]) ** 2)
    for column in blocks.T[1:]:
        tracer.join(blocks[:, 0], column)
    return Tag((*data.ids[:axis], blocks[:, 0], *(pinned(size) for size in call.outputs[0].shape[-2:])))


# --- joining and taking apart ----------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def cat(tracer: Tracer, call: Call) -> Tag:
    """Ids are concatenated, so every column of a consumer meets its own producer."""
    tags = [tracer.tag(tensor) for tensor in call["tensors"] if tensor.shape != (0,)]
    axis = axis_of(call["dim"], len(tags[0].ids))
    ids = list(tags[0].ids)
    for tag in tags[1:]:
        for other in range(len(ids)):
            if other != axis:
                tracer.join(ids[other], tag.ids[other])
    ids[axis] = np.concatenate([tag.ids[axis] for tag in tags])
    return Tag(tuple(ids))


@rule("stack")
def stack(tracer: Tracer, call: Call) -> Tag:
    """A new axis, which stays; along the others the tensors share their channels."""
    tags = [tracer.tag(tensor) for tensor in call["tensors"]]
    for tag in tags[1:]:
        for ids, own in zip(tags[0].ids, tag.ids, strict=True):
            tracer.join(ids, own)
    axis = axis_of(call["dim"], len(tags[0].ids) + 1)
    joined = tags[0].ids
    return Tag((*joined[:axis], pinned(len(tags)), *joined[axis:]))


def _replaced(ids: Sequence[Ids], axis: int, new: Ids) -> tuple[Ids, ...]:
    return (*ids[:axis], new, *ids[axis + 1 :])


def _part(tag: Tag, axis: int, ids: Ids) -> Tag:
    """A tag with one axis cut: that axis no longer shows the whole of its parameter's axis."""
    whole = len(ids) == len(tag.ids[axis])
    axes = tag.axes if whole or tag.parameter is None else _without(tag.axes, axis)
    return Tag(_replaced(tag.ids, axis, ids), tag.parameter, axes)


def _without(axes: tuple[int | None, ...], axis: int) -> tuple[int | None, ...]:
    return (*axes[:axis], None, *axes[axis + 1 :])


@rule("split", "unsafe_split", "chunk", "unsafe_chunk", view=True)
def split(tracer: Tracer, call: Call) -> list[Tag]:
    """Equal parts stay equal: channel i is place i of every part (gates, mean and log-deviation)."""
    tag = tracer.tag(call["self"])
    axis = axis_of(call["dim"] or 0, len(tag.ids))
    sizes = [output.shape[axis] for output in call.outputs]
    parts = np.split(tag.ids[axis], np.cumsum(sizes)[:-1])
    if len(set(sizes)) == 1:
        for part in parts[1:]:
            tracer.join(parts[0], part)
    elif tracer.is_free(tag.ids[axis]):
        tracer.pin(tag.ids[axis])
    return [_part(tag, axis, part) for part in parts]


@rule("split_with_sizes", "unsafe_split_with_sizes", view=True)
def split_with_sizes(tracer: Tracer, call: Call) -> list[Tag]:
    """Parts of stated sizes are widths of their own."""
    tag = tracer.tag(call["self"])
    axis = axis_of(call["dim"] or 0, len(tag.ids))
    parts = np.split(tag.ids[axis], np.cumsum(call["split_sizes"])[:-1])
    for part in parts:
        tracer.divide(part)
    return [_part(tag, axis, part) for part in parts]


@rule("slice", view=True)
def slice_axis(tracer: Tracer, call: Call) -> Tag:
    """A run of channels is a width of its own, and so is what lies before and behind it.

    With a stride the places count, so the axis stays; so it does for one place counted from the front.
    """
    tag = tracer.tag(call["self"])
    axis = axis_of(call["dim"] or 0, len(tag.ids))
    whole = tag.ids[axis]
    start, end, step = slice(call["start"], call["end"], call["step"]).indices(len(whole))
    if step != 1 or (end - start == 1 and start > 0 and call["start"] > 0):
        tracer.pin(whole)
    elif end - start < len(whole):
        for part in (whole[:start], whole[start:end], whole[end:]):
            tracer.divide(part)
    return _part(tag, axis, whole[start:end:step])


@rule("select", view=True)
def select(tracer: Tracer, call: Call) -> Tag:
    """One place by its number: the numbering of that axis must not change."""
    tag = tracer.tag(call["self"])
    axis = axis_of(call["dim"], len(tag.ids))
    tracer.pin(tag.ids[axis])
    return Tag(tag.ids[:axis] + tag.ids[axis + 1 :], tag.parameter, tag.axes[:axis] + tag.axes[axis + 1 :])


@rule("unbind", view=True)
def unbind(tracer: Tracer, call: Call) -> list[Tag]:
    """Every place by its number, so the axis stays."""
    tag = tracer.tag(call["self"])
    axis = axis_of(call["dim"] or 0, len(tag.ids))
    tracer.pin(tag.ids[axis])
    part = Tag(tag.ids[:axis] + tag.ids[axis + 1 :], tag.parameter, tag.axes[:axis] + tag.axes[axis + 1 :])
    return [part for _ in call.outputs]


@rule("index_select", "gather", "take_along_dim")
def index_along(tracer: Tracer, call: Call) -> Tag:
    """Places chosen by data: that axis stays."""
    tag = tracer.tag(call["self"])
    axis = axis_of(call["dim"], len(tag.ids))
    tracer.pin(tag.ids[axis])
    if call.name != "aten.index_select":
        for ids in (*tag.ids, *tracer.tag(call["index"]).ids):
            tracer.pin(ids)
        return all_pinned(call.outputs[0])
    return Tag(_replaced(tag.ids, axis, pinned(call.outputs[0].shape[axis])))


@rule("index")
def index(tracer: Tracer, call: Call) -> Tag:
    """Advanced indexing: indexed axes stay; one index keeps the other axes in place."""
    tag = tracer.tag(call["self"])
    indices = list(call["indices"]) + [None] * (len(tag.ids) - len(call["indices"]))
    used = [axis for axis, item in enumerate(indices) if item is not None]
    for item in (item for item in indices if item is not None):
        for ids in tracer.tag(item).ids:
            tracer.pin(ids)
    for axis in used:
        tracer.pin(tag.ids[axis])
    places = indices[used[0]]
    if len(used) == 1 and (places.dtype in (torch.long, torch.int32) or places.dim() == 1):
        axis = used[0]
        chosen = call.outputs[0].shape[axis : axis + places.dim()]
        return Tag((*tag.ids[:axis], *(pinned(size) for size in chosen), *tag.ids[axis + 1 :]))
    for ids in tag.ids:
        tracer.pin(ids)
    return all_pinned(call.outputs[0])


@rule(
    "index_put_", "index_put", "scatter_", "scatter", "scatter_add", "scatter_add_", "index_add", "index_copy"
)
@rule("index_copy_", "index_add_", "slice_scatter", "select_scatter", "masked_select", "masked_scatter")
def pin_all(tracer: Tracer, call: Call) -> list[Tag | None]:
    """Places by number in ways that no group can follow: everything stays."""
    for tensor in call.tensors():
        for ids in tracer.tag(tensor).ids:
            tracer.pin(ids)
    return [all_pinned(output) if isinstance(output, Tensor) else None for output in call.outputs]


# --- views -----------------------------------------------------------------------------------------------


@rule("detach", "alias", "lift_fresh", "lift_fresh_copy", "lift", "conj", "_conj", view=True)
def same(tracer: Tracer, call: Call) -> Tag:
    """The same tensor under another name."""
    return tracer.tag(next(call.tensors()))


@rule("view_as_real", view=True)
def as_real(tracer: Tracer, call: Call) -> Tag:
    """A last axis for the real and the imaginary part, which stays."""
    return Tag((*tracer.tag(call["self"]).ids, pinned(2)))


@rule("view_as_complex", view=True)
def as_complex(tracer: Tracer, call: Call) -> Tag:
    """The last axis was real and imaginary part."""
    tag = tracer.tag(call["self"])
    tracer.pin(tag.ids[-1])
    return Tag(tag.ids[:-1])


def _permuted(tag: Tag, order: Sequence[int]) -> Tag:
    axes = tuple(tag.axes[axis] for axis in order) if tag.parameter is not None else ()
    return Tag(tuple(tag.ids[axis] for axis in order), tag.parameter, axes, tag.result_of)


@rule("t", "numpy_T", "transpose", "transpose_", "t_", "swapaxes", view=True)
def transpose(tracer: Tracer, call: Call) -> Tag:
    """Two axes change places."""
    tag = tracer.tag(call["self"])
    order = list(range(len(tag.ids)))
    if call.name in ("aten.transpose", "aten.transpose_", "aten.swapaxes"):
        first, second = (axis_of(call[name], len(order)) for name in ("dim0", "dim1"))
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    return _permuted(tag, order)


@rule("permute", view=True)
def permute(tracer: Tracer, call: Call) -> Tag:
    """Axes change places."""
    tag = tracer.tag(call["self"])
    return _permuted(tag, [axis_of(axis, len(tag.ids)) for axis in call["dims"]])


@rule("movedim", view=True)
def movedim(tracer: Tracer, call: Call) -> Tag:
    """Axes change places."""
    tag = tracer.tag(call["self"])
    sources = [axis_of(axis, len(tag.ids)) for axis in call["source"]]
    targets = [axis_of(axis, len(tag.ids)) for axis in call["destination"]]
    order: list[int] = [axis for axis in range(len(tag.ids)) if axis not in sources]
    for target, source in sorted(zip(targets, sources, strict=True)):
        order.insert(target, source)
    return _permuted(tag, order)


@rule(
    "unsqueeze",
    "squeeze",
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "flatten",
    "unflatten",
    view=True,
)
@rule("unsqueeze_", "squeeze_", view=True)
def reshape(tracer: Tracer, call: Call) -> Tag:
    """Axes are merged and split; see `reshape_ids`. Axes of size 1 come and go freely."""
    tag, shape = tracer.tag(call["self"]), call.outputs[0].shape
    if call["dtype"] is not None and prod(shape) != prod(len(own) for own in tag.ids):
        tracer.pin(tag.ids[-1])
        return Tag((*tag.ids[:-1], pinned(shape[-1])))
    merges = call.name in (
        "aten.view",
        "aten._unsafe_view",
        "aten.reshape",
        "aten._reshape_alias",
        "aten.unflatten",
    )
    ids = reshape_ids(tracer, tag.ids, shape, tracer.flexible_axis if merges else None)
    before = [axis for axis, own in enumerate(tag.ids) if len(own) != 1]
    after = [axis for axis, size in enumerate(shape) if size != 1]
    if [len(tag.ids[axis]) for axis in before] != [shape[axis] for axis in after]:
        same_last = bool(shape and tag.ids) and shape[-1] == len(tag.ids[-1])
        return Tag(ids, result_of=tag.result_of if same_last else None)
    axes: list[int | None] = [None] * len(shape)
    for old, new in zip(before, after, strict=True):
        axes[new] = tag.axes[old] if tag.parameter is not None else None
    if tag.parameter is not None:  # axes of size 1 keep their order where they can be told apart
        ones = [tag.axes[axis] for axis, own in enumerate(tag.ids) if len(own) == 1]
        free = [axis for axis, size in enumerate(shape) if size == 1]
        for axis, old_axis in zip(free, ones, strict=False):
            axes[axis] = old_axis
    return Tag(ids, tag.parameter, tuple(axes) if tag.parameter is not None else (), tag.result_of)


def reshape_ids(
    tracer: Tracer, ids: Sequence[Ids], shape: Sequence[int], flexible: int | None = None
) -> tuple[Ids, ...]:
    """Carry ids through a reshape.

    Runs of axes with equal products are handled one by one. Merging axes repeats the ids of the one that
    can lose channels (convolution -> flatten: each channel owns its positions); the others are pinned.
    Splitting an axis gives the ids to the one that the program leaves open (`flexible`, the `-1` of a view),
    else to the axis along which alone they vary, else to the outermost one, and joins everything at each of
    its places (linear -> view -> convolution; SimNorm; attention heads).
    """
    if not prod(shape):  # nothing in it
        for own in ids:
            tracer.pin(own)
        return tuple(pinned(size) for size in shape)
    old = [own for own in ids if len(own) != 1]
    new = [size for size in shape if size != 1]
    open_axis = None
    if flexible is not None and flexible < len(shape) and shape[flexible] != 1:
        open_axis = sum(size != 1 for size in shape[:flexible])
    result: list[Ids] = []
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j = i, j
        left, right = len(old[i]), new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * len(old[i]), i + 1
            else:
                right, j = right * new[j], j + 1
        within = open_axis - first_j if open_axis is not None and first_j <= open_axis < j else None
        result.extend(_reshape_run(tracer, old[first_i:i], new[first_j:j], within))
    iterator = iter(result)
    return tuple(pinned(1) if size == 1 else next(iterator) for size in shape)


def _reshape_run(tracer: Tracer, ids: Sequence[Ids], shape: Sequence[int], flexible: int | None) -> list[Ids]:
    if len(ids) == 1 and len(shape) == 1:
        return [ids[0]]
    free = [axis for axis, own in enumerate(ids) if tracer.is_free(own)]
    if not free:
        return [pinned(size) for size in shape]
    carrier = max(free, key=lambda axis: (tracer.is_of_parameter(ids[axis]), len(ids[axis])))
    for axis in free:
        if axis != carrier or (len(ids) > 1 and not tracer.is_of_parameter(ids[axis])):
            tracer.pin(ids[axis])  # a constant's size, such as how often data are repeated, is the program's
    along = [1] * len(ids)
    along[carrier] = -1
    flat = np.broadcast_to(ids[carrier].reshape(along), [len(own) for own in ids]).ravel()
    if len(shape) == 1:
        return [flat]
    grid = flat.reshape(shape)
    chosen = _axis_of_variation(tracer.roots(grid)) if flexible is None else flexible
    rows = np.moveaxis(grid, chosen, 0).reshape(shape[chosen], -1)
    for column in rows.T[1:]:
        tracer.join(rows[:, 0], column)
    return [rows[:, 0] if axis == chosen else pinned(size) for axis, size in enumerate(shape)]


def _axis_of_variation(roots: Ids) -> int:
    """The first axis along which alone the roots differ; the outermost where there is none."""
    for axis, size in enumerate(roots.shape):
        rows = np.moveaxis(roots, axis, 0).reshape(size, -1)
        if (rows == rows[:, :1]).all():
            return axis
    return 0


@rule("expand", "expand_copy", "broadcast_to", view=True)
def expand(tracer: Tracer, call: Call) -> Tag:
    """A repeated axis has the same value everywhere, so it can lose any of its places: its ids are new."""
    tag, shape = tracer.tag(call["self"]), call.outputs[0].shape
    added = len(shape) - len(tag.ids)
    ids: list[Ids] = []
    axes: list[int | None] = []
    for axis, size in enumerate(shape):
        own = tag.ids[axis - added] if axis >= added else None
        same_size = own is not None and len(own) == size
        ids.append(own if own is not None and same_size else tracer.fresh(size))
        axes.append(tag.axes[axis - added] if same_size and tag.parameter is not None else None)
    return Tag(tuple(ids), tag.parameter, tuple(axes) if tag.parameter is not None else ())


@rule("repeat", "tile")
def repeat(tracer: Tracer, call: Call) -> Tag:
    """A repeated axis shows its channels again; a new or single one stays."""
    tag, shape = tracer.tag(call["self"]), call.outputs[0].shape
    added = len(shape) - len(tag.ids)
    ids = [pinned(size) for size in shape[:added]]
    for own, size in zip(tag.ids, shape[added:], strict=True):
        ids.append(pinned(size) if len(own) == 1 else np.tile(own, size // len(own)))
    return Tag(tuple(ids))


# --- new tensors -----------------------------------------------------------------------------------------


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "empty_strided",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "randn",
)
@rule("new_empty_strided", "rand", "scalar_tensor")
def constant(tracer: Tracer, call: Call) -> Tag:
    """Alike (or independent noise) at every place, so any places may go: new ids."""
    return Tag(tuple(tracer.fresh(size) for size in call.outputs[0].shape))


@rule("zeros_like", "ones_like", "full_like", "empty_like", "randn_like", "rand_like", "new_empty_like")
def constant_like(tracer: Tracer, call: Call) -> Tag:
    """As wide as another tensor, so it follows that tensor's channels."""
    return tracer.tag(call["self"]).plain()
