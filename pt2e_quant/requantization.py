"""From sums of products to codes of the next tensor: requantization in integers, with a named rounding.

The one arithmetic of the integer reference (`pt2e.representation`) and of the kernels (`kernels`).
The functions take tensors or the symbols of `emit`, so that what is written into a graph is what the tests run. Each
computes  code = clamp(round(scale * x / out.scale) + out.zero_point), where x is a tensor of integers (int32 or int64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .errors import QuantizationError
from .graph.write import call
from .grid import Grid

__all__ = ["NoIntegerForm", "Rounding", "Term", "bias_codes", "codes", "float32_factor", "requantize", "requantize_sum"]

aten = torch.ops.aten
_Q = torch.ops.quantized_decomposed

_SIGNIFICAND = 24  # bits of a float32, the hidden one included
_INT32, _INT64 = 2**31, 2**63
_ADD_BITS = 20  # XNNPACK's additions: the larger multiplier lies in [2^20, 2^21]


class NoIntegerForm(QuantizationError):
    """A quantized pattern stays in floating point; the message is the reason that the report shows."""


class Rounding(Enum):
    """How a kernel turns an integer sum into a code of its output.

    FLOAT32_HALF_EVEN: what XNNPACK does (its `fp32` kernels, on x86, WebAssembly and, per channel, on Arm). The factor
        s = fl(fl(s_x * s_w) / s_y) and the product fl(x * s) are rounded to float32, then to the nearest integer, ties
        to even: `lrintf`, `cvtps2dq` or adding 1.5 * 2^23. Written here in integers, bit for bit: x times the 24-bit
        significand of s, rounded to 24 bits, shifted. Two kernels differ. Additions have multipliers of 21 bits and one
        shift and round ties up (xnn_init_qs8_add_minmax_scalar_params); averages add the zero point before they round.
        XNNPACK, src/qs8-requantization/fp32-scalar-lrintf.c, src/microparams-init.c, src/qs8-vadd/scalar.c.in
    FIXED_POINT_HALF_AWAY: what gemmlowp, TensorFlow Lite's reference kernels and CMSIS-NN do. The factor is a 31-bit
        fraction and a shift; the product's high half is rounded to nearest, ties up, then shifted right, ties away from
        zero. Averages use the same multiplication.
        gemmlowp, fixedpoint/fixedpoint.h: SaturatingRoundingDoublingHighMul, RoundingDivideByPOT; TensorFlow Lite,
        kernels/internal/common.h: MultiplyByQuantizedMultiplier, reference/add.h; CMSIS-NN: arm_nn_requantize
    """

    FLOAT32_HALF_EVEN = "float32, half to even"
    FIXED_POINT_HALF_AWAY = "fixed point, half away from zero"


@dataclass(frozen=True)
class Term:
    """One operand of a sum: sign * scale * x.

    x:     tensor of integers
    scale: positive, float64, of one element or of a shape that broadcasts to x
    bound: no |x| is larger
    """

    x: Any
    scale: Tensor
    bound: int
    sign: int = 1


Constant = Callable[[Tensor], Any]
"""Brings a constant tensor to where the computation happens: into the graph, or nowhere."""


def requantize(term: Term, out: Grid, rounding: Rounding, constant: Constant, *, zero_point_first: bool = False) -> Any:
    """Codes of `term` on the grid `out`, in its dtype.

    Args:
        term: what to requantize.
        out: the grid.
        rounding: see there.
        constant: see Constant; for tensors `lambda tensor: tensor`.
        zero_point_first: add the zero point before rounding (averages of XNNPACK).

    Raises:
        NoIntegerForm: the factor lies outside what 64-bit integers hold.
    """
    if rounding is Rounding.FLOAT32_HALF_EVEN:
        return codes(_times_float32(term, out, constant, zero_point_first), out, 0 if zero_point_first else None)
    factor = term.sign * term.scale / out.scale
    return codes(_times_fixed_point(term.x, factor, term.bound, constant), out)


def requantize_sum(terms: Sequence[Term], out: Grid, rounding: Rounding, constant: Constant) -> Any:
    """Codes of the sum of terms, one rounding for all of them where the kernels have one.

    Raises:
        NoIntegerForm: as `requantize`.
    """
    if rounding is Rounding.FLOAT32_HALF_EVEN:
        return codes(_sum_with_one_shift(terms, out, constant), out)
    return codes(_sum_on_a_common_grid(terms, out, constant), out)


def codes(x: Any, out: Grid, zero_point: int | None = None) -> Any:
    """Integers relative to the zero point -> codes: add it (or `zero_point`), clamp, and take the dtype."""
    offset = out.zero_point if zero_point is None else zero_point
    return cast(call(aten.clamp.default, x + offset if offset else x, out.quant_min, out.quant_max), out.dtype)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """x in another integer dtype; x itself when it has it."""
    return x if x.dtype is dtype else call(aten._to_copy.default, x, dtype=dtype)


def float32_factor(scale: Tensor, out_scale: float) -> Tensor:
    """fl(fl(scale) / fl(out_scale)): what a sum is multiplied with, in float32; scale in float64, of any shape."""
    return scale.float() / torch.tensor(out_scale, dtype=torch.float32)


def bias_codes(bias: Tensor, x_scale: float, scale: Tensor) -> Tensor:
    """A bias in int32 with scale s_x * s_w, rounded as ExecuTorch rounds it for XNNPACK: to float32, half to even.

    Args:
        bias: real numbers, one for each output channel.
        x_scale: s_x.
        scale: s_w in float64, of one element or of one for each output channel.
    """
    held, limits = bias.float(), (-_INT32, _INT32 - 1, torch.int32)
    if scale.numel() == 1:
        return _Q.quantize_per_tensor.default(held, x_scale * float(scale), 0, *limits)  # type: ignore[no-any-return]
    steps = scale.float() * x_scale
    zeros = torch.zeros_like(steps, dtype=torch.int64)
    return _Q.quantize_per_channel.default(held, steps, zeros, -1, *limits)  # type: ignore[no-any-return]


# --- float32 and half to even, in integers ----------------------------------------------------------------------------


def _times_float32(term: Term, out: Grid, constant: Constant, zero_point_first: bool) -> Any:
    """round(fl(fl(x) * s)), s a float32 = significand * 2^-shift."""
    factor = float32_factor(term.scale, out.scale)
    fraction, exponent = torch.frexp(factor.double())
    significand, shift = (fraction * 2**_SIGNIFICAND).long(), (_SIGNIFICAND - exponent).long()
    if int(shift.min()) < 1 or term.bound >= 2**38:
        raise NoIntegerForm(f"sums up to {term.bound} times {float(factor.max()):.3g} do not fit 64-bit integers")
    # Too small to reach one half: zero, without the shift that would leave int64.
    vanishes = term.bound * factor.double() < 0.25
    significand, shift = torch.where(vanishes, 0, significand), torch.where(vanishes, 1, shift)
    x = cast(term.x, torch.int64)  # the product has up to 31 + 24 bits
    if term.bound >= 2**_SIGNIFICAND:
        x = _to_significand(x, constant)
    product = _to_significand(x * _number(term.sign * significand, constant), constant)
    if zero_point_first:
        product = product + _number(out.zero_point * 2**shift, constant)
    return _shift_half_even(product, shift, constant)


def _to_significand(x: Any, constant: Constant) -> Any:
    """The nearest integers with 24 significant bits, ties to even: the integers that a float32 holds."""
    powers = constant(2 ** torch.arange(_SIGNIFICAND, 63))
    excess = call(aten.bucketize.Tensor, call(aten.abs.default, x), powers, right=True)  # bits beyond 24
    almost_half = (call(aten.bitwise_left_shift.Scalar_Tensor, 1, excess) - 1) >> 1
    odd = (x >> excess) & call(aten.clamp.default, excess, None, 1)
    return ((x + almost_half + odd) >> excess) << excess


def _shift_half_even(x: Any, shift: Tensor, constant: Constant) -> Any:
    """round(x / 2^shift), ties to even; shift >= 1."""
    by = _number(shift, constant)
    return (x + ((x >> by) & 1) + _number(2 ** (shift - 1) - 1, constant)) >> by


def _sum_with_one_shift(terms: Sequence[Term], out: Grid, constant: Constant) -> Any:
    """sum(x * multiplier) / 2^shift, ties up; the largest multiplier has 21 bits."""
    factors = [float32_factor(term.scale, out.scale) for term in terms]
    shift = _ADD_BITS - (math.frexp(max(float(factor.max()) for factor in factors))[1] - 1)
    if not 1 <= shift <= 38:
        raise NoIntegerForm(f"its operands' scales are {2.0 ** (_ADD_BITS - shift):.3g} times that of its output")
    multipliers = [torch.round(factor.double() * 2.0**shift).long() for factor in factors]
    half = 2 ** (shift - 1)
    reach = half + sum(term.bound * int(m.max()) for term, m in zip(terms, multipliers, strict=True))
    if reach >= _INT64:
        raise NoIntegerForm("the sum of its operands does not fit 64-bit integers")
    dtype = torch.int32 if reach < _INT32 else torch.int64
    total = half
    for term, multiplier in zip(terms, multipliers, strict=True):
        product = cast(term.x, dtype) * _number((term.sign * multiplier).to(dtype), constant)
        total = product + total
    return total >> shift


# --- fixed point ------------------------------------------------------------------------------------------------------


def _times_fixed_point(x: Any, factor: Tensor, bound: int, constant: Constant) -> Any:
    """x * factor with a 31-bit multiplier: high half of the doubled product, then a right shift."""
    fraction, exponent = torch.frexp(factor)
    multiplier, exponent = torch.round(fraction * 2.0**31).long(), exponent.long()
    full = multiplier.abs() == 2**31  # rounded up to 1
    multiplier, exponent = torch.where(full, multiplier // 2, multiplier), exponent + full.long()
    multiplier, exponent = torch.where(exponent < -31, 0, multiplier), torch.where(exponent < -31, 0, exponent)
    left, right = exponent.clamp(min=0), (-exponent).clamp(min=0)
    if bound << int(left.max()) >= _INT32:
        raise NoIntegerForm(f"sums up to {bound}, shifted left by {int(left.max())} bits, do not fit 32-bit integers")
    x = cast(x, torch.int64)  # the product has up to 31 + 31 bits
    if left.any():
        x = x * _number(2**left, constant)
    high = (x * _number(multiplier, constant) + 2**30) >> 31
    if not right.any():
        return high
    below_zero = (high >> 63) * _number(right.clamp(max=1), constant)  # -1 where ties go down
    return (high + below_zero + _number(2**right // 2, constant)) >> _number(right, constant)


def _sum_on_a_common_grid(terms: Sequence[Term], out: Grid, constant: Constant) -> Any:
    """TensorFlow Lite's addition: 20 bits more, each operand on a grid of twice the larger scale, sum, requantize."""
    twice = 2 * max(float(term.scale.max()) for term in terms)
    total, bound = None, 0
    for term in terms:
        if term.bound >= _INT32 >> _ADD_BITS:
            raise NoIntegerForm(f"an operand reaches {term.bound}; fixed-point addition takes 8-bit operands")
        factor = term.sign * term.scale / twice
        scaled = _times_fixed_point(cast(term.x, torch.int64) << _ADD_BITS, factor, term.bound << _ADD_BITS, constant)
        total, bound = scaled if total is None else total + scaled, bound + (term.bound << (_ADD_BITS - 1)) + 1
    factor = torch.tensor(twice / (2**_ADD_BITS * out.scale), dtype=torch.float64)
    return _times_fixed_point(total, factor, bound, constant)


def _number(values: Tensor, constant: Constant) -> Any:
    """One value as a Python number, which reads best in a graph; several as a constant tensor."""
    return int(values) if values.numel() == 1 else constant(values)
