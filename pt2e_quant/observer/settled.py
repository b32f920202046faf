"""SettledObserver: the grid of a tensor that an algorithm chose, in the place of the observer that would choose it.

Before this: `base`. After it: the engine reads it like any observer, so that every quantizer gets the choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from .base import ObserverBase

__all__ = ["SettledObserver"]

_FORM = ("qscheme", "ch_axis", "granularity", "scheme", "block_size", "quant_min", "quant_max")


class SettledObserver(ObserverBase):
    """Answers with one grid, whatever it sees.

    Args:
        observer: whose place it takes, of any package: dtype, bounds, scheme and granularity stay its.
        scale, zero_point: in the shapes of that observer's own answer.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, observer: nn.Module, scale: Tensor, zero_point: Tensor) -> None:
        dtype: Any = observer.dtype
        super().__init__(dtype)
        for name in _FORM:
            if getattr(observer, name, None) is not None:
                setattr(self, name, getattr(observer, name))
        self.site = str(getattr(observer, "site", ""))
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) as they were given."""
        return self.scale, self.zero_point

    def _merge(self, other: Any) -> None:
        """Processes that settled on one grid keep it."""
        if not torch.equal(self.scale, other.scale) or not torch.equal(self.zero_point, other.zero_point):
            raise CalibrationError(f"{self._where}: two different settled grids cannot be merged")
