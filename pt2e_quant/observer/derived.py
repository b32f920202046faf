"""DerivedObserver: qparams that are a function of those of other observers, such as a bias with s_input * s_weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..specs import integer_range

__all__ = ["DerivedObserver"]


class DerivedObserver(nn.Module):
    """Watches nothing itself; `calculate_qparams` asks the observers that it derives from.

    Args:
        sources: the observers (or fake-quantizers) that the qparams follow from.
        derive_qparams_fn: takes that list and returns (scale, zero_point).
        dtype, quant_min, quant_max, qscheme, ch_axis: as in DerivedQuantizationSpec; None is the whole range of dtype.
    """

    def __init__(
        self,
        sources: list[nn.Module],
        derive_qparams_fn: Callable[[list[Any]], tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        ch_axis: int | None = None,
    ) -> None:
        super().__init__()
        whole = integer_range(dtype) or (0, 0)
        self.sources = list(sources)  # a plain list: the sources are registered where they are used
        self.derive_qparams_fn = derive_qparams_fn
        self.dtype = dtype
        self.quant_min = whole[0] if quant_min is None else quant_min
        self.quant_max = whole[1] if quant_max is None else quant_max
        self.qscheme = torch.per_tensor_affine if qscheme is None else qscheme
        self.ch_axis = ch_axis
        self.is_dynamic = False
        self.site = ""

    @property
    def has_data(self) -> bool:
        """The sources answer for themselves."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        return x

    def merge(self, other: DerivedObserver) -> None:
        """Nothing to do: the sources merge for themselves."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.derive_qparams_fn(self.sources)
