"""The quantize, dequantize and choice of qparams of the converted graph as ONNX operators, for torch's exporter.

QuantizeLinear divides where torch multiplies by the reciprocal, so a value between two integers may go to either one.
It saturates at the bounds of its type; a narrower range is clipped afterwards, on integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import ir
from onnxscript.onnx_opset import opset21
from onnxscript.onnx_types import TensorType

from ...ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE

__all__ = ["TRANSLATIONS"]

op: Any = opset21

_BOUNDS = {ir.DataType.INT8: (-128, 127), ir.DataType.UINT8: (0, 255)}
_LAST = -1
_EPS = torch.finfo(torch.float32).eps
_EPS_SYMMETRIC = 1e-5


def _quantize(
    input: TensorType, scale: TensorType, zero_point: TensorType, quant_min: int, quant_max: int, dtype: int
) -> Any:
    """Of one scale in all, a number of the graph or computed."""
    integers = op.QuantizeLinear(input, _scale(scale, input), _integer(zero_point, dtype))
    return _clip(integers, quant_min, quant_max, dtype)


def _dequantize(
    input: TensorType,
    scale: TensorType,
    zero_point: TensorType,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int = -1,
) -> Any:
    return _cast(op.DequantizeLinear(input, _scale(scale), _integer(zero_point, dtype)), out_dtype)


def _quantize_channels(
    input: TensorType,
    scales: TensorType,
    zero_points: TensorType,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
) -> Any:
    integers = op.QuantizeLinear(input, _cast(scales, ir.DataType.FLOAT), _cast(zero_points, dtype), axis=axis)
    return _clip(integers, quant_min, quant_max, dtype)


def _dequantize_channels(
    input: TensorType,
    scales: TensorType,
    zero_points: TensorType | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int = -1,
) -> Any:
    zeros = None if zero_points is None else _cast(zero_points, dtype)
    return _cast(op.DequantizeLinear(input, _cast(scales, ir.DataType.FLOAT), zeros, axis=axis), out_dtype)


def _dequantize_groups(
    input: TensorType,
    scales: TensorType,
    zero_points: TensorType | None,
    quant_min: int,
    quant_max: int,
    dtype: int,
    group_size: int,
    output_dtype: int = -1,
) -> Any:
    zeros = None if zero_points is None else _cast(zero_points, dtype)
    floats = _cast(scales, ir.DataType.FLOAT)
    return _cast(op.DequantizeLinear(input, floats, zeros, axis=1, block_size=group_size), output_dtype)


def _quantize_tokens(
    input: TensorType, scales: TensorType, zero_points: TensorType, quant_min: int, quant_max: int, dtype: int
) -> Any:
    """ONNX has no scale for each row of a size that is not known, so this is arithmetic."""
    steps = op.Round(op.Add(op.Div(_float(input), _float(scales)), _float(zero_points)))
    return op.Cast(op.Clip(steps, _number(quant_min), _number(quant_max)), to=dtype)


def _dequantize_tokens(
    input: TensorType,
    scales: TensorType,
    zero_points: TensorType,
    quant_min: int,
    quant_max: int,
    dtype: int,
    output_dtype: int = -1,
) -> Any:
    return _cast(op.Mul(op.Sub(_float(input), _float(zero_points)), _float(scales)), output_dtype)


def _choose(input: TensorType, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
    smallest, largest = _ends(input)
    scale = op.Max(op.Div(op.Sub(largest, smallest), _number(quant_max - quant_min)), _number(eps))
    zero_point = op.Sub(_number(quant_min), op.Round(op.Div(smallest, scale)))
    return _pair(*_in_vectors(scale, op.Clip(zero_point, _number(quant_min), _number(quant_max))))


def _choose_symmetric(input: TensorType, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
    smallest, largest = _ends(input)
    reach = op.Max(op.Neg(smallest), largest)
    scale = op.Max(op.Div(reach, _number((quant_max - quant_min) / 2)), _number(eps))
    middle = _number(128.0 if dtype == ir.DataType.UINT8 else 0.0)
    return _pair(*_in_vectors(scale, op.Add(op.Mul(scale, _number(0.0)), middle)))


def _choose_tokens(input: TensorType, dtype: int) -> Any:
    reach = op.ReduceMax(op.Abs(_float(input)), _axes(), keepdims=1)
    scales = op.Div(op.Max(reach, _number(_EPS_SYMMETRIC)), _number(127.0))
    return scales, op.Mul(scales, _number(0.0))


def _choose_tokens_asymmetric(input: TensorType, dtype: int) -> Any:
    """Each end of the range suggests a zero point; the one whose end lies nearer to zero is taken."""
    x, zero = _float(input), _number(0.0)
    smallest = op.Min(op.ReduceMin(x, _axes(), keepdims=1), zero)
    largest = op.Max(op.ReduceMax(x, _axes(), keepdims=1), zero)
    scale = op.Max(op.Div(op.Sub(largest, smallest), _number(255.0)), _number(_EPS))
    low, high = _number(-128.0), _number(127.0)
    bottom, top = op.Div(smallest, scale), op.Div(largest, scale)
    below, above = op.Sub(low, bottom), op.Sub(high, top)
    nearer = op.Greater(op.Add(op.Add(low, bottom), op.Add(high, top)), zero)
    return _pair(scale, op.Round(op.Clip(op.Where(nearer, below, above), low, high)))


def _convert(input: TensorType, dtype: int) -> Any:
    return op.Cast(input, to=dtype)


# Parts ----------------------------------------------------------------------------------------------------------------


def _scale(scale: Any, like: Any = None) -> Any:
    """A scalar; chosen at run time, it comes as one value in a vector of float64."""
    if isinstance(scale, (int, float)):
        return _number(scale) if like is None else op.CastLike(_number(scale), like)
    return _scalar(_float(scale))


def _integer(zero_point: Any, dtype: int) -> Any:
    if isinstance(zero_point, (int, float)):
        return op.Constant(value=ir.tensor(int(zero_point), dtype=ir.DataType(dtype)))
    return _scalar(op.Cast(zero_point, to=dtype))


def _scalar(value: Any) -> Any:
    return op.Reshape(value, op.Constant(value=ir.tensor([], dtype=ir.DataType.INT64)))


def _clip(integers: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
    if _BOUNDS.get(ir.DataType(dtype)) == (quant_min, quant_max):
        return integers
    return op.Clip(
        integers, *(op.Constant(value=ir.tensor(b, dtype=ir.DataType(dtype))) for b in (quant_min, quant_max))
    )


def _ends(input: Any) -> tuple[Any, Any]:
    """Smallest and largest value, zero counted in."""
    x, zero = _float(input), _number(0.0)
    return op.Min(op.ReduceMin(x, keepdims=0), zero), op.Max(op.ReduceMax(x, keepdims=0), zero)


def _pair(scale: Any, zero_point: Any) -> Any:
    """As torch returns them: in float64 and int64."""
    return op.Cast(scale, to=ir.DataType.DOUBLE), op.Cast(zero_point, to=ir.DataType.INT64)


def _in_vectors(*values: Any) -> list[Any]:
    """Scalars as torch returns them, in vectors of one."""
    return [op.Reshape(value, op.Constant(value_ints=[1])) for value in values]


def _axes() -> Any:
    return op.Constant(value_ints=[_LAST])


def _number(value: float) -> Any:
    return op.Constant(value=ir.tensor(float(value), dtype=ir.DataType.FLOAT))


def _float(value: Any) -> Any:
    return op.Cast(value, to=ir.DataType.FLOAT)


def _cast(value: Any, dtype: int | None) -> Any:
    return value if dtype in (-1, None, ir.DataType.FLOAT) and value is not None else op.Cast(value, to=dtype)


_BY_NAME: dict[str, Callable[..., Any]] = {
    "quantize_per_tensor": _quantize,
    "dequantize_per_tensor": _dequantize,
    "quantize_per_channel": _quantize_channels,
    "dequantize_per_channel": _dequantize_channels,
    "dequantize_per_channel_group": _dequantize_groups,
    "quantize_per_token": _quantize_tokens,
    "dequantize_per_token": _dequantize_tokens,
    "choose_qparams": _choose,
    "choose_qparams_symmetric": _choose_symmetric,
    "choose_qparams_per_token": _choose_tokens,
    "choose_qparams_per_token_asymmetric": _choose_tokens_asymmetric,
}

TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    target: _BY_NAME[name]
    for target in (*QUANTIZE, *DEQUANTIZE, *CHOOSE_QPARAMS)
    if (name := target._schema.name.partition("::")[2]) in _BY_NAME
} | {torch.ops.quantized_decomposed.convert_element_type.no_fuse: _convert}
"""What torch's exporter is given as `custom_translation_table`."""
