"""Modules that round values while training, to the grid that the converted model will have.

FakeQuantize                      an observer and the rounding to the grid that it finds
FixedQParamsFakeQuantize          qparams that are known beforehand
FusedMovingAvgObsFakeQuantize     both in one call of torch's fused kernel
LearnableFakeQuantize             scale and zero point are trained (LSQ, LSQ+)
AffineFakeQuantize                one scale per block: PerAxis, PerGroup, PerBlock, ...
PerGroupFakeQuantize              one scale per group in a row, for weights of few bits
LearnablePerGroupFakeQuantize     the same, with scales that are trained
default_...                       recipes of these that the reference has ready made
"""

from __future__ import annotations

from .affine import FakeQuantize, FixedQParamsFakeQuantize
from .base import (
    FakeQuantizeBase,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    is_fake_quantizer,
    toggle_fake_quantizers,
)
from .blocks import AffineFakeQuantize
from .defaults import (
    default_affine_fake_quant,
    default_affine_fixed_qparams_fake_quant,
    default_affine_per_axis_fake_quant,
    default_dynamic_fake_quant,
    default_embedding_fake_quant,
    default_embedding_fake_quant_4bit,
    default_fake_quant,
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_groupwise_fake_quant,
    default_histogram_fake_quant,
    default_per_channel_weight_fake_quant,
    default_symmetric_fixed_qparams_fake_quant,
    default_weight_fake_quant,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    fused_wt_fake_quant_range_neg_127_to_127,
)
from .fused import FusedMovingAvgObsFakeQuantize
from .learnable import (
    LearnableFakeQuantize,
    disable_range_learning,
    enable_range_learning,
    toggle_range_learning,
)
from .per_group import LearnablePerGroupFakeQuantize, PerGroupFakeQuantize

__all__ = [
    "AffineFakeQuantize",
    "FakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "LearnableFakeQuantize",
    "LearnablePerGroupFakeQuantize",
    "PerGroupFakeQuantize",
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
    "disable_fake_quant",
    "disable_observer",
    "disable_range_learning",
    "enable_fake_quant",
    "enable_observer",
    "enable_range_learning",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
    "is_fake_quantizer",
    "toggle_fake_quantizers",
    "toggle_range_learning",
]
