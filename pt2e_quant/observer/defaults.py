"""The reference's ready-made recipes for observers: values to put into specs and qconfigs."""

from __future__ import annotations

import torch

from .fixed import FixedQParamsObserver
from .histogram import HistogramObserver
from .min_max import MinMaxObserver, PerChannelMinMaxObserver
from .placeholder import PlaceholderObserver, ReuseInputObserver
from .recording import RecordingObserver

__all__ = [
    "default_affine_fixed_qparams_observer",
    "default_debug_observer",
    "default_dynamic_quant_observer",
    "default_fixed_qparams_range_0to1_observer",
    "default_fixed_qparams_range_neg1to1_observer",
    "default_float_qparams_observer",
    "default_float_qparams_observer_4bit",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_weight_observer",
    "default_placeholder_observer",
    "default_reuse_input_observer",
    "default_symmetric_fixed_qparams_observer",
    "default_weight_observer",
    "per_channel_weight_observer_range_neg_127_to_127",
    "weight_observer_range_neg_127_to_127",
]

_INT8_SYMMETRIC = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
_INT8_PER_CHANNEL = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
_WITHOUT_MINUS_128 = {"quant_min": -127, "quant_max": 127, "eps": 2**-12}

# Activations: 7 bits, so that kernels without VNNI do not overflow.
default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)
default_placeholder_observer = PlaceholderObserver
default_dynamic_quant_observer = PlaceholderObserver.with_args(
    dtype=torch.quint8, quant_min=0, quant_max=255, is_dynamic=True
)
default_debug_observer = RecordingObserver
default_reuse_input_observer = ReuseInputObserver

# Weights.
default_weight_observer = MinMaxObserver.with_args(**_INT8_SYMMETRIC)
weight_observer_range_neg_127_to_127 = MinMaxObserver.with_args(**_INT8_SYMMETRIC, **_WITHOUT_MINUS_128)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(**_INT8_PER_CHANNEL)
per_channel_weight_observer_range_neg_127_to_127 = PerChannelMinMaxObserver.with_args(
    **_INT8_PER_CHANNEL, **_WITHOUT_MINUS_128
)

# Embeddings: a real-valued zero point per row.
default_float_qparams_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.quint8, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0
)
default_float_qparams_observer_4bit = PerChannelMinMaxObserver.with_args(
    dtype=torch.quint4x2, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0
)

# Outputs of sigmoid and tanh.
default_fixed_qparams_range_0to1_observer = FixedQParamsObserver.with_args(
    scale=1.0 / 256.0, zero_point=0, dtype=torch.quint8, quant_min=0, quant_max=255
)
default_fixed_qparams_range_neg1to1_observer = FixedQParamsObserver.with_args(
    scale=2.0 / 256.0, zero_point=128, dtype=torch.quint8, quant_min=0, quant_max=255
)
default_affine_fixed_qparams_observer = default_fixed_qparams_range_0to1_observer
default_symmetric_fixed_qparams_observer = default_fixed_qparams_range_neg1to1_observer
