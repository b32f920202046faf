"""The observer and the fake quantizer of any scheme, for those that the reference's classes do not cover.

Before this: `arithmetic`. After it: `spec` chooses between these and the reference's classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import checked
from ..errors import CalibrationError, SpecError
from ..fake_quantize import AffineFakeQuantize
from ..observer import AffineQuantizedMinMaxObserver, MappingType
from ..observer.base import checked_constant, move_range
from .arithmetic import choose_qparams, fake_quantize
from .scheme import Scheme

__all__ = ["SchemeFakeQuantize", "SchemeObserver"]


class SchemeObserver(AffineQuantizedMinMaxObserver):
    """Keep the range of each block of a tensor.

    Args:
        scheme: what the tensor is quantized to.
        averaging_constant: weight of a new batch in a moving average, in (0, 1]; 1 keeps the last batch alone, as
            weights in training and dynamic tensors need. None keeps the range of everything seen.
        fields: those of the QuantizationSpec that made it, which must agree with the scheme.

    Raises:
        SpecError: an argument is illegal, or fields and scheme contradict each other.
    """

    @checked(SpecError)
    def __init__(self, scheme: Scheme, averaging_constant: float | None = None, **fields: Any) -> None:
        of = scheme.format
        known = {"dtype": of.storage, "quant_min": of.low, "quant_max": of.high, "is_dynamic": scheme.is_dynamic}
        for name, value in fields.items():
            if value is not None and known.get(name, value) != value:
                raise SpecError(f"{name}={value} contradicts the scheme, {scheme}; leave it out of the spec")
        super().__init__(
            MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC,
            of.storage,
            scheme.blocks,
            of.low,
            of.high,
            scheme.eps,
            is_dynamic=scheme.is_dynamic,
        )
        self.scheme = scheme
        constant = 1.0 if scheme.is_dynamic else averaging_constant
        self.averaging_constant = None if constant is None else checked_constant(constant)

    def forward(self, x: Tensor) -> Tensor:
        """Take in the range of each block of x."""
        kept = self.min_val, self.max_val
        if self.averaging_constant == 1.0 and x.numel():
            self.reset_min_max_vals()  # tensors that stand for themselves may have any shape
        try:
            return super().forward(x)
        except (CalibrationError, SpecError) as error:
            self.min_val, self.max_val = kept
            if isinstance(error, SpecError):  # of the granularity, which knows no place
                raise SpecError(f"{self._where}: {error}") from error
            raise

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) in `scheme.qparams_shape`; scale in `scheme.scale_dtype`, zero_point in int64.

        Raises:
            CalibrationError: no data was seen.
        """
        if not self.has_data:
            raise CalibrationError(self._no_data())
        return choose_qparams(self.min_val, self.max_val, self.scheme)

    def extra_repr(self) -> str:
        return f"{self.scheme}, averaging_constant={self.averaging_constant}"

    def _block_ranges(self, values: Tensor) -> tuple[Tensor, Tensor] | None:
        found = super()._block_ranges(values)
        if found is None:
            return None
        shape = self.scheme.qparams_shape(tuple(values.shape))
        return found[0].reshape(shape), found[1].reshape(shape)

    def _take_in(self, low: Tensor, high: Tensor) -> None:
        if self.averaging_constant is None:
            super()._take_in(low, high)
        else:
            move_range(self.min_val, self.max_val, low, high, self.averaging_constant)


class SchemeFakeQuantize(AffineFakeQuantize):
    """Watch a tensor and round it to the grid of its scheme; gradients pass inside the range.

    Args:
        scheme: what the tensor will be quantized to.
        averaging_constant: as in SchemeObserver.
        fields: those of the QuantizationSpec that made it, which must agree with the scheme.

    Buffers and `activation_post_process` as in AffineFakeQuantize.

    Raises:
        SpecError: as in SchemeObserver.
    """

    @checked(SpecError)
    def __init__(self, scheme: Scheme, averaging_constant: float | None = None, **fields: Any) -> None:
        observed = {"scheme": scheme, "averaging_constant": averaging_constant, "is_dynamic": scheme.is_dynamic}
        super().__init__(SchemeObserver, **{**observed, **fields})
        self.scheme = scheme
        self.scale = self.scale.to(scheme.scale_dtype)

    def _round(self, x: Tensor) -> Tensor:
        expected = self.scheme.qparams_shape(tuple(x.shape))
        if self.scale.shape != expected:
            raise CalibrationError(
                f"{self.where}: there are scales of shape {tuple(self.scale.shape)}, and a tensor of shape "
                f"{tuple(x.shape)}, which needs {expected}, came. Run a batch with the observer enabled first."
            )
        return fake_quantize(x, self.scale, self.zero_point, self.scheme)
