"""torch._int_mm: int8 times int8 to int32, for linears on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..requantization import float32_factor
from .kernel import Codes, Kernel, Real

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL"]

_ROWS, _MULTIPLE = 17, 8  # cuBLAS takes more than 16 rows, and other sizes by 8


def codes(product: Product) -> Codes:
    out, weight, low = product.grid, product.weight, product.lowest
    bias = weight.codes_of_bias(product.scale)
    factor = float32_factor(weight.scale * product.scale, out.scale).to(product.device)

    def run(x: Tensor) -> Tensor:
        total = _sums(product, x, product.zero_point)
        total = total if bias is None else total + bias
        return (torch.round(total.float() * factor) + out.zero_point).clamp_(low, out.quant_max).to(out.dtype)

    return run


def real(product: Product) -> Real:
    weight = product.weight

    def run(x: Tensor, scale: float, zero_point: int) -> Tensor:
        scaled = _sums(product, x, zero_point).float() * (weight.scale * scale).float()
        return scaled if weight.bias is None else scaled + weight.bias

    return run


def _sums(product: Product, x: Tensor, zero_point: int) -> Tensor:
    """sum((x - z) * w) = sum((x - 128) * w) + (128 - z) * sum(w): uint8 codes become int8 by turning one bit."""
    weight = product.weight
    if x.dtype is torch.uint8:
        x, zero_point = (x ^ 128).view(torch.int8), zero_point - 128
    rows = torch._int_mm(x.reshape(-1, x.shape[-1]), weight.quantized.codes.t())
    sums = weight.once(("sums of rows",), lambda: weight.quantized.codes.sum(1, dtype=torch.int32))
    return (rows - zero_point * sums).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def _lacks(product: Product) -> str | None:
    weight = product.weight
    if product.device.type not in ("cuda", "cpu"):
        return "neither on a GPU nor on a CPU"
    if weight.geometry is not None or not weight.is_symmetric or product.stored is torch.int32:
        return "no linear of 8-bit codes with a symmetric weight"
    sizes = weight.quantized.shape
    return (
        None if product.rows >= _ROWS and not any(size % _MULTIPLE for size in sizes) else "sizes that cuBLAS refuses"
    )


KERNEL = Kernel(
    "int_mm",
    "int8 products on a GPU; convolutions have no such kernel there",
    codes,
    real,
    _lacks,
    lambda product: None if product.device.type == "cuda" else "not on a GPU",
)
