"""What became of each op of an annotated graph, and why: the part of a plan that reports show."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch.fx import GraphModule, Node

from ..graph.module import is_guard
from ..graph.nested import graphs
from ..graph.values import is_float_tensor
from ..ops import BATCH_NORM, EMBEDDING, RNN, RNN_CELL
from ..quantizer.reading import AnnotationReading
from ..reasons import WAYS_OUT, Refusal, refusals
from ..specs import EdgeOrNode
from ..where import exported_name, locate_all, module_path, node_id, source_line, target_name
from .record import Decision
from .rounded_indices import rounded_indices
from .sharing import Resolved

__all__ = ["PLAN", "decisions", "nothing_quantized", "opaque_decisions"]

PLAN = "plan"
"""Who refuses what an annotation asks for and the graph does not allow."""

_CALLS = ("call_function", "call_module", "call_method")
"""Exported graphs have the first alone; symbolic ones have modules and methods, too."""

_WITH_PARTS = frozenset((*RNN, *RNN_CELL, *EMBEDDING, *BATCH_NORM))


def decisions(
    gm: GraphModule,
    quantizer: str,
    annotations: Mapping[Node, AnnotationReading],
    resolved: Resolved,
    refused: Mapping[Node, list[Refusal]],
) -> list[Decision]:
    """The fate of every op that computes a float tensor, or was annotated.

    Args:
        resolved: the sites that are quantized.
        refused: reasons of the plan, which come after those that quantizers left on the nodes.
    """
    return [
        _decision(node, quantizer, annotations.get(node), resolved, [*refusals(node), *refused.get(node, ())])
        for node in gm.graph.nodes
        if _is_decided(node, annotations)
    ]


def opaque_decisions(gm: GraphModule) -> list[Decision]:
    """The ops in the bodies of higher-order ops of unknown form: left in float, with that reason."""
    quantized = {path for path, _ in graphs(gm, opaque=False)}
    reason = "inside {}, the nested graph of an operator whose graphs are not quantized"
    return [
        replace(decision, reason=reason.format(path), code="nested_graph")
        for path, part in graphs(gm)
        if path not in quantized
        for decision in decisions(part, "", {}, {}, {})
    ]


def nothing_quantized(parts: Iterable[GraphModule], decided: list[Decision], quantizer: str) -> str:
    """What to say when no op of these graphs is annotated."""
    nodes = {node_id(node): node for part in parts for node in part.graph.nodes}
    reasons: dict[tuple[str, str], list[Node]] = defaultdict(list)
    for decision in decided:
        if decision.node in nodes:
            reasons[decision.reason or "", decision.code or ""].append(nodes[decision.node])
    count = sum(map(len, reasons.values()))
    lines = [f"nothing would be quantized: {quantizer} annotated none of the {count} float ops of this graph."]
    for (reason, code), examples in sorted(reasons.items(), key=lambda item: -len(item[1]))[:6]:
        lines += [f"  {len(examples)} x {reason}, such as", locate_all(examples[:1])]
        lines += [f"    {WAYS_OUT[code]}"] if code in WAYS_OUT else []
    lines.append(
        "  Or widen the selectors or the rules; prepare_pt2e(..., allow_empty=True), or prepare_fx with None for every "
        "qconfig, prepares a graph without observers."
    )
    return "\n".join(lines)


def _is_decided(node: Node, annotations: Mapping[Node, AnnotationReading]) -> bool:
    if node.op not in _CALLS or _is_part(node) or is_guard(node):
        return False
    return is_float_tensor(node) or node in annotations or node.target in _WITH_PARTS


def _is_part(node: Node) -> bool:
    """What is taken out of an RNN, of bags, of a batch norm or of a module's tuple shares their fate."""
    if node.target is not operator.getitem:
        return False
    whole = node.all_input_nodes[0]
    return whole.target in _WITH_PARTS or (isinstance(whole.meta.get("val"), tuple) and whole.op == "call_module")


def _decision(
    node: Node, quantizer: str, annotation: AnnotationReading | None, resolved: Resolved, refused: list[Refusal]
) -> Decision:
    sources = [source for source in node.all_input_nodes if (source, node) in resolved]
    inputs = {source.name: str(resolved[(source, node)][1]) for source in sources}
    output = str(resolved[node][1]) if node in resolved else None
    rule = None if annotation is None else annotation.rule
    inside = rule is not None and annotation is not None and annotation.is_claimed  # of a pattern, without a spec
    quantized = bool(inputs) or output is not None or inside
    is_claimed = annotation is not None and annotation.is_claimed
    reason, code = (None, None) if quantized else _reason(node, quantizer, is_claimed, refused)
    return Decision(
        node=node_id(node),
        op=target_name(node),
        quantized=quantized,
        rule=(rule or quantizer) if quantized else None,
        reason=None if reason is None else reason + _stored_twice(node, resolved) + rounded_indices(node, resolved),
        inputs=inputs,
        output=output,
        module=module_path(node),
        source=source_line(node),
        code=code,
        origin=exported_name(node),
        overlaps=tuple(found.by for found in refused if quantized and found.code == "already_annotated"),
        left=tuple(found.reason for found in refused if quantized and found.by == PLAN),
    )


def _reason(node: Node, quantizer: str, is_claimed: bool, refused: list[Refusal]) -> tuple[str, str]:
    """All reasons for leaving a node alone, and the code of the first."""
    if node.target in (*RNN, *RNN_CELL):
        tried = [refusal.reason for refusal in refused if refusal.code == "composite_op"]
        whole = (
            'captured as one op, whose linears no quantizer sees; take it apart: prepare_pt2e(..., decompose={"rnn"})'
        )
        return (*tried, whole)[0], "composite_op"
    if not refused and is_claimed:
        return f"{quantizer} marked it as annotated, without a spec for integers", "config_none"
    if not refused:
        return f"{quantizer} did not annotate it", "not_annotated"
    return "; ".join(dict.fromkeys(refusal.reason for refusal in refused)), refused[0].code


def _stored_twice(node: Node, resolved: Mapping[EdgeOrNode, object]) -> str:
    """What to add where a float op reads a parameter that others read as integers, as an embedding tied to a head."""
    for source in node.all_input_nodes:
        others = [user.name for user in source.users if source.op == "get_attr" and (source, user) in resolved]
        if others:
            return f"; so {source.target} is stored in float here and as integers for {', '.join(others)}"
    return ""
