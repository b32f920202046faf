"""FusedMovingAvgObsFakeQuantize: observing and rounding in one call of torch's fused kernel, the fastest way to train.

The kernel has its own way from a range to qparams, which rounds in float64, gives a symmetric range 127.5 / 127 of the
observer's scale and knows no eps. What counts is that the trained grid is the converted one, so `calculate_qparams`
answers with what the kernel rounded to, where the reference answers with what its observer would have chosen. Where
the kernel's answer is unusable (a scale below eps or infinite, a zero point beside the middle of a symmetric range, as
it gives to channels of zeros) the observer's takes its place, in both.

Before this: `affine`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import checked
from ..errors import SpecError
from ..observer import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from ..observer.batch import remember
from ..specs import is_symmetric
from .affine import FakeQuantize, channel_axis

__all__ = ["FusedMovingAvgObsFakeQuantize"]

_FLOAT32_MAX = torch.finfo(torch.float32).max


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """FakeQuantize with a moving average of the range, through torch.fused_moving_avg_obs_fake_quant.

    Args:
        observer: MovingAverageMinMaxObserver or MovingAveragePerChannelMinMaxObserver, or a recipe of one.
        quant_min, quant_max: bounds of q, both included.
        observer_kwargs: further arguments of the observer.

    Raises:
        SpecError: another observer, bounds that its dtype does not hold, or float qparams.
    """

    @checked(SpecError, but=("observer",))
    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        inner = self.activation_post_process
        averages = isinstance(inner, (MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver))
        if not averages or self.qscheme is torch.per_channel_affine_float_qparams:
            raise SpecError(
                "FusedMovingAvgObsFakeQuantize computes moving averages with integer zero points, got "
                f"{type(inner).__name__} with {self.qscheme}; use MovingAverageMinMaxObserver or "
                "MovingAveragePerChannelMinMaxObserver, or FakeQuantize for other observers"
            )
        self.fake_quant_enabled = torch.tensor([1], dtype=torch.long)  # the kernel reads int64
        self.observer_enabled = torch.tensor([1], dtype=torch.long)
        self.is_symmetric_quant = is_symmetric(self.qscheme)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) that the last forward rounded to; zero_point in int64.

        Raises:
            CalibrationError: no data was seen.
        """
        if not self.has_data:
            return super().calculate_qparams()
        return self.scale, self.zero_point.to(torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        if torch.compiler.is_compiling():  # what follows reads values, which would cut the graph in two
            return self._kernel(x)
        if not self._watches():  # the kernel would choose qparams again
            return super().forward(x)
        if self.is_per_channel and not self._fits(x):
            self.activation_post_process(x.detach())  # raises, and says why, unless x is masks alone
            channel_axis(self, x)
        rounded = self._observed(x)
        if rounded is None and not self.has_data:  # masks alone
            return x
        usable = self._usable()
        if rounded is not None and bool(usable.all()):
            return rounded
        self._replace(usable)
        return self._round(x) if self.fake_quant_enabled[0] == 1 else x

    def _observed(self, x: Tensor) -> Tensor | None:
        """What the kernel makes of x; None where x has masks, which the observer leaves out of the range.

        Raises:
            CalibrationError: x holds NaN; the state is as it was.
        """
        inner = self.activation_post_process
        remember(self, "scale", "zero_point")
        remember(inner, "min_val", "max_val")
        rounded = self._fused(x) if inner._peers is None else None
        if rounded is None:
            inner(x.detach())
            if self.has_data:
                self._settle(*inner.calculate_qparams())  # one for each channel
                self._kernel(x, observe=False)  # chooses its own for the range that it finds
        return rounded

    def _fused(self, x: Tensor) -> Tensor | None:
        """What the kernel makes of x; None, and the state is as it was, where x has masks or NaN."""
        state = self._state()
        before = [tensor.clone() for tensor in state]
        try:
            rounded = self._kernel(x)
            if self._within(before, x):
                return rounded
        except RuntimeError:  # for channels with NaN, after it took them in
            if bool(x.isfinite().all()):
                raise
        for tensor, old in zip(state, before, strict=True):
            tensor.resize_(old.shape).copy_(old)
        return None

    def _state(self) -> tuple[Tensor, ...]:
        inner = self.activation_post_process
        return inner.min_val, inner.max_val, self.scale, self.zero_point

    def _fits(self, x: Tensor) -> bool:
        """True when x has the channels that were seen before."""
        channels = self.activation_post_process.min_val.numel()
        return -x.dim() <= self.ch_axis < x.dim() and channels in (0, x.shape[self.ch_axis])

    def _within(self, before: list[Tensor], x: Tensor) -> bool:
        """True when x held neither NaN nor masks, told by how far the average moved. The margin is for its rounding."""
        inner, ends = self.activation_post_process, []
        for old, new in zip(before, (inner.min_val, inner.max_val), strict=False):
            moved = old.numel() == new.numel() and bool(old.isfinite().all())
            seen = old + (new - old) / inner.averaging_constant if moved else new
            ends.append(seen)
        low, high = ends[0].amin().item(), ends[1].amax().item()
        return bool(inner._within(low * (1 + 1e-5), high * (1 + 1e-5), x))

    def _usable(self) -> Tensor:
        """Where the kernel's qparams can be trained and converted with. NaN is False."""
        usable: Tensor = (self.scale >= self.activation_post_process.eps) & (self.scale <= _FLOAT32_MAX)
        if self.is_symmetric_quant:
            usable = usable & ((2 * self.zero_point - self.quant_min - self.quant_max).abs() <= 1)
        return usable

    def _replace(self, usable: Tensor) -> None:
        scale, zero_point = self.activation_post_process.calculate_qparams()
        self.scale.copy_(torch.where(usable, self.scale, scale))
        self.zero_point.copy_(torch.where(usable, self.zero_point, zero_point))

    def _kernel(self, x: Tensor, observe: bool = True) -> Tensor:
        inner = self.activation_post_process
        values = x.to(torch.float32)  # the kernel takes nothing else
        if self.is_per_channel and x.dim() == 1:
            values = values.unsqueeze(1)  # nor one dimension
        rounded: Tensor = torch.fused_moving_avg_obs_fake_quant(
            values,
            self.observer_enabled if observe else self.observer_enabled.new_zeros(1),
            self.fake_quant_enabled if observe else self.fake_quant_enabled.new_ones(1),
            inner.min_val,
            inner.max_val,
            self.scale,
            self.zero_point,
            inner.averaging_constant,
            self.quant_min,
            self.quant_max,
            self.ch_axis % max(x.dim(), 1) if self.is_per_channel else -1,
            self.is_per_channel,
            self.is_symmetric_quant,
        )
        return rounded.reshape(x.shape).to(x.dtype)
