"""What the quantized_decomposed ops demand of their arguments: shapes, dtypes and bounds that make sense.

Each function takes the arguments of its ops, and raises SpecError. `_quantized_decomposed` names them in its table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .errors import SpecError

__all__ = [
    "check_axis",
    "check_choice",
    "check_dequantize",
    "check_fake_quantize",
    "check_groups",
    "check_input",
    "check_int8",
    "check_qparams",
    "check_quantize",
    "check_storage",
    "check_tokens",
    "group_size",
]

_HALF = (torch.float16, torch.bfloat16)
_STORAGE = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.float8_e5m2, torch.float8_e4m3fn)


def check_storage(dtype: torch.dtype, quant_min: int, quant_max: int) -> None:
    if dtype not in _STORAGE:
        raise SpecError(f"{dtype} cannot store quantized values; use one of {', '.join(map(str, _STORAGE))}")
    held = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if quant_min < held.min or quant_max > held.max:
        raise SpecError(f"[{quant_min}, {quant_max}] is not a range of {dtype}, which holds [{held.min}, {held.max}]")


def check_input(x: Tensor) -> None:
    if x.dtype is not torch.float32 and x.dtype not in _HALF:
        raise SpecError(f"quantization takes float32, float16 or bfloat16, got {x.dtype}; cast the tensor first")


def check_axis(x: Tensor, axis: int) -> None:
    if not -x.dim() <= axis < x.dim():
        raise SpecError(f"axis {axis} does not exist in a tensor of {x.dim()} dimensions")


def check_qparams(x: Tensor, scale: Any, zero_point: Any, axis: list[int]) -> None:
    if axis:
        check_axis(x, *axis)
    elif isinstance(scale, Tensor) and not scale.numel() == zero_point.numel() == 1:
        raise SpecError(
            f"per-tensor scale and zero_point hold one element each, got {scale.numel()} and {zero_point.numel()}"
        )


def check_quantize(x: Tensor, scale: Any, zero_point: Any, *rest: Any) -> None:
    *axis, low, high, dtype = rest
    check_input(x)
    check_qparams(x, scale, zero_point, axis)
    if not isinstance(low, Tensor):
        check_storage(dtype, low, high)


def check_dequantize(q: Tensor, scale: Any, zero_point: Any, *rest: Any, **out_dtype: Any) -> None:
    *axis, _low, _high, dtype = rest  # the range is not used: it is there for whoever reads the graph
    check_qparams(q, scale, zero_point, axis)
    check_storage(dtype, 0, 0)
    if q.dtype is not dtype:
        raise SpecError(f"dequantize was told {dtype}, but the tensor holds {q.dtype}")


def check_fake_quantize(x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, low: int, high: int) -> None:
    if x.dtype is not torch.float32:
        raise SpecError(f"fake_quant_per_channel takes float32, got {x.dtype}; cast the tensor first")
    check_axis(x, axis)


def check_choice(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> None:
    check_input(x)
    check_storage(dtype, 0, 0)
    if not low <= 0 <= high or low == high:
        raise SpecError(f"[{low}, {high}] must hold 0 and at least one more value")


def check_int8(x: Tensor, dtype: torch.dtype) -> None:
    if dtype is not torch.int8:
        raise SpecError(f"choose_qparams_per_token knows torch.int8 only, got {dtype}")


def check_tokens(
    x: Tensor, scales: Tensor, zero_points: Tensor, low: int, high: int, dtype: torch.dtype, *output: Any
) -> None:
    check_storage(dtype, low, high)
    tokens = math.prod(x.shape[:-1])
    if scales.numel() != tokens or zero_points.numel() != tokens:
        raise SpecError(
            f"{tuple(x.shape)} holds {tokens} tokens, got {scales.numel()} scales and {zero_points.numel()} zero points"
        )


def check_groups(
    x: Tensor, scales: Tensor, zero_points: Any, low: int, high: int, dtype: Any, size: int, *output: Any
) -> None:
    if size <= 1 or x.dim() != 2:
        raise SpecError(f"groups need a matrix and group_size > 1, got {x.dim()} dimensions and group_size={size}")
    if x.shape[-1] % group_size(x, scales, size):
        raise SpecError(f"rows of {x.shape[-1]} do not split into groups of {size}")


def group_size(x: Tensor, scales: Tensor, size: int) -> int:
    """A row narrower than a group is one group, if it has one scale."""
    return x.shape[-1] if size > x.shape[-1] and scales.shape[-1] == 1 else size
