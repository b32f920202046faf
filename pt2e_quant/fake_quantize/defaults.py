"""The fake quantizers that the reference has ready made, as recipes; its qconfigs are put together from them.

Before this: the classes. After it: `qconfig`.
"""

from __future__ import annotations

import torch

from ..observer import (
    AffineQuantizedMinMaxObserver,
    FixedQParamsObserver,
    HistogramObserver,
    MappingType,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerAxis,
    PerGroup,
    PerTensor,
)
from .affine import FakeQuantize, FixedQParamsFakeQuantize
from .blocks import AffineFakeQuantize
from .fused import FusedMovingAvgObsFakeQuantize

__all__ = [
    "default_affine_fake_quant",
    "default_affine_fixed_qparams_fake_quant",
    "default_affine_per_axis_fake_quant",
    "default_dynamic_fake_quant",
    "default_embedding_fake_quant",
    "default_embedding_fake_quant_4bit",
    "default_fake_quant",
    "default_fixed_qparams_range_0to1_fake_quant",
    "default_fixed_qparams_range_neg1to1_fake_quant",
    "default_fused_act_fake_quant",
    "default_fused_per_channel_wt_fake_quant",
    "default_fused_wt_fake_quant",
    "default_groupwise_fake_quant",
    "default_histogram_fake_quant",
    "default_per_channel_weight_fake_quant",
    "default_symmetric_fixed_qparams_fake_quant",
    "default_weight_fake_quant",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
]

_UINT8 = {"dtype": torch.quint8, "quant_min": 0, "quant_max": 255}
_INT8 = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}
_INT8_NARROW = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127, "eps": 2**-12}
_SYMMETRIC = {"observer": MovingAverageMinMaxObserver, "qscheme": torch.per_tensor_symmetric}
_SYMMETRIC_CHANNELS = {"observer": MovingAveragePerChannelMinMaxObserver, "qscheme": torch.per_channel_symmetric}
_AFFINE = {"qscheme": torch.per_tensor_affine, "reduce_range": True}

default_fake_quant = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, **_UINT8, **_AFFINE)
"""Activations: uint8 per tensor in 7 bits, an average of the range."""

default_histogram_fake_quant = FakeQuantize.with_args(observer=HistogramObserver, **_UINT8, **_AFFINE)
"""Activations: uint8 per tensor in 7 bits, the range without outliers."""

default_dynamic_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, **_UINT8, is_dynamic=True, averaging_constant=1
)
"""Activations: uint8 per tensor, the range of each tensor alone, as at run time."""

default_weight_fake_quant = FakeQuantize.with_args(**_SYMMETRIC, **_INT8, reduce_range=False)
"""Weights: int8 per tensor, symmetric. The range is an average over the last weights: they move while training."""

default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    **_SYMMETRIC_CHANNELS, **_INT8, reduce_range=False, ch_axis=0
)
"""Weights: int8 per channel of dimension 0, symmetric."""

_EMBEDDING = {
    "observer": MovingAveragePerChannelMinMaxObserver,
    "qscheme": torch.per_channel_affine_float_qparams,
    "ch_axis": 0,
    "averaging_constant": 1,
}

default_embedding_fake_quant = FakeQuantize.with_args(**_EMBEDDING, **_UINT8)
"""Tables of embeddings: uint8 per row with a real-valued zero point, the range of today's weights."""

default_embedding_fake_quant_4bit = FakeQuantize.with_args(**_EMBEDDING, dtype=torch.quint4x2)
"""Tables of embeddings: uint4 per row with a real-valued zero point."""

default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, **_UINT8)
"""Activations: uint8 per tensor, on the fused kernel."""

default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(**_SYMMETRIC, **_INT8)
"""`default_weight_fake_quant` on the fused kernel."""

default_fused_per_channel_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(**_SYMMETRIC_CHANNELS, **_INT8)
"""`default_per_channel_weight_fake_quant` on the fused kernel."""

fused_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(**_SYMMETRIC, **_INT8_NARROW)
"""`default_fused_wt_fake_quant` without -128, and with a smallest scale that XNNPACK can requantize with."""

fused_per_channel_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    **_SYMMETRIC_CHANNELS, **_INT8_NARROW
)
"""`default_fused_per_channel_wt_fake_quant` without -128, and with that smallest scale."""

_FIXED = {"dtype": torch.quint8, "quant_min": 0, "quant_max": 255}

default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=FixedQParamsObserver.with_args(scale=2.0 / 256.0, zero_point=128, **_FIXED)
)
"""Outputs in [-1, 1), such as those of tanh."""

default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=FixedQParamsObserver.with_args(scale=1.0 / 256.0, zero_point=0, **_FIXED)
)
"""Outputs in [0, 1), such as those of sigmoid and softmax."""

default_symmetric_fixed_qparams_fake_quant = default_fixed_qparams_range_neg1to1_fake_quant
"""Another name of it."""

default_affine_fixed_qparams_fake_quant = default_fixed_qparams_range_0to1_fake_quant
"""Another name of it."""

_BLOCKS = {"observer": AffineQuantizedMinMaxObserver}
_BLOCKS_OF_WEIGHTS = {**_BLOCKS, "mapping_type": MappingType.SYMMETRIC, "target_dtype": torch.int8}

default_affine_fake_quant = AffineFakeQuantize.with_args(
    **_BLOCKS, mapping_type=MappingType.ASYMMETRIC, target_dtype=torch.uint8, granularity=PerTensor()
)
"""Activations: uint8 per tensor, the range of everything seen."""

default_groupwise_fake_quant = AffineFakeQuantize.with_args(**_BLOCKS_OF_WEIGHTS, granularity=PerGroup(128))
"""Weights: int8 per 128 neighbours in a row, symmetric."""

default_affine_per_axis_fake_quant = AffineFakeQuantize.with_args(**_BLOCKS_OF_WEIGHTS, granularity=PerAxis(0))
"""Weights: int8 per channel of dimension 0, symmetric."""
