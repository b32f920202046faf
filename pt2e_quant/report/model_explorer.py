"""A record as node data for Google's Model Explorer, which shows it as columns and colours on the float graph.

    torch.export.save(exported, "model.pt2")
    report.save("report")                     # among others, report.model_explorer.json
    $ model-explorer model.pt2                # then: upload per-node data, report.model_explorer.json

Format: `node_data_builder.py` of ai-edge-model-explorer, class ModelNodeData: {graph id: {name, results: {node id:
{value, bgColor}}, gradient, ...}}. Its adapter for .pt2 files calls the graph 'graph', and nodes as the exported
program does. Nodes that a quantizer's transform made count for the node that they stem from.
"""

from __future__ import annotations

from typing import Any, Literal

from ..pt2e.record import Decision, Record
from .text import bits_lost

__all__ = ["Column", "node_data"]

Column = Literal["decision", "bits_lost"]

_GRAPH = "graph"
_QUANTIZED, _INSIDE, _FLOAT, _FOLDED = "#a5d6a7", "#dcedc8", "#ffcc80", "#e0e0e0"


def node_data(record: Record, column: Column) -> dict[str, Any]:
    """The content of one node-data file; see `Report.to_model_explorer`."""
    if column == "decision":
        data = {"results": _decisions(record), "showExpandedSummaryOnGroupNode": True}
    else:
        gradient = [{"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#e57373"}]
        data = {"results": _costs(record), "gradient": gradient}
    return {_GRAPH: {"name": f"{record.quantizer}: {column.replace('_', ' ')}", **data}}


def _decisions(record: Record) -> dict[str, Any]:
    results: dict[str, Any] = {fold.node: _result(f"folded into {fold.into}", _FOLDED) for fold in record.folded}
    for decision in _top_level(record):
        results.setdefault(decision.origin, _decision(decision))
    return results


def _decision(decision: Decision) -> dict[str, Any]:
    if not decision.quantized:
        return _result(f"float: {decision.code}", _FLOAT)
    spec = decision.output or next(iter(decision.inputs.values()), None)
    if spec is None:
        return _result(f"inside {decision.rule}", _INSIDE)
    return _result(f"{spec.split()[0].rstrip(',')}: {decision.rule}", _QUANTIZED)


def _costs(record: Record) -> dict[str, Any]:
    lost = {
        own.tensor: max(0.0, bits_lost(own, group))
        for group in record.groups
        if len(group.own) > 1
        for own in group.own
    }
    costs: dict[str, Any] = {}
    for decision in _top_level(record):
        if decision.node in lost:
            costs.setdefault(decision.origin, {"value": round(lost[decision.node], 2)})
    return costs


def _top_level(record: Record) -> list[Decision]:
    """Model Explorer's adapter shows no nested graphs; names of their nodes have dots here."""
    return [decision for decision in record.decisions if "." not in decision.node]


def _result(value: str, color: str) -> dict[str, Any]:
    return {"value": value, "bgColor": color}
