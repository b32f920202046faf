"""What a quantizer said of a graph, in values that can be compared between two copies of the graph.

A *claim* is a site (the output of a node, or one use of it) with the spec that an annotation gives it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import QuantizationError
from ..graph.values import is_float_tensor
from ..meta import ANNOTATION_KEY
from ..pt2e.sharing import share
from ..quantizer.reading import SpecReading, input_specs, is_annotated, output_spec, read_constructor, read_spec
from ..specs import EdgeOrNode
from ..where import describe_site

__all__ = ["Claim", "Said", "claims", "fingerprint", "is_claimable", "spec_text", "what_was_said"]

_SHOWN = 6


class Claim(NamedTuple):
    """node: the annotated one; tensor: an input of it, or the node itself for its output."""

    node: Node
    tensor: Any
    spec: Any

    @property
    def is_output(self) -> bool:
        return self.tensor is self.node

    @property
    def site(self) -> EdgeOrNode:
        return self.node if self.is_output else (self.tensor, self.node)

    @property
    def where(self) -> str:
        return self.node.name if self.is_output else f"{getattr(self.tensor, 'name', self.tensor)} -> {self.node.name}"


def claims(gm: GraphModule) -> Iterator[Claim]:
    """Every spec of every annotation, legal or not, in graph order."""
    for node in gm.graph.nodes:
        for tensor, spec in input_specs(node).items():
            if spec is not None:
                yield Claim(node, tensor, spec)
        if output_spec(node) is not None:
            yield Claim(node, node, output_spec(node))


def is_claimable(claim: Claim) -> bool:
    """The claimed tensor is one floating-point tensor that the node really reads or computes."""
    if not claim.is_output and claim.tensor not in claim.node.all_input_nodes:
        return False
    value = claim.tensor.meta.get("val")
    return (
        is_float_tensor(claim.tensor) if isinstance(value, Tensor) else value is None and claim.tensor.op == "get_attr"
    )


class Said(NamedTuple):
    """What holds for a site: its spec in words, and the sites that share its qparams."""

    spec: str
    together: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.together[:_SHOWN]) + (f", ... ({len(self.together)})" if self.together[_SHOWN:] else "")
        return f"{self.spec} on {shown}" if len(self.together) > 1 else self.spec


def what_was_said(gm: GraphModule) -> dict[str, Said]:
    """Each claim as it was written, by its place; of a node that is only marked as annotated, the mark."""
    said = {claim.where: Said(spec_text(claim.spec)) for claim in claims(gm)}
    for node in gm.graph.nodes:
        if is_annotated(node):
            said.setdefault(node.name, Said("a mark, and no spec for its output"))
    return said


def fingerprint(gm: GraphModule) -> dict[str, Said]:
    """What the claims come to, by place: the same whichever of several sites that share the others refer to.

    Two graphs with equal fingerprints are quantized alike.
    """
    found = [claim for claim in claims(gm) if is_claimable(claim)]
    implicit = {
        claim.site for claim in found if not claim.is_output and _annotates(claim, "allow_implicit_sharing", True)
    }
    tied = {claim.site for claim in found if claim.site in implicit and _annotates(claim, "ties_inputs", False)}
    said = what_was_said(gm)
    try:
        resolved = share({claim.site: read_spec(claim.spec) for claim in found}, implicit, tied=tied)
    except QuantizationError:
        return said
    groups: dict[EdgeOrNode, list[str]] = defaultdict(list)
    for site, (root, _) in resolved.items():
        groups[root].append(describe_site(site))
    for root, group in groups.items():
        text = _reading_text(resolved[root][1])
        said.update(dict.fromkeys(group, Said(text, tuple(sorted(group)))))
    return said


def _annotates(claim: Claim, field: str, default: bool) -> bool:
    return bool(getattr(claim.node.meta[ANNOTATION_KEY], field, default))


def spec_text(spec: Any) -> str:
    """All fields of a spec in words; functions by name, since many quantizers make them anew for each graph."""
    try:
        return _reading_text(read_spec(spec))
    except QuantizationError:
        return repr(spec)


def _reading_text(spec: SpecReading) -> str:
    if spec.shares_with is not None:
        return f"shared with {_site(spec.shares_with)}"
    low, high = spec.given.get("quant_min"), spec.given.get("quant_max")
    words = [str(spec.dtype), *([f"[{low}, {high}]"] if (low, high) != (None, None) else [])]
    words += [str(spec.qscheme)] if spec.qscheme is not None else []
    fields = {"ch_axis": spec.axis, "is_dynamic": spec.is_dynamic, "scale": spec.scale, "zero_point": spec.zero_point}
    words += [f"{name}={value}" for name, value in fields.items() if value not in (None, False)]
    if spec.derived_from:
        words.append(f"derived from {', '.join(map(_site, spec.derived_from))}")
    elif spec.constructor is not None:
        words.append(_constructor(spec.constructor.call))
    return " ".join(words).replace("torch.", "")


def _site(site: EdgeOrNode) -> str:
    return " -> ".join(node.name for node in site) if isinstance(site, tuple) else site.name


def _constructor(constructor: Any) -> str:
    read = read_constructor(constructor)
    shown = (f"{name}={_argument(value)}" for name, value in sorted(read.arguments.items()))
    return f"{read.name}({', '.join(shown)})"


def _argument(value: Any) -> str:
    return _constructor(value) if read_constructor(value).made is not value else str(value)
