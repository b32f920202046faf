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
        spec: a DerivedQuantizationSpec, of this package or with the same fields; None as a bound is that of its dtype.
    """

    def __init__(self, sources: list[nn.Module], spec: Any) -> None:
        super().__init__()
        whole = integer_range(spec.dtype) or (0, 0)
        self.sources = list(sources)  # a plain list: the sources are registered where they are used
        self.derive_qparams_fn: Callable[[list[Any]], tuple[Tensor, Tensor]] = spec.derive_qparams_fn
        self.dtype: torch.dtype = spec.dtype
        self.quant_min: int = whole[0] if spec.quant_min is None else spec.quant_min
        self.quant_max: int = whole[1] if spec.quant_max is None else spec.quant_max
        self.qscheme: torch.qscheme = torch.per_tensor_affine if spec.qscheme is None else spec.qscheme
        self.ch_axis: int | None = spec.ch_axis
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
