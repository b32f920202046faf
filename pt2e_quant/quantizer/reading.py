"""The door for annotations: specs of any package are read here, once; inside it they are values of ours.

A Quantizer may build the specs and annotations of torch.ao, torchao or its own. `read_annotations` looks at each of
their fields one time, and refuses what fits nowhere with the node that carries it. Nothing else asks a spec for a field
that it may not have, or unwraps Class.with_args(...).

Before this: the quantizer's annotate(). After it: the plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch.fx import GraphModule, Node

from ..errors import AnnotationError
from ..meta import ANNOTATION_KEY
from ..specs import EdgeOrNode, integer_range, is_per_channel, is_symmetric, range_of
from ..where import describe_site, locate

__all__ = [
    "AnnotationReading",
    "Constructor",
    "SpecKind",
    "SpecReading",
    "input_specs",
    "is_annotated",
    "output_spec",
    "read_annotations",
    "read_constructor",
    "read_spec",
]

SpecKind = Literal["shared", "derived", "fixed", "observed"]

_FIELDS = ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "is_dynamic")


# --- constructors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Constructor:
    """What makes an observer or fake quantizer.

    call: to be called with the fields of a spec
    made: the class (or function) that it comes down to, inside Class.with_args(...) and functools.partial
    positional, arguments: those fixed on the way
    """

    call: Any
    made: Any
    positional: tuple[Any, ...]
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """'HistogramObserver' for the class, for Class.with_args(...) and for a partial of it."""
        return str(getattr(self.made, "__name__", type(self.made).__name__))

    @property
    def is_grouped(self) -> bool:
        """It makes observers of groups in a row, which share a scale."""
        return hasattr(self.made, "group_size")

    @property
    def rounds(self) -> bool:
        """It makes fake quantizers."""
        return isinstance(self.made, type) and hasattr(self.made, "enable_fake_quant")

    @property
    def scheme(self) -> Any:
        """The scheme in Class.with_args(scheme=...), None without one."""
        return self.arguments.get("scheme")

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for constructors that make the same."""
        made = self.made if isinstance(self.made, Hashable) else id(self.made)
        keywords = tuple((name, _argument_key(value)) for name, value in sorted(self.arguments.items()))
        return made, tuple(map(_argument_key, self.positional)), keywords


def read_constructor(constructor: Any) -> Constructor:
    """Unwrap Class.with_args(...), of any package, and functools.partial; what is neither makes itself."""
    made: Any = constructor
    positional: tuple[Any, ...] = ()
    arguments: dict[str, Any] = {}
    while isinstance(inside := _partial(made), functools.partial):
        positional, arguments = (*inside.args, *positional), {**inside.keywords, **arguments}
        made = inside.func
    return Constructor(constructor, made, positional, arguments)


def _partial(constructor: Any) -> Any:
    return constructor if isinstance(constructor, functools.partial) else getattr(constructor, "p", None)


def _argument_key(value: Any) -> Hashable:
    if isinstance(_partial(value), functools.partial):
        return read_constructor(value).key
    return value if isinstance(value, (int, float, str, type, bool, type(None))) else repr(value)


