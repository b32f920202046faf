"""From real numbers to QTensors and back: torch's functions of these names, on integers of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, overload

import torch
from torch import Tensor

from .. import qparams
from ..checks import checked
from ..errors import QuantizedTensorError, SpecError
from ..specs import integer_range
from .tensor import NAMES, QTensor, check_one_scale, is_traced, wrap

__all__ = ["dequantize", "quantize_per_channel", "quantize_per_tensor", "quantize_per_tensor_dynamic"]

_Q = torch.ops.quantized_decomposed
_STORED = {name: stored for stored, name in NAMES.items()} | {stored: stored for stored in NAMES}
_REDUCED = {torch.uint8: (0, 127), torch.int8: (-64, 63)}


@overload
def quantize_per_tensor(
    input: Tensor, scale: float | Tensor, zero_point: int | Tensor, dtype: torch.dtype
) -> QTensor: ...
@overload
def quantize_per_tensor(
    input: Sequence[Tensor], scale: Tensor, zero_point: Tensor, dtype: torch.dtype
) -> list[QTensor]: ...
@checked(SpecError)
def quantize_per_tensor(
    input: Tensor | Sequence[Tensor], scale: float | Tensor, zero_point: int | Tensor, dtype: torch.dtype
) -> QTensor | list[QTensor]:
    """Quantize real numbers, with one scale: round(x / scale) + zero_point, ties to even, saturating.

    Args:
        input: a floating-point tensor, or several.
        scale, zero_point: one number each, or a tensor of one; for several inputs tensors with one value for each.
        dtype: torch.quint8, qint8 or qint32; or the integer type itself.

    Returns:
        A QTensor, or a list of them.

    Raises:
        SpecError: the arguments do not fit together, a zero point is no value of the dtype, or an input is not
            floating point.
        QuantizedTensorError: torch.jit.trace looks on.
    """
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace
        raise QuantizedTensorError(
            "torch.jit.trace cannot follow a quantized tensor: it would keep the codes of the example. Use "
            "torch.export or torch.compile; TorchScript is deprecated"
        )
    stored = _stored(dtype)
    if isinstance(input, Tensor):
        return _per_tensor(input, _number(scale), cast("int | Tensor", _number(zero_point)), stored)
    scales, zero_points = torch.as_tensor(scale).tolist(), torch.as_tensor(zero_point).tolist()
    if not isinstance(scales, list) or not len(scales) == len(zero_points) == len(input):
        raise SpecError(f"{len(input)} tensors need as many scales and zero points, got {scales} and {zero_points}")
    parts = zip(input, scales, zero_points, strict=True)
    return [_per_tensor(one, float(step), int(zero), stored) for one, step, zero in parts]


@checked(SpecError)
def quantize_per_tensor_dynamic(input: Tensor, dtype: torch.dtype, reduce_range: bool = False) -> QTensor:
    """Quantize real numbers with the scale that their own range asks for.

    Args:
        input: a floating-point tensor.
        dtype: torch.quint8 or qint8; or the integer type itself.
        reduce_range: leave one bit unused, as kernels without VNNI need.

    Raises:
        SpecError: dtype is no 8-bit type.
        CalibrationError: the tensor is empty or not finite.
    """
    _check_real(input)
    stored = _stored(dtype)
    if stored not in _REDUCED:
        raise SpecError(f"a range is quantized to 8 bits while a model runs, not to {dtype}; take quint8 or qint8")
    low, high = _REDUCED[stored] if reduce_range else _limits(stored)
    if is_traced():
        scale, zero_point = _Q.choose_qparams.tensor(input, low, high, qparams.FLOAT32_EPS, stored)
        codes = _Q.quantize_per_tensor.tensor(input, scale, zero_point, low, high, stored)
        return wrap(codes, scale, zero_point, None, NAMES[stored])
    return wrap(*_own(input, low, high, stored), None, NAMES[stored])


@checked(SpecError)
def quantize_per_channel(input: Tensor, scales: Tensor, zero_points: Tensor, axis: int, dtype: torch.dtype) -> QTensor:
    """Quantize real numbers, with one scale for each index of a dimension.

    Args:
        input: a floating-point tensor.
        scales: one for each index of `axis`.
        zero_points: likewise; floats mean q = round(x / scale + zero_point), as for embeddings.
        axis: the dimension.
        dtype: torch.quint8, qint8, qint32, or the integer type itself; torch.quint4x2 with float zero points.

    Raises:
        SpecError: the arguments do not fit together, an integer zero point is no value of the dtype, or the input is
            not floating point.
    """
    _check_real(input)
    if not -input.dim() <= axis < input.dim():
        raise SpecError(f"axis {axis} does not exist in a tensor of shape {tuple(input.shape)}")
    axis %= input.dim()
    packed = dtype is torch.quint4x2
    stored = torch.uint8 if packed else _stored(dtype)
    low, high = (0, 15) if packed else _limits(stored)
    floats = zero_points.is_floating_point()
    if floats:
        codes = _with_float_zero_points(input, scales, zero_points, axis, (low, high)).to(stored)
    else:
        if zero_points.numel() and not is_traced():
            ends = torch.aminmax(zero_points)
            _check_zero_points(int(ends.min), int(ends.max), low, high)
        codes = qparams.quantize(input, scales, zero_points, low, high, stored, axis=axis)
    exact = torch.float32 if is_traced() else torch.float64  # torch keeps these; ONNX knows no others than float32
    kinds = (torch.float32, torch.float32) if floats else (exact, torch.int64)
    scales, zero_points = scales.to(kinds[0]), zero_points.to(kinds[1])
    if not packed:
        return QTensor(codes, scales, zero_points, axis)
    return QTensor(pack(codes), scales, zero_points, axis, torch.quint4x2, input.shape[-1])


@overload
def dequantize(tensors: Tensor) -> Tensor: ...
@overload
def dequantize(tensors: Sequence[Tensor]) -> list[Tensor]: ...
@checked(SpecError)
def dequantize(tensors: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """The real numbers of a quantized tensor, or of several, in float32; what is no quantized tensor, in float32."""
    if isinstance(tensors, Tensor):
        return tensors.dequantize() if isinstance(tensors, QTensor) else tensors.float()
    return [dequantize(one) for one in tensors]


def own_codes(x: Tensor, *, reduce_range: bool = False, whole: bool = True) -> tuple[Tensor, float, int]:
    """Codes, scale and zero point that the range of x asks for, in uint8; or not `whole`, code - zero point in float32.

    Raises:
        CalibrationError: as of `quantize_per_tensor_dynamic`.
    """
    limits = _REDUCED[torch.uint8] if reduce_range else _limits(torch.uint8)
    if whole:
        return _own(x, *limits, torch.uint8)
    scale, zero_point = _own_grid(x, *limits)
    steps = torch.mul(x.detach(), 1.0 / scale).round_()
    return steps.clamp_(limits[0] - zero_point, limits[1] - zero_point), scale, 0


def _own(x: Tensor, low: int, high: int, stored: torch.dtype) -> tuple[Tensor, float, int]:
    scale, zero_point = _own_grid(x, low, high)
    return qparams.rounded(x.detach().float(), zero_point, low, high, stored, factor=1.0 / scale), scale, zero_point


def _own_grid(x: Tensor, low: int, high: int) -> tuple[float, int]:
    smallest, largest = qparams.min_max(x)
    return qparams.affine_numbers(float(smallest), float(largest), low, high)


def pack(codes: Tensor) -> Tensor:
    """4-bit codes, two in a byte along the last dimension."""
    even, odd = codes[..., ::2], codes[..., 1::2]
    if odd.shape[-1] < even.shape[-1]:
        odd = torch.nn.functional.pad(odd, (0, 1))
    return even | odd << 4


def _per_tensor(x: Tensor, scale: float | Tensor, zero_point: int | Tensor, stored: torch.dtype) -> QTensor:
    _check_real(x)
    low, high = _limits(stored)
    if is_traced():
        overload = _Q.quantize_per_tensor.tensor if isinstance(scale, Tensor) else _Q.quantize_per_tensor.default
        return wrap(overload(x, scale, zero_point, low, high, stored), scale, zero_point, None, NAMES[stored])
    _check_zero_points(int(zero_point), int(zero_point), low, high)
    # A scale in float32, as its inverse is what torch's own kernels multiply with.
    step = torch.as_tensor(scale, dtype=torch.float32)
    check_one_scale(scale, zero_point)
    if stored is torch.int32 or x.dtype is not torch.float32:
        codes = qparams.quantize(x, step, zero_point, low, high, stored)
    else:
        codes = qparams.rounded(x.detach() * step.reciprocal(), int(zero_point), low, high, stored)
    return wrap(codes, scale, zero_point, None, NAMES[stored])


def _check_real(x: Tensor) -> None:
    if isinstance(x, QTensor):
        raise QuantizedTensorError(
            "what is to be quantized is quantized already: dequantize() it before, or leave out the second QuantStub"
        )
    if not x.is_floating_point():
        raise SpecError(f"what is to be quantized is floating point, got a tensor of {x.dtype}: call float() before")


def _check_zero_points(smallest: int, largest: int, low: int, high: int) -> None:
    """Zero is to be a code: with others, values of one sign would saturate."""
    if smallest < low or largest > high:
        outside = smallest if smallest < low else largest
        raise SpecError(f"a zero point is one of the codes {low} to {high}, got {outside}")


def _with_float_zero_points(x: Tensor, scale: Tensor, zero: Tensor, axis: int, limits: tuple[int, int]) -> Tensor:
    """round(x / scale + zero_point): zero points are no integers, so they are added before rounding."""
    shape = [-1 if dim == axis else 1 for dim in range(x.dim())]
    if not scale.numel() == zero.numel() == x.shape[axis]:
        raise SpecError(f"{x.shape[axis]} scales and zero points are needed, got {scale.numel()} and {zero.numel()}")
    inverse = (1.0 / scale.float()).reshape(shape)
    return torch.clamp(torch.round(x.float() * inverse + zero.float().reshape(shape)), *limits)


def _number(value: float | Tensor) -> float | Tensor:
    """A number where that can be known now."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise SpecError(f"one tensor has one scale and one zero point, got {value.numel()}; see quantize_per_channel")
    return value.item() if isinstance(value, Tensor) and not is_traced() else value


def _stored(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _STORED:
        raise SpecError(f"values are quantized to torch.quint8, qint8 or qint32, not to {dtype}")
    return _STORED[dtype]


def _limits(stored: torch.dtype) -> tuple[int, int]:
    held = integer_range(stored)
    return held or (0, 0)
