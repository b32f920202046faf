"""The observer that keeps every tensor, for looking at them. Memory grows with the data: for debugging only."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checks import checked
from ..errors import CalibrationError, SpecError
from .base import ObserverBase
from .batch import take_back

__all__ = ["RecordingObserver"]


class RecordingObserver(ObserverBase):
    """Keep a copy of every tensor seen, in `tensor_val`; never forgets by itself.

    Args:
        dtype: kept for code that reads it; means nothing here.
    """

    @checked(SpecError)
    def __init__(self, dtype: torch.dtype = torch.quint8) -> None:
        super().__init__(dtype=dtype, is_dynamic=False)
        self.tensor_val: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tensor_val.append(x.detach().clone())
        take_back(self.tensor_val.pop)
        return x

    def get_tensor_value(self) -> list[Tensor]:
        """All tensors seen, in order."""
        return self.tensor_val

    def calculate_qparams(self) -> NoReturn:
        """Always raises: tensors are kept, no range is."""
        raise CalibrationError(
            f"{self._where}: a RecordingObserver keeps tensors and has no qparams; use an observer that keeps a range, "
            "such as MinMaxObserver."
        )

    def _merge(self, other: Any) -> None:
        self.tensor_val.extend(other.tensor_val)

    def _signature(self) -> dict[str, Any]:
        return {"dtype": self.dtype}
