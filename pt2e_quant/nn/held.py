"""How recurrent layers and cells hold a weight, in the form that kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import QuantizedTensorError
from ..kernels import Held
from ..qtensor import QTensor, quantize_per_tensor
from .weighted import moved, prepared, rounded_to_half

__all__ = [
    "as_parameters",
    "blank",
    "check_type",
    "hold",
    "moved_held",
    "stored_type",
]

_TYPES = (torch.qint8, torch.float16)


def hold(weight: Tensor, bias: Tensor | None) -> Held:
    """A weight, quantized or float, in the form that kernels take.

    Raises:
        QuantizedTensorError: it is neither int8 nor floating-point.
    """
    if isinstance(weight, QTensor) or weight.is_quantized:
        return prepared(weight, bias)
    return rounded_to_half(weight.detach().float()), None if bias is None else bias.detach()


def stored_type(held: Held) -> torch.dtype:
    """torch.qint8, or torch.float16."""
    return torch.float16 if isinstance(held, tuple) else torch.qint8


def as_parameters(held: Held) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, as `hold` takes them."""
    return held if isinstance(held, tuple) else (held.quantized, held.bias)


def moved_held(held: Held, fn: Any) -> Held:
    """A weight on the device that `fn` moves tensors to."""
    if not isinstance(held, tuple):
        return moved(held, fn)
    device = fn(held[0]).device
    return held[0].to(device), None if held[1] is None else held[1].to(device)


def blank(rows: int, columns: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
    """A weight of zeros, to be set or loaded."""
    weight, zeros = torch.zeros(rows, columns), torch.zeros(rows) if bias else None
    return quantize_per_tensor(weight, 0.1, 0, torch.qint8) if dtype is torch.qint8 else weight, zeros


def check_type(owner: object, dtype: torch.dtype) -> None:
    """
    Raises:
        QuantizedTensorError: no weight of a recurrent layer has this type.
    """
    if dtype not in _TYPES:
        raise QuantizedTensorError(f"{owner}: dtype is torch.qint8 or torch.float16, not {dtype}")
