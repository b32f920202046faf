"""While a compiler or torch.export looks: dequantize, the float operator, quantize, which is what backends match."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..qtensor.tensor import is_traced
from .kernel import Kernel

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL"]


def codes(product: Product) -> Tensor:
    values = real(product)
    return product.out.quantize(torch.relu(values) if product.post.name == "relu" else values)  # type: ignore[union-attr]


def real(product: Product) -> Tensor:
    weight = product.weight
    return weight.apply(product.x.dequantize(), weight.quantized.dequantize(), weight.bias)


KERNEL = Kernel(
    "graph",
    "dequantize, float operator, quantize: the graph that backends match, when one is made",
    codes,
    real,
    lambda product: None if is_traced() else "nothing traces",
)
