"""nn.intrinsic.qat: products with what follows them, rounded in training as the one quantized module they become."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....batch_norm import by_channel, gamma_over_sigma
from ....errors import QuantizedTensorError
from ... import trained
from ...rows import ROWS
from ..containers import FusedModule

__all__ = [
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "LinearBn1d",
    "LinearReLU",
    "freeze_bn_stats",
    "update_bn_stats",
]


# --- with relu alone --------------------------------------------------------------------------------------------------


class _ReLU(FusedModule):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class ConvReLU1d(_ReLU, trained.Conv1d):
    """Conv1d and relu, with a rounded weight."""

    row = ROWS["intrinsic.ConvReLU1d"]


class ConvReLU2d(_ReLU, trained.Conv2d):
    """Conv2d and relu, with a rounded weight."""

    row = ROWS["intrinsic.ConvReLU2d"]


class ConvReLU3d(_ReLU, trained.Conv3d):
    """Conv3d and relu, with a rounded weight."""

    row = ROWS["intrinsic.ConvReLU3d"]


class LinearReLU(_ReLU, trained.Linear):
    """Linear and relu, with a rounded weight."""

    row = ROWS["intrinsic.LinearReLU"]


# --- with a batch norm ------------------------------------------------------------------------------------------------

_OF_VERSION_1 = {
    "gamma": "bn.weight",
    "beta": "bn.bias",
    **{name: f"bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")},
}
"""Names in old state dicts, which have no module `bn`."""


class _WithNorm(FusedModule, trained.Trained):
    """A product and the batch norm `bn` after it; see `pt2e_quant.batch_norm` for what is rounded.

    freeze_bn: whether `bn` uses its running statistics, and leaves them as they are, while the rest trains.
    """

    _version = 2
    bn: Any

    def _norm_with(self, bn: nn.Module, freeze_bn: bool) -> None:
        self.freeze_bn = freeze_bn
        rounder: Any = self._modules.pop("weight_fake_quant")  # in state dicts it comes last
        self.bn, self.weight_fake_quant = bn, rounder
        self.train(self.training)
        self.bn.training = self.training and not freeze_bn

    def forward(self, input: Tensor) -> Tensor:
        """In the reference's order: one float32 rounding apart, values at ties go to other steps, and losses drift."""
        scale = gamma_over_sigma(self.bn.weight, self.bn.running_var, self.bn.eps)
        weight = self.weight_fake_quant(by_channel(operator.mul, self.weight, scale, None))
        channels = [-1, *[1] * (self.weight.dim() - 2)]
        y = self._product(input, weight) / scale.reshape(channels)
        if self.bias is not None:
            y = y + self.bias.reshape(channels)
        y = self.bn(y)
        return F.relu(y) if self.row.post == "relu" else y

    def _product(self, input: Tensor, weight: Tensor) -> Tensor:
        """Without the bias."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """As any module, but frozen statistics stay frozen."""
        self.training = mode
        if not self.freeze_bn:
            for child in self.children():
                child.train(mode)
        return self

    def freeze_bn_stats(self) -> Any:
        """Let the batch norm use its running statistics and leave them as they are; this module."""
        self.freeze_bn, self.bn.training = True, False
        return self

    def update_bn_stats(self) -> Any:
        """Let the batch norm use those of each batch, and keep a running average; this module."""
        self.freeze_bn, self.bn.training = False, True
        return self

    def reset_running_stats(self) -> None:
        """Running statistics as they were before the first batch."""
        self.bn.reset_running_stats()

    def reset_bn_parameters(self) -> None:
        """The batch norm as it was made."""
        self.bn.reset_parameters()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for old, new in _OF_VERSION_1.items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        made = super().from_float(mod, use_precomputed_fake_quant)
        if mod[1].running_var is None:
            raise QuantizedTensorError(
                f"{cls.__name__}: the batch norm has no running statistics (track_running_stats=False), so it cannot "
                "be folded; leave it apart"
            )
        made.bn = mod[1]
        return made


class _ConvBn(_WithNorm, trained.Convolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool | None = None,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float = 0.1,
        freeze_bn: bool = False,
        qconfig: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, groups, bool(bias), padding_mode)
        super().__init__(in_channels, out_channels, *geometry, qconfig, device=device, dtype=dtype)
        self._norm_with(_norm(self.row.dims)(out_channels, eps, momentum, device=device, dtype=dtype), freeze_bn)

    def _product(self: Any, input: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(input, weight, None)  # type: ignore[no-any-return]


def _norm(dims: int) -> Any:
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]


class ConvBn1d(_ConvBn, nn.Conv1d):
    """Conv1d and BatchNorm1d."""

    row = ROWS["intrinsic.ConvBn1d"]


class ConvBn2d(_ConvBn, nn.Conv2d):
    """Conv2d and BatchNorm2d."""

    row = ROWS["intrinsic.ConvBn2d"]


class ConvBn3d(_ConvBn, nn.Conv3d):
    """Conv3d and BatchNorm3d."""

    row = ROWS["intrinsic.ConvBn3d"]


class ConvBnReLU1d(ConvBn1d):
    """Conv1d, BatchNorm1d and relu."""

    row = ROWS["intrinsic.ConvBnReLU1d"]


class ConvBnReLU2d(ConvBn2d):
    """Conv2d, BatchNorm2d and relu."""

    row = ROWS["intrinsic.ConvBnReLU2d"]


class ConvBnReLU3d(ConvBn3d):
    """Conv3d, BatchNorm3d and relu."""

    row = ROWS["intrinsic.ConvBnReLU3d"]


class LinearBn1d(_WithNorm, trained.Linear):
    """Linear and BatchNorm1d."""

    row = ROWS["intrinsic.LinearBn1d"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        freeze_bn: bool = False,
        qconfig: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, qconfig, device=device, dtype=dtype)
        self._norm_with(nn.BatchNorm1d(out_features, eps, momentum, device=device, dtype=dtype), freeze_bn)

    def _product(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight)


# --- switches, to be given to model.apply -----------------------------------------------------------------------------


def freeze_bn_stats(mod: nn.Module) -> None:
    """`freeze_bn_stats` of a module that has a batch norm inside; nothing of another."""
    if isinstance(mod, _WithNorm):
        mod.freeze_bn_stats()


def update_bn_stats(mod: nn.Module) -> None:
    """`update_bn_stats` of a module that has a batch norm inside; nothing of another."""
    if isinstance(mod, _WithNorm):
        mod.update_bn_stats()