# --- specs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SpecReading:
    """How one tensor is quantized, as the engine sees it.

    kind:         which of the four kinds of spec it is
    given:        the fields that its author filled in, as constructors of observers take them
    dtype, qscheme, axis, is_dynamic: of these fields; None where a kind has no such field
    bounds:       smallest and largest q, those of dtype where the author left them out; None for a floating-point type
    constructor:  what makes the observer, of kind 'observed'
    shares_with:  the other tensor, of kind 'shared'
    scale, zero_point: of kind 'fixed'
    derived_from, derive: of kind 'derived'
    """

    kind: SpecKind
    given: Mapping[str, Any]
    bounds: tuple[int, int] | None = None
    constructor: Constructor | None = None
    shares_with: EdgeOrNode | None = None
    scale: float | None = None
    zero_point: int | None = None
    derived_from: tuple[EdgeOrNode, ...] = ()
    derive: Callable[..., Any] | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        return self.given.get("dtype")

    @property
    def qscheme(self) -> torch.qscheme | None:
        return self.given.get("qscheme")

    @property
    def axis(self) -> int | None:
        return self.given.get("ch_axis")

    @property
    def is_dynamic(self) -> bool:
        return bool(self.given.get("is_dynamic"))

    @property
    def is_cast(self) -> bool:
        """It asks for another floating-point dtype and no grid, unless the observer writes what it likes."""
        made = None if self.constructor is None else self.constructor.made
        return self.kind == "observed" and self.bounds is None and not hasattr(made, "convert")

    @functools.cached_property
    def key(self) -> Hashable:
        """Specs with equal keys ask for the same integers, so that two uses of one tensor may share an observer.

        How the range of a tensor is found (class and arguments of a static observer) does not count: quantizing a
        tensor to the same integers twice, with two guesses at its range, would only lose accuracy.
        """
        common = tuple(self.given.get(name) for name in _FIELDS)
        if self.kind == "fixed":
            return self.kind, common, self.scale, self.zero_point
        if self.kind == "derived":
            return self.kind, common, self.derived_from, self.derive
        return self.kind, common, self.constructor.key if self._says_more_than_a_range() else None  # type: ignore[union-attr]

    def _says_more_than_a_range(self) -> bool:
        """True where dtype, bounds, qscheme and axis do not say all: qparams at run time, blocks, own q/dq."""
        constructor = self.constructor
        if constructor is None:
            return False
        own = hasattr(constructor.made, "convert") or constructor.is_grouped
        return self.is_dynamic or own or constructor.scheme is not None

    def is_made_like(self, other: SpecReading) -> bool:
        """Both make observers of one class from the same arguments; True as well when `other` makes none."""
        if self is other or self.constructor is None or other.constructor is None:
            return True
        return self.constructor.key == other.constructor.key

    def __str__(self) -> str:
        return self.text

    @functools.cached_property
    def text(self) -> str:
        """One line, for example 'int8 [-127, 127] per channel of dim 0, symmetric, PerChannelMinMaxObserver'."""
        if self.shares_with is not None:
            return f"shared with {describe_site(self.shares_with)}"
        if self.constructor is not None and self.constructor.scheme is not None:
            return f"{self.constructor.scheme}, {self.constructor.name}"
        return ", ".join((*self._grid_words(), self._origin()))

    def _grid_words(self) -> list[str]:
        word = str(self.dtype).removeprefix("torch.")
        if self.bounds is None:
            return [word]
        word += f" [{self.bounds[0]}, {self.bounds[1]}]" + (" dynamic" if self.is_dynamic else "")
        word += f" per channel of dim {self.axis}" if is_per_channel(self.qscheme) else " per tensor"
        return [word, "symmetric"] if is_symmetric(self.qscheme) else [word]

    def _origin(self) -> str:
        if self.constructor is not None:
            return self.constructor.name
        if self.scale is not None:
            return f"fixed scale {self.scale:.6g}, zero point {self.zero_point}"
        return f"derived from {', '.join(map(describe_site, self.derived_from))}"


def read_spec(spec: Any, carrier: Node | None = None) -> SpecReading:
    """A spec of any package as a value of ours.

    Args:
        spec: an object with the fields of one of the four kinds of spec.
        carrier: the node whose annotation holds it, for errors.

    Raises:
        AnnotationError: it has the fields of none, or a field holds what does not fit there.
    """
    if hasattr(spec, "edge_or_node"):
        return SpecReading("shared", {}, shares_with=_site(spec.edge_or_node, "a shared spec", carrier))
    kind = _kind(spec, carrier)
    given = {name: value for name in _FIELDS if (value := getattr(spec, name, None)) is not None}
    bounds = _bounds(spec, given, carrier)
    if kind == "fixed":
        return SpecReading(kind, given, bounds, scale=float(spec.scale), zero_point=int(spec.zero_point))
    if kind == "derived":
        sources = tuple(_site(site, "derived_from", carrier) for site in spec.derived_from)
        return SpecReading(kind, given, bounds, derived_from=sources, derive=spec.derive_qparams_fn)
    return SpecReading(kind, given, bounds, read_constructor(spec.observer_or_fake_quant_ctr))


def _kind(spec: Any, carrier: Node | None) -> SpecKind:
    if hasattr(spec, "derive_qparams_fn"):
        return "derived"
    if hasattr(spec, "observer_or_fake_quant_ctr"):
        return "observed"
    if hasattr(spec, "scale") and hasattr(spec, "zero_point"):
        return "fixed"
    raise AnnotationError(
        f"{spec!r} is not a quantization spec: it has neither observer_or_fake_quant_ctr, scale and zero_point, "
        f"edge_or_node, nor derive_qparams_fn{_at(carrier)}"
    )


def _bounds(spec: Any, given: Mapping[str, Any], carrier: Node | None) -> tuple[int, int] | None:
    dtype = given.get("dtype")
    if not isinstance(dtype, torch.dtype):
        raise AnnotationError(f"dtype is {dtype!r}, where a torch.dtype is needed, in {spec!r}{_at(carrier)}")
    for name in ("quant_min", "quant_max"):
        if not isinstance(given.get(name, 0), int):
            raise AnnotationError(
                f"{name} of {spec!r} is {given[name]!r}, where a whole number is needed{_at(carrier)}"
            )
    return range_of(dtype, given.get("quant_min"), given.get("quant_max")) if integer_range(dtype) else None


