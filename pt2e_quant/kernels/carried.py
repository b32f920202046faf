"""Exact sums in a floating-point type that holds them: runs where no integer kernel does, and is fast for few rows.

The product with the factor is rounded to float32 and then to an integer, half to even: bit for bit what the reference
does in integers (Rounding.FLOAT32_HALF_EVEN).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..qparams import rounded
from ..requantization import float32_factor
from .kernel import Codes, Kernel, Real

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL", "SMALL"]

_FLOAT32_EXACT = 2**24
_SMALL = 1 << 16
"""Products of a linear below which starting an integer kernel costs more than the sums (1 x 64 x 64: 14 us, 30 with
oneDNN, one thread of an AVX-512 server)."""


def codes(product: Product) -> Codes:
    weight, out, low = product.weight, product.grid, product.lowest
    factor = weight.along_channels(float32_factor(weight.scale * product.scale, out.scale))
    sums = _sums(product)

    def run(x: Tensor) -> Tensor:
        total = sums(x)
        scaled = (total if total.dtype is torch.float32 else total.float()).mul_(factor)
        return rounded(scaled, out.zero_point, low, out.quant_max, out.dtype)

    return run


def _sums(product: Product) -> Callable[[Tensor], Tensor]:
    """From codes to sums with the bias. A linear's has what the zero point adds; a convolution pads with it."""
    weight, type_, zero_point = product.weight, _type(product), product.zero_point
    centred, codes_of_bias = weight.centred, weight.codes_of_bias(product.scale)
    values, bias = centred.to(type_), None if codes_of_bias is None else codes_of_bias.long()
    if weight.geometry is not None:
        added = None if bias is None else bias.to(type_)
        return lambda x: weight.apply(_less(x.to(type_), zero_point), values, added)
    start = (0 if bias is None else bias) - zero_point * centred.sum(1)
    columns, added, sizes = values.t(), start.to(type_), (product.rows, product.shape[-1])
    shape = (*product.shape[:-1], len(values))
    return lambda x: torch.addmm(added, x.to(type_).reshape(sizes), columns).reshape(shape)


def real(product: Product) -> Real:
    weight, type_ = product.weight, _type(product)
    values, scales = weight.centred.to(type_), weight.along_channels(weight.scale.float())
    bias = None if weight.bias is None else weight.along_channels(weight.bias.detach().float())

    def run(x: Tensor, scale: float, zero_point: int) -> Tensor:
        total = weight.apply(_less(x.to(type_), zero_point), values, None).float()
        scaled = total.mul_(scales * scale)
        return scaled if bias is None else scaled.add_(bias)

    return run


def _less(x: Tensor, zero_point: int) -> Tensor:
    return x - zero_point if zero_point else x


def _type(product: Product) -> torch.dtype:
    """float32 where no sum leaves its integers and its products are not rounded to fewer bits."""
    whole = product.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if whole and product.bound < _FLOAT32_EXACT else torch.float64


def _lacks(product: Product) -> str | None:
    return None if product.bound < 2**53 else "sums do not fit float64"


def _loses(product: Product) -> str | None:
    weight = product.weight.quantized
    if product.weight.geometry is not None or product.rows * weight.numel() > _SMALL:
        return f"more than {_SMALL} products"
    return None if _type(product) is torch.float32 else "sums do not fit float32"


SMALL = Kernel(
    "small",
    "exact sums in float32: a few rows are done before an integer kernel has started",
    codes,
    real,
    _lacks,
    _loses,
    whole=False,
)
KERNEL = Kernel(
    "carried",
    "exact sums in float32, or float64 where they are larger: needs no integer kernel",
    codes,
    real,
    _lacks,
    whole=False,
)
