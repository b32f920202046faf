"""From a configuration for calibration to the one for training: the same integers, rounded in every forward.

A backend writes its configuration once; `is_qat=True` passes it through `for_training`, and `with_learned_scales` makes
parameters of its scales.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..checks import checked
from ..errors import SpecError
from ..fake_quantize import (
    FakeQuantize,
    FakeQuantizeBase,
    LearnableFakeQuantize,
    LearnablePerGroupFakeQuantize,
    PerGroupFakeQuantize,
)
from ..observer import (
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerTokenPlaceholderObserver,
)
from ..schemes import Scheme, quantization_spec
from ..specs import QuantizationSpec, QuantizationSpecBase, integer_range, is_per_channel
from .config import QuantizationConfig
from .reading import Constructor, read_constructor

__all__ = [
    "AVERAGING_CONSTANT",
    "for_training",
    "trained_activation",
    "trained_weight",
    "with_learned_scales",
]

AVERAGING_CONSTANT = 0.01
"""Weight of a new batch in the moving average that training keeps of the range of an activation."""

_FLOAT_QPARAMS = torch.per_channel_affine_float_qparams
_LEARNABLE: dict[Any, type[FakeQuantizeBase]] = {
    FakeQuantize: LearnableFakeQuantize,
    PerGroupFakeQuantize: LearnablePerGroupFakeQuantize,
}


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


@checked(SpecError)
def with_learned_scales(config: QuantizationConfig, *, learn_zero_points: bool = True) -> QuantizationConfig:
    """The same integers with scales that are parameters of the model (LSQ; with zero points, LSQ+).

    Scales follow the observers of `for_training` until `enable_range_learning(prepared)`, or start from a calibration:
    `prepare_qat_pt2e(..., calibration=...)`. Dynamic tensors, fixed qparams, real-valued zero points and casts stay as
    they are. Sources: see `LearnableFakeQuantize`.

    Args:
        config: what `get_..._config()` of a backend returns, for calibration or for training.
        learn_zero_points: train the zero points of asymmetric schemes too; False keeps those of the start.
    """
    config = for_training(config)
    inputs = _learned(config.input_activation, learn_zero_points)
    same = config.output_activation is config.input_activation
    outputs = inputs if same else _learned(config.output_activation, learn_zero_points)
    weight, bias = (_learned(spec, learn_zero_points) for spec in (config.weight, config.bias))
    return QuantizationConfig(inputs, outputs, weight, bias, is_qat=True)


def _learned(spec: QuantizationSpecBase | None, learn_zero_point: bool) -> QuantizationSpecBase | None:
    if not isinstance(spec, QuantizationSpec) or spec.is_dynamic or spec.qscheme is _FLOAT_QPARAMS:
        return spec
    constructor = read_constructor(spec.observer_or_fake_quant_ctr)
    learnable = _LEARNABLE.get(constructor.made)
    if learnable is None:
        return spec
    recipe = learnable.with_args(**constructor.arguments, use_grad_scaling=True, learn_zero_point=learn_zero_point)
    return replace(spec, observer_or_fake_quant_ctr=recipe)


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
    if constructor.is_grouped:
        recipe = PerGroupFakeQuantize.with_args(observer=constructor.made, **constructor.arguments)
        return replace(spec, observer_or_fake_quant_ctr=recipe)
    return _averaged(spec, constructor, 1.0)


def _observer_of(spec: QuantizationSpecBase | None) -> Constructor | None:
    """What makes the observer of integers; None where nothing is to be changed."""
    if not isinstance(spec, QuantizationSpec) or integer_range(spec.dtype) is None:
        return None
    constructor = read_constructor(spec.observer_or_fake_quant_ctr)
    return None if constructor.rounds else constructor


def _averaged(spec: QuantizationSpec, constructor: Constructor, constant: float) -> QuantizationSpec:
    per_channel = is_per_channel(spec.qscheme)
    average: Any = MovingAveragePerChannelMinMaxObserver if per_channel else MovingAverageMinMaxObserver
    kept = {name: value for name, value in constructor.arguments.items() if name == "eps"}
    recipe = FakeQuantize.with_args(observer=average, averaging_constant=constant, **kept)
    return replace(spec, observer_or_fake_quant_ctr=recipe)
