"""What sharing costs: the range of each tensor of a group beside the range that they share; and how its values spread.

An observer that several tensors share keeps one range for all of them, so who needs how much of it is not known from
calibration, and keeping it there would cost every run. It is measured on request, by running data once more through a
copy of the prepared model in which watchers stand in the place of the observers; calibrating costs what it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph.attributes import attribute
from ..graph.run import batches_of
from ..pt2e.histograms import with_histograms
from ..pt2e.observed import QParams, read_observer, read_qparams, with_qparams
from ..pt2e.record import GroupRecord, Record, SiteRange
from ..qparams import affine_qparams, min_max
from .output_errors import MeasuredOutputs
from .stand_ins import watched, with_stand_ins

__all__ = ["measure_ranges"]

_SAMPLE = 10_000

Key = tuple[str, str]
"""Path of an observer, name of the node whose value it is called on."""


class _Watcher(nn.Module):
    """Keeps the smallest and largest value and the spread of each call, and returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: tuple[float, float] | None = None
        self.spreads: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.numel():
            low, high = (float(end) for end in min_max(x))
            self.ends = (low, high) if self.ends is None else (min(low, self.ends[0]), max(high, self.ends[1]))
            self.spreads += _spread(x)
        return x


def _spread(x: Tensor) -> list[float]:
    """The median distance from the median, in a sample, of values that differ from it; zeros of a relu may not."""
    values = x.detach().flatten().float()
    values = values[:: -(-len(values) // _SAMPLE)]
    distances = (values - values.median()).abs()
    distances = distances[distances > 0]
    return [float(distances.median())] if len(distances) else []


def measure_ranges(prepared: GraphModule, record: Record, data: Iterable[Any]) -> Record:
    """The record with the errors of the outputs, and with ranges and qparams of the groups that have one static scale.

    Args:
        prepared: a calibrated model; its state stays as it is.
        data: batches, as `graph.run.batches_of` takes them.

    Raises:
        CalibrationError: `data` is no collection of batches, or there is none in it.
    """
    watchers: dict[Key, _Watcher] = {}

    def watch(name: str, call: Node) -> nn.Module:
        return watchers.setdefault((name, watched(call)), _Watcher())

    twin = with_stand_ins(prepared, {group.observer for group in record.groups}, watch)
    readings = {group.observer: read_observer(attribute(prepared, group.observer)) for group in record.groups}
    ranged = {name: read_qparams(reading) for name, reading in readings.items() if reading.has_range}
    outputs = MeasuredOutputs(prepared, record, readings)
    with torch.no_grad():
        for args, kwargs in batches_of(data, "explain(prepared, data)"):
            outputs.include(twin(*args, **kwargs), args, kwargs)
    groups = [_with_ranges(group, ranged.get(group.observer), watchers) for group in record.groups]
    return with_histograms(replace(record, groups=groups, output_errors=outputs.found()), prepared)


def _with_ranges(group: GroupRecord, qparams: QParams | None, watchers: dict[Key, _Watcher]) -> GroupRecord:
    group = with_qparams(group, qparams)
    if group.range is None or qparams is None:
        return group
    return replace(group, own=tuple(_own_ranges(group.observer, qparams, watchers)))


def _own_ranges(observer: str, qparams: QParams, watchers: dict[Key, _Watcher]) -> Iterator[SiteRange]:
    for (name, tensor), watcher in watchers.items():
        if name == observer and watcher.ends is not None:
            limits = qparams.quant_min, qparams.quant_max
            scheme: dict[str, Any] = {"dtype": qparams.dtype, "symmetric": qparams.symmetric, "eps": qparams.eps}
            scale, _ = affine_qparams(*watcher.ends, *limits, **scheme)
            spread = sum(watcher.spreads) / len(watcher.spreads) if watcher.spreads else None
            yield SiteRange(tensor, *watcher.ends, float(scale), spread)
