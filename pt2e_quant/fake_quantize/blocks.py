"""AffineFakeQuantize: rounding with one scale per block, whatever the block; torchao's class of that name.

Before this: an AffineQuantized observer finds the range of each block. After it: `convert` writes q/dq where the
dialect has an op for such blocks. `pt2e_quant.schemes` rounds to further number formats in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, QuantizationError, SpecError
from ..observer import AffineQuantizedMinMaxObserver, AffineQuantizedObserverBase
from ..observer.batch import remember
from ..observer.granularity import block_rows, from_block_rows
from .affine import call_constructor
from .base import FakeQuantizeBase, straight_through

__all__ = ["AffineFakeQuantize"]


class AffineFakeQuantize(FakeQuantizeBase):
    """Watch a tensor and round each of its blocks to a grid of its own; gradients pass inside the range.

    Args:
        observer: class or recipe of an AffineQuantized observer.
        is_dynamic: the range is that of each tensor alone.
        observer_kwargs: arguments of the observer: mapping_type, target_dtype, granularity, ...

    Buffers `scale` and `zero_point`: as `calculate_qparams` gives them; empty before the first tensor.
    `activation_post_process` is the observer.

    Raises:
        SpecError: another observer, or one that refuses its arguments.
    """

    scale: Tensor
    zero_point: Tensor
    activation_post_process: AffineQuantizedObserverBase

    def __init__(
        self,
        observer: Callable[..., Any] = AffineQuantizedMinMaxObserver,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        inner = call_constructor(type(self).__name__, observer, {**observer_kwargs, "is_dynamic": is_dynamic})
        if not isinstance(inner, AffineQuantizedObserverBase):
            raise SpecError(
                f"{type(self).__name__} takes the range of each block from an observer such as "
                f"AffineQuantizedMinMaxObserver, got {type(inner).__name__}; use FakeQuantize for other observers"
            )
        self.activation_post_process = inner
        self.dtype = self.target_dtype = inner.dtype
        self.quant_min, self.quant_max = inner.quant_min, inner.quant_max
        self.mapping_type, self.zero_point_domain = inner.mapping_type, inner.zero_point_domain
        self.granularity, self.is_dynamic = inner.granularity, inner.is_dynamic
        self.qscheme, self.ch_axis, self.eps = inner.qscheme, inner.ch_axis, inner.eps
        self.register_buffer("scale", torch.tensor([], dtype=inner.scale_dtype or torch.float32))
        self.register_buffer("zero_point", torch.tensor([], dtype=torch.int64))

    @property
    def has_data(self) -> bool:
        return self.activation_post_process.has_data

    @property
    def block_size(self) -> tuple[int, ...] | None:
        """Shape of a block, known after the first batch."""
        return getattr(self.activation_post_process, "block_size", None)

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        if self._watches() or (self.is_dynamic and self.fake_quant_enabled[0] == 1):
            self._observe(x)
            if not self.has_data:  # masks alone
                return x
        return self._round(x) if self.fake_quant_enabled[0] == 1 else x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Those of the observer."""
        return self.activation_post_process.calculate_qparams()

    def extra_repr(self) -> str:
        return f"fake_quant_enabled={self.fake_quant_enabled}, observer_enabled={self.observer_enabled}"

    def _observe(self, x: Tensor) -> None:
        observer = self.activation_post_process
        kept = {name: getattr(observer, name, None) for name in ("min_val", "max_val", "block_size", "original_dtype")}
        if self.is_dynamic:
            observer.reset_min_max_vals()
        try:
            observer(x.detach())
        except QuantizationError:  # what it refuses leaves no trace
            for name, value in kept.items():
                setattr(observer, name, value)
            raise
        if self.has_data:
            remember(self, "scale", "zero_point")
            self.scale, self.zero_point = self.activation_post_process.calculate_qparams()

    def _round(self, x: Tensor) -> Tensor:
        rows = block_rows(x.detach().to(torch.float32), self.granularity)
        scale, zero_point = self.scale.reshape(-1, 1), self.zero_point.reshape(-1, 1)
        if len(rows) != len(scale):
            raise CalibrationError(
                f"{self.where}: there are scales for {len(scale)} blocks, and a tensor of shape {tuple(x.shape)}, "
                f"which has {len(rows)}, came. Run a batch with the observer enabled first."
            )
        steps = torch.round(rows * (1.0 / scale)) + zero_point
        codes = steps.clamp(self.quant_min, self.quant_max)
        if self.dtype.is_floating_point:
            codes = codes.to(self.dtype).to(torch.float32)
        inside = (steps >= self.quant_min) & (steps <= self.quant_max)
        value, inside = (
            from_block_rows(part, tuple(x.shape), self.granularity) for part in ((codes - zero_point) * scale, inside)
        )
        return straight_through(x, value.to(x.dtype), inside)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("scale", "zero_point"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
