"""QuantizationConfig: the specs that a user picks for a whole op; rules say which tensor gets which of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ..specs import QuantizationSpecBase
from .reading import SpecReading, read_spec

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

    @functools.cached_property
    def input_spec(self) -> SpecReading | None:
        """How inputs are quantized, whichever package the spec is of."""
        return None if self.input_activation is None else read_spec(self.input_activation)

    @functools.cached_property
    def weight_spec(self) -> SpecReading | None:
        """How weights are quantized, whichever package the spec is of."""
        return None if self.weight is None else read_spec(self.weight)

    @property
    def is_dynamic(self) -> bool:
        """Input qparams are computed from each tensor at run time."""
        return self.input_spec is not None and self.input_spec.is_dynamic

    @property
    def is_weight_only(self) -> bool:
        return self.weight is not None and self.input_activation is None

    @property
    def group_size(self) -> int:
        """How many neighbours in a row of the weight share a scale; 0 when that is not the scheme."""
        made_by = None if self.weight_spec is None else self.weight_spec.constructor
        return 0 if made_by is None else int(made_by.arguments.get("group_size", 0))

    def weight_only(self) -> QuantizationConfig:
        """The same with activations in floating point."""
        return replace(self, input_activation=None, output_activation=None)

    def activation_only(self) -> QuantizationConfig:
        """The same with parameters in floating point."""
        return replace(self, weight=None, bias=None)
