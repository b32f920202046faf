"""Functions of torch.nn.functional on QTensors. Those that take no scale stay on the grid of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import QuantizedTensorError
from ...kernels import Geometry, Post, Product, on_grid
from ...qtensor import QTensor
from ...qtensor.tensor import door
from ..convolution import Sizes, per_dimension
from ..observed import as_quantized
from ..weighted import prepared

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "avg_pool2d",
    "avg_pool3d",
    "celu",
    "clamp",
    "conv1d",
    "conv2d",
    "conv3d",
    "elu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "interpolate",
    "leaky_relu",
    "linear",
    "max_pool1d",
    "max_pool2d",
    "threshold",
    "upsample",
    "upsample_bilinear",
    "upsample_nearest",
]

_STORED = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}


# --- products ---------------------------------------------------------------------------------------------------------


@door
def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float | None = None, zero_point: int | None = None
) -> Tensor:
    """input @ weight.T + bias, on the grid (scale, zero_point); without one, on that of the input.

    Shapes: (*, in), (out, in), (out,) -> (*, out). The weight is int8; the bias is real numbers.
    """
    x = as_quantized(input, "linear")
    grid = x.q_scale() if scale is None else scale, x.q_zero_point() if zero_point is None else zero_point
    return Product.compute(prepared(weight, bias), Post(), x, *grid)


@door
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    scale: float = 1.0,
    zero_point: int = 0,
    dtype: torch.dtype = torch.quint8,
) -> Tensor:
    """F.conv1d with an int8 weight and a bias of real numbers, on the grid (scale, zero_point) of `dtype`."""
    return _conv(1, input, weight, bias, (stride, padding, dilation), groups, padding_mode, (scale, zero_point, dtype))


@door
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    scale: float = 1.0,
    zero_point: int = 0,
    dtype: torch.dtype = torch.quint8,
) -> Tensor:
    """F.conv2d with an int8 weight and a bias of real numbers, on the grid (scale, zero_point) of `dtype`."""
    return _conv(2, input, weight, bias, (stride, padding, dilation), groups, padding_mode, (scale, zero_point, dtype))


@door
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    scale: float = 1.0,
    zero_point: int = 0,
    dtype: torch.dtype = torch.quint8,
) -> Tensor:
    """F.conv3d with an int8 weight and a bias of real numbers, on the grid (scale, zero_point) of `dtype`."""
    return _conv(3, input, weight, bias, (stride, padding, dilation), groups, padding_mode, (scale, zero_point, dtype))


def _conv(
    dims: int, input: Tensor, weight: Tensor, bias: Any, moves: Any, groups: int, padding_mode: str, out: Any
) -> Tensor:
    name, (scale, zero_point, dtype) = f"conv{dims}d", out
    x = as_quantized(input, name)
    if padding_mode != "zeros":
        raise QuantizedTensorError(
            f"{name} pads with zeros only; pad with F.pad(input, ..., mode={padding_mode!r}) before"
        )
    if x.dim() != dims + 2:
        raise QuantizedTensorError(f"{name} takes {dims + 2} dimensions, got shape {tuple(x.shape)}")
    if dtype not in _STORED:
        raise QuantizedTensorError(f"{name}: dtype is torch.quint8, qint8 or qint32, got {dtype}")
    stride, padding, dilation = (per_dimension(one, dims) for one in moves)
    packed = prepared(weight, bias, Geometry(stride, padding, dilation, groups))
    return Product.compute(packed, Post(), x, scale, zero_point, _STORED[dtype])


# --- on a grid of their own -------------------------------------------------------------------------------------------


@door
def elu(input: Tensor, scale: float, zero_point: int, alpha: float = 1.0) -> Tensor:
    """F.elu on the grid (scale, zero_point)."""
    return on_grid(lambda x: F.elu(x, alpha), as_quantized(input, "elu"), scale=scale, zero_point=zero_point)


@door
def celu(input: Tensor, scale: float, zero_point: int, alpha: float = 1.0) -> Tensor:
    """F.celu on the grid (scale, zero_point)."""
    return on_grid(lambda x: F.celu(x, alpha), as_quantized(input, "celu"), scale=scale, zero_point=zero_point)


@door
def hardswish(input: Tensor, scale: float, zero_point: int) -> Tensor:
    """F.hardswish on the grid (scale, zero_point)."""
    return on_grid(F.hardswish, as_quantized(input, "hardswish"), scale=scale, zero_point=zero_point)


@door
def leaky_relu(
    input: Tensor,
    negative_slope: float = 0.01,
    inplace: bool = False,
    scale: float | None = None,
    zero_point: int | None = None,
) -> Tensor:
    """F.leaky_relu on the grid (scale, zero_point); without one on that of the input, where it can be in place."""
    x = as_quantized(input, "leaky_relu")
    if scale is None or zero_point is None:
        return F.leaky_relu(x, negative_slope, inplace)
    return on_grid(lambda values: F.leaky_relu(values, negative_slope), x, scale=scale, zero_point=zero_point)


@door
def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """F.hardsigmoid on the grid that spans [0, 1]: 256 steps in 8 bits. `inplace` writes the result into the input."""
    x = as_quantized(input, "hardsigmoid")
    made = F.hardsigmoid(x)
    return x.copy_(made) if inplace else made


# --- on the grid of the input -----------------------------------------------------------------------------------------


@door
def avg_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """F.avg_pool2d, rounded half to even."""
    x = as_quantized(input, "avg_pool2d")
    return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@door
def avg_pool3d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """F.avg_pool3d, rounded half to even."""
    x = as_quantized(input, "avg_pool3d")
    return F.avg_pool3d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@door
def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """F.adaptive_avg_pool2d, rounded half to even."""
    return F.adaptive_avg_pool2d(as_quantized(input, "adaptive_avg_pool2d"), output_size)


@door
def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """F.adaptive_avg_pool3d, rounded half to even."""
    return F.adaptive_avg_pool3d(as_quantized(input, "adaptive_avg_pool3d"), output_size)


@door
def max_pool1d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """F.max_pool1d, on the codes."""
    _no_indices(return_indices)
    return F.max_pool1d(as_quantized(input, "max_pool1d"), kernel_size, stride, padding, dilation, ceil_mode)


@door
def max_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """F.max_pool2d, on the codes."""
    _no_indices(return_indices)
    return F.max_pool2d(as_quantized(input, "max_pool2d"), kernel_size, stride, padding, dilation, ceil_mode)


def _no_indices(wanted: bool) -> None:
    if wanted:
        raise QuantizedTensorError(
            "max pools of quantized tensors return values only; take indices of input.int_repr()"
        )


@door
def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """F.hardtanh: values beyond the bounds take the bound's code."""
    return F.hardtanh(as_quantized(input, "hardtanh"), min_val, max_val, inplace)