def _site(site: Any, what: str, carrier: Node | None) -> EdgeOrNode:
    if isinstance(site, Node) or _is_edge(site):
        return site
    if isinstance(site, list) and _is_edge(tuple(site)):
        return (site[0], site[1])
    raise AnnotationError(
        f"{what} names {site!r}, which is not a tensor of the graph: it takes a node, or (producer, consumer) for one "
        f"use of a tensor{_at(carrier)}"
    )


def _is_edge(site: Any) -> TypeGuard[tuple[Node, Node]]:
    return isinstance(site, tuple) and len(site) == 2 and all(isinstance(end, Node) for end in site)


def _at(carrier: Node | None) -> str:
    return "" if carrier is None else f"\n  annotated on\n{locate(carrier)}"


# --- annotations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AnnotationReading:
    """What a Quantizer says of one node.

    inputs:            the spec of each input that is to be quantized
    output:            that of the output
    shares_implicitly: its inputs may use the qparams of their producer where the specs are equal
    ties_inputs:       its inputs have one scale, so those that others read with their own are requantized
    is_claimed:        the quantizer marked the node as its own, whether with a spec or without
    rule:              what made the annotation, where that says so
    """

    inputs: Mapping[Node, SpecReading]
    output: SpecReading | None
    shares_implicitly: bool
    ties_inputs: bool
    is_claimed: bool
    rule: str | None


def read_annotations(gm: GraphModule) -> dict[Node, AnnotationReading]:
    """Of each annotated node of a graph what its annotation says, in graph order.

    Raises:
        AnnotationError: an annotation is none, names what is no input of its node, or holds what is no spec.
    """
    known: dict[int, SpecReading] = {}  # a quantizer uses few specs for many nodes

    def read(spec: Any, node: Node) -> SpecReading:
        if id(spec) not in known:
            known[id(spec)] = read_spec(spec, node)
        return known[id(spec)]

    found = {}
    for node in gm.graph.nodes:
        annotation = node.meta.get(ANNOTATION_KEY)
        if annotation is None:
            continue
        wanted = _checked_inputs(node, annotation)
        found[node] = AnnotationReading(
            inputs={source: read(spec, node) for source, spec in wanted.items() if spec is not None},
            output=None if annotation.output_qspec is None else read(annotation.output_qspec, node),
            shares_implicitly=bool(getattr(annotation, "allow_implicit_sharing", True)),
            ties_inputs=bool(getattr(annotation, "ties_inputs", False)),
            is_claimed=is_annotated(node),
            rule=getattr(annotation, "rule", None),
        )
    return found


def _checked_inputs(node: Node, annotation: Any) -> Mapping[Node, Any]:
    if not (hasattr(annotation, "input_qspec_map") and hasattr(annotation, "output_qspec")):
        raise AnnotationError(
            f'node.meta["{ANNOTATION_KEY}"] holds {annotation!r}, where a QuantizationAnnotation is needed:\n'
            f"{locate(node)}\n  Wrap the spec: QuantizationAnnotation(output_qspec=spec, _annotated=True)."
        )
    wanted = annotation.input_qspec_map or {}
    if not isinstance(wanted, Mapping):
        raise AnnotationError(
            f"input_qspec_map is {wanted!r}, where a dictionary from input nodes to specs is needed:\n{locate(node)}"
        )
    stale = [key for key in wanted if key not in node.all_input_nodes]
    if stale:
        names = ", ".join(str(getattr(key, "name", key)) for key in stale)
        raise AnnotationError(
            f"the annotation of this node names {names}, which is not among its inputs "
            f"({', '.join(source.name for source in node.all_input_nodes)}):\n{locate(node)}\n"
            "  The graph changed after it was annotated, or the key was taken from another graph. Annotate last, with "
            "the nodes of the graph that annotate() was given."
        )
    return wanted


# --- while a quantizer is still annotating ----------------------------------------------------------------------------


def is_annotated(node: Node) -> bool:
    """A quantizer marked the node as its own."""
    return bool(getattr(node.meta.get(ANNOTATION_KEY), "_annotated", False))


def output_spec(node: Node) -> Any:
    """The spec of its output as the quantizer wrote it, None without one."""
    return getattr(node.meta.get(ANNOTATION_KEY), "output_qspec", None)


def input_specs(node: Node) -> Mapping[Node, Any]:
    """The specs of its inputs as the quantizer wrote them."""
    return getattr(node.meta.get(ANNOTATION_KEY), "input_qspec_map", None) or {}
