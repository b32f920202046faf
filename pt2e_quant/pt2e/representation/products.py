"""Integer forms of ops that multiply: convolutions, linear, matrix products, element by element, and table look-ups.

Products of codes are summed in int32, or in int64 where the largest possible sum (known from constant weights, else
from the length of the sum) does not fit. The scale of a sum is s_x * s_w, and a constant bias becomes int32 with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ... import ops
from ...arguments import bind
from ...graph.write import Symbol
from ...requantization import NoIntegerForm, bias_codes
from .operands import Call
from .values import Integers, Lookup, Value

__all__ = ["PRODUCTS"]

aten = torch.ops.aten
_Q = torch.ops.quantized_decomposed

_INT32 = 2**31
_UNKNOWN_LENGTH = 2**22  # taken for sums of dynamic length: int64 has room for as many products of 8-bit codes


def conv(call: Call) -> Integers:
    """Also transposed. Code - zero point is padded with zeros, which stand for zeros."""
    x, w = call.integers("input"), call.integers("weight")
    transposed = ops.is_conv_transpose(call.node)
    _no_rows(call, x)
    scale = _per_output(w, 1 if transposed else 0)
    if transposed and scale.numel() > 1:
        scale = scale.repeat(int(call.arguments["groups"]))
    bound = x.bound * _largest_sum(call, w, 1 if transposed else 0)
    bias = _bias(call, call.arguments["bias"], x, scale)
    bound += _largest(bias)
    needs_int64 = transposed or set(call.arguments["dilation"]) != {1}  # torch has kernels of these for int64 only
    total = torch.int64 if needs_int64 else call.sum_dtype(bound)
    codes = call.emit_with(input=x.centred(total), weight=w.centred(total), bias=_buffer(call, bias, total))
    ones = [1] * (w.codes.node.meta["val"].dim() - 2)
    pending = _pending(call, call.arguments["bias"], x, [-1, *ones])
    per_channel = scale.reshape(-1, *ones) if scale.numel() > 1 else scale
    return Integers(codes, x.scale * per_channel, bound, run_time=x.run_time, bias=pending)


def linear(call: Call) -> Integers:
    x, w = call.integers("input"), call.integers("weight")
    _one_scale(x)
    scale = _per_output(w, 0)
    bias = _bias(call, call.arguments["bias"], x, scale)
    bound = x.bound * _largest_sum(call, w, 0) + _largest(bias)
    total = call.sum_dtype(bound)
    codes = call.emit_with(input=x.centred(total), weight=w.centred(total), bias=_buffer(call, bias, total))
    pending = _pending(call, call.arguments["bias"], x, None)
    return Integers(codes, x.scale * scale, bound, run_time=x.run_time, bias=pending)


def matmul(call: Call) -> Integers:
    """mm, bmm and matmul, and addmm and baddbmm with a constant to add."""
    target, first, second, added = _FACTORS[call.node.target]  # type: ignore[index]
    x, w = call.integers(first), call.integers(second)
    _one_scale(x)
    if call.arguments.get("alpha", 1) != 1 or call.arguments.get("beta", 1) != 1:
        raise NoIntegerForm("alpha and beta are not 1")
    if min(len(call.shape_of(first)), len(call.shape_of(second))) < 2 and (x.run_time or w.scale.numel() > 1):
        raise NoIntegerForm("a factor is a vector, and the other has several scales")
    scale = _per_output(w, -1)
    bias = _bias(call, call.arguments[added], x, scale) if added else None
    bound = x.bound * _largest_sum(call, w, -1) + _largest(bias)
    total = call.sum_dtype(bound)
    codes = call.emit(target, x.centred(total), w.centred(total))
    if bias is not None:
        codes = codes + _buffer(call, bias, total)
    pending = _pending(call, call.arguments[added], x, None) if added else None
    return Integers(codes, x.scale * scale, bound, run_time=x.run_time, bias=pending)


def mul(call: Call) -> Integers:
    """Two quantized tensors, or one and a number, which only changes the scale."""
    x, other = call.integers("self"), call.arguments["other"]
    if isinstance(other, int | float):
        return _times_number(x, float(other))
    y = call.integers("other")
    if x.run_time is not None or y.run_time is not None:
        raise NoIntegerForm("an operand's scale is known at run time only")
    bound = x.bound * y.bound
    total = call.sum_dtype(bound)
    return Integers(x.centred(total) * y.centred(total), x.scale * y.scale, bound)


def div(call: Call) -> Integers:
    """By a number."""
    divisor = call.arguments["other"]
    if not isinstance(divisor, int | float) or not divisor:
        raise NoIntegerForm("it divides by a tensor")
    return _times_number(call.integers("self"), 1 / divisor)


def _times_number(x: Integers, number: float) -> Integers:
    if not number or not math.isfinite(number):
        raise NoIntegerForm(f"it multiplies by {number}")
    if number > 0:
        return replace(x, scale=x.scale * number)
    return replace(x, codes=x.centred_as_is() * -1, zero_point=0, scale=x.scale * -number, limits=None)


def embedding(call: Call) -> Value:
    """Rows of integers; with a scale for each row, the rows of a table that is requantized in advance."""
    weight, indices = call.arguments["weight"], call.symbol(call.arguments["indices"])
    if weight.target is not _Q.dequantize_per_channel.default:
        w = call.integers("weight")
        if w.scale.numel() > 1:
            raise NoIntegerForm("its table was moved after it got a scale per channel")
        return replace(w, codes=call.emit(aten.embedding.default, w.codes, indices))
    of = bind(weight)
    table, scale, zero_point = (call.constant(of[name]) for name in ("input", "scales", "zero_points"))
    if table is None or scale is None or int(of["axis"]) % table.dim():
        raise NoIntegerForm("its table is not a constant with a scale for each row")
    zero_point = torch.zeros_like(scale, dtype=torch.int64) if zero_point is None else zero_point
    codes = call.symbol(of["input"])
    return Lookup(table, scale.double()[:, None], zero_point[:, None], codes, indices)


# --- scales, bounds and bias ------------------------------------------------------------------------------------------


def _one_scale(x: Integers) -> None:
    if x.scale.numel() != 1:
        raise NoIntegerForm("its input has a scale per channel")


def _no_rows(call: Call, x: Integers) -> None:
    _one_scale(x)
    if x.run_time is not None and not call.is_single(x.run_time):
        raise NoIntegerForm("its input has a scale for each row, and it mixes rows")


def _per_output(w: Integers, axis: int) -> Tensor:
    """The scales of a weight, one for each output channel or one in all."""
    if w.run_time is not None:
        raise NoIntegerForm("its second factor has a scale that is known at run time only")
    if w.scale.numel() == 1:
        return w.scale.reshape(())
    if w.scale.numel() != w.scale.shape[axis]:
        raise NoIntegerForm(f"its weight has scales along dimension {_longest(w.scale)}, where products are summed")
    return w.scale.flatten()


def _longest(scale: Tensor) -> int:
    return max(range(scale.dim()), key=lambda dim: scale.shape[dim])


def _largest_sum(call: Call, w: Integers, axis: int) -> int:
    """The largest sum of |weight| that meets one output: exact for constants, else by the number of products."""
    held = call.constant(w.codes.node)
    if held is not None and isinstance(w.zero_point, int):
        sizes = (held.long() - w.zero_point).abs()
        kept = range(held.dim() - 1) if axis == -1 else [d for d in range(held.dim()) if d != axis]
        return int(sizes.sum(-2 if axis == -1 and held.dim() > 1 else list(kept)).max())
    shape = list(w.codes.shape)
    length = shape[max(-2, -len(shape))] if axis == -1 else math.prod(shape[:axis] + shape[axis + 1 :])
    return w.bound * (length if isinstance(length, int) else _UNKNOWN_LENGTH)


def _bias(call: Call, operand: object, x: Integers, scale: Tensor) -> Tensor | None:
    """The bias in int32 with scale s_x * s_w.

    None where there is none, or where s_x is known at run time only and the bias is added after the scale.
    """
    if operand is None or x.run_time is not None:
        return None
    if isinstance(operand, Node) and operand in call.values:
        return _given_bias(call, operand, x.scale * scale)
    held = call.constant(operand)
    if held is None:
        raise NoIntegerForm(f"its bias {operand} is computed at run time")
    codes = bias_codes(held, float(x.scale), scale)
    if float((held.double() / (x.scale * scale)).abs().max()) >= _INT32 - 2**8:  # float32 counts in steps of 128 there
        raise NoIntegerForm("its bias does not fit 32-bit integers with the scale s_x * s_w")
    return codes


def _given_bias(call: Call, operand: Node, scale: Tensor) -> Tensor:
    """A bias that the quantizer made int32: its scale must be s_x * s_w, to float32's precision."""
    given = call.integers_of(operand)
    held = call.constant(given.codes.node)
    fits = held is not None and given.zero_point == 0 and given.scale.flatten().shape[0] in (1, scale.numel())
    if not fits or not torch.allclose(given.scale.flatten(), scale, rtol=2**-20, atol=0.0):
        raise NoIntegerForm(f"its bias {operand} has another scale than s_x * s_w")
    return held  # type: ignore[return-value]


