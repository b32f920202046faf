"""Modules that watch tensors and answer with qparams. Put in by `prepare`, read by `convert`.

MinMaxObserver, PerChannelMinMaxObserver                              the range of everything seen
MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver    an average of the range over batches
PerGroupMinMaxObserver                                                the range of each group in a row
HistogramObserver                                                     the range without outliers
FixedQParamsObserver                                                  qparams that are known beforehand
PlaceholderObserver                                                   a configuration, for run-time qparams
"""

from __future__ import annotations

from .base import ObserverBase, UniformQuantizationObserverBase
from .factory import PartialWrapper
from .fixed import FixedQParamsObserver
from .histogram import HistogramObserver
from .min_max import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from .per_group import PerGroupMinMaxObserver
from .placeholder import PerTokenPlaceholderObserver, PlaceholderObserver

__all__ = [
    "FixedQParamsObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObserverBase",
    "PartialWrapper",
    "PerChannelMinMaxObserver",
    "PerGroupMinMaxObserver",
    "PerTokenPlaceholderObserver",
    "PlaceholderObserver",
    "UniformQuantizationObserverBase",
]
