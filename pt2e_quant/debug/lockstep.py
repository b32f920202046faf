"""Lockstep: a float graph and a quantized one run side by side, and each pair of values is shown and dropped.

Of a quantized op three values are known: that of the float graph, the one computed from quantized inputs, and `own`,
computed from the inputs that the float graph has: what of the error is its own. No value is kept longer than its last
reader needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..arguments import written_values
from ..fake_quantize import is_fake_quantizer
from ..graph.attributes import attribute
from ..graph.constants import Constants
from ..graph.module import is_guard
from ..graph.run import Held, flat_inputs, on_batch, readers_of, writes_to_buffer
from .pairs import Pairs, observes

__all__ = ["Lockstep", "Seen"]


@dataclass(frozen=True)
class Seen:
    """One tensor of the float graph, and what the quantized graph makes of it.

    exact, found: float32 or what the model computes in; found is what readers in integers see
    own:          the same from exact inputs; `exact` itself where nothing is quantized between the two
    """

    pair: tuple[Node, Node]
    exact: Tensor
    found: Tensor
    own: Tensor


class Lockstep:
    """Runs two graphs over batches.

    Args:
        exact, found: the float graph and the quantized one; see `pairs.join`. Buffers that they write to stay written.
        pairs: their nodes.
        own: compute each op from exact inputs too.
    """

    def __init__(self, exact: GraphModule, found: GraphModule, pairs: Pairs, *, own: bool = True) -> None:
        self._exact, self._found, self._pairs = exact, found, pairs
        self._own = own
        self._engines = {gm: Interpreter(gm) for gm in (exact, found)}
        self._constants = Constants(found)
        self._shown: dict[Node, list[Node]] = {}
        for twin, node in pairs.shown:
            self._shown.setdefault(node, []).append(twin)
        self._unchanged = {node for node, twin in pairs.values.items() if self._same_call(node, twin)}

    def run(self, batch: Any, see: Callable[[Seen], None]) -> tuple[list[Any], list[Any]]:
        """Run both on one batch; the outputs of both, flat. `see` is given every pair, in the order of `pairs.shown`.

        Raises:
            CalibrationError: a graph fails on the batch.
        """
        run = _Run(self, batch)
        with torch.no_grad(), on_batch(self._found, "the quantized graph"):
            for node in self._found.graph.nodes:
                run.step(node, see)
        return run.outputs()

    def _readers(self) -> Counter[Node]:
        """How often each value of the float graph is read, by itself and by the quantized one."""
        readers = readers_of(self._exact)
        for node in self._found.graph.nodes:
            readers.update(
                self._pairs.values[source] for source in node.all_input_nodes if source in self._pairs.values
            )
            readers.update(self._shown.get(node, ()))
        return readers

    def _same_call(self, node: Node, twin: Node) -> bool:
        """Whether a node is the same op on the same inputs as its float twin: exact inputs give the exact value."""
        if node.op != "call_function" or node.target is not twin.target:
            return False
        return self._same((node.args, dict(node.kwargs)), (twin.args, dict(twin.kwargs)))

    def _same(self, ours: Any, theirs: Any) -> bool:
        if isinstance(ours, Node):
            if not isinstance(theirs, Node):
                return False
            twin = self._pairs.values.get(ours)
            return (twin is theirs and ours not in self._pairs.grids) or self._same_constant(ours, theirs)
        if isinstance(ours, tuple | list):
            return isinstance(theirs, tuple | list) and len(ours) == len(theirs) and all(map(self._same, ours, theirs))
        if isinstance(ours, dict):
            return (
                isinstance(theirs, dict)
                and ours.keys() == theirs.keys()
                and all(self._same(value, theirs[key]) for key, value in ours.items())
            )
        return type(ours) is type(theirs) and bool(ours == theirs)

    def _same_constant(self, ours: Node, theirs: Node) -> bool:
        if ours.op != "get_attr" or theirs.op != "get_attr":
            return False
        one, other = attribute(self._found, str(ours.target)), attribute(self._exact, str(theirs.target))
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.data_ptr() == other.data_ptr()


class _Run:
    """One batch."""

    def __init__(self, lockstep: Lockstep, batch: Any) -> None:
        self._of, self._pairs = lockstep, lockstep._pairs
        exact, found = lockstep._exact, lockstep._found
        self._inputs = {gm: iter(flat_inputs(gm, batch)) for gm in (exact, found)}
        self._exact = Held(lockstep._readers())
        self._found, self._alone = Held(readers_of(found)), Held(readers_of(found))
        self._ahead = iter(exact.graph.nodes)
        self._reached: set[Node] = set()

    def step(self, node: Node, see: Callable[[Seen], None]) -> None:
        """Compute one node of the quantized graph, and what of the float graph it is compared with."""
        if node in self._of._constants:
            return  # computed for its first reader: weights that are dequantized all at once would fill the memory
        if is_guard(node):
            self._release_sources(node)
            return
        self._reach(self._pairs.parts.get(node))
        self._found[node] = self._compute(self._of._found, node, self._value)
        if self._of._own and not writes_to_buffer(node):
            self._compute_alone(node)
        for twin in self._of._shown.get(node, ()):
            see(self._seen(twin, node))
            self._exact.release(twin)
        self._release_sources(node)

    def _value(self, node: Node) -> Any:
        """What a node of the quantized graph gave; a constant is computed now."""
        pending = [] if node in self._found else [node]
        while pending:
            missing = [source for source in pending[-1].all_input_nodes if source not in self._found]
            if missing:
                pending += missing
                continue
            current = pending.pop()
            if current not in self._found:
                self._found[current] = self._compute(self._of._found, current, self._found.__getitem__)
                self._release_sources(current)
        return self._found[node]

    def outputs(self) -> tuple[list[Any], list[Any]]:
        """Those of both graphs, flat."""
        ends = [gm.graph.output_node() for gm in (self._of._exact, self._of._found)]
        self._reach(ends[0])
        return pytree.tree_leaves(self._exact[ends[0]]), pytree.tree_leaves(self._found[ends[1]])

    def _reach(self, wanted: Node | None) -> None:
        """Run the float graph up to a node."""
        while wanted is not None and wanted not in self._reached:
            node = next(self._ahead)
            self._reached.add(node)
            if not is_guard(node):
                self._exact[node] = self._compute(self._of._exact, node, self._exact.__getitem__)
            for source in (*node.all_input_nodes, node):
                self._exact.release(source)

    def _compute_alone(self, node: Node) -> None:
        """What a node of the quantized graph gives for exact inputs, where that is not what it gave."""
        twin = self._pairs.parts.get(node)
        if node in self._of._unchanged:
            self._alone[node] = self._exact[twin]  # type: ignore[index]  # it has one
        elif any(self._is_exact(source, twin) or source in self._alone for source in node.all_input_nodes):
            self._alone[node] = self._compute(self._of._found, node, lambda source: self._given(source, twin))

    def _is_exact(self, source: Node, twin: Node | None) -> bool:
        """Whether an input is the value of another float node: what rounds a value takes the op's own instead."""
        return source in self._pairs.values and self._pairs.values[source] is not twin

    def _given(self, source: Node, twin: Node | None) -> Any:
        if not self._is_exact(source, twin):
            return self._alone[source] if source in self._alone else self._value(source)
        return self._as_held(source)

    def _as_held(self, node: Node) -> Any:
        """The exact value in the form in which a node holds it."""
        value = self._exact[self._pairs.values[node]]
        grid = self._pairs.grids.get(node)
        return value if grid is None else grid.quantize(value)

    def _seen(self, twin: Node, node: Node) -> Seen:
        grid = self._pairs.grids.get(node)
        found, own = self._found[node], self._alone.get(node, self._found[node])
        if grid is not None:
            found, own = grid.dequantize(found), grid.dequantize(own)
        return Seen((twin, node), self._exact[twin], found, own)

    def _release_sources(self, node: Node) -> None:
        for source in node.all_input_nodes:
            if source in self._pairs.values:
                self._exact.release(self._pairs.values[source])
        for source in (*node.all_input_nodes, node):
            self._found.release(source)
            self._alone.release(source)

    def _compute(self, gm: GraphModule, node: Node, lookup: Callable[[Node], Any]) -> Any:
        if node.op == "placeholder":
            return next(self._inputs[gm])
        copied = [] if writes_to_buffer(node) else written_values(node)
        written = {source: lookup(source).clone() for source in copied}
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: written.get(source, lookup(source)))
        if observes(gm, node) and not is_fake_quantizer(attribute(gm, str(node.target))):
            return args[0]
        if node.target is _PER_CHANNEL:
            return _in_parts(*args, **kwargs)  # type: ignore[arg-type]  # as the op's schema has them
        return getattr(self._of._engines[gm], node.op)(node.target, args, kwargs)


_PER_CHANNEL = torch.ops.quantized_decomposed.dequantize_per_channel.default
_PART = 64


def _in_parts(codes: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int, *rest: Any, **named: Any) -> Tensor:
    """What the op gives, some channels at a time: it takes 12 bytes for each code besides its result."""
    result: Tensor | None = None
    for start in range(0, codes.shape[axis], _PART):
        size = min(_PART, codes.shape[axis] - start)
        some = [None if one is None else one[start : start + size] for one in (scales, zero_points)]
        part = _PER_CHANNEL(codes.narrow(axis, start, size), *some, axis, *rest, **named)
        result = torch.empty_like(codes, dtype=part.dtype) if result is None else result
        result.narrow(axis, start, size).copy_(part)
    return _PER_CHANNEL(codes, scales, zero_points, axis, *rest, **named) if result is None else result
