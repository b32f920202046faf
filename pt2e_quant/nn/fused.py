"""nn.intrinsic.quantized: products and what follows them, rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import Post, Product
from ..kernels.elementwise import quantized
from ..qtensor.tensor import door
from .convolution import Conv1d, Conv2d, Conv3d
from .observed import as_quantized
from .rows import ROWS
from .weighted import Linear

__all__ = [
    "ConvAdd2d",
    "ConvAddReLU2d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "LinearLeakyReLU",
    "LinearReLU",
    "LinearTanh",
]


class ConvReLU1d(Conv1d):
    """Conv1d and relu."""

    row = ROWS["intrinsic.ConvReLU1d"]


class ConvReLU2d(Conv2d):
    """Conv2d and relu."""

    row = ROWS["intrinsic.ConvReLU2d"]


class ConvReLU3d(Conv3d):
    """Conv3d and relu."""

    row = ROWS["intrinsic.ConvReLU3d"]


class ConvAdd2d(Conv2d):
    """Conv2d and the sum with another QTensor, rounded once."""

    row = ROWS["intrinsic.ConvAdd2d"]

    def forward(self, input: Tensor, extra_input: Tensor) -> Tensor:  # type: ignore[override]
        """Two QTensors in, one on the grid (scale, zero_point) out; `extra_input` has the shape of the result."""
        x = as_quantized(self.padded(as_quantized(input, self)), self)
        values = Product.compute_real(self.product, Post(), x) + as_quantized(extra_input, self).dequantize()
        return quantized(values, x, self.scale, self.zero_point, self.row.post == "relu")


class ConvAddReLU2d(ConvAdd2d):
    """Conv2d, the sum with another QTensor, and relu."""

    row = ROWS["intrinsic.ConvAddReLU2d"]


class _FusedLinear(Linear):
    """A linear whose argument is called `bias`, as in the reference."""

    @door
    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = torch.qint8
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)


class LinearReLU(_FusedLinear):
    """Linear and relu."""

    row = ROWS["intrinsic.LinearReLU"]


class LinearTanh(_FusedLinear):
    """Linear and tanh."""

    row = ROWS["intrinsic.LinearTanh"]


class LinearLeakyReLU(Linear):
    """Linear and leaky relu.

    Args:
        in_features, out_features, bias, dtype: see Linear.
        negative_slope: the factor below zero.
    """

    row = ROWS["intrinsic.LinearLeakyReLU"]

    @door
    def __init__(
        self,
        in_features: int,
        out_features: int,
        negative_slope: float,
        bias: bool = True,
        dtype: torch.dtype = torch.qint8,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.negative_slope = negative_slope

    @property
    def post(self) -> Post:  # type: ignore[override]
        return Post("leaky_relu", self._leaky)

    def _leaky(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    @classmethod
    def empty_like(cls, module: Any) -> LinearLeakyReLU:
        slope = getattr(module, "negative_slope", 0.01)
        return cls(module.in_features, module.out_features, slope, module.bias is not None)

    @classmethod
    @door
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> LinearLeakyReLU:
        """The quantized form of a fused, observed pair of torch.nn.Linear and torch.nn.LeakyReLU."""
        made = super().from_float(mod, use_precomputed_fake_quant)
        if isinstance(mod, nn.Sequential):
            made.negative_slope = mod[1].negative_slope
        return made  # type: ignore[return-value]
