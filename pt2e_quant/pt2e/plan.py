"""The plan: every quantization point of an annotated graph, who shares with whom, and why the rest stays float.

Made before the graph is touched, from `node.meta["quantization_annotation"]` alone. `prepare` only carries it out.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import AnnotationError, SharingError
from ..graph.attributes import attribute
from ..graph.constants import Constants
from ..graph.module import is_guard
from ..graph.nested import carried, graphs
from ..graph.values import is_float_tensor, is_quantizable
from ..meta import ANNOTATION_KEY, UNUSED_RULES_KEY
from ..ops import EMBEDDING, RNN
from ..quantizer.overwritten import overwritten, overwritten_reason
from ..reasons import refusals, refuse
from ..specs import EdgeOrNode
from ..where import exported_name, locate, locate_all, module_path, node_id, source_line
from .record import Decision
from .sharing import share
from .spec_fields import describe_spec, same_observer, spec_kind

__all__ = ["Group", "Plan", "Point", "make_plan", "nothing_quantized", "opaque_decisions"]

_WITH_PARTS = frozenset((*RNN, *EMBEDDING))


@dataclass(frozen=True)
class Point:
    """One tensor at its producer, and the consumers that see it quantized.

    source:   the point whose quantized value this one quantizes again, None for the producer's own value
    constant: the producer is a parameter or computed from parameters, so it needs no calibration
    """

    producer: Node
    consumers: tuple[Node, ...]
    group: int
    source: Point | None = None
    constant: bool = False


@dataclass
class Group:
    """Sites that share one observer, and the spec that it is made from.

    dropped: members whose own spec asked for the same integers with another observer, which is not used
    """

    spec: Any
    members: list[EdgeOrNode] = field(default_factory=list)
    dropped: dict[EdgeOrNode, Any] = field(default_factory=dict)

    @property
    def derived(self) -> bool:
        return spec_kind(self.spec) == "derived"


@dataclass(frozen=True)
class Plan:
    """points are in graph order; groups are numbered in the order of their first point.

    group_of: number of the group that each annotated site belongs to
    """

    points: list[Point]
    groups: list[Group]
    group_of: dict[EdgeOrNode, int]
    decisions: list[Decision]
    unused_rules: list[str]


def make_plan(gm: GraphModule, quantizer_name: str) -> Plan:
    """Read the annotations of a graph; each graph nested in it has a plan of its own.

    Raises:
        AnnotationError: an annotation does not fit the graph.
        SharingError: tensors that must share qparams cannot, or one parameter would be stored as different integers.
    """
    specs, implicit = _sites(gm)
    resolved = share(specs, implicit, {result: start for start, result in carried(gm)})
    _check_stored_once(gm, resolved)
    points, groups, group_of = _points(gm, resolved)
    for site, spec in specs.items():
        if spec_kind(spec) == "observed" and not same_observer(spec, groups[group_of[site]].spec):
            groups[group_of[site]].dropped[site] = spec
    decisions = [_decision(node, quantizer_name, resolved) for node in gm.graph.nodes if _is_decided(node)]
    return Plan(points, groups, group_of, decisions, list(gm.meta.get(UNUSED_RULES_KEY, ())))


def _sites(gm: GraphModule) -> tuple[dict[EdgeOrNode, Any], set[EdgeOrNode]]:
    """Spec of every annotated site in graph order, and the edges that may share with other uses of their tensor."""
    specs: dict[EdgeOrNode, Any] = {}
    implicit: set[EdgeOrNode] = set()
    written = overwritten(gm.graph)
    for node in gm.graph.nodes:
        annotation = node.meta.get(ANNOTATION_KEY)
        if annotation is None:
            continue
        wanted = dict(annotation.input_qspec_map or {})
        _check_inputs(node, wanted)
        for source in node.all_input_nodes:
            spec = wanted.get(source)
            if spec is not None and _can_quantize(source, node, spec, written):
                specs[(source, node)] = spec
                if getattr(annotation, "allow_implicit_sharing", True):
                    implicit.add((source, node))
        if annotation.output_qspec is not None and _can_quantize(node, node, annotation.output_qspec, written):
            specs[node] = annotation.output_qspec
    return specs, implicit


def _check_inputs(node: Node, wanted: dict[Node, Any]) -> None:
    stale = [key for key in wanted if key not in node.all_input_nodes]
    if stale:
        names = ", ".join(str(getattr(key, "name", key)) for key in stale)
        raise AnnotationError(
            f"the annotation of this node names {names}, which is not among its inputs "
            f"({', '.join(source.name for source in node.all_input_nodes)}):\n{locate(node)}\n"
            "  The graph changed after it was annotated, or the key was taken from another graph. Annotate last, with "
            "the nodes of the graph that annotate() was given."
        )


def _can_quantize(tensor: Node, annotated: Node, spec: Any, written: dict[Node, Node]) -> bool:
    """False, with the reason recorded, for what must stay as it is; an error for values that are no tensor at all."""
    if tensor in written:
        refuse(annotated, "plan", overwritten_reason(tensor, written[tensor]), "overwritten")
        return False
    value = tensor.meta.get("val")
    if value is None and tensor.op == "get_attr":
        value = attribute(tensor.graph.owning_module, str(tensor.target))  # type: ignore[arg-type]
        if isinstance(value, Tensor):
            return True  # parameters are tensors even where export recorded nothing; bodies of branches are none
    if not isinstance(value, Tensor):
        what = "has no recorded value (meta['val'])" if value is None else f"is a {_kind(value)}, not one tensor"
        raise AnnotationError(
            f"{tensor.name} {what}, so it cannot be quantized:\n{locate(annotated)}\n"
            "  For an op with several outputs annotate the getitem nodes that take them apart; for a missing value "
            "export the model again."
        )
    if not is_quantizable(tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        reason = f"{tensor.name} is {dtype}, only float32, float16 and bfloat16 are quantized"
        refuse(annotated, "plan", reason, "dtype" if value.dtype.is_floating_point else "non_float")
        spec_kind(spec)
        return False
    return True


def _kind(value: object) -> str:
    return "nested graph" if isinstance(value, GraphModule) else type(value).__name__


def _check_stored_once(gm: GraphModule, resolved: dict[EdgeOrNode, tuple[EdgeOrNode, Any]]) -> None:
    """A parameter that several ops read, such as that of an embedding tied to a head, is stored as one tensor."""
    uses: dict[str, dict[EdgeOrNode, tuple[Node, Any]]] = defaultdict(dict)
    for site, (root, spec) in resolved.items():
        if not isinstance(site, Node) and site[0].op == "get_attr" and not getattr(spec, "is_dynamic", False):
            uses[str(site[0].target)].setdefault(root, (site[1], spec))
    for name, groups in uses.items():
        if len(groups) > 1:
            sites = "\n".join(f"{describe_spec(spec)}, for\n{locate(node)}" for node, spec in groups.values())
            raise SharingError(
                f"parameter {name!r} would be stored {len(groups)} times, each time as other integers:\n{sites}\n"
                "  Give all its uses one spec, keep all but one in float, or untie them in the model: "
                "other.weight = nn.Parameter(weight.detach().clone())"
            )


def _points(
    gm: GraphModule, resolved: dict[EdgeOrNode, tuple[EdgeOrNode, Any]]
) -> tuple[list[Point], list[Group], dict[EdgeOrNode, int]]:
    constants = Constants(gm)
    edges: dict[Node, list[tuple[Node, Node]]] = defaultdict(list)
    for site in resolved:
        if not isinstance(site, Node):
            edges[site[0]].append(site)
    numbers: dict[EdgeOrNode, int] = {}
    points: list[Point] = []
    groups: list[Group] = []

    def number(site: EdgeOrNode) -> int:
        root, spec = resolved[site]
        if root not in numbers:
            numbers[root] = len(groups)
            groups.append(Group(spec))
        return numbers[root]

    for node in gm.graph.nodes:
        constant = node in constants
        output = None
        if node in resolved:
            consumers = tuple(user for user in node.users if not is_guard(user))
            output = Point(node, consumers, number(node), constant=constant)
            points.append(output)
        by_group: dict[int, list[Node]] = defaultdict(list)
        for edge in edges.get(node, ()):
            if output is None or number(edge) != output.group:
                by_group[number(edge)].append(edge[1])
        points += [Point(node, tuple(users), group, output, constant) for group, users in by_group.items()]
    for site in resolved:
        groups[number(site)].members.append(site)
    return points, groups, {site: numbers[root] for site, (root, _) in resolved.items()}


def _is_decided(node: Node) -> bool:
    """Ops that the report accounts for: everything that computes a float tensor, or was annotated."""
    if node.op != "call_function" or _is_part(node):
        return False
    return is_float_tensor(node) or ANNOTATION_KEY in node.meta or node.target in _WITH_PARTS


def _is_part(node: Node) -> bool:
    """What is taken out of an RNN or of bags shares their fate."""
    return node.target is operator.getitem and node.all_input_nodes[0].target in _WITH_PARTS


def _decision(node: Node, quantizer: str, resolved: dict[EdgeOrNode, tuple[EdgeOrNode, Any]]) -> Decision:
    annotation = node.meta.get(ANNOTATION_KEY)
    edges = [(source, node) for source in node.all_input_nodes if (source, node) in resolved]
    inputs = {source.name: describe_spec(resolved[(source, node)][1]) for source, _ in edges}
    output = describe_spec(resolved[node][1]) if node in resolved else None
    claimed = annotation is not None and (
        getattr(annotation, "_annotated", False) or bool(inputs) or output is not None
    )
    part_of_pattern = claimed and getattr(annotation, "rule", None) is not None
    quantized = bool(inputs) or output is not None or part_of_pattern
    reason, code = (None, None) if quantized else _reason(node, quantizer)
    return Decision(
        node=node_id(node),
        op=str(node.target),
        quantized=quantized,
        rule=(getattr(annotation, "rule", None) or quantizer) if quantized else None,
        reason=None if reason is None else reason + _stored_twice(node, resolved),
        inputs=inputs,
        output=output,
        module=module_path(node),
        source=source_line(node),
        code=code,
        origin=exported_name(node),
        overlaps=tuple(found.by for found in refusals(node) if quantized and found.code == "already_annotated"),
    )


def opaque_decisions(gm: GraphModule) -> list[Decision]:
    """The ops in the bodies of higher-order ops of unknown form: left in float, with that reason."""
    quantized = {path for path, _ in graphs(gm, opaque=False)}
    reason = "inside {}, the nested graph of an operator whose graphs are not quantized"
    return [
        replace(_decision(node, "", {}), reason=reason.format(path), code="nested_graph")
        for path, part in graphs(gm)
        if path not in quantized
        for node in part.graph.nodes
        if _is_decided(node)
    ]


def _reason(node: Node, quantizer: str) -> tuple[str, str]:
    """All reasons that were recorded for leaving a node alone, and the code of the first."""
    found = refusals(node)
    if node.target in RNN:
        tried = [refusal.reason for refusal in found if refusal.code == "composite_op"]
        whole = 'captured as one op, whose linears no quantizer sees; unroll it: prepare_pt2e(..., decompose={"rnn"})'
        return (*tried, whole)[0], "composite_op"
    if not found and getattr(node.meta.get(ANNOTATION_KEY), "_annotated", False):
        return f"{quantizer} marked it as annotated, without a spec", "config_none"
    if not found:
        return f"{quantizer} did not annotate it", "not_annotated"
    return "; ".join(dict.fromkeys(refusal.reason for refusal in found)), found[0].code


def _stored_twice(node: Node, resolved: dict[EdgeOrNode, tuple[EdgeOrNode, Any]]) -> str:
    """What to add where a float op reads a parameter that others read as integers, as an embedding tied to a head."""
    for source in node.all_input_nodes:
        others = [user.name for user in source.users if source.op == "get_attr" and (source, user) in resolved]
        if others:
            return f"; so {source.target} is stored in float here and as integers for {', '.join(others)}"
    return ""


def nothing_quantized(parts: Iterable[GraphModule], quantizer: str) -> str:
    """What to say when no op of these graphs is annotated."""
    floats = [node for gm in parts for node in gm.graph.nodes if _is_decided(node)]
    reasons: dict[str, list[Node]] = defaultdict(list)
    for node in floats:
        reasons[_reason(node, quantizer)[0]].append(node)
    lines = [f"nothing would be quantized: {quantizer} annotated none of the {len(floats)} float ops of this graph."]
    for reason, nodes in sorted(reasons.items(), key=lambda item: -len(item[1]))[:6]:
        lines.append(f"  {len(nodes)} x {reason}, such as")
        lines.append(locate_all(nodes[:1]))
    lines.append(
        "  Widen the selectors or the rules; prepare_pt2e(..., allow_empty=True) prepares a graph without observers."
    )
    return "\n".join(lines)
