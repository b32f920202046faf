"""The observer and the fake quantizer of any scheme, for those that the reference's classes do not cover.

Before this: `arithmetic`. After it: `spec` chooses between these and the reference's classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, SpecError
from ..fake_quantize import FakeQuantizeBase
from ..observer import ObserverBase
from .arithmetic import choose_qparams, fake_quantize, ranges
from .scheme import Scheme

__all__ = ["SchemeFakeQuantize", "SchemeObserver"]


class SchemeObserver(ObserverBase):
    """Keep the range of each block of a tensor.

    Args:
        scheme: what the tensor is quantized to.
        averaging_constant: weight of a new batch in a moving average, in (0, 1]; 1 keeps the last batch alone, as
            weights in training and dynamic tensors need. None keeps the range of everything seen.
        fields: those of the QuantizationSpec that made it, which must agree with the scheme.

    Buffers `min_val` and `max_val`: float32, in `scheme.qparams_shape` of the first tensor; empty before.

    Raises:
        SpecError: an argument is illegal, or fields and scheme contradict each other.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, scheme: Scheme, averaging_constant: float | None = None, **fields: Any) -> None:
        of = scheme.format
        super().__init__(dtype=of.storage, is_dynamic=scheme.is_dynamic)
        if averaging_constant is not None and not 0.0 < averaging_constant <= 1.0:
            raise SpecError(f"averaging_constant is the weight of a new batch, in (0, 1], got {averaging_constant}")
        self.scheme = scheme
        self.averaging_constant = 1.0 if scheme.is_dynamic else averaging_constant
        integer = of.kind == "integer"
        self.quant_min, self.quant_max = (of.low, of.high) if integer else (None, None)
        self.qscheme = None
        self.ch_axis = scheme.axis if scheme.granularity == "axis" else None
        self.granularity = scheme.granularity
        self.eps = scheme.eps
        for name, value in fields.items():
            if value is not None and getattr(self, name, value) != value:
                raise SpecError(f"{name}={value} contradicts the scheme, {scheme}; leave it out of the spec")
        self.register_buffer("min_val", torch.tensor([]))
        self.register_buffer("max_val", torch.tensor([]))

    @property
    def has_data(self) -> bool:
        return self.is_dynamic or bool(self.min_val.numel())

    def forward(self, x: Tensor) -> Tensor:
        """Take the ranges of x into those that are kept.

        Raises:
            SpecError: x cannot be cut into the scheme's blocks.
            CalibrationError: x holds NaN or infinity, or does not have the blocks that were seen before.
        """
        if not x.numel():
            return x
        try:
            low, high = ranges(x, self.scheme)
        except SpecError as error:
            raise SpecError(f"{self._where}: {error}") from error
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise CalibrationError(
                f"{self._where}: a tensor of {x.numel()} values holds NaN or infinity; none was recorded. Drop the "
                "batch, mask with a large finite number instead of infinity, or leave this place in float."
            )
        self._take(low, high)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) in `scheme.qparams_shape`; scale in `scheme.scale_dtype`, zero_point in int64.

        Raises:
            CalibrationError: no data was seen.
        """
        if not self.min_val.numel():
            raise CalibrationError(f"{self._where}: the SchemeObserver saw no data, so it has no range; run a batch")
        return choose_qparams(self.min_val, self.max_val, self.scheme)

    def extra_repr(self) -> str:
        return f"{self.scheme}, averaging_constant={self.averaging_constant}"

    def _take(self, low: Tensor, high: Tensor) -> None:
        first = not self.min_val.numel() or self.averaging_constant == 1.0
        if first:
            self.min_val, self.max_val = low.to(self.min_val.device), high.to(self.max_val.device)
            return
        if low.shape != self.min_val.shape:
            raise CalibrationError(
                f"{self._where}: saw blocks of shape {tuple(self.min_val.shape)} before, and now {tuple(low.shape)}. "
                "Ranges that are kept need tensors of one shape; quantize per tensor, or dynamically."
            )
        if self.averaging_constant is None:
            torch.minimum(self.min_val, low, out=self.min_val)
            torch.maximum(self.max_val, high, out=self.max_val)
            return
        self.min_val.lerp_(low, self.averaging_constant)
        self.max_val.lerp_(high, self.averaging_constant)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("min_val", "max_val"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.min_val.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class SchemeFakeQuantize(FakeQuantizeBase):
    """Watch a tensor and round it to the grid of its scheme; gradients pass inside the range.

    Args:
        scheme: what the tensor will be quantized to.
        averaging_constant: as in SchemeObserver.
        fields: those of the QuantizationSpec that made it, which must agree with the scheme.

    Buffers `scale` and `zero_point`: as `calculate_qparams` gives them; empty before the first tensor.
    `activation_post_process` is the observer.

    Raises:
        SpecError: as in SchemeObserver.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: Scheme, averaging_constant: float | None = None, **fields: Any) -> None:
        super().__init__()
        inner = self.activation_post_process = SchemeObserver(scheme, averaging_constant, **fields)
        self.scheme = scheme
        self.dtype, self.quant_min, self.quant_max = inner.dtype, inner.quant_min, inner.quant_max
        self.qscheme, self.ch_axis, self.is_dynamic = inner.qscheme, inner.ch_axis, inner.is_dynamic
        self.granularity = inner.granularity
        self.eps = inner.eps
        self.register_buffer("scale", torch.tensor([], dtype=scheme.scale_dtype))
        self.register_buffer("zero_point", torch.tensor([], dtype=torch.int64))

    @property
    def has_data(self) -> bool:
        return self.activation_post_process.has_data

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        if self.observer_enabled[0] == 1 or (self.is_dynamic and self.fake_quant_enabled[0] == 1):
            self.activation_post_process(x.detach())
            self.scale, self.zero_point = self.activation_post_process.calculate_qparams()
        if self.fake_quant_enabled[0] == 1:
            return self._round(x)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Those of the observer."""
        return self.activation_post_process.calculate_qparams()

    def extra_repr(self) -> str:
        return f"fake_quant_enabled={self.fake_quant_enabled}, observer_enabled={self.observer_enabled}"

    def _round(self, x: Tensor) -> Tensor:
        expected = self.scheme.qparams_shape(tuple(x.shape))
        if self.scale.shape != expected:
            raise CalibrationError(
                f"{self.where}: there are scales of shape {tuple(self.scale.shape)}, and a tensor of shape "
                f"{tuple(x.shape)}, which needs {expected}, came. Run a batch with the observer enabled first."
            )
        return fake_quantize(x, self.scale, self.zero_point, self.scheme)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("scale", "zero_point"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
