"""What a scheme computes: ranges, qparams, elements and back. Without state, and the same for calibration and training.

    integer   q = clamp(round(x / scale) + zero_point, low, high)                x ~ (q - zero_point) * scale
    float8    q = float8(clamp(x / scale, low, high))                            x ~ q * scale
    mx        the same with scale = 2 ** (floor(log2(largest |x| of the block)) - largest exponent of an element)
              (OCP MX v1.0, section 6.3: elements beyond the largest normal one saturate)

A tensor is cut into blocks that lie one after the other, so that every granularity is one scale per row of a matrix.

Before this: `scheme`. After it: `modules`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import qparams
from ..checks import checked
from ..errors import CalibrationError, SpecError
from ..fake_quantize.base import straight_through
from ..observer.granularity import block_rows, blocked, from_block_rows
from .scheme import Scheme

__all__ = ["choose_qparams", "dequantize", "fake_quantize", "quantize", "ranges", "rounded"]

_SMALLEST_SHARED = -127  # E8M0 holds the powers of two from 2 ** -127 to 2 ** 127


@checked(SpecError)
def ranges(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each block, float32, in `scheme.qparams_shape(x.shape)`.

    Raises:
        SpecError: x cannot be cut into such blocks.
        CalibrationError: x is empty.
    """
    if not x.numel():
        raise CalibrationError(f"a tensor of shape {tuple(x.shape)} has no values and so no range; skip empty tensors")
    laid_out, within = blocked(x.detach(), scheme.blocks)
    shape = scheme.qparams_shape(tuple(x.shape))
    return laid_out.amin(within).float().reshape(shape), laid_out.amax(within).float().reshape(shape)


@checked(SpecError)
def choose_qparams(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) for these ranges, in their shape.

    scale is float32, or float8_e8m0fnu for shared exponents; zero_point is int64, and 0 for floating-point formats.

    Raises:
        CalibrationError: a range is not finite, or its ends are in the wrong order.
    """
    if scheme.op == "quantize_per_token":
        return _token_qparams(low, high, scheme)
    of, symmetric = scheme.format, bool(scheme.symmetric)
    scale, zero_point = qparams.affine_qparams(
        low, high, of.low, of.high, dtype=of.storage if of.kind == "integer" else torch.int8,
        symmetric=symmetric, eps=scheme.eps, zero_point=_middle(scheme) if symmetric else None,
    )  # fmt: skip
    if of.kind != "mx":
        return scale, zero_point
    largest = torch.maximum(-low.clamp(max=0.0), high.clamp(min=0.0))
    exponent = torch.frexp(largest).exponent.to(torch.float32) - 1  # frexp: largest = m * 2 ** e with 0.5 <= m < 1
    exponent = torch.where(largest > 0, exponent - of.largest_exponent, _SMALLEST_SHARED)
    return torch.exp2(exponent.clamp(_SMALLEST_SHARED, -_SMALLEST_SHARED)).to(scheme.scale_dtype), zero_point


@checked(SpecError)
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The element that stands for each value of x, in `scheme.format.storage` and the shape of x."""
    return _elements(x, scale, zero_point, scheme)[0]


@checked(SpecError)
def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The real numbers that q stands for, computed in float32 and returned as out_dtype."""
    values = block_rows(q, scheme.blocks).to(torch.float32)
    scale, zero_point = (_rows(param, len(values)) for param in (scale, zero_point))
    if scheme.format.kind == "integer":
        values = values - zero_point
    return from_block_rows(values * scale, tuple(q.shape), scheme.blocks).to(out_dtype)


@checked(SpecError)
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """`dequantize(quantize(x))` in the dtype of x; its gradient is that of x inside the range and 0 outside."""
    return straight_through(x, *rounded(x, scale, zero_point, scheme))


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """x on the grid, in its dtype, and where it was not clamped to get there."""
    elements, inside = _elements(x.detach(), scale, zero_point, scheme)
    return dequantize(elements, scale, zero_point, scheme, x.dtype), inside


def _elements(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    of, values = scheme.format, block_rows(x.to(torch.float32), scheme.blocks)
    scale, zero_point = (_rows(param, len(values)) for param in (scale, zero_point))
    if of.kind != "integer":
        values = values / scale
        inside = (values >= of.low) & (values <= of.high)
        elements = of.elements(values.clamp(of.low, of.high))
    else:
        steps = values * (1.0 / scale)  # the product with 1 / scale is what the q/dq ops compute
        if scheme.op == "quantize_per_token":
            steps = torch.round(steps + zero_point)
        else:
            steps = torch.round(steps) + zero_point
        inside = (steps >= of.low) & (steps <= of.high)
        elements = steps.clamp(of.low, of.high).to(of.storage)
    shape = tuple(x.shape)
    return from_block_rows(elements, shape, scheme.blocks), from_block_rows(inside, shape, scheme.blocks)


def _rows(param: Tensor, rows: int) -> Tensor:
    """One value per row of the matrix of blocks; scales in float32 or, as the op per token has them, in float64."""
    if param.numel() not in (1, rows):
        raise SpecError(f"this scheme has {rows} blocks here, but scales or zero points for {param.numel()}")
    if param.dtype is torch.float8_e8m0fnu:
        param = param.to(torch.float32)
    return param.reshape(-1, 1)


def _middle(scheme: Scheme) -> int:
    """As observers and the op for run time have it: the middle of a byte is rounded up, of fewer bits down."""
    of = scheme.format
    return 0 if of.low < 0 else (of.low + of.high + (of.high == 255)) // 2


def _token_qparams(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """As quantized_decomposed.choose_qparams_per_token_asymmetric: the zero point from the end nearer to zero, and the
    scale in float64."""
    of = scheme.format
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / float(of.high - of.low)).clamp(min=torch.finfo(torch.float32).eps)
    bottom, top = low / scale, high / scale
    zero_point = torch.where((of.low + bottom) + (of.high + top) > 0, of.low - bottom, of.high - top)
    return scale.to(torch.float64), zero_point.clamp(of.low, of.high).round().to(torch.int64)
