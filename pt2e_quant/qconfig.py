"""QConfig: which observer or fake quantizer a layer gets for its activations, and which for its weights.

The configuration of the reference API before specs and annotations; `qconfig_mapping` says which part of a model gets
which. Names and contents are those of torch.ao.quantization.qconfig.

Before this: `observer` and `fake_quantize` have the recipes that these are put together from.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from .checks import checked
from .errors import SpecError
from .fake_quantize import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    default_dynamic_fake_quant,
    default_embedding_fake_quant,
    default_embedding_fake_quant_4bit,
    default_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_per_channel_weight_fake_quant,
    default_weight_fake_quant,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    fused_wt_fake_quant_range_neg_127_to_127,
)
from .observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    NoopObserver,
    PlaceholderObserver,
    default_debug_observer,
    default_dynamic_quant_observer,
    default_float_qparams_observer,
    default_float_qparams_observer_4bit,
    default_observer,
    default_per_channel_weight_observer,
    default_placeholder_observer,
    default_reuse_input_observer,
    default_weight_observer,
    per_channel_weight_observer_range_neg_127_to_127,
    weight_observer_range_neg_127_to_127,
)

__all__ = [
    "QConfig",
    "QConfigAny",
    "default_activation_only_qconfig",
    "default_debug_qconfig",
    "default_dynamic_qat_qconfig",
    "default_dynamic_qconfig",
    "default_embedding_qat_qconfig",
    "default_embedding_qat_qconfig_4bit",
    "default_per_channel_qconfig",
    "default_per_channel_symmetric_qnnpack_qat_qconfig",
    "default_per_channel_symmetric_qnnpack_qconfig",
    "default_qat_qconfig",
    "default_qat_qconfig_v2",
    "default_qconfig",
    "default_quint8_weight_qconfig",
    "default_reuse_input_qconfig",
    "default_symmetric_qnnpack_qat_qconfig",
    "default_symmetric_qnnpack_qconfig",
    "default_weight_only_qconfig",
    "float16_dynamic_qconfig",
    "float16_static_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "get_default_qat_qconfig",
    "get_default_qconfig",
    "per_channel_dynamic_qconfig",
    "qconfig_equals",
]


class _Fields(NamedTuple):
    activation: Any
    weight: Any


class QConfig(_Fields):
    """Recipes for the activations and for the weights of a layer.

    Args:
        activation, weight: observer or fake quantizer classes, or recipes (`Class.with_args(...)`); torch.nn.Identity
            leaves the tensor in floating point. Each layer calls them for objects of its own.

    Two of them with equal recipes are equal.

    Raises:
        SpecError: neither a class nor a recipe was given; of an object, layers would share the range.
    """

    __slots__ = ()

    def __new__(cls, activation: Any, weight: Any) -> QConfig:
        for name, recipe in (("activation", activation), ("weight", weight)):
            if isinstance(recipe, nn.Module):
                raise SpecError(
                    f"QConfig: {name} is an object of {type(recipe).__name__}, whose range all layers would share; "
                    f"pass the class, or {type(recipe).__name__}.with_args(...)"
                )
            if not callable(recipe):
                raise SpecError(
                    f"QConfig: {name} must be a class of observers or fake quantizers, or Class.with_args(...), got "
                    f"{recipe!r}; torch.nn.Identity leaves the tensor in floating point"
                )
        return super().__new__(cls, activation, weight)


QConfigAny = QConfig | None


def qconfig_equals(q1: QConfigAny, q2: QConfigAny) -> bool:
    """`==`, under the reference's name: recipes of this package are values."""
    return q1 == q2


# --- calibration ------------------------------------------------------------------------------------------------------

default_qconfig = QConfig(default_observer, default_weight_observer)
"""uint8 activations in 7 bits, int8 weights, both per tensor."""

default_debug_qconfig = QConfig(default_debug_observer, default_weight_observer)
"""Records activations instead of quantizing them."""

default_per_channel_qconfig = QConfig(default_observer, default_per_channel_weight_observer)
"""`default_qconfig` with one scale per channel of the weights."""

default_dynamic_qconfig = QConfig(default_dynamic_quant_observer, default_weight_observer)
"""Activations are quantized at run time."""

per_channel_dynamic_qconfig = QConfig(default_dynamic_quant_observer, default_per_channel_weight_observer)
"""`default_dynamic_qconfig` with one scale per channel of the weights."""

float16_dynamic_qconfig = QConfig(
    PlaceholderObserver.with_args(dtype=torch.float16, is_dynamic=True),
    PlaceholderObserver.with_args(dtype=torch.float16),
)
"""float16 weights, activations cast at run time."""

float16_static_qconfig = QConfig(
    PlaceholderObserver.with_args(dtype=torch.float16), PlaceholderObserver.with_args(dtype=torch.float16)
)
"""float16 weights and activations."""

float_qparams_weight_only_qconfig = QConfig(default_placeholder_observer, default_float_qparams_observer)
"""Tables of embeddings in uint8 with real-valued zero points."""

float_qparams_weight_only_qconfig_4bit = QConfig(default_placeholder_observer, default_float_qparams_observer_4bit)
"""Tables of embeddings in uint4 with real-valued zero points."""

