"""Observers that keep the smallest and the largest value: of everything seen, or as a moving average over batches.

These run on every batch at every observed tensor, so `forward` does one reduction and, unless the range grew, nothing
else. Before this: `base` checks arguments and turns the range into qparams.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import checked
from ..errors import CalibrationError, SpecError
from ..qparams import FLOAT32_EPS, min_max
from ..specs import PER_CHANNEL, PER_TENSOR
from .base import (
    UniformQuantizationObserverBase,
    checked_constant,
    is_unset,
    move_range,
    revive_scalar,
    widen,
)
from .batch import remember

__all__ = [
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "PerChannelMinMaxObserver",
]


class MinMaxObserver(UniformQuantizationObserverBase):
    """Keep the range of every tensor seen. Arguments as in UniformQuantizationObserverBase, per-tensor schemes only."""

    schemes = PER_TENSOR
    facts: ClassVar[tuple[str, ...]] = ("min_val", "max_val")

    min_val: Tensor
    max_val: Tensor

    @checked(SpecError)
    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = FLOAT32_EPS,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        buffers = self._factory(factory_kwargs)
        self.register_buffer("min_val", torch.tensor(math.inf, **buffers))
        self.register_buffer("max_val", torch.tensor(-math.inf, **buffers))

    def forward(self, x: Tensor) -> Tensor:
        """Widen the range to hold x."""
        if x.numel() and not x.is_meta and (seen := self._usable(x)) is not None:
            # Compared as Python numbers: cheaper than two kernels that would, nearly always, change nothing.
            buffers: dict[str, Any] = self._buffers  # nn.Module.__getattr__ takes as long as a small aminmax
            _, low, high = seen
            if low < buffers["min_val"].item():
                remember(self, "min_val")
                self.min_val.fill_(low)
            if high > buffers["max_val"].item():
                remember(self, "max_val")
                self.max_val.fill_(high)
        return x

    @property
    def has_data(self) -> bool:
        return not is_unset(self.min_val, self.max_val)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point), one element each."""
        return self._calculate_qparams(self.min_val, self.max_val)

    def reset_min_max_vals(self) -> None:
        self.min_val.fill_(math.inf)
        self.max_val.fill_(-math.inf)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"

    def _merge(self, other: Any) -> None:
        widen(self.min_val, self.max_val, other.min_val, other.max_val)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        revive_scalar(state_dict, prefix + "min_val", math.inf)
        revive_scalar(state_dict, prefix + "max_val", -math.inf)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MovingAverageMinMaxObserver(MinMaxObserver):
    """Keep a moving average of each batch's range: end += averaging_constant * (end of this batch - end).

    An average depends on the order of batches, so that of merged observers cannot be that of one pass: merging gives
    the smallest range that holds the averages of both, in whatever order parts are merged.

    Args:
        averaging_constant: weight of a new batch, in (0, 1]; 1 keeps the last batch alone, as is_dynamic requires.
        others: as in UniformQuantizationObserverBase.
    """

    facts = ()  # an average depends on its constant

    @checked(SpecError)
    def __init__(
        self,
        averaging_constant: float = 0.01,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = FLOAT32_EPS,
        is_dynamic: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        self.averaging_constant = checked_constant(averaging_constant)
        if is_dynamic and averaging_constant != 1:
            raise SpecError(
                f"{type(self).__name__}: a dynamic range is that of one tensor, an average with averaging_constant="
                f"{averaging_constant} is not; use averaging_constant=1, or is_dynamic=False"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Move the range towards that of x."""
        if x.numel() and not x.is_meta and (seen := self._usable(x)) is not None:
            remember(self, "min_val", "max_val")
            low, high = (torch.tensor(end, dtype=torch.float32) for end in seen[1:])
            self._move(low, high)
        return x

    def _absorb(self, batch: Any) -> None:
        if batch.has_data:
            self._move(batch.min_val, batch.max_val)

    def _move(self, low: Tensor, high: Tensor) -> None:
        if self.min_val.item() > self.max_val.item():
            self.min_val.copy_(low)
            self.max_val.copy_(high)
        else:
            move_range(self.min_val, self.max_val, low, high, self.averaging_constant)


class PerChannelMinMaxObserver(UniformQuantizationObserverBase):
    """Keep the range of each index of one dimension.

    Args:
        ch_axis: that dimension; may be negative; None is 0.
        others: as in UniformQuantizationObserverBase, per-channel schemes only; is_dynamic is refused.

    The buffers have no elements until the first batch, or `expect`, tells how many channels there are.
    """

    schemes = PER_CHANNEL

    min_val: Tensor
    max_val: Tensor

    @checked(SpecError)
    def __init__(
        self,
        ch_axis: int | None = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = FLOAT32_EPS,
        is_dynamic: bool = False,
    ) -> None:
        if is_dynamic:
            raise SpecError(
                f"{type(self).__name__}: run-time qparams exist per tensor or per token, not per channel; "
                "use PlaceholderObserver with is_dynamic=True"
            )
        super().__init__(dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        buffers = self._factory(factory_kwargs)
        self.ch_axis = 0 if ch_axis is None else ch_axis
        self.register_buffer("min_val", torch.tensor([], **buffers))
        self.register_buffer("max_val", torch.tensor([], **buffers))

    def forward(self, x: Tensor) -> Tensor:
        """Widen the range of each channel to hold x."""
        if x.numel() and not x.is_meta and (ranges := self._channel_ranges(x)) is not None:
            low, high = ranges
            remember(self, "min_val", "max_val")
            if not self.has_data:
                self._set_ranges(low, high)
            else:
                torch.minimum(self.min_val, low, out=self.min_val)
                torch.maximum(self.max_val, high, out=self.max_val)
        return x

    @property
    def has_data(self) -> bool:
        return not is_unset(self.min_val, self.max_val)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point), one element per channel each."""
        return self._calculate_qparams(self.min_val, self.max_val)

    def reset_min_max_vals(self) -> None:
        self.min_val.resize_(0)
        self.max_val.resize_(0)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"

    def expect(self, channels: int) -> None:
        """Make room for so many channels before the first batch does, for what holds on to buffers: DDP, averages."""
        if self.min_val.numel() == 0:
            self.min_val.resize_(channels).fill_(math.inf)
            self.max_val.resize_(channels).fill_(-math.inf)

    def _channel_ranges(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Range of each channel of x, known to be finite and to fit what was seen before; None of nothing but masks.

        A channel that has nothing but masks has the range [0, 0], which says nothing: zero is part of every range.
        """
        if not -x.dim() <= self.ch_axis < x.dim():
            raise SpecError(
                f"{self._where}: ch_axis={self.ch_axis} does not exist in a tensor of shape {tuple(x.shape)}; "
                "set ch_axis in the spec, or use a per-tensor observer"
            )
        values = x.detach()
        low, high = min_max(values, axis=self.ch_axis)
        if not self._within(low.amin().item(), high.amax().item(), values):
            masked = self._masked(values)
            if bool(masked.all()):
                return None
            low, _ = min_max(values.masked_fill(masked, math.inf), axis=self.ch_axis)
            _, high = min_max(values.masked_fill(masked, -math.inf), axis=self.ch_axis)
            low, high = low.where(low <= high, 0.0), high.where(low <= high, 0.0)
        low, high = low.to(self.min_val.device), high.to(self.min_val.device)
        if self.min_val.numel() not in (0, low.numel()):
            raise CalibrationError(
                f"{self._where}: saw {self.min_val.numel()} channels along dimension {self.ch_axis} before, and now "
                f"{low.numel()}, in a tensor of shape {tuple(x.shape)}.\n"
                "  One range per channel needs a dimension of constant size: set ch_axis to it, or observe per tensor."
            )
        return low, high

    def _merge(self, other: Any) -> None:
        if not other.has_data:
            return
        if not self.has_data:
            self._set_ranges(other.min_val, other.max_val)
            return
        if self.min_val.numel() != other.min_val.numel():
            raise CalibrationError(
                f"{self._where}: saw {self.min_val.numel()} channels, and the observer to merge "
                f"{other.min_val.numel()}; both must watch the same tensor"
            )
        widen(self.min_val, self.max_val, other.min_val, other.max_val)

    def _set_ranges(self, low: Tensor, high: Tensor) -> None:
        self.min_val.resize_(low.shape).copy_(low)
        self.max_val.resize_(high.shape).copy_(high)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in (("min_val", self.min_val), ("max_val", self.max_val)):
            key = prefix + name
            if key + "s" in state_dict and key not in state_dict:  # the name before version 3
                state_dict[key] = state_dict.pop(key + "s")
            if key in state_dict:
                buffer.resize_(state_dict[key].shape)  # the number of channels is part of the state
        super()._load_from_state_dict(state_dict, prefix, *args)


class MovingAveragePerChannelMinMaxObserver(PerChannelMinMaxObserver):
    """Keep a moving average of the range of each channel; arguments of the two classes it is named after.

    Merging is that of MovingAverageMinMaxObserver.
    """

    @checked(SpecError)
    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int | None = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = FLOAT32_EPS,
        is_dynamic: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(ch_axis, dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        self.averaging_constant = checked_constant(averaging_constant)

    def forward(self, x: Tensor) -> Tensor:
        """Move the range of each channel towards that of x."""
        if x.numel() and not x.is_meta and (ranges := self._channel_ranges(x)) is not None:
            low, high = ranges
            remember(self, "min_val", "max_val")
            self._move(low, high)
        return x

    def _absorb(self, batch: Any) -> None:
        if batch.has_data:
            self._move(batch.min_val, batch.max_val)

    def _move(self, low: Tensor, high: Tensor) -> None:
        if not self.has_data:
            self._set_ranges(low, high)
        else:
            move_range(self.min_val, self.max_val, low, high, self.averaging_constant)
