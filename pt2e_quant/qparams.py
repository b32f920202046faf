"""The arithmetic of affine quantization, without state: range -> (scale, zero_point), and x <-> q.

    q = clamp(round(x / scale) + zero_point, quant_min, quant_max)        x ~ (q - zero_point) * scale

Every range is widened to include zero, so zero is always represented exactly. Granularity is a matter of shapes:

    per tensor              scale is one number (or a tensor with one element)
    per channel, axis=a     scale has one element per index of dimension a
    per token               scale has shape (..., 1) and holds for the whole last dimension
    per group, group_size=g scale has shape (..., n / g): g neighbours in the last dimension share one

Values are computed in float32, whatever x is, in the order of operations of the q/dq ops that backends run, so that
folded weights and a running graph agree bit for bit.

Before this: `specs` says what is wanted. After it: observers keep the ranges that go in here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import CalibrationError, SpecError
from .specs import integer_range

__all__ = [
    "FLOAT32_EPS",
    "affine_numbers",
    "affine_qparams",
    "dequantize",
    "fake_quantize",
    "flat",
    "float_qparams",
    "min_max",
    "narrowed",
    "quantize",
    "rounded",
    "storage_dtype",
    "symmetric_zero_point",
]

FLOAT32_EPS: float = torch.finfo(torch.float32).eps
"""Smallest scale unless told otherwise: keeps 1 / scale finite for a tensor of zeros."""

_FLOAT32_MAX: float = torch.finfo(torch.float32).max
_FLOAT32_EXACT_INTEGERS = 1 << 24
_ONES = 1.5 * 2**23
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)

# Measured on x86 (AVX2 and AVX-512), float32, one thread: `aminmax` costs about 0.16 ns a value, `amin` and `amax` 0.05
# each, plus 1 us for the second call. Above the upper bound the tensor leaves the cache between the two passes.
_TWO_PASSES_PAY = (1 << 15, 1 << 21)


def affine_qparams(
    min_val: Tensor | float,
    max_val: Tensor | float,
    quant_min: int,
    quant_max: int,
    *,
    dtype: torch.dtype,
    symmetric: bool = False,
    eps: float = FLOAT32_EPS,
    zero_point: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Map the real range [min_val, max_val], zero included, onto the integers [quant_min, quant_max].

    Args:
        min_val, max_val: ends of the range, of any one shape; the result has that shape.
        quant_min, quant_max: bounds of q, both included.
        dtype: type that stores q; decides where a symmetric range has its middle. A floating-point one has no zero
            point: its ranges are symmetric.
        symmetric: the range is [-b, b] with b = max(-min_val, max_val), and zero_point is constant.
        eps: smallest scale.
        zero_point: replaces the `symmetric_zero_point` of a symmetric range.

    Returns:
        scale in float32 and zero_point in int64.

    Raises:
        CalibrationError: an end is NaN or infinite, or min_val > max_val.
        SpecError: quant_min >= quant_max.
    """
    low, high = _checked_range(min_val, max_val)
    steps = _steps(quant_min, quant_max)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric or dtype.is_floating_point:
        scale = torch.maximum(-low, high) / (steps / 2)
        middle = symmetric_zero_point(quant_min, quant_max, dtype) if zero_point is None else zero_point
        return scale.clamp(min=eps), torch.full_like(scale, middle, dtype=torch.int64)
    scale = (high - low) / steps
    # The difference of two float32 can exceed float32, a quotient by >= 2 cannot.
    if torch.compiler.is_compiling() or not bool(scale.isfinite().all()):
        exact = ((high.double() - low.double()) / steps).clamp(max=_FLOAT32_MAX).float()
        scale = torch.where(scale.isfinite(), scale, exact)
    scale = scale.clamp(min=eps)
    offset = quant_min - torch.round(low / scale).to(torch.int64)
    return scale, offset.clamp(quant_min, quant_max)


