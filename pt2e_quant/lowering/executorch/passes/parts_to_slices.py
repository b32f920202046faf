"""Write split, chunk, unbind, select and slices in steps as slices in steps of 1, of tensors whose shape is known."""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Symbol, Writer, function
from ....ops import SPLIT, UNBIND
from .looks import literal_sizes
from .steps import Emit, replace_by_steps

__all__ = ["parts_to_slices"]

pad = function(torch.ops.aten.constant_pad_nd.default)

_MANY = frozenset((*SPLIT, *UNBIND))


def parts_to_slices(gm: GraphModule) -> GraphModule:
    """Each part becomes a slice; one of size 1 that loses its dimension is reshaped. Every n-th value is the first of
    n that a reshape puts beside each other."""
    write = Writer(gm, "parts_to_slices")
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.aten.select.int and _is_fixed(node):
            bound = bind(node)
            if isinstance(bound["index"], int):
                replace_by_steps(write, node, _selected(node, bound["dim"], bound["index"]))
        elif node.target is torch.ops.aten.slice.Tensor and _is_fixed(node) and 0 not in literal_sizes(node):
            if bind(node)["step"] != 1:
                replace_by_steps(write, node, _every_nth(node))
        elif node.target in _MANY and _is_fixed(node):
            _slice_parts(write, node)
    return tidy(gm)


def _slice_parts(write: Writer, node: Node) -> None:
    parts, dim = list(node.users), int(bind(node).get("dim", 0))
    if any(part.target is not operator.getitem for part in parts):
        return
    unbound = node.target in UNBIND
    sizes = [1 if unbound else value.shape[dim] for value in node.meta["val"]]
    starts = list(accumulate(sizes, initial=0))
    for part in parts:
        index: Any = part.args[1]
        start = starts[index]
        steps = _selected(node, dim, start) if unbound else [_slice(dim, start, start + sizes[index])]
        replace_by_steps(write, part, steps, source=node.all_input_nodes[0])


def _selected(node: Node, dim: int, index: int) -> list[Emit]:
    shape = literal_sizes(node.all_input_nodes[0])
    dim %= len(shape)
    index %= shape[dim]
    rest = shape[:dim] + shape[dim + 1 :]
    return [_slice(dim, index, index + 1), lambda x: x.reshape(rest)]


def _every_nth(node: Node) -> list[Emit]:
    bound, shape = bind(node), literal_sizes(node.all_input_nodes[0])
    dim, step, count = bound["dim"] % len(shape), bound["step"], literal_sizes(node)[bound["dim"]]
    start, _, _ = slice(bound["start"], None).indices(shape[dim])
    if count == 1:
        return [_slice(dim, start, start + 1)]
    missing = max(start + count * step - shape[dim], 0)
    place = min(missing, start)  # of the value among its neighbours, which need not begin with it
    missing -= place
    filled: list[Emit] = [lambda x: pad(x, [0, 0] * (len(shape) - 1 - dim) + [0, missing])] if missing else []
    return [
        _slice(dim, start - place, start - place + count * step - missing), *filled,
        lambda x: x.reshape([*shape[:dim], count, step, *shape[dim + 1 :]]), _slice(dim + 1, place, place + 1),
        lambda x: x.reshape(literal_sizes(node)),
    ]  # fmt: skip


def _slice(dim: int, start: int, end: int) -> Emit:
    def step(x: Symbol) -> Symbol:
        return x.slice(dim, start, end)  # type: ignore[no-any-return]

    return step


def _is_fixed(node: Node) -> bool:
    source = node.all_input_nodes[0]
    return isinstance(source.meta.get("val"), Tensor) and -1 not in literal_sizes(source)
