"""nn.quantized.Conv1d to Conv3d and ConvTranspose1d to ConvTranspose3d: one class, and a row for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import QuantizedTensorError
from ..kernels import Geometry, Weight
from ..qtensor import QTensor
from ..qtensor.tensor import door
from .observed import as_quantized
from .rows import ROWS
from .weighted import WeightedModule, moved, prepared

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Convolution",
    "Place",
    "Sizes",
]


Sizes = int | list[int] | tuple[int, ...]
"""One number for all spatial dimensions, or one for each."""
Place = torch.device | str | int | None


class Convolution(WeightedModule):
    """What all convolutions share. The arguments are those of torch.nn's class of the same name.

    Shapes: (batch, in_channels, ...) -> (batch, out_channels, ...), as of that class.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _FIELDS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    def _build(self, output_padding: Any, bias: bool, **fields: Any) -> None:
        """Check and keep the constructor's arguments."""
        dims = self.row.dims
        for name in ("kernel_size", "stride", "padding", "dilation"):
            fields[name] = per_dimension(fields[name], dims)
        for name, value in fields.items():
            setattr(self, name, value)
        self.output_padding, self.transposed = per_dimension(output_padding, dims), self.row.kernel == "conv_transpose"
        self._check()
        self.scale, self.zero_point = 1.0, 0
        sizes = (self.in_channels, self.out_channels) if self.transposed else (self.out_channels, self.in_channels)
        empty = torch.zeros(sizes[0], sizes[1] // self.groups, *self.kernel_size, dtype=torch.int8)
        self.set_weight_bias(QTensor(empty, 1.0, 0), torch.zeros(self.out_channels) if bias else None)

    def _check(self) -> None:
        name = f"{self._get_name()}({self.in_channels}, {self.out_channels}, groups={self.groups})"
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise QuantizedTensorError(f"{name}: groups must divide the channels")
        refused = ("reflect",) if self.row.dims == 3 else ()
        if self.padding_mode in refused or (self.transposed and self.padding_mode != "zeros"):
            raise QuantizedTensorError(f"{name}: padding_mode {self.padding_mode!r} is not supported")

    @property
    def product(self) -> Weight:
        return self._weight

    @door
    def set_weight_bias(self, w: Tensor, b: Tensor | None) -> None:
        padding = self.padding if self.padding_mode == "zeros" else (0,) * self.row.dims
        output_padding = self.output_padding if self.transposed else ()
        geometry = Geometry(self.stride, padding, self.dilation, self.groups, self.transposed, output_padding)
        self._weight = prepared(w, b, geometry)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.padded(as_quantized(input, self)))

    def padded(self, input: Tensor) -> Tensor:
        """The input, with the padding of a mode other than zeros.

        Raises:
            QuantizedTensorError: it has another number of dimensions.
        """
        if input.dim() != self.row.dims + 2:
            raise QuantizedTensorError(
                f"{self._get_name()} takes (batch, channels, {'...' if self.row.dims > 1 else 'length'}), "
                f"{self.row.dims + 2} dimensions; got shape {tuple(input.shape)}"
            )
        if self.padding_mode == "zeros":
            return input
        amounts = [amount for amount in reversed(self.padding) for _ in range(2)]
        return F.pad(input, amounts, mode=self.padding_mode)

    def extra_repr(self) -> str:
        shown = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        shown.append(f"scale={self.scale}, zero_point={self.zero_point}")
        plain = {"padding": (0,) * self.row.dims, "dilation": (1,) * self.row.dims, "groups": 1}
        plain["output_padding"] = (0,) * self.row.dims
        shown += [f"{name}={getattr(self, name)}" for name, usual in plain.items() if getattr(self, name) != usual]
        return ", ".join([*shown, *(["bias=False"] if self.bias() is None else [])])

    @classmethod
    def empty_like(cls, module: Any) -> Convolution:
        fields = {name: getattr(module, name) for name in cls._FIELDS}
        if module.transposed:
            fields["output_padding"] = module.output_padding
        return cls(**fields, bias=module.bias is not None)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            super().__setstate__(state)  # type: ignore[no-untyped-call]
            return
        super().__init__()  # the reference has a tuple
        *fields, weight, bias, self.scale, self.zero_point, self.training = state
        for name, value in zip(_STATE, fields, strict=True):
            setattr(self, name, value)
        self.set_weight_bias(weight, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Convolution:
        self._weight = moved(self._weight, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"], destination[prefix + "bias"] = self._weight_bias()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        if prefix + "weight" in state_dict:
            self.set_weight_bias(state_dict.pop(prefix + "weight"), state_dict.pop(prefix + "bias", None))
        else:
            missing.append(prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)


_STATE = (*Convolution._FIELDS[:6], "transposed", "output_padding", *Convolution._FIELDS[6:])
"""The reference's order."""


class _Forward(Convolution):
    @door
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Place = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._build(
            0, bias, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
            padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        if device is not None:
            self.to(device)


class _Transposed(Convolution):
    @door
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: str = "zeros",
        device: Place = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._build(
            output_padding, bias, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size,
            stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        if device is not None:
            self.to(device)


class Conv1d(_Forward):
    """torch.nn.Conv1d on QTensors."""

    row = ROWS["Conv1d"]


class Conv2d(_Forward):
    """torch.nn.Conv2d on QTensors."""

    row = ROWS["Conv2d"]


class Conv3d(_Forward):
    """torch.nn.Conv3d on QTensors."""

    row = ROWS["Conv3d"]


class ConvTranspose1d(_Transposed):
    """torch.nn.ConvTranspose1d on QTensors."""

    row = ROWS["ConvTranspose1d"]


class ConvTranspose2d(_Transposed):
    """torch.nn.ConvTranspose2d on QTensors."""

    row = ROWS["ConvTranspose2d"]


class ConvTranspose3d(_Transposed):
    """torch.nn.ConvTranspose3d on QTensors."""

    row = ROWS["ConvTranspose3d"]


def per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    """One number for each spatial dimension.

    Raises:
        QuantizedTensorError: there are others than that.
    """
    made = (value,) * dims if isinstance(value, int) else tuple(value)
    made = made * dims if len(made) == 1 else made
    if len(made) != dims or not all(isinstance(one, int) for one in made):
        raise QuantizedTensorError(f"{dims} numbers are needed, one for each spatial dimension, got {value!r}")
    return made