default_quint8_weight_qconfig = QConfig(HistogramObserver, MinMaxObserver)
"""uint8 weights, as for PReLU."""

default_reuse_input_qconfig = QConfig(default_reuse_input_observer, NoopObserver)
"""For ops that only move values, such as reshape: the output has the qparams of the input."""

_SYMMETRIC_ACTIVATION = HistogramObserver.with_args(dtype=torch.qint8, reduce_range=False, eps=2**-12)

default_symmetric_qnnpack_qconfig = QConfig(_SYMMETRIC_ACTIVATION, weight_observer_range_neg_127_to_127)
"""int8 activations and int8 weights without -128, as XNNPACK wants them; 2**-12 keeps requantization legal."""

default_per_channel_symmetric_qnnpack_qconfig = QConfig(
    _SYMMETRIC_ACTIVATION, per_channel_weight_observer_range_neg_127_to_127
)
"""`default_symmetric_qnnpack_qconfig` with one scale per channel of the weights."""

# --- training ---------------------------------------------------------------------------------------------------------

default_qat_qconfig = QConfig(default_fake_quant, default_weight_fake_quant)
"""uint8 activations in 7 bits, int8 weights, both per tensor."""

default_qat_qconfig_v2 = QConfig(default_fused_act_fake_quant, default_fused_wt_fake_quant)
"""The same in 8 bits, on the fused kernel."""

default_dynamic_qat_qconfig = QConfig(default_dynamic_fake_quant, default_weight_fake_quant)
"""Activations are quantized at run time."""

default_weight_only_qconfig = QConfig(nn.Identity, default_weight_fake_quant)
"""Weights alone."""

default_activation_only_qconfig = QConfig(default_fake_quant, nn.Identity)
"""Activations alone."""

default_embedding_qat_qconfig = QConfig(NoopObserver.with_args(dtype=torch.float32), default_embedding_fake_quant)
"""Tables of embeddings in uint8 with real-valued zero points."""

default_embedding_qat_qconfig_4bit = QConfig(
    NoopObserver.with_args(dtype=torch.float32), default_embedding_fake_quant_4bit
)
"""Tables of embeddings in uint4 with real-valued zero points."""

_SYMMETRIC_FUSED = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    reduce_range=False,
    eps=2**-12,
)

default_symmetric_qnnpack_qat_qconfig = QConfig(_SYMMETRIC_FUSED, fused_wt_fake_quant_range_neg_127_to_127)
"""`default_symmetric_qnnpack_qconfig` for training."""

default_per_channel_symmetric_qnnpack_qat_qconfig = QConfig(
    _SYMMETRIC_FUSED, fused_per_channel_wt_fake_quant_range_neg_127_to_127
)
"""`default_per_channel_symmetric_qnnpack_qconfig` for training."""

# --- by backend -------------------------------------------------------------------------------------------------------

# Whether its kernels add products of 8 bits in 16 (x86 without VNNI), and whether weights have one scale per channel.
_BACKENDS = {"x86": (True, True), "fbgemm": (True, True), "qnnpack": (False, False), "onednn": (False, True)}


@checked(SpecError)
def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """What to calibrate with for a backend: "x86", "fbgemm", "qnnpack" or "onednn".

    Raises:
        SpecError: another backend, or a version other than 0.
    """
    reduce_range, per_channel = _of_backend(backend, version, (0,))
    if backend == "onednn" and not torch.cpu._is_vnni_supported():
        warnings.warn(
            "this machine has no VNNI instructions, without which 8-bit products may overflow in oneDNN; the qconfig "
            "of 'x86' avoids that at the cost of one bit",
            stacklevel=2,
        )
    weight = default_per_channel_weight_observer if per_channel else default_weight_observer
    return QConfig(HistogramObserver.with_args(reduce_range=reduce_range), weight)


@checked(SpecError)
def get_default_qat_qconfig(backend: str = "x86", version: int = 1) -> QConfig:
    """What to train with for a backend: "x86", "fbgemm", "qnnpack" or "onednn"; version 0 is without fused kernels.

    Raises:
        SpecError: another backend, or a version other than 0 and 1.
    """
    reduce_range, per_channel = _of_backend(backend, version, (0, 1))
    kind = FusedMovingAvgObsFakeQuantize if version else FakeQuantize
    activation = kind.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, reduce_range=reduce_range
    )
    if version:
        weight = default_fused_per_channel_wt_fake_quant if per_channel else default_fused_wt_fake_quant
    else:
        weight = default_per_channel_weight_fake_quant if per_channel else default_weight_fake_quant
    return QConfig(activation, weight)


def _of_backend(backend: str, version: int, versions: tuple[int, ...]) -> tuple[bool, bool]:
    if backend not in _BACKENDS:
        raise SpecError(f"no default qconfig is known for backend {backend!r}; pass one of {', '.join(_BACKENDS)}")
    if version not in versions:
        raise SpecError(f"version {version!r} of the default qconfigs does not exist; pass one of {list(versions)}")
    return _BACKENDS[backend]
