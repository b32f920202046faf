"""Exact sums in a floating-point type that holds them: runs where no integer kernel does, and is fast for few rows.

The product with the factor is rounded to float32 and then to an integer, half to even: bit for bit what the reference
does in integers (Rounding.FLOAT32_HALF_EVEN).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..qparams import narrowed
from ..qtensor.tensor import QTensor
from ..requantization import float32_factor
from .kernel import Kernel

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL", "SMALL"]

_FLOAT32_EXACT = 2**24
_SMALL = 1 << 16
"""Products of a linear below which starting an integer kernel costs more than the sums (1 x 64 x 64: 14 us, 30 with
oneDNN, one thread of an AVX-512 server)."""


def codes(product: Product) -> Tensor:
    out, x = product.out, product.x
    key = ("carried", float(x.scale), x.zero_point, out, product.post.name)
    type_, weight, bias, factor = product.weight.once(key, lambda: _constants(product))
    total = product.weight.apply(_centred(x, type_), weight, bias)
    scaled = (total if total.dtype is torch.float32 else total.float()).mul_(factor).round_()
    low = out.zero_point if product.post.name == "relu" else out.quant_min  # type: ignore[union-attr]
    return narrowed(scaled.add_(out.zero_point).clamp_(low, out.quant_max), out.dtype)  # type: ignore[union-attr]


def real(product: Product) -> Tensor:
    weight, type_ = product.weight, _type(product)
    total = weight.apply(_centred(product.x, type_), weight.centred.to(type_), None).float()
    scaled = total.mul_(weight.along_channels((weight.scale * float(product.x.scale)).float()))
    return scaled if weight.bias is None else scaled.add_(weight.along_channels(weight.bias.detach().float()))


def _constants(product: Product) -> tuple[torch.dtype, Tensor, Tensor | None, Tensor]:
    weight, out, x_scale = product.weight, product.out, float(product.x.scale)
    type_, bias = _type(product), weight.codes_of_bias(x_scale)
    factor = weight.along_channels(float32_factor(weight.scale * x_scale, out.scale))  # type: ignore[union-attr]
    return type_, weight.centred.to(type_), None if bias is None else bias.to(type_), factor


def _centred(x: QTensor, type_: torch.dtype) -> Tensor:
    codes = x.codes.to(type_)
    return codes.sub_(x.zero_point) if x.zero_point else codes


def _type(product: Product) -> torch.dtype:
    """float32 where no sum leaves its integers and its products are not rounded to fewer bits."""
    whole = product.x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if whole and product.bound < _FLOAT32_EXACT else torch.float64


def _lacks(product: Product) -> str | None:
    return None if product.bound < 2**53 else "sums do not fit float64"


def _large(product: Product) -> str | None:
    weight = product.weight.quantized
    if product.weight.geometry is not None or product.rows * weight.numel() > _SMALL:
        return f"more than {_SMALL} products"
    return None if product.bound < _FLOAT32_EXACT else "sums do not fit float32"


SMALL = Kernel(
    "small", "exact sums in float32: a few rows are done before an integer kernel has started", codes, real, _large
)
KERNEL = Kernel(
    "carried", "exact sums in float32, or float64 where they are larger: needs no integer kernel", codes, real, _lacks
)
