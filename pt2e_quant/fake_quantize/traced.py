"""One forward of a fake quantizer without a look at values: what torch.compile traces, in one graph.

The switches, masks and the first batch become torch.where, which Inductor fuses with the tensor's own kernel. Nothing
can be raised or warned of in here: NaN goes into the range, and `convert_pt2e` says so.

Before this: the same in eager mode, in `affine` and `observer.min_max`, with the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..observer import (
    FixedQParamsObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from ..observer.base import largest
from .rounding import on_grid

__all__ = ["can_be_traced", "traced_forward", "traced_grid", "traced_within_int64"]

_KINDS = (
    FixedQParamsObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)


def can_be_traced(observer: Any) -> bool:
    """Observers of a range can, as long as they look at the values of this process alone."""
    return type(observer) in _KINDS and observer._peers is None


def traced_forward(module: Any, x: Tensor) -> Tensor:
    """What `module(x)` gives, a FakeQuantize whose observer can be traced."""
    observer = module.activation_post_process
    axis = module.ch_axis % x.dim() if module.is_per_channel else None
    rounds = module.fake_quant_enabled[0] == 1
    if not isinstance(observer, FixedQParamsObserver):
        watches = module.observer_enabled[0] == 1
        _follow(module, x, axis, watches | rounds if module.is_dynamic else watches)
    rounded = on_grid(x, module.scale, module.zero_point, module.quant_min, module.quant_max, axis)
    return torch.where(rounds, rounded, x)


def traced_grid(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero point) that a LearnableFakeQuantize rounds x to, whose observer can be traced."""
    with torch.no_grad():
        _follow(module, x, module.ch_axis % x.dim() if module.is_per_channel else None, module.static_enabled[0] == 1)
        module.scale.clamp_(min=module.eps)
        if module.is_symmetric_around_zero:
            module.zero_point.zero_()
    learns = module.learning_enabled[0] == 1
    scale, zero_point = (torch.where(learns, one, one.detach()) for one in (module.scale, module.zero_point))
    return scale, zero_point


def traced_within_int64(x: Tensor, scale: Tensor) -> Tensor:
    """x with masks moved to where they saturate at the right end; see `affine.within_int64`."""
    limit = (2.0**62 * scale.detach().min()).clamp(max=torch.finfo(x.dtype).max).to(x.dtype)
    return x.clamp(-limit, limit)


def _follow(module: Any, x: Tensor, axis: int | None, watches: Tensor) -> None:
    """Let the observer take in x, and scale and zero point follow it, where `watches` says so."""
    observer = module.activation_post_process
    if not isinstance(observer, FixedQParamsObserver):
        watches = _watch(observer, x.detach(), axis, watches)
    for name, new in zip(("scale", "zero_point"), observer.calculate_qparams(), strict=True):
        _settle(module, name, new, watches)


def _watch(observer: Any, x: Tensor, axis: int | None, watches: Tensor) -> Tensor:
    """Take in the range of x where `watches` says so; whether the observer has one now that its qparams follow."""
    low, high = _ends(x, axis)
    masks = low > high  # of masks alone there is no range; in a channel, it says nothing
    watches = watches & ~masks.all()
    low, high = low.masked_fill(masks, 0.0), high.masked_fill(masks, 0.0)
    old_low, old_high = observer.min_val, observer.max_val
    if old_low.shape == low.shape:
        first = old_low > old_high
        new_low, new_high = _taken_in(observer, low, high)
        new_low, new_high = torch.where(first, low, new_low), torch.where(first, high, new_high)
    else:  # the first batch says how many channels there are
        new_low, new_high = low, high
    _settle(observer, "min_val", new_low, watches)
    _settle(observer, "max_val", new_high, watches)
    return watches


def _ends(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Range of x, or of each channel, without masks."""
    masked = x.abs() >= largest(x.dtype)  # NaN is none
    values = x.to(torch.float32)
    others = [dim for dim in range(x.dim()) if dim != axis]
    low, high = values.masked_fill(masked, math.inf), values.masked_fill(masked, -math.inf)
    return (low.amin(others), high.amax(others)) if others else (low, high)


def _taken_in(observer: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    constant = getattr(observer, "averaging_constant", None)
    old_low, old_high = observer.min_val, observer.max_val
    if constant is None:
        return torch.minimum(old_low, low), torch.maximum(old_high, high)
    new_low, new_high = (old + (seen - old) * constant for old, seen in ((old_low, low), (old_high, high)))
    inside_out = new_low > new_high  # see `move_range`
    return torch.where(inside_out, low, new_low), torch.where(inside_out, high, new_high)


def _settle(module: Any, name: str, new: Tensor, changes: Tensor) -> None:
    old = getattr(module, name)
    if old.shape == new.shape:
        old.copy_(torch.where(changes, new.to(old.dtype), old))
    else:
        setattr(module, name, new.to(old.dtype))
