"""The border to torch's own quantized tensors: checkpoints and old code. Nothing else here makes any of those.

torch says since 2.13 that it will remove them. Until then a checkpoint can hold them, and old code can want them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import QuantizedTensorError
from .quantizing import pack
from .tensor import QTensor

__all__ = ["from_torch", "to_torch"]

_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)


def from_torch(values: Any) -> Any:
    """torch's own quantized tensors in a value (a tensor, a list, a dict, a state dict) as QTensors; the rest as it is.

    Codes, scales and zero points are kept bit for bit.
    """
    return _mapped(values, lambda t: isinstance(t, Tensor) and not isinstance(t, QTensor) and t.is_quantized, _from)


def to_torch(values: Any) -> Any:
    """The other way: QTensors as torch's own quantized tensors, so that torch.ao's modules load a state dict of ours.

    Raises:
        QuantizedTensorError: this torch has no quantized tensors any more.
    """
    return _mapped(values, lambda t: isinstance(t, QTensor), _to)


def _mapped(values: Any, wanted: Any, change: Any) -> Any:
    made = pytree.tree_map(lambda leaf: change(leaf) if wanted(leaf) else leaf, values)
    if hasattr(values, "_metadata"):  # the versions in a state dict, which copies of it lose
        made._metadata = values._metadata
    return made


def _from(t: Tensor) -> QTensor:
    if t.qscheme() in _PER_TENSOR:
        return QTensor(t.int_repr(), t.q_scale(), t.q_zero_point())
    # Copies: those of an embedding's table lie in memory of the packed one, which goes with its module.
    parts = t.q_per_channel_scales().clone(), t.q_per_channel_zero_points().clone(), t.q_per_channel_axis()
    if t.dtype is not torch.quint4x2:
        return QTensor(t.int_repr(), *parts)
    zeros = parts[1].unsqueeze(1)
    codes = torch.round(t.dequantize() / parts[0].unsqueeze(1) + zeros).clamp(0, 15).to(torch.uint8)
    return QTensor(pack(codes), *parts, torch.quint4x2, t.shape[-1])


def _to(q: QTensor) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the types' removal, which is why this is the one place that makes them
            return _made(q)
    except AttributeError as error:
        raise QuantizedTensorError("this torch has no quantized tensors any more; keep the QTensor") from error


def _made(q: QTensor) -> Tensor:
    if q.axis is None:
        return torch._make_per_tensor_quantized_tensor(q.codes, q.q_scale(), q.q_zero_point())
    scales, zero_points = q.q_per_channel_scales(), q.q_per_channel_zero_points()
    if q.stored_as is torch.quint4x2:
        return torch.quantize_per_channel(q.dequantize(), scales, zero_points, q.axis, torch.quint4x2)
    return torch._make_per_channel_quantized_tensor(q.codes, scales, zero_points, q.axis)
