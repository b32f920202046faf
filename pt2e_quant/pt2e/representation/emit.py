"""Write integer arithmetic into a graph as if it were computed: symbols that stand for graph nodes.

`a * b + 1` on two symbols inserts aten.mul and aten.add; on tensors it computes. So a formula is written once, runs in
tests, and stands in the graph as ordinary ATen ops with their values recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...graph.attributes import free_name, insert_attribute
from ...graph.values import with_value
from ...graph.write import copy_origin

__all__ = ["Emitter", "Symbol", "call"]

aten = torch.ops.aten


class Emitter:
    """Inserts nodes before one node of a graph, with that node's origin."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._names: Iterator[str] = free_name(gm, "_integer_constant_")
        self._known: list[tuple[Tensor, str]] = []
        self.before: Node = gm.graph.output_node()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Symbol:
        """Insert a call; symbols among the arguments, also inside lists, become their nodes."""
        args, kwargs = pytree.tree_map_only(Symbol, lambda symbol: symbol.node, (args, kwargs))
        values = torch.fx.node.map_arg((args, kwargs), lambda used: used.meta.get("val"))
        return self._insert(target, args, kwargs, lambda: target(*values[0], **values[1]))

    def moved(self, target: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> Symbol:
        """Insert a call that does with integers what the node in front of which it stands does with real numbers.

        The value of that node, in another dtype, is the new one's: computing it again would invent new sizes where
        sizes depend on data.
        """

        def value() -> Any:
            def integers(t: Tensor) -> Tensor:
                return torch.empty_like(t, dtype=dtype) if t.is_floating_point() else t

            return pytree.tree_map_only(Tensor, integers, self.before.meta["val"])

        return self._insert(target, args, kwargs, value)

    def _insert(self, target: Any, args: Any, kwargs: Any, value: Callable[[], Any]) -> Symbol:
        with self._gm.graph.inserting_before(self.before):
            node = self._gm.graph.call_function(target, args, kwargs)
        copy_origin(node, self.before, "reference_representation_rewrite")
        with_value(node, next(used for used in node.all_input_nodes if "val" in used.meta), value)
        return Symbol(node, self)

    def constant(self, tensor: Tensor) -> Symbol:
        """Insert a read of a buffer with this value; equal ones share the buffer."""
        name = next(
            (name for held, name in self._known if held.dtype is tensor.dtype and torch.equal(held, tensor)), None
        )
        with self._gm.graph.inserting_before(self.before):
            if name is None:
                name = next(self._names)
                self._known.append((tensor, name))
            node = insert_attribute(self._gm, name, tensor, self.before, "reference_representation_rewrite")
        return Symbol(node, self)

    def symbol(self, node: Node) -> Symbol:
        return Symbol(node, self)


class Symbol:
    """A node of the graph that is computed with like a tensor."""

    __slots__ = ("emitter", "node")

    def __init__(self, node: Node, emitter: Emitter) -> None:
        self.node = node
        self.emitter = emitter

    @property
    def dtype(self) -> torch.dtype:
        return self.node.meta["val"].dtype  # type: ignore[no-any-return]

    @property
    def shape(self) -> torch.Size:
        return self.node.meta["val"].shape  # type: ignore[no-any-return]

    def __add__(self, other: Any) -> Any:
        return call(aten.add.Tensor, self, other)

    def __sub__(self, other: Any) -> Any:
        return call(aten.sub.Tensor, self, other)

    def __mul__(self, other: Any) -> Any:
        return call(aten.mul.Tensor, self, other)

    def __and__(self, other: Any) -> Any:
        return call(aten.bitwise_and.Scalar if isinstance(other, int) else aten.bitwise_and.Tensor, self, other)

    def __lshift__(self, other: Any) -> Any:
        shift = aten.bitwise_left_shift
        return call(shift.Tensor_Scalar if isinstance(other, int) else shift.Tensor, self, other)

    def __rshift__(self, other: Any) -> Any:
        shift = aten.bitwise_right_shift
        return call(shift.Tensor_Scalar if isinstance(other, int) else shift.Tensor, self, other)


def call(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute an op on tensors, or insert it when an argument is a symbol."""
    symbol = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Symbol)), None)
    return target(*args, **kwargs) if symbol is None else symbol.emitter.call(target, *args, **kwargs)
