"""Write into a graph as if it were computed: symbols that stand for nodes, with their values and their origin.

`a * b + 1` on two symbols inserts aten.mul and aten.add; on tensors it computes. `call(aten.bmm.default, a, b)` is the
same for any op. So a formula is written once, runs in tests, and stands in the graph as ordinary ATen ops. Every pass
writes with a `Writer`; nodes are erased and replaced by `Writer.replace`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..where import copy_origin
from .attributes import free_name, insert_attribute
from .values import copy_value, fake_like, with_value

__all__ = ["Symbol", "Writer", "call", "function", "nodes_of"]

aten = torch.ops.aten

_COMPARED = 2**12


class Writer:
    """Inserts nodes before one node of a graph, with the origin of that node or of another one.

    Args:
        gm: the graph.
        by: name of the pass, for the record of where nodes come from.
        constants: how the buffers are named that `constant` adds: this, and a number.

    Examples:
        >>> write = Writer(gm, "double")                                              # doctest: +SKIP
        >>> for node in list(gm.graph.nodes):
        ...     with write.before(node):
        ...         write.replace(node, write(node.args[0]) * 2 + 1)
    """

    def __init__(self, gm: GraphModule, by: str, constants: str = "_constant_") -> None:
        self._gm = gm
        self._by = by
        self._names = free_name(gm, constants)
        self._known: list[tuple[Tensor, str]] = []
        self._values: dict[Any, Node] = {}
        """Of each kind of call the first: torch takes long to tell what an op gives, and is asked once."""
        self._like: Node = gm.graph.output_node()

    @property
    def like(self) -> Node:
        """The node whose origin is that of what is written now."""
        return self._like

    @contextmanager
    def before(self, node: Node, like: Node | None = None) -> Iterator[None]:
        """Write before `node`, with the origin of `like`, which is the node itself when it is left out."""
        outer, self._like = self._like, like or node
        try:
            with self._gm.graph.inserting_before(node):
                yield
        finally:
            self._like = outer

    @contextmanager
    def after(self, node: Node) -> Iterator[None]:
        """Write right after `node`, with its origin."""
        with self.before(node.next, like=node):
            yield

    @contextmanager
    def origin(self, like: Node) -> Iterator[None]:
        """Go on in the same place, with the origin of another node."""
        outer, self._like = self._like, like
        try:
            yield
        finally:
            self._like = outer

    def __call__(self, node: Any) -> Symbol:
        """The symbol of a node."""
        return node if isinstance(node, Symbol) else Symbol(node, self)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Symbol:
        """Insert a call; symbols among the arguments, also inside lists, become their nodes."""
        args, kwargs = nodes_of((args, kwargs))
        values: Any = map_arg((args, kwargs), lambda used: used.meta.get("val"))
        kind = _kind(target, values)
        like = None if kind is None else self._values.get(kind)
        if like is not None:
            return Symbol(_copy_of_value(self.without_value(target, args, kwargs), like), self)
        written = self.call_with_value(target, args, kwargs, lambda: target(*values[0], **values[1]))
        made = written.node.meta.get("val")
        if kind is not None and isinstance(made, FakeTensor) and made.is_contiguous():
            self._values[kind] = written.node
        return written

    def call_with_value(self, target: Any, args: Any, kwargs: Any, value: Callable[[], Any]) -> Symbol:
        """Insert a call whose value `value` computes: for ops that would invent sizes where these depend on data."""
        node = self.without_value(target, args, kwargs)
        sources = node.all_input_nodes or [self._like]  # of numbers alone, the value is one of the same trace
        if all("val" in used.meta for used in sources):
            with_value(node, sources[0], value)
        return Symbol(node, self)

    def without_value(self, target: Any, args: Any, kwargs: Any) -> Node:
        """Insert a call whose value the caller records."""
        return copy_origin(self._gm.graph.call_function(target, args, kwargs), self._like, self._by)

    def constant(self, tensor: Tensor) -> Symbol:
        """Insert a read of a buffer, or parameter, with this value; equal ones share it."""
        name = next((name for held, name in self._known if _is_same(held, tensor)), None)
        if name is None:
            name = next(self._names)
            self._known.append((tensor, name))
        return Symbol(insert_attribute(self._gm, name, tensor, self._like, self._by), self)

    def follow(self, node: Node, compute: Callable[[Symbol], Symbol]) -> Node:
        """Let the readers of a node read what `compute` makes of it instead; the node of that."""
        readers = list(node.users)
        with self.after(node):
            made = compute(self(node)).node
        for reader in readers:
            reader.replace_input_with(node, made)
        return made

    def replace(self, old: Node, new: Symbol | Node) -> Node:
        """Let what was written, which computes the same, take the place of a node, and erase that one."""
        made: Node = new.node if isinstance(new, Symbol) else new
        if "val" not in made.meta:
            copy_value(made, old)
        old.replace_all_uses_with(made)
        self._gm.graph.erase_node(old)
        return made


class Symbol:
    """A node of the graph that is computed with like a tensor."""

    __slots__ = ("node", "writer")

    def __init__(self, node: Node, writer: Writer) -> None:
        self.node = node
        self.writer = writer

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

    def __neg__(self) -> Any:
        return call(aten.neg.default, self)

    def __mul__(self, other: Any) -> Any:
        return call(aten.mul.Tensor, self, other)

    def __truediv__(self, other: Any) -> Any:
        return call(aten.div.Tensor, self, other)

    def __matmul__(self, other: Any) -> Any:
        return call(aten.matmul.default, self, other)

    def __and__(self, other: Any) -> Any:
        return call(aten.bitwise_and.Scalar if isinstance(other, int) else aten.bitwise_and.Tensor, self, other)

    def __lshift__(self, other: Any) -> Any:
        shift = aten.bitwise_left_shift
        return call(shift.Tensor_Scalar if isinstance(other, int) else shift.Tensor, self, other)

    def __rshift__(self, other: Any) -> Any:
        shift = aten.bitwise_right_shift
        return call(shift.Tensor_Scalar if isinstance(other, int) else shift.Tensor, self, other)

    __iter__ = None  # how many results there are is not known

    def __getitem__(self, index: int) -> Symbol:
        """One of several results."""
        return self.writer.call(operator.getitem, self, index)

    def reshape(self, sizes: Sequence[Any]) -> Any:
        return call(aten.reshape.default, self, list(sizes))

    def view(self, sizes: Sequence[Any]) -> Any:
        return call(aten.view.default, self, list(sizes))

    def unsqueeze(self, dim: int) -> Any:
        return call(aten.unsqueeze.default, self, dim)

    def squeeze(self, dim: int) -> Any:
        return call(aten.squeeze.dim, self, dim)

    def flatten(self, start: int, end: int = -1) -> Any:
        return call(aten.flatten.using_ints, self, start, end)

    def slice(self, dim: int, start: Any, end: Any) -> Any:
        return call(aten.slice.Tensor, self, dim, start, end)

    def to(self, dtype: torch.dtype) -> Any:
        return self if self.dtype is dtype else call(aten.to.dtype, self, dtype)


def call(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute an op on tensors, or insert it when an argument is a symbol."""
    symbol = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Symbol)), None)
    return target(*args, **kwargs) if symbol is None else symbol.writer.call(target, *args, **kwargs)


