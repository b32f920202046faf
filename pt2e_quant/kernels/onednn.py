"""oneDNN's int8 kernels on plain integers, which Inductor's x86 path depends on: the fast ones on a CPU with VNNI."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import sees_padding_only
from ..qtensor.tensor import QTensor
from .kernel import Kernel

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL"]

_ONEDNN = torch.ops.onednn
_NO_RELU = 3
"""Spatial dimensions of the convolution that oneDNN's kernels compute without relu."""


def codes(product: Product) -> Tensor:
    """oneDNN reads and writes uint8; int8 codes are these with one bit turned, and the zero point 128 further."""
    out = product.out
    signed = out.dtype is torch.int8  # type: ignore[union-attr]
    zero_point = out.zero_point + 128 * signed  # type: ignore[union-attr]
    made = _run(product, out.scale, zero_point, torch.uint8)  # type: ignore[union-attr]
    if product.post.name == "relu" and product.weight.spatial == _NO_RELU:
        made.clamp_(min=zero_point)
    return (made ^ 128).view(torch.int8) if signed else made


def real(product: Product) -> Tensor:
    return _run(product, 1.0, 0, torch.float32)


def _run(product: Product, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    weight = product.weight
    x, x_scale, x_zero = _unsigned(product.x)
    fuses = dtype is torch.uint8 and product.weight.spatial != _NO_RELU
    post: tuple[Any, ...] = (product.post.name if fuses else "none", [], "")
    scales, zeros, bias = weight.once(("onednn constants",), lambda: _constants(product))
    if weight.geometry is None:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        packed = weight.once(("onednn",), lambda: _ONEDNN.qlinear_prepack(weight.quantized.codes, list(rows.shape)))
        made = _ONEDNN.qlinear_pointwise(
            rows, x_scale, x_zero, packed, scales, zeros, bias, scale, zero_point, dtype, *post
        )
        return made if x.dim() == 2 else made.reshape(*x.shape[:-1], made.shape[-1])  # type: ignore[no-any-return]
    g = weight.geometry
    moves = (g.stride, g.padding, g.dilation, g.groups)
    packed = weight.once(
        ("onednn", x_scale, x_zero),
        lambda: _ONEDNN.qconv_prepack(weight.quantized.codes, scales, x_scale, x_zero, *moves, list(x.shape)),
    )
    return _ONEDNN.qconv_pointwise(  # type: ignore[no-any-return]
        x, x_scale, x_zero, packed, scales, zeros, bias, *moves, scale, zero_point, dtype, *post
    )


def _unsigned(x: QTensor) -> tuple[Tensor, float, int]:
    if x.codes.dtype is torch.uint8:
        return x.codes, float(x.scale), int(x.zero_point)
    return x.codes.view(torch.uint8) ^ 128, float(x.scale), int(x.zero_point) + 128


def _constants(product: Product) -> tuple[Any, ...]:
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
    weight, x, out = product.weight, product.x, product.out
    if x.device.type != "cpu":
        return "not on a CPU"
    if x.codes.dtype is torch.int32 or (out is not None and out.dtype is torch.int32):
        return "codes of 32 bits"
    if not weight.is_symmetric:
        return "the weight has zero points"
    if weight.geometry is not None and weight.geometry.transposed:
        return "a transposed convolution"
    g, sizes = weight.geometry, (x.codes.shape[2:], weight.quantized.shape[2:])
    if g is not None and sees_padding_only(*sizes, stride=g.stride, padding=g.padding, dilation=g.dilation):
        return "a window sees padding only: oneDNN's sums are wrong there, or it reads memory that is not its own"
    return _absent() if x.codes.numel() and torch.backends.mkldnn.enabled else "nothing to compute, or oneDNN is off"


KERNEL = Kernel(
    "onednn", "int8 kernels of oneDNN on plain integers: as fast as torch's engine x86", codes, real, _lacks
)
