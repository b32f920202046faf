"""Operators on one or several QTensors whose result has a grid of its own: computed with real numbers, then rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import qparams
from ..qtensor.tensor import NAMES, QTensor, door, is_traced, wrap
from . import onednn

__all__ = ["add", "add_scalar", "cat", "matmul", "multiply", "multiply_scalar", "on_grid", "quantized"]


@door
def on_grid(
    function: Callable[..., Tensor],
    *operands: QTensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    relu: bool = False,
) -> QTensor:
    """`function` of the real numbers, rounded to a grid in the integer type of the first operand.

    Args:
        function: from float32 tensors to one of them.
        operands: what it takes.
        scale, zero_point: the grid.
        relu: take codes below the zero point for the zero point.
    """
    values = function(*(operand.dequantize() for operand in operands)).detach()  # integers have no gradient
    return quantized(values, operands[0], scale, zero_point, relu)


def quantized(
    values: Tensor,
    like: QTensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    relu: bool = False,
    *,
    in_steps: bool = False,
) -> QTensor:
    """Real numbers (or numbers of steps) on a grid, in the integer type of `like`. The values may be overwritten."""
    low, high = like.limits
    if relu and isinstance(zero_point, Tensor):  # as traced; the result is the same
        values = torch.relu(values)
    elif relu:
        low = max(low, int(zero_point))
    stored = like.codes.dtype
    if is_traced():
        op = torch.ops.quantized_decomposed.quantize_per_tensor
        overload = op.tensor if isinstance(scale, Tensor) else op.default
        codes = overload(values, scale, zero_point, low, high, stored)
    elif stored is torch.int32:
        codes = qparams.quantize(values, scale, zero_point, low, high, stored)
    else:
        steps = values if in_steps else values.mul_(1.0 / scale)
        codes = qparams.rounded(steps, int(zero_point), low, high, stored)
    return wrap(codes, scale, zero_point, None, NAMES[stored])


@door
def add(a: QTensor, b: QTensor, scale: float | Tensor, zero_point: int | Tensor, *, relu: bool = False) -> QTensor:
    """a + b, by oneDNN where it can; or in one sum of steps of the result: f_a * (a - z_a) + f_b * (b - z_b)."""
    if is_traced() or a.shape != b.shape or torch.int32 in (a.codes.dtype, b.codes.dtype):
        return on_grid(torch.add, a, b, scale=scale, zero_point=zero_point, relu=relu)
    scale, zero_point = float(scale), int(zero_point)
    if onednn.adds(a, b):
        return wrap(onednn.sum_of(a, b, scale, zero_point, relu), scale, zero_point, None, a.stored_as)
    (f_a, z_a), (f_b, z_b) = ((float(one.scale) / scale, int(one.zero_point)) for one in (a, b))
    steps = torch.rsub(a.codes.float(), -(f_a * z_a + f_b * z_b), alpha=-f_a).add_(b.codes.float(), alpha=f_b)
    return quantized(steps, a, scale, zero_point, relu, in_steps=True)


@door
def multiply(a: QTensor, b: QTensor, scale: float | Tensor, zero_point: int | Tensor, *, relu: bool = False) -> QTensor:
    """a * b, element by element."""
    return on_grid(torch.mul, a, b, scale=scale, zero_point=zero_point, relu=relu)


@door
def matmul(a: QTensor, b: QTensor, scale: float | Tensor, zero_point: int | Tensor) -> QTensor:
    """The matrix product of two quantized tensors."""
    return on_grid(torch.matmul, a, b, scale=scale, zero_point=zero_point)


@door
def cat(tensors: Sequence[QTensor], dim: int, scale: float | Tensor, zero_point: int | Tensor) -> QTensor:
    """One tensor of several; those on the grid of the result keep their codes."""
    grid = (tensors[0].stored_as, scale, zero_point, None)
    parts = [
        one.codes if one.grid == grid else quantized(one.dequantize(), tensors[0], scale, zero_point).codes
        for one in tensors
    ]
    return wrap(torch.cat(parts, dim), scale, zero_point, None, tensors[0].stored_as)


@door
def add_scalar(x: QTensor, number: float) -> QTensor:
    """x + number: the zero point moves, and the codes stay; where it would leave their range, the scale grows instead.

    The result's range always contains that of x + number, as in the reference (quantized::add_scalar).
    """
    low, high = x.limits
    scale, zero_point = float(x.scale), int(x.zero_point)
    shifted = zero_point - round(number / scale)
    if low <= shifted <= high:
        return wrap(x.codes, scale, shifted, None, x.stored_as)
    end = low if shifted < low else high
    wider = scale * abs((high + low - end) - shifted) / (high - low)
    return on_grid(lambda values: values + round(number / scale) * scale, x, scale=wider, zero_point=end)


@door
def multiply_scalar(x: QTensor, number: float) -> QTensor:
    """x * number: the scale changes; with a negative number the codes and the zero point change ends."""
    low, high = x.limits
    scale, zero_point = float(x.scale), int(x.zero_point)
    if number > 0:
        return wrap(x.codes, scale * number, zero_point, None, x.stored_as)
    if number == 0:
        return wrap(torch.zeros_like(x.codes), 1.0, 0, None, x.stored_as)
    turned = (low + high - x.codes.long()).to(x.codes.dtype)
    return wrap(turned, scale * -number, low + high - zero_point, None, x.stored_as)