def affine_numbers(low: float, high: float, quant_min: int, quant_max: int) -> tuple[float, int]:
    """`affine_qparams` of one range, as numbers: for what runs in every call of a layer (3 us; on tensors it takes 40).

    Raises:
        CalibrationError: as of `affine_qparams`.
    """
    if not -_FLOAT32_MAX <= low <= high <= _FLOAT32_MAX:
        raise CalibrationError(_no_range(f"{low:g}", f"{high:g}"))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (quant_max - quant_min), FLOAT32_EPS)
    return scale, min(max(quant_min - round(low / scale), quant_min), quant_max)


def symmetric_zero_point(quant_min: int, quant_max: int, dtype: torch.dtype) -> int:
    """The q that stands for 0.0 in a symmetric scheme: 0 when signed; unsigned the middle, rounded up in a full range.

    >>> symmetric_zero_point(-127, 127, torch.int8), symmetric_zero_point(0, 255, torch.uint8)
    (0, 128)
    """
    whole = integer_range(dtype)
    if whole is None or whole[0] < 0:
        return 0
    return (quant_min + quant_max + (whole == (quant_min, quant_max))) // 2


def float_qparams(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, *, eps: float = FLOAT32_EPS
) -> tuple[Tensor, Tensor]:
    """Scale and *real-valued* zero point of torch.per_channel_affine_float_qparams: q = round(x / scale + zero_point).

    The range is taken as it is, without zero, and min_val lands on 0; a range narrower than eps steps gets scale 1.
    """
    low, high = _checked_range(min_val, max_val)
    scale = (high - low) / _steps(quant_min, quant_max)
    scale = torch.where(scale > eps, scale, torch.ones_like(scale))
    return scale, -1 * low / scale


def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Integers that stand for x, stored as dtype (torch.qint8 as int8, sub-byte types in a byte).

    Args:
        x: a floating-point tensor; values beyond the range saturate.
        scale, zero_point: in a shape for the granularity (see the top of this file).
        quant_min, quant_max: bounds of q, both included.
        dtype: integer type of the result.
        axis: the dimension that has one scale per index; None otherwise.
        group_size: number of neighbours in the last dimension that share a scale; None otherwise.

    Raises:
        SpecError: dtype is not an integer type, or shapes, axis and group_size do not fit together.
    """
    stored = storage_dtype(dtype)
    values, scale, zero_point = _aligned(_compute_type(x, quant_min, quant_max), scale, zero_point, axis, group_size)
    return narrowed(_to_grid(values, scale, zero_point, quant_min, quant_max).reshape(x.shape), stored)


def dequantize(
    q: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The real numbers that q stands for, computed in float32 and returned as out_dtype; arguments as in `quantize`."""
    values, scale, zero_point = _aligned(q.to(torch.float32), scale, zero_point, axis, group_size)
    return ((values - zero_point) * scale).reshape(q.shape).to(out_dtype)


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """`dequantize(quantize(x))` in the dtype of x, through no integer type; arguments as in `quantize`."""
    values, scale, zero_point = _aligned(_compute_type(x, quant_min, quant_max), scale, zero_point, axis, group_size)
    grid = _to_grid(values, scale, zero_point, quant_min, quant_max).to(torch.float32)
    return ((grid - zero_point) * scale).reshape(x.shape).to(x.dtype)


def rounded(
    steps: Tensor, zero_point: int, low: int, high: int, stored: torch.dtype, *, factor: float | None = None
) -> Tensor:
    """clamp(round(steps) + zero_point, low, high) as 8-bit integers; the float32 steps are overwritten.

    Next to 1.5 * 2^23 float32 counts in ones: adding that rounds, half to even, and leaves the integer in the low bits.
    This is half the passes over memory of one operator after the other.

    Args:
        factor: what to multiply the steps with before; these stay, and halves are rounded to either side.
    """
    if steps.dtype is not torch.float32 or stored not in (torch.uint8, torch.int8):
        return narrowed(steps.mul(factor or 1.0).round_().add_(zero_point).clamp_(low, high), stored)
    if factor is not None:
        moved = torch.rsub(steps, _ONES + zero_point, alpha=-factor)
    else:  # an odd zero point would turn even into odd
        moved = (steps.round_() if zero_point % 2 else steps).add_(_ONES + zero_point)
    return moved.clamp_(_ONES + low, _ONES + high).view(torch.int32).to(stored)