def function(target: Any) -> Callable[..., Any]:
    """An op to be called like a function of torch, on tensors or symbols: `bmm = function(aten.bmm.default)`."""
    return partial(call, target)


def nodes_of(arguments: Any) -> Any:
    """Arguments with the nodes that symbols among them stand for."""
    return pytree.tree_map_only(Symbol, lambda symbol: symbol.node, arguments)


def _kind(target: Any, values: Any) -> Any:
    """What the value of a call depends on: sizes, strides and types of its arguments; None where one is unknown."""
    leaves, tree = pytree.tree_flatten(values)
    kinds: list[Any] = [target, tree]
    for leaf in leaves:
        if isinstance(leaf, FakeTensor) and all(type(size) is int for size in leaf.shape):
            kinds.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, id(leaf.fake_mode)))
        elif leaf is None or isinstance(leaf, (bool, int, float, torch.dtype)):
            kinds.append((type(leaf), leaf))
        else:
            return None
    return tuple(kinds)


def _copy_of_value(node: Node, like: Node) -> Node:
    """Record a value of the same kind. Not the same one: those of an exported graph are alike only where they alias."""
    known = like.meta["val"]
    node.meta |= {"val": fake_like(known, known.fake_mode), "tensor_meta": like.meta["tensor_meta"]}
    return node


def _is_same(held: Tensor, tensor: Tensor) -> bool:
    """Large ones are not compared: that would cost more than it saves."""
    if type(held) is not type(tensor) or (held.dtype, held.shape) != (tensor.dtype, tensor.shape):
        return False
    return held is tensor or (held.numel() <= _COMPARED and torch.equal(held, tensor))
