"""on_grid: values rounded to the grid that they will have, with the gradient of x inside the range and 0 outside.

torch has a kernel for it, torch.fake_quantize_*_affine, which the CPU runs one value at a time. Here the same bits come
of a few vectorised passes over parts that stay in the cache, in half of the time; and where nothing was clipped,
autograd has no mask to keep. Under torch.compile it is one expression, which Inductor fuses with what is around it.

Before this: an observer has found the grid. After it: every fake quantizer with a grid that is not learned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..qparams import flat
from .base import straight_through

__all__ = ["on_grid", "ready_to_compile"]

_FEW = 1 << 15  # values; for less, the kernel is as fast
_PART = 1 << 16  # values; three buffers of that size fit into the cache of one core


def on_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """x -> (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale, straight through.

    Args:
        x: a floating-point tensor.
        scale, zero_point: one element each, or with `axis` one for each index of that dimension; float zero points
            are those of torch.per_channel_affine_float_qparams.
        quant_min, quant_max: bounds of q, both included.
    """
    vectorised = x.dtype is torch.float32 and not zero_point.is_floating_point()
    if vectorised and torch.compiler.is_compiling():
        return _as_expression(x, _steps_along(x, scale, zero_point, quant_min, quant_max, axis))
    if vectorised and x.device.type == "cpu" and x.numel() >= _FEW:
        return straight_through(x, *_in_parts(x.detach(), scale, zero_point, quant_min, quant_max, axis))
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, quant_min, quant_max)


class _Steps(NamedTuple):
    """A grid whose zero is at 0: numbers, or tensors that broadcast over x."""

    inverse: Any
    scale: Any
    low: Any
    high: Any


def _as_expression(x: Tensor, steps: _Steps) -> Tensor:
    """In operators that Inductor fuses.

    The mask is computed as a number: Inductor writes and reads bool one value at a time, 20 times slower than int8
    (torch 2.13, AVX-512, 800,000 values: 8 ms, not 0.5).
    """
    rounded = torch.round(x.detach() * steps.inverse)
    clipped = rounded.clamp(steps.low, steps.high)
    outside = (rounded - clipped).abs().clamp(max=1.0)  # both are whole numbers, or infinite
    return _through(x, clipped * steps.scale, (1.0 - outside).to(torch.int8))


def _through(x: Tensor, value: Tensor, inside: Tensor) -> Tensor:
    return straight_through(x, value, inside)


def ready_to_compile() -> None:
    """Let Dynamo take `_through` as one call: of a torch.autograd.Function it makes an object, which torch warns of.

    It loads Dynamo, which torch.export has done already.
    """
    torch.compiler.allow_in_graph(_through)


def _in_parts(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor | None]:
    """The values, and where x was inside of the range; None for everywhere."""
    values = torch.empty_like(x)
    if values.stride() != x.stride():  # x has gaps
        x = values.copy_(x)
    if axis is not None:
        steps = _steps_along(x, scale, zero_point, quant_min, quant_max, axis)
        inside = _round(x, values, steps, float(steps.low.amax()), float(steps.high.amin()))
        return values, None if inside is None else inside.to(torch.bool)
    middle = int(zero_point)
    low, high = float(quant_min - middle), float(quant_max - middle)
    steps = _Steps(scale.reciprocal().item(), scale.item(), low, high)
    mask: Tensor | None = None
    for start, (part, into) in enumerate(zip(flat(x).split(_PART), flat(values).split(_PART), strict=True)):
        inside = _round(part, into, steps, low, high)
        if inside is not None:
            mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
            flat(mask)[start * _PART :][: len(part)].copy_(inside)
    return values, mask


def _steps_along(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> _Steps:
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    low, high = (bound - zero_point.reshape(shape).to(x.dtype) for bound in (quant_min, quant_max))
    scale = scale.reshape(shape)
    return _Steps(scale.reciprocal(), scale, low, high)


def _round(x: Tensor, into: Tensor, steps: _Steps, low: float, high: float) -> Tensor | None:
    """Round x, which may be `into`; 1.0 where it was inside, and None where it was so everywhere.

    low, high: no value between them is clipped.
    """
    torch.mul(x, steps.inverse, out=into).round_()
    inside = None
    if not (low <= into.amin().item() and into.amax().item() <= high):  # NaN is nowhere inside
        clipped = into.clamp(steps.low, steps.high)
        inside = torch.eq(into, clipped, out=torch.empty_like(into))  # to bool, it would not be vectorised
        into.copy_(clipped)
    into.mul_(steps.scale)
    return inside
