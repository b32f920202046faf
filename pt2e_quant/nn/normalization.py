"""nn.quantized's batch, layer, group and instance norms, and the batch norms with relu of nn.intrinsic.quantized."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..qtensor.tensor import door
from .convolution import Place, Sizes
from .pointwise import OnGrid
from .rows import ROWS, Row

__all__ = [
    "BNReLU2d",
    "BNReLU3d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
]


class _Norm(OnGrid):
    """A norm computed with real numbers and rounded to the grid in the buffers scale and zero_point."""

    row: ClassVar[Row]

    def _keep(self: Any, weight: Any, bias: Any, scale: float, zero_point: int, device: Any, dtype: Any) -> None:
        self.weight, self.bias = weight, bias
        self._keep_grid(scale, zero_point, device, dtype)

    def forward(self: Any, input: Tensor) -> Tensor:
        return self._round(self._normalized, input, relu=self.row.post == "relu")  # type: ignore[no-any-return]


class _BatchNorm(_Norm, nn.modules.batchnorm._BatchNorm):
    @door
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Place = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, True, True, device=device, dtype=dtype)
        self._keep_grid(1.0, 0, device, None)

    def _normalized(self, x: Tensor) -> Tensor:
        """With the running statistics: a quantized model is not trained."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    @classmethod
    @door
    def from_reference(cls, bn: Any, output_scale: float, output_zero_point: int) -> Any:
        """The quantized form of a float batch norm (or of one with relu), on a grid."""
        bn = bn[0] if isinstance(bn, nn.Sequential) else bn
        made = cls(bn.num_features, bn.eps, bn.momentum)
        for name in ("weight", "bias", "running_mean", "running_var"):
            setattr(made, name, getattr(bn, name))
        made.scale, made.zero_point = torch.tensor(float(output_scale)), torch.tensor(int(output_zero_point))
        return made


class BatchNorm2d(_BatchNorm):
    """torch.nn.BatchNorm2d in inference, on QTensors of (batch, channels, height, width)."""

    row = ROWS["BatchNorm2d"]


class BatchNorm3d(_BatchNorm):
    """torch.nn.BatchNorm3d in inference, on QTensors of (batch, channels, depth, height, width)."""

    row = ROWS["BatchNorm3d"]


class BNReLU2d(BatchNorm2d):
    """BatchNorm2d and relu, rounded once."""

    row = ROWS["intrinsic.BNReLU2d"]


class BNReLU3d(BatchNorm3d):
    """BatchNorm3d and relu, rounded once."""

    row = ROWS["intrinsic.BNReLU3d"]


class LayerNorm(_Norm, nn.LayerNorm):
    """torch.nn.LayerNorm on the grid (scale, zero_point)."""

    row = ROWS["LayerNorm"]
    _KEPT = ("normalized_shape", "weight", "bias", "eps", "elementwise_affine")

    @door
    def __init__(
        self,
        normalized_shape: Sizes,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        device: Place = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        self._keep(weight, bias, scale, zero_point, device, dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(_Norm, nn.GroupNorm):
    """torch.nn.GroupNorm on the grid (scale, zero_point)."""

    row = ROWS["GroupNorm"]
    _KEPT = ("num_groups", "num_channels", "weight", "bias", "eps", "affine")

    @door
    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Place = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self._keep(weight, bias, scale, zero_point, device, dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class _InstanceNorm(_Norm, nn.modules.instancenorm._InstanceNorm):
    _KEPT = ("num_features", "weight", "bias", "eps", "affine")

    @door
    def __init__(
        self,
        num_features: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Place = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._keep(weight, bias, scale, zero_point, device, dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        """F.instance_norm, which refuses channels of one element, as in training; the reference takes them."""
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, False)


class InstanceNorm1d(_InstanceNorm):
    """torch.nn.InstanceNorm1d on QTensors of (batch, channels, length)."""

    row = ROWS["InstanceNorm1d"]


class InstanceNorm2d(_InstanceNorm):
    """torch.nn.InstanceNorm2d on QTensors of (batch, channels, height, width)."""

    row = ROWS["InstanceNorm2d"]


class InstanceNorm3d(_InstanceNorm):
    """torch.nn.InstanceNorm3d on QTensors of (batch, channels, depth, height, width)."""

    row = ROWS["InstanceNorm3d"]
