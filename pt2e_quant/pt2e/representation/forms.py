"""The integer form of each op, in a table: what is known of its operands -> what is known of its result.

A form inserts the op on integers and says which real numbers the result stands for (`values`); it never sees how the
result is used. Arguments go by the names in the op's schema. The forms of products are in `products`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ... import ops
from ...graph.write import Symbol
from ...requantization import NoIntegerForm
from .operands import Call
from .products import PRODUCTS
from .values import Integers, Sum, Value, bounded

__all__ = ["integer_form"]

aten = torch.ops.aten
_Q = torch.ops.quantized_decomposed

Form = Callable[[Call], Value]


def integer_form(node: Node) -> Form | None:
    """The form for a node's op, if it has one."""
    form = _FORMS.get(node.target) if isinstance(node.target, OpOverload) else None
    return form if form is not None or not ops.is_value_preserving(node) else same_values


# --- where integers come from -----------------------------------------------------------------------------------------


def dequantize_per_tensor(call: Call) -> Integers:
    """Codes with one scale: numbers, or tensors that are constant or chosen at run time."""
    arguments = call.arguments
    scale, zero_point = call.number(arguments["scale"]), call.number(arguments["zero_point"])
    if scale is None or zero_point is None:
        return _chosen_at_run_time(call, arguments["scale"], arguments["zero_point"])
    limits = (int(arguments["quant_min"]), int(arguments["quant_max"]))
    return Integers(
        call.symbol(arguments["input"]),
        torch.tensor(scale, dtype=torch.float32).double(),  # kernels hold scales in float32
        call.reach(arguments["input"], int(zero_point), limits),
        int(zero_point),
        limits=limits,
    )


def dequantize_per_token(call: Call) -> Integers:
    return _chosen_at_run_time(call, call.arguments["scales"], call.arguments["zero_points"])


def _chosen_at_run_time(call: Call, scale: Node, zero_point: Node) -> Integers:
    arguments = call.arguments
    bound = int(arguments["quant_max"]) - int(arguments["quant_min"])
    one = torch.ones((), dtype=torch.float64)
    return Integers(call.symbol(arguments["input"]), one, bound, call.symbol(zero_point), run_time=call.symbol(scale))


def dequantize_per_channel(call: Call) -> Integers:
    """Constant codes with a scale per index of one dimension."""
    arguments = call.arguments
    weight, scale = call.constant(arguments["input"]), call.constant(arguments["scales"])
    if weight is None or scale is None:
        raise NoIntegerForm("its scales per channel are known at run time only")
    given = arguments["zero_points"]
    zero_point = torch.zeros_like(scale, dtype=torch.int64) if given is None else call.constant(given)
    if zero_point is None or zero_point.is_floating_point():
        raise NoIntegerForm("its zero points are floats")
    shape = [1] * weight.dim()
    shape[int(arguments["axis"])] = -1
    centred = weight.long() - zero_point.reshape(shape)
    return Integers(
        call.symbol(arguments["input"]),
        scale.double().reshape(shape),
        int(centred.abs().max()),
        call.writer.constant(zero_point.reshape(shape)) if zero_point.any() else 0,
    )


# --- the same values, elsewhere ---------------------------------------------------------------------------------------


def same_values(call: Call) -> Integers:
    """Ops that move values or pick some: on the codes themselves, or on code - zero_point where zeros are filled in."""
    if call.node.target in _NO_KERNEL:
        raise NoIntegerForm("torch has no kernel of it for integers")
    operands = [node for node in call.node.all_input_nodes if call.is_real(node)]
    values = [call.integers_of(node) for node in operands]
    first = values[0]
    if call.node.target in _IDENTITIES and isinstance(call.node.meta["val"], Tensor):
        return first
    if any(value.scale.numel() != 1 or value.scale != first.scale for value in values):
        raise NoIntegerForm("its operands have different scales, or a scale per channel")
    if any(value.run_time is not None for value in values) and (len(values) > 1 or not call.is_single(first.run_time)):
        raise NoIntegerForm("its operands' scales are known at run time only, for each row")
    if ops.fills_zeros(call.node) or len({value.bounds for value in values}) > 1:
        values = [value.settled() for value in values]
    raw = not ops.fills_zeros(call.node) and len({(value.zero_point, value.codes.dtype) for value in values}) == 1
    inside = {node: value.codes if raw else value.centred() for node, value in zip(operands, values, strict=True)}
    moved = _move(call, inside)
    return replace(
        values[0],
        codes=moved,
        bound=max(value.bound for value in values),
        zero_point=first.zero_point if raw else 0,
        limits=first.limits if raw and len({value.limits for value in values}) == 1 else None,
    )


