"""Fused, dynamically quantized modules. The names of torch.ao.nn.intrinsic.quantized.dynamic."""

from ....dynamic import (
    LinearReLU,
)

__all__ = [
    "LinearReLU",
]
