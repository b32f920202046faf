"""The reference: sums of products of integers, requantized by the arithmetic of the integer representation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..requantization import Rounding, Term, requantize
from .kernel import Kernel

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL", "sums"]


def sums(product: Product) -> Tensor:
    """Exact sums in int64. They are computed in float64, whose integers are exact up to 2^53: no sum comes near."""
    weight, x = product.weight, product.x
    centred = x.codes.double() - float(x.zero_point)
    return weight.apply(centred, weight.centred.double(), None).long()


def codes(product: Product) -> Tensor:
    weight, out, total = product.weight, product.out, sums(product)
    bias = weight.codes_of_bias(float(product.x.scale))
    if bias is not None:
        total = total + weight.along_channels(bias.long())
    if product.post.name == "relu":
        out = replace(out, quant_min=max(out.zero_point, out.quant_min))  # type: ignore[type-var, union-attr]
    scale = weight.along_channels(weight.scale * float(product.x.scale))
    term = Term(total, scale, product.bound)
    return requantize(term, out, Rounding.FLOAT32_HALF_EVEN, lambda tensor: tensor)  # type: ignore[arg-type, no-any-return]


def real(product: Product) -> Tensor:
    weight = product.weight
    values = sums(product).double() * weight.along_channels(weight.scale * float(product.x.scale))
    if weight.bias is not None:
        values = values + weight.along_channels(weight.bias.detach().double())
    return values.float()


KERNEL = Kernel(
    "exact",
    "the reference, in integers; runs everywhere, about 20 times slower than the others",
    codes,
    real,
    lambda product: None,
)