def _move(call: Call, inside: dict[Node, Symbol]) -> Symbol:
    """The op on integers. A zero that it fills in must be an integer, or torch makes the result real numbers."""
    args, kwargs = map_arg(
        (call.node.args, call.node.kwargs), lambda node: inside[node].node if node in inside else node
    )
    if ops.fills_zeros(call.node):
        args, kwargs = pytree.tree_map_only(float, int, (args, kwargs))
    (dtype,) = {symbol.dtype for symbol in inside.values()}

    def value() -> Any:
        """The float op's own value in integers: computing it again would invent sizes where these depend on data."""

        def integers(t: Tensor) -> Tensor:
            return torch.empty_like(t, dtype=dtype) if t.is_floating_point() else t

        return pytree.tree_map_only(Tensor, integers, call.node.meta["val"])

    return call.writer.call_with_value(ops.functional(call.node.target), args, kwargs, value)


def max_pool1d(call: Call) -> Integers:
    """torch pools integers in two dimensions only, so one of size 1 is added for a while."""
    x = call.integers_of(call.arguments["self"])
    stride = call.arguments["stride"] or call.arguments["kernel_size"]
    amounts = [
        [neutral, *amount]
        for neutral, amount in (
            (1, call.arguments["kernel_size"]),
            (1, stride),
            (0, call.arguments["padding"]),
            (1, call.arguments["dilation"]),
        )
    ]
    flat = call.emit(aten.unsqueeze.default, x.codes, -2)
    pooled = call.emit(aten.max_pool2d.default, flat, *amounts, call.arguments["ceil_mode"])
    return replace(x, codes=call.emit(aten.squeeze.dim, pooled, -2))


# --- bounds -----------------------------------------------------------------------------------------------------------


def relu(call: Call) -> Value:
    return bounded(call.value("self"), 0.0, math.inf)


def relu6(call: Call) -> Value:
    return bounded(call.value("self"), 0.0, 6.0)


def hardtanh(call: Call) -> Value:
    return bounded(call.value("self"), float(call.arguments["min_val"]), float(call.arguments["max_val"]))


def clamp(call: Call) -> Value:
    low, high = call.arguments.get("min"), call.arguments.get("max")
    return bounded(call.value("self"), -math.inf if low is None else low, math.inf if high is None else high)


# --- sums and averages ------------------------------------------------------------------------------------------------


def add(call: Call) -> Sum:
    return _sum(call, 1)


def sub(call: Call) -> Sum:
    return _sum(call, -1)


def _sum(call: Call, sign: int) -> Sum:
    if call.arguments["alpha"] != 1:
        raise NoIntegerForm(f"alpha={call.arguments['alpha']}")
    terms = ((1, call.integers("self")), (sign, call.integers("other")))
    if any(term.run_time is not None for _, term in terms):
        raise NoIntegerForm("an operand's scale is known at run time only")
    return Sum(terms)


def mean(call: Call) -> Integers:
    """The sum over some dimensions; its scale is divided by the count."""
    if call.arguments["dtype"] is not None:
        raise NoIntegerForm(f"dtype={call.arguments['dtype']}")
    dims = call.arguments.get("dim") or list(range(len(call.shape_of("self"))))
    return _average(call, [int(dim) for dim in dims], bool(call.arguments.get("keepdim", False)))


def _average(call: Call, dims: Sequence[int], keepdim: bool) -> Integers:
    x, sizes = call.one_scale("self"), call.shape_of("self")
    count = math.prod(_static(sizes[dim] for dim in dims))
    total = call.sum_dtype(x.bound * count)
    summed = call.emit(aten.sum.dim_IntList, x.centred(total), dims, keepdim, dtype=total)
    return Integers(summed, x.scale / count, x.bound * count, average=True)


