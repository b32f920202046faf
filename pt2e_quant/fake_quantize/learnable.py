"""LearnableFakeQuantize: scale and zero point are parameters that training moves (LSQ and LSQ+).

    LSQ    Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153
    LSQ+   Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization",
           CVPR workshops 2020, arXiv 2004.09576 (the zero point is learned as well)

With v = x / s: the gradient of s is round(v) - v inside the range and q - z at its ends, that of z is 0 inside and -s
outside, both times the gradient of the output; torch's kernels compute it. The zero point of a symmetric scheme is no
parameter to train: it stays, and asks for no gradient.

Signature, state-dict keys and methods are those of torch.ao.quantization._learnable_fake_quantize; the methods of
torchao's class (`enable_range_learning`, ...) do the same, and its checkpoints load.

Before this: `affine`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import checked
from ..errors import CaptureError, SpecError, TargetingError
from ..observer.batch import remember
from ..qparams import FLOAT32_EPS
from ..specs import is_per_channel, is_symmetric
from .affine import channel_axis, load_shapes, made_observer, within_int64
from .base import FakeQuantizeBase, is_fake_quantizer, recomputes
from .traced import can_be_traced, traced_grid, traced_within_int64

__all__ = [
    "LearnableFakeQuantize",
    "disable_range_learning",
    "enable_range_learning",
    "toggle_range_learning",
]

MOST_CHANNELS = 1 << 32


class LearnableFakeQuantize(FakeQuantizeBase):
    """Round a tensor to a grid that starts where an observer puts it and is then trained with the weights.

    It has two phases. First (`enable_static_estimate`, the start) scale and zero point follow the observer. After
    `enable_param_learning` the observer rests and their gradients count. `scale` and `zero_point` are parameters from
    the start, so an optimizer that is made before any data sees them; where the number of channels is not given, they
    take their shape, as the same objects, with the first batch.

    Args:
        observer: class or recipe of an observer that computes qparams.
        quant_min, quant_max: bounds of q, both included.
        scale, zero_point: values to start from, where learning begins without an observer's estimate.
        channel_len: number of channels of a per-channel scheme; -1 leaves it to the first batch.
        learn_zero_point: train the zero point of an asymmetric scheme too (LSQ+); False keeps the observer's.
        use_grad_scaling: multiply the gradients of both by 1 / sqrt(number of values * quant_max), as LSQ does to keep
            their steps as large, relative to their size, as those of the weights.
        observer_kwargs: further arguments of the observer.

    Raises:
        SpecError: the observer computes no qparams, refuses its arguments, or has float qparams.
    """

    scale: nn.Parameter
    zero_point: nn.Parameter
    static_enabled: Tensor
    learning_enabled: Tensor
    eps: Tensor

    @checked(SpecError, but=("observer",))
    def __init__(
        self,
        observer: Any,
        quant_min: int = 0,
        quant_max: int = 255,
        scale: float = 1.0,
        zero_point: float = 0.0,
        channel_len: int = -1,
        use_grad_scaling: bool = False,
        learn_zero_point: bool = True,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        bounds = {"quant_min": quant_min, "quant_max": quant_max}
        inner = made_observer(type(self).__name__, observer, **observer_kwargs, **bounds)
        float_qparams = inner.qscheme is torch.per_channel_affine_float_qparams
        if float_qparams or inner.is_dynamic or channel_len == 0 or not -1 <= channel_len <= MOST_CHANNELS:
            raise SpecError(
                "LearnableFakeQuantize learns a static grid with integer zero points of at least one channel, got "
                f"{inner.qscheme}, is_dynamic={inner.is_dynamic} and channel_len={channel_len}; use "
                "torch.per_channel_affine, is_dynamic=False, and channel_len=-1 where it is unknown"
            )
        if not FLOAT32_EPS <= scale < math.inf or not quant_min <= zero_point <= quant_max:
            raise SpecError(
                f"LearnableFakeQuantize starts from a finite scale > 0 and a zero point in [{quant_min}, {quant_max}], "
                f"got {scale} and {zero_point}"
            )
        self.quant_min, self.quant_max = int(quant_min), int(quant_max)
        self.use_grad_scaling = use_grad_scaling
        self.dtype: torch.dtype = inner.dtype
        self.qscheme: torch.qscheme = inner.qscheme
        self.ch_axis: int = getattr(inner, "ch_axis", -1)
        self.is_per_channel = is_per_channel(self.qscheme)
        self.is_dynamic = False
        self.bitwidth = (self.quant_max - self.quant_min + 1).bit_length() - 1
        count = max(channel_len, 1)
        self.scale = nn.Parameter(torch.full((count,), float(scale)))
        self.learns_zero_point = learn_zero_point and not is_symmetric(self.qscheme)
        self.zero_point = nn.Parameter(torch.full((count,), float(zero_point)), requires_grad=self.learns_zero_point)
        self.activation_post_process = inner
        self.register_buffer("static_enabled", torch.tensor([1], dtype=torch.uint8))
        self.register_buffer("learning_enabled", torch.tensor([0], dtype=torch.uint8))
        self.register_buffer("eps", torch.tensor([max(FLOAT32_EPS, float(getattr(inner, "eps", 0.0)))]))

    @property
    def has_data(self) -> bool:
        """False while scale and zero point wait for the observer, and it has seen nothing."""
        return bool(self.static_enabled[0] != 1 or getattr(self.activation_post_process, "has_data", True))

    def enable_param_learning(self) -> LearnableFakeQuantize:
        """Train scale and zero point; the observer rests."""
        return self._phase(learning=True, fake_quant=True, observer=False)

    def enable_static_estimate(self) -> LearnableFakeQuantize:
        """Let scale and zero point follow the observer."""
        return self._phase(learning=False, fake_quant=True, observer=True)

    def enable_static_observation(self) -> LearnableFakeQuantize:
        """Let scale and zero point follow the observer, and pass values on as they are."""
        return self._phase(learning=False, fake_quant=False, observer=True)

    def enable_range_learning(self) -> None:
        """Train scale and zero point; the observer rests. Whether values are rounded stays as it is."""
        self.toggle_qparam_learning().toggle_observer_update(False)

    def disable_range_learning(self) -> None:
        """Leave scale and zero point where training has brought them."""
        self.toggle_qparam_learning(False)

    def toggle_observer_update(self, enabled: bool = True) -> LearnableFakeQuantize:
        self.static_enabled[0] = int(enabled)
        return self

    def toggle_qparam_learning(self, enabled: bool = True) -> LearnableFakeQuantize:
        self.learning_enabled[0] = int(enabled)
        self.scale.requires_grad = enabled
        self.zero_point.requires_grad = enabled and self.learns_zero_point
        return self

    def toggle_fake_quant(self, enabled: bool = True) -> LearnableFakeQuantize:
        self.fake_quant_enabled[0] = int(enabled)
        return self

    def enable_observer(self, enabled: bool = True) -> None:
        """Let scale and zero point follow the observer, which ends learning; with False, keep them."""
        self.toggle_observer_update(enabled)
        if enabled:
            self.disable_range_learning()

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) of the grid that the next forward rounds to; zero_point rounded, in int64."""
        if self.static_enabled[0] == 1:
            return self.activation_post_process.calculate_qparams()  # type: ignore[no-any-return]
        scale, zero_point = (one.detach() for one in self._grid())
        return scale, zero_point.round().clamp(self.quant_min, self.quant_max).to(torch.int64)

    @property
    def is_symmetric_around_zero(self) -> bool:
        """The zero point is 0, whatever checkpoints of the reference hold."""
        return bool(is_symmetric(self.qscheme) and self.quant_min < 0)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.numel() and can_be_traced(self.activation_post_process):
            scale, zero_point = traced_grid(self, x)
            rounded = self._on_grid(traced_within_int64(x, scale), scale, zero_point)
            return torch.where(self.fake_quant_enabled[0] == 1, rounded, x)
        if self.static_enabled[0] == 1 and not recomputes():
            self._observe(x)
        return self._round(x) if self.fake_quant_enabled[0] == 1 and x.numel() else x

    def extra_repr(self) -> str:
        return (
            f"fake_quant_enabled={self.fake_quant_enabled}, static_enabled={self.static_enabled}, "
            f"learning_enabled={self.learning_enabled}, quant_min={self.quant_min}, quant_max={self.quant_max}, "
            f"dtype={self.dtype}, qscheme={self.qscheme}, ch_axis={self.ch_axis}"
        )

    def _phase(self, *, learning: bool, fake_quant: bool, observer: bool) -> LearnableFakeQuantize:
        return self.toggle_qparam_learning(learning).toggle_fake_quant(fake_quant).toggle_observer_update(observer)

    def _observe(self, x: Tensor) -> None:
        self.activation_post_process(x.detach())
        if not getattr(self.activation_post_process, "has_data", True):  # an empty first batch leaves none
            return
        remember(self, "scale", "zero_point")
        found = self.activation_post_process.calculate_qparams()
        for parameter, new in zip((self.scale, self.zero_point), found, strict=True):
            parameter.data = new.to(parameter.data, copy=True)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) to round with, where they mean something after a step of the optimizer too.

        Gradients reach them only while they are learned: `requires_grad` is in no checkpoint.
        """
        self.scale.data.clamp_(min=self.eps.item())
        if self.is_symmetric_around_zero:
            self.zero_point.data.zero_()
        if self.learning_enabled[0] == 1:
            return self.scale, self.zero_point
        return self.scale.detach(), self.zero_point.detach()

    def _round(self, x: Tensor) -> Tensor:
        return self._on_grid(within_int64(self, x), *self._grid())

    def _on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        factor = (x.numel() * max(self.quant_max, 1)) ** -0.5 if self.use_grad_scaling else 1.0
        return self._kernel(x.to(torch.float32), scale, zero_point, factor).to(x.dtype)  # it takes nothing else

    def _kernel(self, values: Tensor, scale: Tensor, zero_point: Tensor, factor: float) -> Tensor:
        bounds = (self.quant_min, self.quant_max)
        if not self.is_per_channel:
            return torch._fake_quantize_learnable_per_tensor_affine(values, scale, zero_point, *bounds, factor)
        axis = channel_axis(self, values)
        return torch._fake_quantize_learnable_per_channel_affine(values, scale, zero_point, axis, *bounds, factor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_shapes(self, state_dict, prefix, "scale", "zero_point")
        if prefix + "observer_enabled" in state_dict:  # torchao has this one switch for the observer
            state_dict.setdefault(prefix + "static_enabled", state_dict[prefix + "observer_enabled"])
        super()._load_from_state_dict(state_dict, prefix, *args)


@checked(CaptureError)
def toggle_range_learning(model: nn.Module, enabled: bool) -> int:
    """Begin or end the training of all scales and zero points in a model that can be trained; how many modules.

    Raises:
        TargetingError: there is none.
    """
    count = sum(_switch(module, enabled) for module in model.modules())
    if not count:
        raise TargetingError(
            f"{type(model).__name__} holds no fake quantizer whose scale is trained, so there is nothing to switch. "
            "Prepare it with with_learned_scales(config) of pt2e_quant.quantizer."
        )
    return count


@checked(CaptureError)
def enable_range_learning(mod: nn.Module) -> None:
    """For `model.apply(enable_range_learning)`: this one module trains its scale and zero point, if it can."""
    _switch(mod, True)


@checked(CaptureError)
def disable_range_learning(mod: nn.Module) -> None:
    """For `model.apply(disable_range_learning)`: this one module stops training its scale and zero point."""
    _switch(mod, False)


def _switch(mod: nn.Module, learning: bool) -> bool:
    """Whether it is one that learns; those of other packages answer too."""
    method = "enable_range_learning" if learning else "disable_range_learning"
    learns = is_fake_quantizer(mod) and hasattr(mod, method)
    if learns:
        getattr(mod, method)()
    return learns
