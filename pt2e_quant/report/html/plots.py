"""What the plots of the page draw, as plain values: errors by layer, and ranges beside the grids that hold them."""

from __future__ import annotations

import math
from typing import Any

from ...debug.comparison import Comparison
from ...pt2e.record import GroupRecord, Record

__all__ = ["plot_data"]


def plot_data(record: Record, comparison: Comparison | None) -> dict[str, Any]:
    """By plot: lists of the same length, one value a tensor, and None where a number is not finite.

    errors: of each tensor that was compared, in the order of the graph, own and inherited SQNR in dB
    ranges: of each tensor with a known range, where in its grid its values lie: 0 the smallest integer, 1 the largest
    histograms: by observer, with the ends of the grid, where values are clipped
    """
    return {"errors": _errors(comparison), "ranges": _ranges(record.groups), "histograms": _histograms(record.groups)}


def _errors(comparison: Comparison | None) -> dict[str, list[Any]]:
    rows = () if comparison is None else comparison.nodes
    return {
        "nodes": [row.node for row in rows],
        "own": [_finite(row.own) for row in rows],
        "inherited": [_finite(row.inherited) for row in rows],
    }


def _ranges(groups: list[GroupRecord]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"tensors": [], "low": [], "high": [], "values": [], "grids": []}
    for group in groups:
        if group.range is None:
            continue
        start, end = group.range
        for tensor, low, high in _seen(group):
            found["tensors"].append(tensor)
            found["low"].append((low - start) / (end - start))
            found["high"].append((high - start) / (end - start))
            found["values"].append([low, high])
            found["grids"].append([start, end])
    return found


def _seen(group: GroupRecord) -> list[tuple[str, float, float]]:
    """The range of each tensor where it was measured, else of all that share the observer, named by the first."""
    if group.own:
        return [(own.tensor, own.low, own.high) for own in group.own]
    if group.histogram is None:
        return []
    more = f" and {len(group.members) - 1} more" if len(group.members) > 1 else ""
    return [(f"{group.members[0]}{more}", group.histogram.low, group.histogram.high)]


def _histograms(groups: list[GroupRecord]) -> dict[str, dict[str, Any]]:
    return {
        group.observer: {
            "low": group.histogram.low,
            "high": group.histogram.high,
            "counts": group.histogram.counts,
            "clip": group.range,
            "title": ", ".join(group.members[:4]) + (", ..." if len(group.members) > 4 else ""),
        }
        for group in groups
        if group.histogram is not None
    }


def _finite(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None