def adaptive_avg_pool(call: Call) -> Integers:
    """To one value: a mean. To more: windows of different sizes, summed by products with matrices of zeros and ones."""
    x, sizes, wanted = call.one_scale("self"), call.shape_of("self"), call.arguments["output_size"]
    dims = list(range(len(sizes) - len(wanted), len(sizes)))
    if all(size == 1 for size in wanted):
        return _average(call, dims, True)
    if len(wanted) > 2:
        raise NoIntegerForm(f"output size {list(wanted)}, three dimensions at once")
    windows = [_windows(size, count) for size, count in zip(_static(sizes[dim] for dim in dims), wanted, strict=True)]
    counts = [window.sum(1) for window in windows]
    bound = x.bound * math.prod(int(count.max()) for count in counts)
    total = call.sum_dtype(bound)
    summed = call.emit(
        aten.matmul.default, x.centred(total), call.writer.constant(windows[-1].t().contiguous().to(total))
    )
    if len(windows) == 2:
        summed = call.emit(aten.matmul.default, call.writer.constant(windows[0].to(total)), summed)
    sizes_of_windows = counts[0] if len(counts) == 1 else counts[0][:, None] * counts[1]
    return Integers(summed, x.scale / sizes_of_windows.double(), bound, average=True)


def _windows(size: int, count: int) -> Tensor:
    """(count, size) of 0 and 1: window i reaches from floor(i * size / count) to ceil((i + 1) * size / count)."""
    window, position = torch.arange(count)[:, None], torch.arange(size)
    return ((position >= window * size // count) & (position * count < (window + 1) * size)).long()


def avg_pool(call: Call) -> Integers:
    """The sum over windows, as a depthwise convolution with ones; its scale is divided by the count."""
    arguments, x, sizes = call.arguments, call.one_scale("self"), call.shape_of("self")
    target, spatial = _CONV_OF_POOL[call.node.target]  # type: ignore[index]
    if arguments["ceil_mode"] or (any(arguments["padding"]) and not arguments["count_include_pad"]):
        raise NoIntegerForm("its windows hold different numbers of values")
    kernel = list(arguments["kernel_size"]) * (spatial // len(arguments["kernel_size"]))
    (features,) = _static([sizes[-spatial - 1]])
    bound = x.bound * math.prod(kernel)
    total = call.sum_dtype(bound)
    ones = call.writer.constant(torch.ones(features, 1, *kernel, dtype=total))
    options = (arguments["stride"] or kernel, arguments["padding"], [1] * spatial, features)
    summed = call.emit(target, x.centred(total), ones, None, *options)
    count = arguments.get("divisor_override") or math.prod(kernel)
    return Integers(summed, x.scale / count, bound, average=True)


def _static(sizes: Iterable[Any]) -> list[int]:
    found = list(sizes)
    if not all(isinstance(size, int) for size in found):
        raise NoIntegerForm("the number of values that it averages is dynamic")
    return found


# --- the table --------------------------------------------------------------------------------------------------------

_CONV_OF_POOL: dict[OpOverload, tuple[OpOverload, int]] = {
    aten.avg_pool1d.default: (aten.conv1d.default, 1),
    aten.avg_pool2d.default: (aten.conv2d.default, 2),
}
_IDENTITIES = frozenset((*ops.DROPOUT, *ops.CAST))
_NO_KERNEL = frozenset((*ops.UPSAMPLE_NEAREST, *ops.ADAPTIVE_MAX_POOL, aten.im2col.default))

_FORMS: dict[OpOverload, Form] = {
    _Q.dequantize_per_tensor.default: dequantize_per_tensor,
    _Q.dequantize_per_tensor.tensor: dequantize_per_tensor,
    _Q.dequantize_per_token.default: dequantize_per_token,
    _Q.dequantize_per_channel.default: dequantize_per_channel,
    **PRODUCTS,
    **dict.fromkeys(ops.ADD, add),
    **dict.fromkeys(ops.SUB, sub),
    **dict.fromkeys(ops.RELU, relu),
    **dict.fromkeys(ops.RELU6, relu6),
    **dict.fromkeys(ops.HARDTANH, hardtanh),
    **dict.fromkeys(ops.CLAMP, clamp),
    **dict.fromkeys(ops.MEAN, mean),
    **dict.fromkeys(ops.ADAPTIVE_AVG_POOL, adaptive_avg_pool),
    **dict.fromkeys(_CONV_OF_POOL, avg_pool),
    aten.max_pool1d.default: max_pool1d,
}
