"""oneDNN's int8 kernels on plain integers, which Inductor's x86 path depends on: the fast ones on a CPU with VNNI."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import sees_padding_only
from .kernel import NAMED, Codes, Kernel, Real

if TYPE_CHECKING:
    from ..qtensor import QTensor
    from .products import Product

__all__ = ["KERNEL", "adds", "sum_of"]

_ONEDNN = torch.ops.onednn
_NO_RELU = 3
"""Spatial dimensions of the convolution that oneDNN's kernels compute without relu."""


def codes(product: Product) -> Codes:
    """oneDNN reads and writes uint8; int8 codes are these with one bit turned, and the zero point 128 further."""
    out, relu = product.grid, product.post.name == "relu"
    signed = out.dtype is torch.int8
    zero_point = out.zero_point + 128 * signed
    fuses = relu and product.weight.spatial != _NO_RELU
    compute = _made(product, out.scale, zero_point, torch.uint8, "relu" if fuses else "none")
    x_scale, x_zero = product.scale, product.zero_point
    if not signed and fuses is relu:
        return lambda x: compute(x, x_scale, x_zero)

    def run(x: Tensor) -> Tensor:
        made = compute(x, x_scale, x_zero)
        made = made.clamp_(min=zero_point) if relu and not fuses else made
        return (made ^ 128).view(torch.int8) if signed else made

    return run


def real(product: Product) -> Real:
    return _made(product, 1.0, 0, torch.float32, "none")


def _made(product: Product, scale: float, zero_point: int, dtype: torch.dtype, post: str) -> Real:
    compute = _linear if product.weight.geometry is None else _convolution
    run = compute(product, (scale, zero_point, dtype, post, [], ""))
    if product.stored is torch.uint8:
        return run
    return lambda x, x_scale, x_zero: run(x.view(torch.uint8) ^ 128, x_scale, x_zero + 128)


def _linear(product: Product, end: tuple[Any, ...]) -> Real:
    weight, op = product.weight, _ONEDNN.qlinear_pointwise.default
    sizes, width = [product.rows, product.shape[-1]], len(weight.quantized)
    packed = weight.once(("onednn",), lambda: _ONEDNN.qlinear_prepack(weight.quantized.codes, sizes))
    rest = (packed, *_constants(product), *end)
    if len(product.shape) == 2:
        return lambda x, x_scale, x_zero: op(x, x_scale, x_zero, *rest)
    shape = (*product.shape[:-1], width)
    return lambda x, x_scale, x_zero: op(x.reshape(sizes), x_scale, x_zero, *rest).reshape(shape)


def _convolution(product: Product, end: tuple[Any, ...]) -> Real:
    """The packed weight depends on whether there is a zero point, but on neither its value nor the scale."""
    weight, op, g = product.weight, _ONEDNN.qconv_pointwise.default, product.weight.geometry
    moves = (g.stride, g.padding, g.dilation, g.groups)  # type: ignore[union-attr]
    constants, shape = _constants(product), list(product.shape)
    rest = (*constants, *moves, *end)

    @functools.cache
    def packed(shifted: bool) -> Tensor:
        parts = weight.quantized.codes, constants[0], 1.0, int(shifted), *moves, shape
        return weight.once(("onednn", shifted), lambda: _ONEDNN.qconv_prepack(*parts))  # type: ignore[no-any-return]

    return lambda x, x_scale, x_zero: op(x, x_scale, x_zero, packed(x_zero != 0), *rest)


def _constants(product: Product) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales, zero points and bias of the weight."""
    weight = product.weight
    scales = weight.scale.float().reshape(-1)
    bias = None if weight.bias is None else weight.bias.detach().float().contiguous()
    return scales, torch.zeros(scales.numel(), dtype=torch.int64), bias


def adds(a: QTensor, b: QTensor) -> bool:
    """Whether `sum_of` takes these two: uint8, with codes in the same dense order, a multiple of _WIDTH of them."""
    x, y = a.codes, b.codes
    plain = x.dtype is y.dtype is torch.uint8 and x.device.type == "cpu" and x.device == y.device
    alike = plain and x.shape == y.shape and x.stride() == y.stride() and x.numel() % _WIDTH == 0 != x.numel()
    dense = alike and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
    return dense and NAMED.get() in (None, KERNEL.name) and torch._C._get_mkldnn_enabled() and _absent() is None


def sum_of(a: QTensor, b: QTensor, scale: float, zero_point: int, relu: bool) -> Tensor:
    """Codes of a + b on the grid (scale, zero_point), in one pass: a linear's product of a with the identity, and b as
    what oneDNN adds to it before it rounds.

    torch.ops.onednn.qadd would be made for this, but its code for AVX-512 reads codes from 128 on as negative ones
    (torch 2.13; right with AVX2, and in the last numel % 16).
    """
    codes, made, op = a.codes, b.codes.clone(), _ONEDNN.qlinear_pointwise.binary
    rows, steps = (codes.numel() // _WIDTH, _WIDTH), (_WIDTH, 1)
    x, y = codes.as_strided(rows, steps), made.as_strided(rows, steps)
    end: tuple[Any, ...] = (float(b.scale), int(b.zero_point), "sum", 1.0, "relu" if relu else "none", [], "")
    op(x, float(a.scale), int(a.zero_point), *_identity(), y, None, scale, zero_point, torch.uint8, *end)
    return made


_WIDTH = 16
"""Of the identity: one vector of AVX-512 in float32."""


@functools.cache
def _identity() -> tuple[Tensor, Tensor, Tensor]:
    """Packed, with its scale and its zero point."""
    codes = torch.eye(_WIDTH, dtype=torch.int8)
    return _ONEDNN.qlinear_prepack(codes, None), torch.ones(1), torch.zeros(1, dtype=torch.int64)


@functools.cache
def _absent() -> str | None:
    if not torch.backends.mkldnn.is_available() or not hasattr(_ONEDNN, "qlinear_pointwise"):
        return "this torch has no oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "without VNNI, oneDNN adds pairs of products in 16 bits, which saturates"
    return None


def _lacks(product: Product) -> str | None:
    weight, out = product.weight, product.out
    if product.device.type != "cpu":
        return "not on a CPU"
    if product.stored is torch.int32 or (out is not None and out.dtype is torch.int32):
        return "codes of 32 bits"
    if not weight.is_symmetric:
        return "the weight has zero points"
    if weight.geometry is not None and weight.geometry.transposed:
        return "a transposed convolution"
    g, sizes = weight.geometry, (product.shape[2:], weight.quantized.shape[2:])
    if g is not None and sees_padding_only(*sizes, stride=g.stride, padding=g.padding, dilation=g.dilation):
        return "a window sees padding only: oneDNN's sums are wrong there, or it reads memory that is not its own"
    return _absent() if 0 not in product.shape and torch.backends.mkldnn.enabled else "nothing to do, or oneDNN is off"


KERNEL = Kernel(
    "onednn", "int8 kernels of oneDNN on plain integers: as fast as torch's engine x86", codes, real, _lacks
)
