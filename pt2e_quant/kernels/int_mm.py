"""torch._int_mm: int8 times int8 to int32, for linears on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..requantization import float32_factor
from .kernel import Kernel

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL"]

_ROWS, _MULTIPLE = 17, 8  # cuBLAS takes more than 16 rows, and other sizes by 8


def codes(product: Product) -> Tensor:
    out, weight, x_scale = product.out, product.weight, float(product.x.scale)
    total, bias = _sums(product), weight.codes_of_bias(x_scale)
    total = total if bias is None else total + bias
    factor = float32_factor(weight.scale * x_scale, out.scale).to(total.device)  # type: ignore[union-attr]
    low = out.zero_point if product.post.name == "relu" else out.quant_min  # type: ignore[union-attr]
    scaled = torch.round(total.float() * factor) + out.zero_point  # type: ignore[union-attr]
    return scaled.clamp_(low, out.quant_max).to(out.dtype)  # type: ignore[union-attr]


def real(product: Product) -> Tensor:
    weight = product.weight
    scaled = _sums(product).float() * (weight.scale * float(product.x.scale)).float()
    return scaled if weight.bias is None else scaled + weight.bias


def _sums(product: Product) -> Tensor:
    """sum((x - z) * w) = sum((x - 128) * w) + (128 - z) * sum(w): uint8 codes become int8 by turning one bit."""
    x, weight = product.x, product.weight
    codes, zero_point = x.codes, int(x.zero_point)
    if codes.dtype is torch.uint8:
        codes, zero_point = (codes ^ 128).view(torch.int8), zero_point - 128
    rows = torch._int_mm(codes.reshape(-1, codes.shape[-1]), weight.quantized.codes.t())
    sums = weight.once(("sums of rows",), lambda: weight.quantized.codes.sum(1, dtype=torch.int32))
    return (rows - zero_point * sums).unflatten(0, codes.shape[:-1])  # type: ignore[no-any-return]


def _lacks(product: Product) -> str | None:
    weight = product.weight
    if product.x.device.type != "cuda":
        return "not on a GPU"
    if weight.geometry is not None or not weight.is_symmetric or product.x.codes.dtype is torch.int32:
        return "no linear of 8-bit codes with a symmetric weight"
    sizes = weight.quantized.shape
    return (
        None if product.rows >= _ROWS and not any(size % _MULTIPLE for size in sizes) else "sizes that cuBLAS refuses"
    )


KERNEL = Kernel("int_mm", "int8 products on a GPU; convolutions have no such kernel there", codes, real, _lacks)
