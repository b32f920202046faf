"""Observers that look at no data: a configuration for run-time qparams or a cast, nothing at all, or the input's own.

Before this: `base`. After it: the engine reads dtype, bounds, scheme and eps, and emits run-time qparams or a cast.
"""

from __future__ import annotations

import math
import warnings
from typing import NoReturn

import torch
from torch import Tensor

from ..checks import checked
from ..errors import CalibrationError, SpecError
from ..qparams import FLOAT32_EPS
from ..specs import integer_range
from .base import ObserverBase
from .granularity import PerToken

__all__ = ["NoopObserver", "PerTokenPlaceholderObserver", "PlaceholderObserver", "ReuseInputObserver"]


class PlaceholderObserver(ObserverBase):
    """Watch nothing; needs no calibration.

    Args:
        dtype: type that the tensor will have: an integer type with is_dynamic=True, or a floating-point type.
        custom_op_name: kept as `custom_op` for code that reads it; means nothing here.
        compute_dtype: deprecated, any value means is_dynamic=True.
        quant_min, quant_max: bounds of q, both included; None is the bound of dtype.
        qscheme: None is torch.per_tensor_affine.
        eps: smallest scale; None is the epsilon of float32.
        is_dynamic: qparams are computed from each tensor at run time.

    Raises:
        SpecError: the bounds are no range of dtype, or eps is not finite and > 0.
    """

    @checked(SpecError)
    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic or compute_dtype is not None)
        self.custom_op = custom_op_name
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.qscheme = torch.per_tensor_affine if qscheme is None else qscheme
        self.eps = FLOAT32_EPS if eps is None else eps
        if compute_dtype is not None:
            warnings.warn("compute_dtype is deprecated; pass is_dynamic=True instead", FutureWarning, stacklevel=2)
        self._check()

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> NoReturn:
        """Always raises: there is no range to compute qparams from."""
        way_out = (
            "a dynamic tensor gets them at run time from choose_qparams"
            if self.is_dynamic
            else f"use an observer that keeps a range, such as MinMaxObserver, to quantize to {self.dtype}"
        )
        raise CalibrationError(f"{self._where}: a PlaceholderObserver looks at no data and has no qparams; {way_out}.")

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, is_dynamic={self.is_dynamic}"

    def _check(self) -> None:
        whole = integer_range(self.dtype)
        if whole is not None:
            low = whole[0] if self.quant_min is None else self.quant_min
            high = whole[1] if self.quant_max is None else self.quant_max
            if not whole[0] <= low < high <= whole[1]:
                raise SpecError(f"[{low}, {high}] is not a range of {self.dtype}, which holds {list(whole)}")
        if not 0.0 < self.eps < math.inf:
            raise SpecError(f"eps is the smallest scale and must be finite and > 0, got {self.eps}")


class PerTokenPlaceholderObserver(PlaceholderObserver):
    """Run-time qparams for each index of all dimensions but the last (each row), instead of one pair for the tensor.

    Asymmetric over the whole range of dtype, which is all that the q/dq dialect has per token.
    """

    granularity = PerToken()


class NoopObserver(ObserverBase):
    """Watch nothing and carry a dtype, for casts.

    Args:
        dtype: type that the tensor will have.
        custom_op_name: kept as `custom_op` for code that reads it; means nothing here.
    """

    @checked(SpecError)
    def __init__(self, dtype: torch.dtype = torch.float16, custom_op_name: str = "") -> None:
        super().__init__(dtype=dtype, is_dynamic=False)
        self.custom_op = custom_op_name

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> NoReturn:
        """Always raises: there is no range to compute qparams from."""
        raise CalibrationError(
            f"{self._where}: a NoopObserver looks at no data and has no qparams; use an observer that keeps a range, "
            "such as MinMaxObserver."
        )


class ReuseInputObserver(ObserverBase):
    """Stands where an output has the qparams of its op's input; what inserts observers puts the input's there."""

    def __init__(self) -> None:
        super().__init__(torch.quint8, is_dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> NoReturn:
        """Always raises: the qparams are those of the input's observer."""
        raise CalibrationError(
            f"{self._where}: a ReuseInputObserver has no qparams of its own; in PT2E, say the same with "
            "SharedQuantizationSpec."
        )
