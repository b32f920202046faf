"""FakeQuantize: an observer and the rounding to the grid that it finds, in one module.

    x -> (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale

The gradient of x passes through where x lies inside the range and is 0 outside (straight-through estimator; Bengio,
Leonard, Courville 2013). Signatures, attributes and state-dict keys are those of torch.ao.quantization.fake_quantize.

Before this: `base` has the switches. After it: `convert` reads `calculate_qparams` and writes q/dq of the same grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import checked
from ..errors import CalibrationError, QuantizationError, SpecError
from ..observer import (
    FixedQParamsObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from ..observer.batch import remember
from ..specs import integer_range, is_per_channel
from .base import FakeQuantizeBase
from .rounding import on_grid
from .traced import can_be_traced, traced_forward

__all__ = ["FakeQuantize", "FixedQParamsFakeQuantize"]

_FLOAT_QPARAMS = torch.per_channel_affine_float_qparams


class FakeQuantize(FakeQuantizeBase):
    """Watch a tensor with an observer and round it to the grid of what was seen so far.

    Args:
        observer: class or recipe (`Class.with_args(...)`) of an observer that computes qparams.
        quant_min, quant_max: bounds of q, both included, for the observer; None is its own default.
        is_dynamic: the range is that of each tensor alone; for moving averages this needs averaging_constant=1.
        observer_kwargs: further arguments of the observer.

    Buffers: `scale` (float32) and `zero_point` (int32; float32 for float qparams), one element, or one per channel
    after the first batch. `activation_post_process` is the observer.

    Raises:
        SpecError: the observer computes no qparams, or refuses its arguments.
    """

    scale: Tensor
    zero_point: Tensor

    @checked(SpecError, but=("observer",))
    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        bounds = {"quant_min": quant_min, "quant_max": quant_max}
        given = {name: bound for name, bound in bounds.items() if bound is not None}
        inner = made_observer(type(self).__name__, observer, is_dynamic=is_dynamic, **observer_kwargs, **given)
        self.activation_post_process = inner
        self.quant_min: int = inner.quant_min
        self.quant_max: int = inner.quant_max
        self.is_dynamic: bool = inner.is_dynamic
        self.dtype: torch.dtype = inner.dtype
        self.qscheme: torch.qscheme = inner.qscheme
        self.ch_axis: int = getattr(inner, "ch_axis", -1)
        self.is_per_channel = is_per_channel(self.qscheme)
        zero_point_dtype = torch.float32 if self.qscheme is _FLOAT_QPARAMS else torch.int32
        self.register_buffer("scale", torch.tensor([1.0], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([0], dtype=zero_point_dtype))

    @property
    def has_data(self) -> bool:
        """False while the observer has seen nothing; observers of other packages are taken to have."""
        return bool(getattr(self.activation_post_process, "has_data", True))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) of the observer, as it answers."""
        return self.activation_post_process.calculate_qparams()  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.numel() and can_be_traced(self.activation_post_process):
            return traced_forward(self, x)
        if self._watches() or (self.is_dynamic and self.fake_quant_enabled[0] == 1):
            self._observe(x)  # a dynamic tensor has no range to keep from an earlier one
        if self.fake_quant_enabled[0] == 1 and x.numel():
            return self._round(x)
        return x

    @checked(SpecError)
    def expect(self, shape: tuple[int | torch.SymInt, ...]) -> None:
        """Give the buffers the sizes that they have once a tensor of this shape was seen, where that is known."""
        inner = self.activation_post_process
        if type(inner) not in (PerChannelMinMaxObserver, MovingAveragePerChannelMinMaxObserver):
            return
        channels = shape[self.ch_axis] if -len(shape) <= self.ch_axis < len(shape) else None
        if isinstance(channels, int) and not inner.has_data:
            inner.expect(channels)
            self._settle(self.scale.new_ones(channels), self.zero_point.new_zeros(channels))

    def extra_repr(self) -> str:
        return (
            f"fake_quant_enabled={self.fake_quant_enabled}, observer_enabled={self.observer_enabled}, "
            f"quant_min={self.quant_min}, quant_max={self.quant_max}, dtype={self.dtype}, qscheme={self.qscheme}, "
            f"ch_axis={self.ch_axis}, scale={self.scale}, zero_point={self.zero_point}"
        )

    def _observe(self, x: Tensor) -> None:
        self.activation_post_process(x.detach())
        if self.has_data:  # an empty first batch leaves none
            self._settle(*self.activation_post_process.calculate_qparams())

    def _settle(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over qparams, which get one element per channel with the first batch."""
        remember(self, "scale", "zero_point")
        for buffer, new in ((self.scale, scale), (self.zero_point, zero_point)):
            if buffer.shape != new.shape:
                buffer.resize_(new.shape)
            buffer.copy_(new)

    def _round(self, x: Tensor) -> Tensor:
        axis = channel_axis(self, x) if self.is_per_channel else None
        bounds = (self.quant_min, self.quant_max)
        return on_grid(within_int64(self, x), self.scale, self.zero_point, *bounds, axis)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_shapes(self, state_dict, prefix, "scale", "zero_point")
        super()._load_from_state_dict(state_dict, prefix, *args)


class FixedQParamsFakeQuantize(FakeQuantize):
    """Round a tensor whose qparams are known beforehand, such as the output of a sigmoid.

    Args:
        observer: recipe of a FixedQParamsObserver.

    Raises:
        SpecError: it makes another observer.
    """

    def __init__(self, observer: Callable[..., Any]) -> None:
        super().__init__(observer=observer)
        fixed = self.activation_post_process
        if not isinstance(fixed, FixedQParamsObserver):
            raise SpecError(
                f"FixedQParamsFakeQuantize takes its qparams from a FixedQParamsObserver, got {type(fixed).__name__}; "
                "pass FixedQParamsObserver.with_args(scale=..., zero_point=...), or use FakeQuantize"
            )
        self._observer_ctr = observer
        self.scale = fixed.scale
        self.zero_point = fixed.zero_point

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) as they were given, one element each."""
        return self.scale, self.zero_point

    def _observe(self, x: Tensor) -> None:
        """There is nothing to learn from data."""


def made_observer(owner: str, observer: Callable[..., Any], **arguments: Any) -> Any:
    """The observer inside a fake quantizer, known to have what rounding needs.

    Raises:
        SpecError: it computes no qparams (a placeholder, a cast), or its scheme is neither per tensor nor per channel.
    """
    made = call_constructor(owner, observer, arguments)
    missing = [name for name in ("dtype", "qscheme", "quant_min", "quant_max") if getattr(made, name, None) is None]
    if missing:
        raise SpecError(
            f"{owner}: {type(made).__name__} has no {', '.join(missing)}, so there is no grid to round to; use an "
            "observer that keeps a range, such as MovingAverageMinMaxObserver (with averaging_constant=1 and "
            "is_dynamic=True for run-time qparams)"
        )
    in_blocks = is_per_channel(made.qscheme) and getattr(made, "ch_axis", None) is None
    if in_blocks or integer_range(made.dtype) is None:
        what = f"one scale per block ({made.granularity})" if in_blocks else f"{made.dtype}"
        raise SpecError(
            f"{owner} rounds to integers per tensor or per channel, and {type(made).__name__} is for {what}; use "
            "AffineFakeQuantize, or SchemeFakeQuantize of pt2e_quant.schemes"
        )
    return made


def call_constructor(owner: str, observer: Any, arguments: dict[str, Any]) -> Any:
    """What a class or recipe makes of these arguments.

    Raises:
        SpecError: it is none, or does not take them.
    """
    if isinstance(observer, nn.Module) or not callable(observer):
        given = f"{type(observer).__name__}, an object" if isinstance(observer, nn.Module) else repr(observer)
        raise SpecError(
            f"{owner}: observer is {given}; each fake quantizer makes its own, so pass the class, or "
            "Class.with_args(...)"
        )
    try:
        return observer(**arguments)
    except QuantizationError:
        raise
    except Exception as error:  # observers of other packages raise what they like
        name = getattr(observer, "__name__", type(observer).__name__)
        raise SpecError(f"{owner}: {name} cannot be made with {arguments}: {error}") from error


def channel_axis(module: Any, x: Tensor) -> int:
    """The dimension of x that has one scale per index, known to exist and to fit.

    Raises:
        SpecError: x has no such dimension.
        CalibrationError: x has another number of channels than there are scales.
    """
    if not -x.dim() <= module.ch_axis < x.dim():
        raise SpecError(
            f"{module.where}: ch_axis={module.ch_axis} does not exist in a tensor of shape {tuple(x.shape)}; "
            "set ch_axis in the spec, or quantize per tensor"
        )
    axis: int = module.ch_axis % x.dim()
    if module.scale.numel() != x.shape[axis]:
        raise CalibrationError(
            f"{module.where}: there are scales for {module.scale.numel()} channels along dimension {axis}, and a "
            f"tensor of shape {tuple(x.shape)} came.\n  Run a batch with the observer enabled first, or set ch_axis to "
            "a dimension of constant size."
        )
    return axis


def within_int64(module: Any, x: Tensor) -> Tensor:
    """x with its masks (infinity, the largest numbers) moved to where they saturate at the right end.

    torch's kernels round to int64 before they clamp, and what is larger becomes the smallest integer.
    """
    if not getattr(module.activation_post_process, "_warned_of_masks", False):
        return x
    limit = min(2.0**62 * float(module.scale.detach().min()), torch.finfo(x.dtype).max)
    return x.clamp(-limit, limit)


def load_shapes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *names: str) -> None:
    """Give tensors the shape that the checkpoint has for them: the number of channels is part of the state."""
    for name in names:
        saved, own = state_dict.get(prefix + name), getattr(module, name)
        if saved is not None and saved.shape != own.shape:
            own.data = own.data.new_empty(saved.shape)