def narrowed(values: Tensor, stored: torch.dtype) -> Tensor:
    """Integers in a floating-point type, within the range of `stored`, in that type.

    On a CPU torch has no vector code from floats to uint8: two steps through int16 take a quarter of its time (200,704
    values, one thread of an AVX-512 server: 26 us, not 105).
    """
    through = torch.int16 if stored is torch.uint8 and values.device.type == "cpu" else stored
    return values.to(through).to(stored)


def min_max(
    x: Tensor, *, axis: int | None = None, group_size: int | None = None, per_token: bool = False
) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of x in float32, in the shape that scales have for this granularity.

    Args:
        x: any real tensor with at least one element; NaN makes both results NaN.
        axis: one range per index of this dimension, shape (n,).
        group_size: one range per group_size neighbours in the last dimension, shape (..., n / group_size).
        per_token: one range per last dimension, shape (..., 1).

    Raises:
        SpecError: more than one granularity is asked for, or it does not fit x.
        CalibrationError: x is empty.
    """
    if (axis is not None) + (group_size is not None) + per_token > 1:
        raise SpecError(
            "axis, group_size and per_token exclude each other; pass one of them, or none for one range in all"
        )
    if x.numel() == 0:
        raise CalibrationError(f"a tensor of shape {tuple(x.shape)} has no values and so no range; skip empty tensors")
    if x.requires_grad:
        x = x.detach()
    if axis is not None:
        low, high = _per_index(x, _checked_axis(x, axis))
    elif group_size is not None:
        low, high = _ends(_grouped(x, group_size), -1)
    elif per_token:
        low, high = _ends(x, -1, keepdim=True)
    else:
        low, high = _overall(x)
    return low.float(), high.float()


def flat(x: Tensor) -> Tensor:
    """All values of x in one dimension, in the order of memory: a view where x is dense (channels_last, transposed)."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.reshape(-1)


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer type that tensors of this dtype are kept in: torch.qint8 -> int8, torch.int4 -> int8, ...

    Raises:
        SpecError: dtype is not an integer type.
    """
    whole = integer_range(dtype)
    if whole is None:
        raise SpecError(f"{dtype} is not an integer type; quantize to torch.int8, uint8, int16 or int32")
    for candidate in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64):
        held = torch.iinfo(candidate)
        if held.min <= whole[0] < whole[1] <= held.max and (held.min < 0) == (whole[0] < 0):
            return candidate
    raise SpecError(f"{dtype} is wider than any integer type that holds quantized values")


# --- ranges -----------------------------------------------------------------------------------------------------------


def _overall(x: Tensor) -> tuple[Tensor, Tensor]:
    if not x.is_contiguous():
        x = flat(x)  # torch.aminmax copies what is not contiguous
    least, most = _TWO_PASSES_PAY  # compared one by one, since a compiler's symbol is in no range
    if x.dtype is torch.float32 and least <= x.numel() < most and torch.get_num_threads() == 1:
        return torch.amin(x), torch.amax(x)
    low, high = torch.aminmax(x)
    return low, high


def _per_index(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Reduce all dimensions but one. torch.aminmax(dim=...) is 20 times slower than amin and amax."""
    if x.dtype in _SIXTEEN_BIT:
        x = x.float()  # 16-bit reductions along a dimension are not vectorised; a copy is cheaper
    if x.is_contiguous() and axis > 0:
        x = x.reshape(math.prod(x.shape[:axis]), x.shape[axis], -1)
        if x.shape[-1] < 64:  # short rows: fold the leading dimension first, along whole rows of memory
            return x.amin(0).amin(-1), x.amax(0).amax(-1)
        return x.amin(-1).amin(0), x.amax(-1).amax(0)
    others = [dim for dim in range(x.dim()) if dim != axis]
    return _ends(x, others) if others else (x, x.clone())