def _largest(bias: Tensor | None) -> int:
    return 0 if bias is None else int(bias.long().abs().max())


def _buffer(call: Call, bias: Tensor | None, dtype: torch.dtype) -> Symbol | None:
    return None if bias is None else call.writer.constant(bias.to(dtype))


def _pending(call: Call, operand: Node | None, x: Integers, shape: list[int] | None) -> Symbol | None:
    """The real bias of a product whose scale is known at run time only."""
    if operand is None or x.run_time is None:
        return None
    bias = call.symbol(operand)
    return bias if shape is None else call.emit(aten.view.default, bias, shape)


# --- the table --------------------------------------------------------------------------------------------------------

_FACTORS: dict[OpOverload, tuple[OpOverload, str, str, str | None]] = {
    aten.mm.default: (aten.mm.default, "self", "mat2", None),
    aten.bmm.default: (aten.bmm.default, "self", "mat2", None),
    aten.matmul.default: (aten.matmul.default, "self", "other", None),
    aten.addmm.default: (aten.mm.default, "mat1", "mat2", "self"),
    aten.baddbmm.default: (aten.bmm.default, "batch1", "batch2", "self"),
}

PRODUCTS: dict[OpOverload, Callable[[Call], Value]] = {
    **dict.fromkeys((*ops.CONV, *ops.CONVOLUTION, *ops.CONV_TRANSPOSE), conv),
    **dict.fromkeys(ops.LINEAR, linear),
    **dict.fromkeys(_FACTORS, matmul),
    **dict.fromkeys(ops.MUL, mul),
    **dict.fromkeys(ops.DIV, div),
    aten.embedding.default: embedding,
}
"""Ops whose result, where it is read as real numbers, is worth computing in integers first."""
