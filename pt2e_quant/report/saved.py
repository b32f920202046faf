"""A record as plain values, and one from the JSON of a saved report, which is taken only when it can be one.

Whoever opens a report may trust it: all values are of the kind that the record declares, and what the texts compute
with (scales, ranges, counts) is in the range of what a model can have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..errors import CaptureError
from ..grid import Grid
from ..plain import PlainError, from_plain, parse_json, to_plain
from ..pt2e.record import GroupRecord, Histogram, Record

__all__ = ["record_from_json", "record_to_plain"]

_LEFT_OUT = ("example_inputs", "state")  # tensors


def record_to_plain(record: Record) -> dict[str, Any]:
    """Everything but tensors."""
    return {name: to_plain(value) for name, value in vars(record).items() if name not in _LEFT_OUT}


def record_from_json(text: str | bytes) -> Record:
    """The record whose plain values these are.

    Raises:
        CaptureError: the text holds something else, or numbers that no model has.
    """
    try:
        fields = parse_json(text)
        unknown = [name for name in _LEFT_OUT if isinstance(fields, dict) and name in fields]
        if unknown:
            raise PlainError(f"{', '.join(unknown)} of a model are never saved")
        record = from_plain(Record, fields)
    except PlainError as error:
        raise CaptureError(f"this is not the JSON of a report: {error}") from error
    for problem in _implausible(record):
        raise CaptureError(f"this report is damaged: {problem}")
    return record


def _implausible(record: Record) -> Iterator[str]:
    yield from _implausible_totals(record)
    for group in record.groups:
        if not _plausible_group(group):
            yield f"{group.observer} has scale {group.scale}, zero point {group.zero_point}, range {group.range}"
        if group.histogram is not None and not _plausible_histogram(group.histogram):
            yield f"{group.observer} has the histogram {group.histogram}"
        for own in group.own:
            if not (isinstance(group.scale, (int, float)) and _is_scale(own.scale) and _ordered(own.low, own.high)):
                yield f"{group.observer} has, of {own.tensor}, the range [{own.low}, {own.high}] and scale {own.scale}"
    for border in (record.inputs, record.outputs, record.buffers):
        for name, qparams in border.items():
            if not _plausible_border(qparams):
                yield f"{name} has {qparams}"


def _implausible_totals(record: Record) -> Iterator[str]:
    if record.bytes_before < 0 or (record.bytes_after or 0) < 0:
        yield f"parameters take {record.bytes_before} bytes before, {record.bytes_after} after"
    errors = record.output_errors
    if errors is not None and not all(map(math.isfinite, (errors.static, errors.dynamic, *errors.alone.values()))):
        yield f"its outputs have {errors}"


def _plausible_group(group: GroupRecord) -> bool:
    scales, zero_points = (x if isinstance(x, list) else [x] for x in (group.scale, group.zero_point))
    if len(scales) != len(zero_points) or isinstance(group.scale, list) != isinstance(group.zero_point, list):
        return False
    if group.scale is None or group.zero_point is None:
        return group.scale is group.zero_point
    return bool(scales) and all(map(_is_scale, scales)) and (group.range is None or _ordered(*group.range))


def _plausible_histogram(histogram: Histogram) -> bool:
    return _ordered(histogram.low, histogram.high) and all(count >= 0 for count in histogram.counts)


def _plausible_border(qparams: Grid) -> bool:
    whole = not qparams.dtype.is_floating_point and not qparams.dtype.is_complex
    return whole and _is_scale(qparams.scale) and qparams.quant_min <= qparams.zero_point <= qparams.quant_max


def _is_scale(scale: Any) -> bool:
    """True for positive numbers of float32."""
    return bool(2.0**-149 <= scale < 2.0**128)


def _ordered(low: float, high: float) -> bool:
    return -math.inf < low <= high < math.inf
