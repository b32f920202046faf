"""nn.qat: layers that round their weight while they are trained, with the parameters and names of the float class."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..errors import QuantizedTensorError
from .intrinsic.containers import Fused, container_of
from .observed import folded
from .rows import ROWS, Row, float_class

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Convolution",
    "DynamicLinear",
    "Embedding",
    "EmbeddingBag",
    "Linear",
    "Trained",
]


class Trained(nn.Module):
    """A float layer with `weight_fake_quant`, through which its weight goes.

    Subclasses derive from the float class, too, and say their row, and the arguments that both classes are built from.
    """

    row: ClassVar[Row]
    _KEPT: ClassVar[tuple[str, ...]]
    weight: Any
    bias: Any
    weight_fake_quant: nn.Module

    def _round_with(self, qconfig: Any) -> None:
        """Make the fake quantizer of the weight.

        Raises:
            QuantizedTensorError: there is no qconfig.
        """
        if qconfig is None:
            raise QuantizedTensorError(
                f"{type(self).__name__} needs a qconfig that rounds its weight, as get_default_qat_qconfig gives"
            )
        self.qconfig = qconfig
        self.weight_fake_quant = qconfig.weight()
        if self.weight.device.type != "meta":
            self.weight_fake_quant.to(self.weight.device)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """The form in training of a float (or fused) module with a qconfig; it has the same parameters.

        Raises:
            QuantizedTensorError: it is of another class, or has no qconfig.
        """
        if not isinstance(mod, float_class(cls.row.float)):
            raise QuantizedTensorError(f"qat.{cls.__name__}.from_float takes {cls.row.float}, got {type(mod).__name__}")
        inner = mod[0] if isinstance(mod, Fused) else mod
        made = cls(**cls._options(inner), qconfig=getattr(mod, "qconfig", None), device="meta")
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(inner, name):
                parametrize.transfer_parametrizations_and_params(inner, made, name)
            elif hasattr(inner, name):
                setattr(made, name, getattr(inner, name))
        return made

    def to_float(self) -> nn.Module:
        """The float module with the weight as it is, not rounded; a batch norm is folded into it."""
        weight, bias = folded(self)
        made: Any = float_class(self.row.first or self.row.float)(**{**self._options(self), "device": "meta"})
        made.weight = nn.Parameter(weight.detach())
        if bias is not None:
            made.bias = nn.Parameter(bias.detach())
        if self.row.post == "relu":
            made = container_of((made, nn.ReLU()))(made, nn.ReLU())
        return made.train(self.training)  # type: ignore[no-any-return]

    @classmethod
    def _options(cls, module: Any) -> dict[str, Any]:
        return {name: getattr(module, name) for name in cls._KEPT}


class _Linear(Trained):
    _KEPT = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        qconfig: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._round_with(qconfig)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight_fake_quant(self.weight), self.bias)

    @classmethod
    def _options(cls, module: Any) -> dict[str, Any]:
        return {**super()._options(module), "bias": module.bias is not None}


class Linear(_Linear, nn.Linear):
    """torch.nn.Linear with a rounded weight."""

    row = ROWS["Linear"]


class DynamicLinear(Linear):
    """nn.qat.dynamic.Linear: its input is rounded to the grid of its own range in each step.

    Raises:
        QuantizedTensorError: the fake quantizer of the qconfig remembers earlier ranges.
    """

    def _round_with(self, qconfig: Any) -> None:
        super()._round_with(qconfig)
        made = qconfig.activation()
        if getattr(getattr(made, "activation_post_process", made), "averaging_constant", None) != 1:
            raise QuantizedTensorError(
                "qat.dynamic.Linear rounds each input by its own range: its qconfig needs averaging_constant=1, as "
                "default_dynamic_qat_qconfig has"
            )


class Convolution(Trained):
    """What the convolutions share. The arguments are those of the float class, and `qconfig`."""

    _KEPT = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        qconfig: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device=device, dtype=dtype)
        self._round_with(qconfig)

    def forward(self: Any, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_fake_quant(self.weight), self.bias)  # type: ignore[no-any-return]

    @classmethod
    def _options(cls, module: Any) -> dict[str, Any]:
        return {**super()._options(module), "bias": module.bias is not None}


class Conv1d(Convolution, nn.Conv1d):
    """torch.nn.Conv1d with a rounded weight."""

    row = ROWS["Conv1d"]


class Conv2d(Convolution, nn.Conv2d):
    """torch.nn.Conv2d with a rounded weight."""

    row = ROWS["Conv2d"]


class Conv3d(Convolution, nn.Conv3d):
    """torch.nn.Conv3d with a rounded weight."""

    row = ROWS["Conv3d"]


class _Table(Trained):
    def __init__(self, *args: Any, qconfig: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._round_with(qconfig)

    def _round_with(self, qconfig: Any) -> None:
        super()._round_with(qconfig)
        if qconfig.weight().qscheme is not torch.per_channel_affine_float_qparams:
            raise QuantizedTensorError(
                f"{type(self).__name__} has float zero points; take default_embedding_qat_qconfig for it"
            )


class Embedding(_Table, nn.Embedding):
    """torch.nn.Embedding with a rounded table. The arguments are those of the float class, and `qconfig`."""

    row = ROWS["Embedding"]
    _KEPT = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

    def forward(self, input: Tensor) -> Tensor:
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        return F.embedding(input, self.weight_fake_quant(self.weight), *options)


class EmbeddingBag(_Table, nn.EmbeddingBag):
    """torch.nn.EmbeddingBag with a rounded table. The arguments are those of the float class, and `qconfig`."""

    row = ROWS["EmbeddingBag"]
    _KEPT = (
        "num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
        "include_last_offset", "padding_idx",
    )  # fmt: skip

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return F.embedding_bag(
            input, self.weight_fake_quant(self.weight), offsets, self.max_norm, self.norm_type,
            self.scale_grad_by_freq, self.mode, self.sparse, per_sample_weights, self.include_last_offset,
            self.padding_idx,
        )  # fmt: skip
