"""Write split, chunk, unbind and select as slices, which XNNPACK takes, of tensors whose shape is known."""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Symbol, Writer
from ....ops import SPLIT, UNBIND
from .looks import literal_sizes
from .steps import Step, replace_by_steps

__all__ = ["parts_to_slices"]

_MANY = frozenset((*SPLIT, *UNBIND))


def parts_to_slices(gm: GraphModule) -> GraphModule:
    """Each part becomes a slice; one of size 1 that loses its dimension is reshaped."""
    write = Writer(gm, "parts_to_slices")
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.aten.select.int and _is_fixed(node):
            bound = bind(node)
            if isinstance(bound["index"], int):
                replace_by_steps(write, node, _selected(node, bound["dim"], bound["index"]))
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


def _selected(node: Node, dim: int, index: int) -> list[Step]:
    shape = literal_sizes(node.all_input_nodes[0])
    dim %= len(shape)
    index %= shape[dim]
    rest = shape[:dim] + shape[dim + 1 :]
    return [_slice(dim, index, index + 1), lambda x: x.reshape(rest)]


def _slice(dim: int, start: int, end: int) -> Step:
    def step(x: Symbol) -> Symbol:
        return x.slice(dim, start, end)  # type: ignore[no-any-return]

    return step


def _is_fixed(node: Node) -> bool:
    source = node.all_input_nodes[0]
    return isinstance(source.meta.get("val"), Tensor) and -1 not in literal_sizes(source)
