"""What observers counted, in a few equal bins, for the record: a report draws it beside the ends of the grid.

Before this: calibration. After it: the record of the converted graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .record import Histogram, Record

__all__ = ["with_histograms"]

_BINS = 64  # what a plot as wide as a page can show


def with_histograms(record: Record, prepared: GraphModule) -> Record:
    """The record, with the histogram of each group whose observer keeps counts (`ObserverBase.counted`)."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    groups = [replace(group, histogram=_histogram(modules.get(group.observer))) for group in record.groups]
    return replace(record, groups=groups)


def _histogram(observer: Any) -> Histogram | None:
    inner = getattr(observer, "activation_post_process", observer)
    counted = getattr(inner, "counted", None)
    found = counted() if callable(counted) else None
    return None if found is None else _in_equal_bins(*found)


def _in_equal_bins(values: Tensor, counts: Tensor) -> Histogram | None:
    """Counts of values (both 1-d, values ascending) in bins of equal width from the first value to the last."""
    if not len(values):
        return None
    low, high = float(values[0]), float(values[-1])
    width = (high - low) / _BINS
    places = ((values - low) / width).long().clamp(max=_BINS - 1) if width else torch.zeros_like(counts).long()
    summed = torch.bincount(places, weights=counts.double(), minlength=_BINS)
    return Histogram(low, high, tuple(map(int, summed.round().tolist())))
