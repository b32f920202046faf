"""Modules that watch tensors and answer with qparams. Put in by `prepare`, read by `convert`.

MinMaxObserver, PerChannelMinMaxObserver                              the range of everything seen
MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver    an average of the range over batches
PerGroupMinMaxObserver, PerGroupMSEObserver                           the range of each group in a row; its best part
MSEObserver, LpNormObserver, PercentileObserver, EntropyObserver      exact counts, and the range that serves them best
HistogramObserver                                                     the reference's histogram and its range
AffineQuantizedMinMaxObserver, ...MovingAverageMinMaxObserver         one range per block: PerAxis, PerGroup, PerBlock
FixedQParamsObserver                                                  qparams that are known beforehand
PlaceholderObserver, AffineQuantizedPlaceholderObserver, NoopObserver a configuration, for run-time qparams and casts
ReuseInputObserver                                                    the qparams of the input
RecordingObserver                                                     all tensors, for debugging
default_observer, default_weight_observer, ...                        the reference's recipes

Which one to take: docs/observers.md has their errors on data of several kinds. Every observer has `merge(other)`.
"""

from __future__ import annotations

from .affine import (
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMovingAverageMinMaxObserver,
    AffineQuantizedObserverBase,
    AffineQuantizedPlaceholderObserver,
    MappingType,
    ZeroPointDomain,
)
from .base import ObserverBase, UniformQuantizationObserverBase
from .defaults import (
    default_affine_fixed_qparams_observer,
    default_debug_observer,
    default_dynamic_quant_observer,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_float_qparams_observer,
    default_float_qparams_observer_4bit,
    default_histogram_observer,
    default_observer,
    default_per_channel_weight_observer,
    default_placeholder_observer,
    default_reuse_input_observer,
    default_symmetric_fixed_qparams_observer,
    default_weight_observer,
    per_channel_weight_observer_range_neg_127_to_127,
    weight_observer_range_neg_127_to_127,
)
from .distribution import DistributionObserver, EntropyObserver, LpNormObserver, MSEObserver, PercentileObserver
from .factory import PartialWrapper
from .fixed import FixedQParamsObserver
from .granularity import Granularity, PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken, get_block_size
from .histogram import HistogramObserver
from .min_max import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from .per_group import PerGroupMinMaxObserver, PerGroupMSEObserver
from .placeholder import NoopObserver, PerTokenPlaceholderObserver, PlaceholderObserver, ReuseInputObserver
from .recording import RecordingObserver
from .state import get_observer_state_dict, load_observer_state_dict

__all__ = [
    "AffineQuantizedMinMaxObserver",
    "AffineQuantizedMovingAverageMinMaxObserver",
    "AffineQuantizedObserverBase",
    "AffineQuantizedPlaceholderObserver",
    "DistributionObserver",
    "EntropyObserver",
    "FixedQParamsObserver",
    "Granularity",
    "HistogramObserver",
    "LpNormObserver",
    "MSEObserver",
    "MappingType",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NoopObserver",
    "ObserverBase",
    "PartialWrapper",
    "PerAxis",
    "PerBlock",
    "PerChannelMinMaxObserver",
    "PerGroup",
    "PerGroupMSEObserver",
    "PerGroupMinMaxObserver",
    "PerRow",
    "PerTensor",
    "PerToken",
    "PerTokenPlaceholderObserver",
    "PercentileObserver",
    "PlaceholderObserver",
    "RecordingObserver",
    "ReuseInputObserver",
    "UniformQuantizationObserverBase",
    "ZeroPointDomain",
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
    "get_block_size",
    "get_observer_state_dict",
    "load_observer_state_dict",
    "per_channel_weight_observer_range_neg_127_to_127",
    "weight_observer_range_neg_127_to_127",
]
