"""The observer of a tensor whose qparams are known beforehand, such as the output of a sigmoid. It looks at no data.

Before this: `base`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import checked
from ..errors import CalibrationError, SpecError
from ..specs import PER_TENSOR, integer_range
from .base import ObserverBase

__all__ = ["FixedQParamsObserver"]


class FixedQParamsObserver(ObserverBase):
    """Answer with the qparams it was made with.

    Args:
        scale: size of one step, finite and > 0.
        zero_point: the q that stands for 0.0, inside [quant_min, quant_max].
        dtype: integer type that stores q.
        qscheme: a per-tensor scheme; None is torch.per_tensor_affine.
        quant_min, quant_max: bounds of q, both included; None is the bound of dtype.
        is_dynamic: refused, fixed qparams are not computed at run time.

    Raises:
        SpecError: an argument is illegal, or two contradict each other.
    """

    scale: Tensor
    zero_point: Tensor

    @checked(SpecError)
    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = torch.per_tensor_affine,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.qscheme = torch.per_tensor_affine if qscheme is None else qscheme
        whole = integer_range(dtype)
        if whole is None or self.qscheme not in PER_TENSOR or is_dynamic:
            raise SpecError(
                f"fixed qparams need an integer dtype, a per-tensor scheme and is_dynamic=False, got dtype={dtype}, "
                f"qscheme={qscheme}, is_dynamic={is_dynamic}"
            )
        self.quant_min = whole[0] if quant_min is None else quant_min
        self.quant_max = whole[1] if quant_max is None else quant_max
        if not whole[0] <= self.quant_min < self.quant_max <= whole[1]:
            raise SpecError(
                f"[{self.quant_min}, {self.quant_max}] is not a range of {dtype}, which holds {list(whole)}; "
                "pass quant_min and quant_max that fit"
            )
        if not 0.0 < scale < math.inf:
            raise SpecError(f"scale must be finite and greater than 0, got {scale}")
        if not self.quant_min <= zero_point <= self.quant_max:
            raise SpecError(
                f"zero_point {zero_point} lies outside [{self.quant_min}, {self.quant_max}], the range of q"
            )
        self.register_buffer("scale", torch.tensor([float(scale)], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([int(zero_point)], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) as they were given, one element each."""
        return self.scale, self.zero_point.to(torch.int64)

    def _merge(self, other: Any) -> None:
        if (self.scale.item(), self.zero_point.item()) != (other.scale.item(), other.zero_point.item()):
            raise CalibrationError(f"{self._where}: {self!r} and {other!r} differ; they cannot be merged")

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():g}, zero_point={self.zero_point.item()}, dtype={self.dtype}"
