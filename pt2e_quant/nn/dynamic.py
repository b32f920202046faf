"""nn.quantized.dynamic's linear and convolutions: float in, float out; the input's grid is that of its own range.

Inputs get all 8 bits: no kernel of ours saturates, so no bit need stay unused as in the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import Product
from ..qconfig import default_dynamic_qconfig
from ..qtensor.tensor import door
from . import convolution, weighted
from .rows import ROWS

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Linear",
    "LinearReLU",
]


class _Dynamic(weighted.WeightedModule):
    """A product whose input is quantized while it runs."""

    def _get_name(self) -> str:
        return f"DynamicQuantized{self.row.shown}"

    def forward(self, input: Tensor, reduce_range: bool = False) -> Tensor:
        """Real numbers in, real numbers out, in the type of the input.

        Args:
            input: as of the float class.
            reduce_range: leave one bit of the input unused, as the reference does.
        """
        return Product.compute_dynamic(self.product, self.post, input, reduce_range=reduce_range)

    @classmethod
    def _is_static(cls) -> bool:
        return False

    @classmethod
    def _default_observer(cls) -> Any:
        return default_dynamic_qconfig.weight


class Linear(_Dynamic, weighted.Linear):
    """torch.nn.Linear with int8 products, or with dtype=torch.float16 with a weight rounded to that.

    Args:
        in_features, out_features, bias_: see nn.quantized.Linear.
        dtype: torch.qint8 or torch.float16.
    """

    _version = 4

    @door
    def __init__(
        self, in_features: int, out_features: int, bias_: bool = True, dtype: torch.dtype = torch.qint8
    ) -> None:
        super().__init__(in_features, out_features, bias_, dtype)
        self.version = 4

    def forward(self, x: Tensor, reduce_range: bool = False) -> Tensor:
        held: Any = self._modules["_packed_params"]  # nn.Module's __getattr__ takes a percent of a layer's time
        if held.packed is not None:
            return Product.compute_dynamic(held.packed, self.post, x, reduce_range=reduce_range)
        weight, bias = self._weight_bias()
        made = F.linear(x.float(), weighted.rounded_to_half(weight), bias)
        return (made if self.post.function is None else self.post.function(made)).to(x.dtype)

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, out_features={self.out_features}, dtype={self._packed_params.dtype}"
        quantized = self._packed_params.packed
        return shown if quantized is None else f"{shown}, qscheme={quantized.quantized.qscheme()}"

    def _take_float(self, weight: Tensor, bias: Tensor | None, observer: Any, watch: bool) -> None:
        if observer.dtype is torch.float16:
            self._packed_params.dtype = torch.float16
            self.set_weight_bias(weight, None if bias is None else bias.detach())
        else:
            super()._take_float(weight, bias, observer, watch)

    @classmethod
    @door
    def from_reference(cls, ref: Any, output_scale: float = 1.0, output_zero_point: int = 0) -> Any:
        if ref.weight_dtype is not torch.float16:
            return super().from_reference(ref)
        made = cls(ref.in_features, ref.out_features, ref.bias is not None, torch.float16)
        made.set_weight_bias(ref.weight, ref.bias)
        return made


class LinearReLU(Linear):
    """Linear and relu."""

    row = ROWS["intrinsic.LinearReLU"]

    @door
    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = torch.qint8
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)


class _Convolution(_Dynamic, convolution.Convolution):
    """Arguments: those of the static class; `reduce_range` is accepted, and forward's argument of that name decides."""

    @door
    def __init__(self, *args: Any, reduce_range: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)

    def forward(self, input: Tensor, reduce_range: bool = False) -> Tensor:
        return super().forward(self.padded(input), reduce_range)


class Conv1d(_Convolution, convolution.Conv1d):
    """torch.nn.Conv1d with int8 products."""


class Conv2d(_Convolution, convolution.Conv2d):
    """torch.nn.Conv2d with int8 products."""


class Conv3d(_Convolution, convolution.Conv3d):
    """torch.nn.Conv3d with int8 products."""


class ConvTranspose1d(_Convolution, convolution.ConvTranspose1d):
    """torch.nn.ConvTranspose1d with int8 products."""


class ConvTranspose2d(_Convolution, convolution.ConvTranspose2d):
    """torch.nn.ConvTranspose2d with int8 products."""


class ConvTranspose3d(_Convolution, convolution.ConvTranspose3d):
    """torch.nn.ConvTranspose3d with int8 products."""
