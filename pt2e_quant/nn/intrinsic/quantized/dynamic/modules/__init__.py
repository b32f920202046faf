"""The same as pt2e_quant.nn.intrinsic.quantized.dynamic, under the reference's longer path."""

from .. import (
    LinearReLU,
)

__all__ = [
    "LinearReLU",
]
