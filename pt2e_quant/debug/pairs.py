"""join: which node of a quantized graph holds the value of which node of the float graph that it was made from.

Nodes find each other by provenance: the handles of `generate_numeric_debug_handle` where both graphs carry them, else
the names that they had in the program that was exported first. After this: `lockstep` runs both graphs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..fake_quantize import is_fake_quantizer
from ..graph.attributes import attribute
from ..graph.constants import Constants
from ..graph.handles import handle_of
from ..graph.module import is_guard
from ..grid import Grid
from ..observer import ObserverBase
from ..ops import CHOOSE_QPARAMS, is_dequantize, is_quantize
from ..pt2e.record import record_of
from ..where import computed_name

__all__ = ["Pairs", "join", "observes"]

Key = str | int | tuple[Any, int]


@dataclass
class Pairs:
    """Nodes of a float graph and of a quantized one.

    values:  by node of the quantized graph that holds the value of a float node (rounded, or as codes): that float node
    parts:   the same for every node that helps to compute it or to round it
    grids:   what the codes stand for, of nodes in `values` that hold codes
    shown:   (float node, node that holds its value as the readers in integers see it), in the order of the quantized
             graph; a tensor that is rounded in two ways has two
    rounded: those nodes in `shown` that hold what is left after rounding, or what an observer lets through
    missing: nodes of the quantized graph that compute a float tensor for which no float node was found
    """

    values: dict[Node, Node] = field(default_factory=dict)
    parts: dict[Node, Node] = field(default_factory=dict)
    grids: dict[Node, Grid] = field(default_factory=dict)
    shown: list[tuple[Node, Node]] = field(default_factory=list)
    rounded: set[Node] = field(default_factory=set)
    missing: list[Node] = field(default_factory=list)


def join(exact: GraphModule, found: GraphModule) -> Pairs:
    """Pair the nodes of a float graph with those of a prepared or converted graph, or of an integer reference."""
    by_handle = all(any(handle_of(node) is not None for node in gm.graph.nodes) for gm in (exact, found))
    return _Join(found, dict(_keyed(exact, by_handle)), by_handle).run()


def observes(gm: GraphModule, node: Node) -> bool:
    """Whether a node calls an observer or a fake quantizer."""
    if node.op != "call_module" or is_guard(node):
        return False
    module = attribute(gm, str(node.target))
    return isinstance(module, ObserverBase) or is_fake_quantizer(module) or hasattr(module, "calculate_qparams")


class _Join:
    """The quantized graph on its way to pairs; `wanted` are the float nodes by their keys."""

    def __init__(self, found: GraphModule, wanted: dict[Key, Node], by_handle: bool) -> None:
        self._gm, self._wanted, self._by_handle = found, wanted, by_handle
        record = record_of(found)
        self._codes = {} if record is None or record.representation is None else record.representation.grids
        self._nodes = list(_computed(found))
        self._rounded = {node: self._source(node) for node in self._nodes}
        self._pairs = Pairs()

    def run(self) -> Pairs:
        for node in self._nodes:
            self._find_part(node)
        last = {twin: node for node, twin in self._pairs.parts.items() if self._may_hold(node, twin)}
        for node in self._nodes:
            self._find_value(node, last)
        self._pairs.shown = list(self._shown())
        self._pairs.rounded = {node for _, node in self._pairs.shown if self._way(node)[0]}
        return self._pairs

    def _source(self, node: Node) -> Node | None:
        """The tensor that a node rounds, observes, turns into codes and back, or chooses qparams of; None for an op."""
        first = node.args[0] if node.args else None
        if not isinstance(first, Node):
            return None
        of_qparams = node.target is operator.getitem and first.target in CHOOSE_QPARAMS
        rounds = is_quantize(node) or is_dequantize(node) or node.target in CHOOSE_QPARAMS or of_qparams
        return first if rounds or observes(self._gm, node) else None

    def _find_part(self, node: Node) -> None:
        source = self._rounded[node]
        if source is not None:
            twin = self._pairs.parts.get(source)
        else:
            keys = reversed(_keys(node, self._by_handle))
            twin = next((self._wanted[key] for key in keys if key in self._wanted), None)
        if twin is not None:
            self._pairs.parts[node] = twin
        elif source is None and _is_float(node):
            self._pairs.missing.append(node)

    def _may_hold(self, node: Node, twin: Node) -> bool:
        """Whether an op gives one tensor like that of a float node. Of several that do, the last has its value."""
        one, other = node.meta.get("val"), twin.meta.get("val")
        if self._rounded[node] is not None or not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return False
        same_kind = one.is_floating_point() == other.is_floating_point() or node.name in self._codes
        return same_kind and list(map(str, one.shape)) == list(map(str, other.shape))

    def _find_value(self, node: Node, last: dict[Node, Node]) -> None:
        twin, source = self._pairs.parts.get(node), self._rounded[node]
        if twin is None or (last.get(twin) is not node if source is None else not self._passes_on(node, source)):
            return
        self._pairs.values[node] = twin
        grid = self._codes.get(node.name) or (Grid.of(node) if is_quantize(node) else None)
        if grid is not None:
            self._pairs.grids[node] = grid

    def _passes_on(self, node: Node, source: Node) -> bool:
        """Whether a rounded tensor, or its codes, is still the value of a float node."""
        if is_quantize(node):  # codes of one static scale; with others, only what they are turned back into counts
            return source in self._pairs.values and Grid.of(node) is not None
        if is_dequantize(node) and is_quantize(source):
            return source.args[0] in self._pairs.values
        return source in self._pairs.values and (is_dequantize(node) or observes(self._gm, node))

    def _shown(self) -> Iterator[tuple[Node, Node]]:
        ways: dict[Node, dict[tuple[int, str], Node]] = {}
        for node, twin in self._pairs.values.items():
            if _is_float(twin):
                ways.setdefault(twin, {}).setdefault(self._way(node), node)
        for twin, found in ways.items():
            closest = max(rank for rank, _ in found)
            yield from ((twin, node) for (rank, _), node in found.items() if rank == closest)

    def _way(self, node: Node) -> tuple[int, str]:
        """How close a node is to what readers in integers see, and how it was rounded."""
        if is_dequantize(node):
            return 3, _qparams(node) + _qparams(node.args[0])
        return (2 if node in self._pairs.grids else 1 if observes(self._gm, node) else 0), ""


def _computed(gm: GraphModule) -> Iterator[Node]:
    """The inputs of a graph, and the nodes that depend on them."""
    constants = Constants(gm)
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "call_function", "call_module") and not is_guard(node) and node not in constants:
            yield node


def _keyed(gm: GraphModule, by_handle: bool) -> Iterator[tuple[Key, Node]]:
    """Of nodes that one op was taken apart into, the last comes last: it has the value of that op."""
    for node in _computed(gm):
        for key in _keys(node, by_handle):
            yield key, node


def _keys(node: Node, by_handle: bool) -> list[Key]:
    """The first is the node's own; the second says which part of another node's value it is."""
    handle = handle_of(node) if by_handle else None
    keys: list[Key] = [computed_name(node) if handle is None else handle]
    if node.target is operator.getitem and isinstance(node.args[0], Node) and isinstance(node.args[1], int):
        keys.append((_keys(node.args[0], by_handle)[0], node.args[1]))
    return keys


def _qparams(node: Any) -> str:
    """The arguments after the tensor in words; qparams that are computed at run time are all alike."""
    rest = [one.target if isinstance(one, Node) else one for one in node.args[1:]]
    return f"{node.target}{rest}"


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
