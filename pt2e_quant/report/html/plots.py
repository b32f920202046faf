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
    """
    return {"errors": _errors(comparison), "ranges": _ranges(record.groups)}


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
        for own in group.own:
            found["tensors"].append(own.tensor)
            found["low"].append((own.low - start) / (end - start))
            found["high"].append((own.high - start) / (end - start))
            found["values"].append([own.low, own.high])
            found["grids"].append([start, end])
    return found


def _finite(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None
