"""From a configuration for calibration to the one for training: the same integers, rounded in every forward.

A backend writes its configuration once; `is_qat=True` passes it through `for_training`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..checks import checked
from ..errors import SpecError
from ..fake_quantize import FakeQuantize, PerGroupFakeQuantize
from ..observer import (
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerTokenPlaceholderObserver,
)
from ..schemes import Scheme, quantization_spec
from ..specs import QuantizationSpec, QuantizationSpecBase, integer_range, is_per_channel
from .config import QuantizationConfig
from .reading import Constructor, read_constructor

__all__ = ["AVERAGING_CONSTANT", "for_training", "trained_activation", "trained_weight"]

AVERAGING_CONSTANT = 0.01
"""Weight of a new batch in the moving average that training keeps of the range of an activation."""


@checked(SpecError)
def for_training(config: QuantizationConfig, *, averaging_constant: float = AVERAGING_CONSTANT) -> QuantizationConfig:
    """The same integers with fake quantizers in the place of observers.

    Ranges of activations are moving averages over batches, those of weights and of dynamic activations belong to the
    tensor of the moment alone. Specs that make fake quantizers already, have fixed qparams, or cast, stay as they are.

    Args:
        config: what `get_..._config()` of a backend returns.
        averaging_constant: weight of a new batch in the average, in (0, 1].
    """
    inputs = trained_activation(config.input_activation, averaging_constant)
    same = config.output_activation is config.input_activation
    outputs = inputs if same else trained_activation(config.output_activation, averaging_constant)
    return QuantizationConfig(inputs, outputs, trained_weight(config.weight), trained_weight(config.bias), is_qat=True)


def trained_activation(
    spec: QuantizationSpecBase | None, averaging_constant: float = AVERAGING_CONSTANT
) -> QuantizationSpecBase | None:
    """The spec of an activation with a fake quantizer."""
    constructor = _observer_of(spec)
    if constructor is None or not isinstance(spec, QuantizationSpec):
        return spec
    if constructor.made is PerTokenPlaceholderObserver:
        return quantization_spec(Scheme(dtype="int8", granularity="token", timing="dynamic"), qat=True)
    return _averaged(spec, constructor, 1.0 if spec.is_dynamic else averaging_constant)


def trained_weight(spec: QuantizationSpecBase | None) -> QuantizationSpecBase | None:
    """The spec of a parameter with a fake quantizer. Observers of groups find the range as they do for calibration."""
    constructor = _observer_of(spec)
    if constructor is None or not isinstance(spec, QuantizationSpec):
        return spec
    if hasattr(constructor.made, "group_size"):
        recipe = PerGroupFakeQuantize.with_args(observer=constructor.made, **constructor.arguments)
        return replace(spec, observer_or_fake_quant_ctr=recipe)
    return _averaged(spec, constructor, 1.0)


def _observer_of(spec: QuantizationSpecBase | None) -> Constructor | None:
    """What makes the observer of integers; None where nothing is to be changed."""
    if not isinstance(spec, QuantizationSpec) or integer_range(spec.dtype) is None:
        return None
    constructor = read_constructor(spec.observer_or_fake_quant_ctr)
    return None if _rounds(constructor.made) else constructor


def _rounds(made: Any) -> bool:
    return isinstance(made, type) and hasattr(made, "enable_fake_quant")


def _averaged(spec: QuantizationSpec, constructor: Constructor, constant: float) -> QuantizationSpec:
    per_channel = is_per_channel(spec.qscheme)
    average: Any = MovingAveragePerChannelMinMaxObserver if per_channel else MovingAverageMinMaxObserver
    kept = {name: value for name, value in constructor.arguments.items() if name == "eps"}
    recipe = FakeQuantize.with_args(observer=average, averaging_constant=constant, **kept)
    return replace(spec, observer_or_fake_quant_ctr=recipe)
