"""QuantizationConfig: the specs that a user picks for a whole op; rules say which tensor gets which of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..specs import QuantizationSpecBase
from .reading import read_constructor

__all__ = ["QuantizationConfig"]


@dataclass(eq=True, frozen=True)
class QuantizationConfig:
    """Specs by role; None leaves the tensors of that role in floating point.

    Args:
        input_activation: inputs that are computed at run time.
        output_activation: outputs.
        weight: parameters that the op multiplies with.
        bias: parameters that the op adds.
        is_qat: the specs make fake-quantizers, for training.
    """

    input_activation: QuantizationSpecBase | None
    output_activation: QuantizationSpecBase | None
    weight: QuantizationSpecBase | None
    bias: QuantizationSpecBase | None = None
    is_qat: bool = False

    @property
    def is_dynamic(self) -> bool:
        """Input qparams are computed from each tensor at run time."""
        return bool(getattr(self.input_activation, "is_dynamic", False))

    @property
    def is_weight_only(self) -> bool:
        return self.weight is not None and self.input_activation is None

    @property
    def group_size(self) -> int:
        """How many neighbours in a row of the weight share a scale; 0 when that is not the scheme."""
        constructor = getattr(self.weight, "observer_or_fake_quant_ctr", None)
        return int(read_constructor(constructor).arguments.get("group_size", 0))

    def weight_only(self) -> QuantizationConfig:
        """The same with activations in floating point."""
        return replace(self, input_activation=None, output_activation=None)

    def activation_only(self) -> QuantizationConfig:
        """The same with parameters in floating point."""
        return replace(self, weight=None, bias=None)
