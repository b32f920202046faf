"""What lowered graphs call: operators on QTensors whose result has a grid, kept as buffers of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import kernels, qtensor
from ..nn.observed import as_quantized
from ..qtensor import QTensor
from ..qtensor.tensor import is_traced

__all__ = ["add", "add_relu", "dequantize", "matmul", "mul", "mul_relu", "quantize"]


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> QTensor:
    """Real numbers on a grid; a QTensor stays what it is."""
    if isinstance(x, QTensor):
        return x
    return qtensor.quantize_per_tensor(x, *_numbers(scale, zero_point), dtype)


def dequantize(values: Any) -> Any:
    """The real numbers of every QTensor in a tensor, or in tuples, lists and dictionaries of tensors."""
    return pytree.tree_map_only(QTensor, QTensor.dequantize, values, is_leaf=lambda one: isinstance(one, QTensor))


def add(a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor) -> QTensor:
    """a + b on a grid."""
    return kernels.add(*_pair(a, b), *_numbers(scale, zero_point))


def add_relu(a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor) -> QTensor:
    """relu(a + b) on a grid."""
    return kernels.add(*_pair(a, b), *_numbers(scale, zero_point), relu=True)


def mul(a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor) -> QTensor:
    """a * b on a grid."""
    return kernels.multiply(*_pair(a, b), *_numbers(scale, zero_point))


def mul_relu(a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor) -> QTensor:
    """relu(a * b) on a grid."""
    return kernels.multiply(*_pair(a, b), *_numbers(scale, zero_point), relu=True)


def matmul(a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor) -> QTensor:
    """a @ b on a grid."""
    return kernels.matmul(*_pair(a, b), *_numbers(scale, zero_point))


def _pair(a: Tensor, b: Tensor) -> tuple[QTensor, QTensor]:
    return as_quantized(a, "a lowered operator"), as_quantized(b, "a lowered operator")


def _numbers(scale: Tensor, zero_point: Tensor) -> tuple[Any, Any]:
    """Numbers; buffers while a compiler looks on, which cannot read them."""
    return (scale, zero_point) if is_traced() else (float(scale), int(zero_point))