@door
def clamp(input: Tensor, min_: float, max_: float) -> Tensor:
    """torch.clamp: values beyond the bounds take the bound's code."""
    return torch.clamp(as_quantized(input, "clamp"), min_, max_)


@door
def threshold(input: Tensor, threshold: float, value: float) -> Tensor:
    """F.threshold: x where x > threshold, else value."""
    return F.threshold(as_quantized(input, "threshold"), threshold, value)


@door
def interpolate(
    input: Tensor,
    size: Sizes | None = None,
    scale_factor: float | list[float] | tuple[float, ...] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """F.interpolate, by the nearest value or (2-D) bilinear."""
    x: QTensor = as_quantized(input, "interpolate")
    return F.interpolate(x, size, scale_factor, mode, align_corners)


@door
def upsample(
    input: Tensor,
    size: Sizes | None = None,
    scale_factor: float | list[float] | tuple[float, ...] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """The old name of `interpolate`."""
    return interpolate(input, size, scale_factor, mode, align_corners)


@door
def upsample_bilinear(
    input: Tensor, size: Sizes | None = None, scale_factor: float | list[float] | tuple[float, ...] | None = None
) -> Tensor:
    """`interpolate`, bilinear with aligned corners."""
    return interpolate(input, size, scale_factor, "bilinear", True)


@door
def upsample_nearest(
    input: Tensor, size: Sizes | None = None, scale_factor: float | list[float] | tuple[float, ...] | None = None
) -> Tensor:
    """`interpolate` by the nearest value."""
    return interpolate(input, size, scale_factor)
