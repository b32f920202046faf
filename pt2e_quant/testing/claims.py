"""What a quantizer said of a graph, in values that can be compared between two copies of the graph.

A *claim* is a site (the output of a node, or one use of it) with the spec that an annotation gives it.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import QuantizationError
from ..graph.values import is_float_tensor
from ..meta import ANNOTATION_KEY
from ..pt2e.sharing import share
from ..pt2e.spec_fields import constructor_name, describe_site, spec_kind
from ..specs import EdgeOrNode

__all__ = ["Claim", "Said", "claims", "fingerprint", "is_quantizable", "spec_text", "what_was_said"]

_FIELDS = ("ch_axis", "is_dynamic", "scale", "zero_point")
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
        annotation = node.meta.get(ANNOTATION_KEY)
        if annotation is None:
            continue
        for tensor, spec in (getattr(annotation, "input_qspec_map", None) or {}).items():
            if spec is not None:
                yield Claim(node, tensor, spec)
        if getattr(annotation, "output_qspec", None) is not None:
            yield Claim(node, node, annotation.output_qspec)


def is_quantizable(claim: Claim) -> bool:
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
        if getattr(node.meta.get(ANNOTATION_KEY), "_annotated", False):
            said.setdefault(node.name, Said("a mark, and no spec for its output"))
    return said


def fingerprint(gm: GraphModule) -> dict[str, Said]:
    """What the claims come to, by place: the same whichever of several sites that share the others refer to.

    Two graphs with equal fingerprints are quantized alike.
    """
    found = [claim for claim in claims(gm) if is_quantizable(claim)]
    specs = {claim.site: claim.spec for claim in found}
    implicit = {
        claim.site
        for claim in found
        if not claim.is_output and getattr(claim.node.meta[ANNOTATION_KEY], "allow_implicit_sharing", True)
    }
    said = what_was_said(gm)
    try:
        resolved = share(specs, implicit)
    except QuantizationError:
        return said
    groups: dict[EdgeOrNode, list[str]] = defaultdict(list)
    for site, (root, _) in resolved.items():
        groups[root].append(describe_site(site))
    for root, group in groups.items():
        text = spec_text(resolved[root][1])
        said.update(dict.fromkeys(group, Said(text, tuple(sorted(group)))))
    return said


def spec_text(spec: Any) -> str:
    """All fields of a spec in words; functions by name, since many quantizers make them anew for each graph."""
    try:
        kind = spec_kind(spec)
    except QuantizationError:
        return repr(spec)
    if kind == "shared":
        return f"shared with {_site(spec.edge_or_node)}"
    bounds = (getattr(spec, "quant_min", None), getattr(spec, "quant_max", None))
    words = [str(spec.dtype), *([f"[{bounds[0]}, {bounds[1]}]"] if bounds != (None, None) else [])]
    words += [str(spec.qscheme)] if getattr(spec, "qscheme", None) is not None else []
    words += [f"{name}={value}" for name in _FIELDS if (value := getattr(spec, name, None)) not in (None, False)]
    if kind == "derived":
        words.append(f"derived from {', '.join(map(_site, spec.derived_from))}")
    elif kind == "observed":
        words.append(_constructor(spec.observer_or_fake_quant_ctr))
    return " ".join(words).replace("torch.", "")


def _site(site: Any) -> str:
    if isinstance(site, (tuple, list)):
        return " -> ".join(str(getattr(node, "name", node)) for node in site)
    return str(getattr(site, "name", site))


def _constructor(constructor: Any) -> str:
    inner = getattr(constructor, "p", constructor)
    keywords: dict[str, Any] = {}
    while isinstance(inner, functools.partial):
        keywords = inner.keywords | keywords
        inner = getattr(inner.func, "p", inner.func)
    shown = (f"{name}={_argument(value)}" for name, value in sorted(keywords.items()))
    return f"{constructor_name(constructor)}({', '.join(shown)})"


def _argument(value: Any) -> str:
    return _constructor(value) if hasattr(value, "p") or isinstance(value, functools.partial) else str(value)
