"""While a compiler or torch.export looks: dequantize, the float operator, quantize, which is what backends match."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..qtensor.tensor import NAMES, is_traced, wrap
from .kernel import Codes, Kernel, Real

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL"]


def codes(product: Product) -> Codes:
    out, compute = product.grid, real(product)

    def run(x: Tensor) -> Tensor:
        values = compute(x, product.scale, product.zero_point)
        return out.quantize(torch.relu(values) if product.post.name == "relu" else values)

    return run


def real(product: Product) -> Real:
    weight = product.weight

    def run(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
        values = wrap(x, scale, zero_point, None, NAMES[product.stored]).dequantize()
        return weight.apply(values, weight.exported.dequantize(), weight.bias)

    return run


KERNEL = Kernel(
    "graph",
    "dequantize, float operator, quantize: the graph that backends match, when one is made",
    codes,
    real,
    lambda product: None,
    lambda product: None if is_traced() else "nothing traces",
)
