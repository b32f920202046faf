"""The plan: every quantization point of an annotated graph, who shares with whom, and why the rest stays float.

Made before the graph is touched, from `node.meta["quantization_annotation"]` alone. `prepare` only carries it out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import AnnotationError, SharingError
from ..graph.attributes import attribute
from ..graph.constants import Constants
from ..graph.module import is_guard
from ..graph.nested import carried
from ..graph.values import is_quantizable
from ..meta import UNUSED_RULES_KEY
from ..quantizer.overwritten import Overwritten, overwritten_reason
from ..quantizer.reading import AnnotationReading, SpecReading, read_annotations
from ..reasons import Refusal
from ..specs import EdgeOrNode
from ..where import locate
from .decisions import PLAN, decisions
from .record import Decision
from .sharing import Resolved, share

__all__ = ["Group", "Plan", "Point", "make_plan"]


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

    spec: SpecReading
    members: list[EdgeOrNode] = field(default_factory=list)
    dropped: dict[EdgeOrNode, SpecReading] = field(default_factory=dict)

    @property
    def derived(self) -> bool:
        return self.spec.kind == "derived"


@dataclass(frozen=True)
class Plan:
    """points are in graph order; groups are numbered in the order of their first point.

    group_of: number of the group that each annotated site belongs to
    refusals: why the plan leaves out what an annotation asks for, by the node that carries it
    """

    points: list[Point]
    groups: list[Group]
    group_of: dict[EdgeOrNode, int]
    decisions: list[Decision]
    refusals: Mapping[Node, list[Refusal]]
    unused_rules: list[str]


@checked(AnnotationError)
def make_plan(gm: GraphModule, quantizer_name: str) -> Plan:
    """Read the annotations of a graph; each graph nested in it has a plan of its own.

    Raises:
        AnnotationError: an annotation does not fit the graph.
        SharingError: tensors that must share qparams cannot, or one parameter would be stored as different integers.
    """
    annotations = read_annotations(gm)
    wanted = _Sites(gm, annotations)
    resolved = share(wanted.specs, wanted.implicit, {result: start for start, result in carried(gm)}, wanted.tied)
    _check_stored_once(gm, resolved)
    points, groups, group_of = _points(gm, resolved)
    for site, spec in wanted.specs.items():
        if not spec.is_made_like(groups[group_of[site]].spec):
            groups[group_of[site]].dropped[site] = spec
    decided = decisions(gm, quantizer_name, annotations, resolved, wanted.refusals)
    return Plan(points, groups, group_of, decided, wanted.refusals, list(gm.meta.get(UNUSED_RULES_KEY, ())))


class _Sites:
    """What the annotations of a graph ask for, as far as it can be quantized.

    specs:    spec of every annotated site, in graph order
    implicit: the edges that may share with other uses of their tensor
    tied:     those of them that share with other inputs of their op
    refusals: why the others must stay as they are, by annotated node
    """

    def __init__(self, gm: GraphModule, annotations: Mapping[Node, AnnotationReading]) -> None:
        self.specs: dict[EdgeOrNode, SpecReading] = {}
        self.implicit: set[EdgeOrNode] = set()
        self.tied: set[EdgeOrNode] = set()
        self.refusals: dict[Node, list[Refusal]] = {}
        self._written = Overwritten(gm.graph)
        for node, annotation in annotations.items():
            for source in node.all_input_nodes:
                if source in annotation.inputs and self._can_quantize(source, node, annotation.inputs[source]):
                    self.specs[(source, node)] = annotation.inputs[source]
                    if annotation.shares_implicitly:
                        self.implicit.add((source, node))
                        if annotation.ties_inputs:
                            self.tied.add((source, node))
            if annotation.output is not None and self._can_quantize(node, node, annotation.output):
                self.specs[node] = annotation.output

    def _can_quantize(self, tensor: Node, annotated: Node, spec: SpecReading) -> bool:
        """False, with the reason kept, for what must stay as it is; an error for values that are no tensor at all.

        False without a reason where the spec asks for the floating-point dtype that the tensor has: for nothing.
        """
        alone = annotated is not tensor
        write = self._written.write_missed(tensor, annotated) if alone else self._written.write(tensor)
        if write is not None:
            self._refuse(annotated, overwritten_reason(tensor, write), "overwritten")
            return False
        value = _value(tensor, annotated)
        if tensor.meta.get("val") is not None and not is_quantizable(tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            reason = f"{tensor.name} is {dtype}, only float32, float16 and bfloat16 are quantized"
            self._refuse(annotated, reason, "dtype" if value.dtype.is_floating_point else "non_float")
            return False
        return not (spec.is_cast and spec.dtype == value.dtype)

    def _refuse(self, annotated: Node, reason: str, code: str) -> None:
        self.refusals.setdefault(annotated, []).append(Refusal(PLAN, reason, code))


def _value(tensor: Node, annotated: Node) -> Tensor:
    """What is known of a tensor. Parameters are tensors even where export recorded nothing; branches are none."""
    value = tensor.meta.get("val")
    if value is None and tensor.op == "get_attr":
        value = attribute(tensor.graph.owning_module, str(tensor.target))  # type: ignore[arg-type]
    if isinstance(value, Tensor):
        return value
    what = "has no recorded value (meta['val'])" if value is None else f"is a {_kind(value)}, not one tensor"
    raise AnnotationError(
        f"{tensor.name} {what}, so it cannot be quantized:\n{locate(annotated)}\n"
        "  For an op with several outputs annotate the getitem nodes that take them apart; for a missing value export "
        "the model again."
    )


def _kind(value: object) -> str:
    return "nested graph" if isinstance(value, GraphModule) else type(value).__name__


def _check_stored_once(gm: GraphModule, resolved: Resolved) -> None:
    """A parameter that several ops read, such as that of an embedding tied to a head, is stored as one tensor."""
    uses: dict[str, dict[EdgeOrNode, tuple[Node, SpecReading]]] = defaultdict(dict)
    for site, (root, spec) in resolved.items():
        if not isinstance(site, Node) and site[0].op == "get_attr" and not spec.is_dynamic:
            uses[str(site[0].target)].setdefault(root, (site[1], spec))
    for name, groups in uses.items():
        if len(groups) > 1:
            sites = "\n".join(f"{spec}, for\n{locate(node)}" for node, spec in groups.values())
            raise SharingError(
                f"parameter {name!r} would be stored {len(groups)} times, each time as other integers:\n{sites}\n"
                "  Give all its uses one spec, keep all but one in float, or untie them in the model: "
                "other.weight = nn.Parameter(weight.detach().clone())"
            )


def _points(gm: GraphModule, resolved: Resolved) -> tuple[list[Point], list[Group], dict[EdgeOrNode, int]]:
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