def _ends(x: Tensor, dims: int | list[int], keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return torch.amin(x, dims, keepdim), torch.amax(x, dims, keepdim)


def _checked_range(min_val: Tensor | float, max_val: Tensor | float) -> tuple[Tensor, Tensor]:
    low = torch.as_tensor(min_val).to(torch.float32)
    high = torch.as_tensor(max_val).to(torch.float32)
    if low.numel() == 0 or high.numel() == 0:
        raise CalibrationError("an empty range has no qparams; calibrate with at least one batch first")
    in_order = (low <= high) & (low >= -_FLOAT32_MAX) & (high <= _FLOAT32_MAX)  # False for NaN as well
    if not torch.compiler.is_compiling() and not bool(in_order.all()):
        raise CalibrationError(_no_range(_ends_text(low), _ends_text(high)))
    return low, high


def _no_range(low: str, high: str) -> str:
    return (
        f"[{low}, {high}] is not a range: both ends must be finite float32 numbers with min_val <= max_val; calibrate "
        "with data that has no NaN and no infinity"
    )


def _ends_text(end: Tensor) -> str:
    return f"{end.item():g}" if end.numel() == 1 else f"{end.flatten()[:4].tolist()}{'...' if end.numel() > 4 else ''}"


def _steps(quant_min: int, quant_max: int) -> float:
    if quant_min >= quant_max:
        raise SpecError(f"quant_min={quant_min} must be smaller than quant_max={quant_max}")
    return float(quant_max - quant_min)


# --- values -----------------------------------------------------------------------------------------------------------


def _compute_type(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """x in float32, or in float64 where float32 cannot hold the bounds (it would round 2**31 - 1 up and overflow)."""
    exact = max(-quant_min, quant_max) <= _FLOAT32_EXACT_INTEGERS
    return x.to(torch.float32 if exact else torch.float64)


def _to_grid(x: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int) -> Tensor:
    """Integers, still in a floating-point type. The product with 1 / scale is what the q/dq ops of torch compute."""
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, quant_min, quant_max)


def _aligned(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, axis: int | None, group_size: int | None
) -> tuple[Tensor, Tensor | float, Tensor | int]:
    """x (split into groups where asked) with scale and zero_point in shapes that broadcast over it."""
    if axis is not None and group_size is not None:
        raise SpecError("axis and group_size exclude each other; a scale per group already has one per channel")
    if group_size is not None:
        x = _grouped(x, group_size)
    if isinstance(scale, Tensor):
        scale = _broadcastable(scale.to(torch.float32), x, axis, group_size)
    if isinstance(zero_point, Tensor):
        zero_point = _broadcastable(zero_point, x, axis, group_size)
    return x, scale, zero_point


def _broadcastable(param: Tensor, x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    if param.numel() == 1:
        return param.reshape(())
    if group_size is not None:
        param = param.unsqueeze(-1)
    elif axis is not None:
        axis = _checked_axis(x, axis)
        if param.dim() == 1 and param.numel() == x.shape[axis]:
            return param.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
        raise SpecError(f"qparams of shape {tuple(param.shape)} do not fit axis {axis} of shape {tuple(x.shape)}")
    fits = param.dim() <= x.dim() and all(
        mine in (1, theirs) for mine, theirs in zip(reversed(param.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise SpecError(
            f"qparams of shape {tuple(param.shape)} do not broadcast over {tuple(x.shape)}; "
            "pass axis for one per channel, group_size for one per group"
        )
    return param


def _grouped(x: Tensor, group_size: int) -> Tensor:
    if group_size < 1 or x.dim() == 0 or x.shape[-1] % group_size:
        last = x.shape[-1] if x.dim() else "no"
        raise SpecError(f"groups of {group_size} do not divide the last dimension ({last} values); choose a divisor")
    return x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)


def _checked_axis(x: Tensor, axis: int) -> int:
    if not -x.dim() <= axis < x.dim():
        raise SpecError(f"axis {axis} does not exist in a tensor of shape {tuple(x.shape)}")
    return axis % x.dim()
