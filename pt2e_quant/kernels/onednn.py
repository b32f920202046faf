"""oneDNN's int8 kernels on plain integers, which Inductor's x86 path depends on: the fast ones on a CPU with VNNI."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import sees_padding_only
from .kernel import Codes, Kernel, Real

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL"]

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

    def pack(x_zero: int) -> Callable[[], Tensor]:
        scales = constants[0]
        return lambda: _ONEDNN.qconv_prepack(weight.quantized.codes, scales, 1.0, x_zero, *moves, shape)

    def run(x: Tensor, x_scale: float, x_zero: int) -> Tensor:
        packed = weight.once(("onednn", x_zero != 0), pack(x_zero))
        return op(x, x_scale, x_zero, packed, *constants, *moves, *end)  # type: ignore[no-any-return]

    return run


def _constants(product: Product) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales, zero points and bias of the weight."""
    weight = product.weight
    scales = weight.scale.float().reshape(-1)
    bias = None if weight.bias is None else weight.bias.detach().float().contiguous()
    return scales, torch.zeros(scales.numel(), dtype=torch.int64), bias


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
