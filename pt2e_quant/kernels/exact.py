"""The reference: sums of products of integers, requantized by the arithmetic of the integer representation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..requantization import Rounding, Term, requantize
from .kernel import Codes, Kernel, Real

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL"]


def codes(product: Product) -> Codes:
    weight, out = product.weight, product.grid
    out = replace(out, quant_min=product.lowest)
    bias = weight.codes_of_bias(product.scale)
    scale = weight.along_channels(weight.scale * product.scale)

    def run(x: Tensor) -> Tensor:
        total = _sums(product, x, product.zero_point)
        total = total if bias is None else total + weight.along_channels(bias.long())
        term = Term(total, scale, product.bound)
        return requantize(term, out, Rounding.FLOAT32_HALF_EVEN, lambda tensor: tensor)  # type: ignore[no-any-return]

    return run


def real(product: Product) -> Real:
    weight = product.weight

    def run(x: Tensor, scale: float, zero_point: int) -> Tensor:
        values = _sums(product, x, zero_point).double() * weight.along_channels(weight.scale * scale)
        if weight.bias is not None:
            values = values + weight.along_channels(weight.bias.detach().double())
        return values.float()

    return run


def _sums(product: Product, x: Tensor, zero_point: int) -> Tensor:
    """Exact sums in int64. They are computed in float64, whose integers are exact up to 2^53: no sum comes near."""
    weight = product.weight
    return weight.apply(x.double() - zero_point, weight.centred.double(), None).long()


KERNEL = Kernel(
    "exact",
    "the reference, in integers; runs everywhere, about 20 times slower than the others",
    codes,
    real,
    lambda product: None,
    whole=False,
)
