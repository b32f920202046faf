"""Write a cat of many tensors as cats of as few as XNNPACK takes, in a tree.

XNNPACK's compiler would write a chain, which copies the first values again for every four tensors, and would trace the
whole delegate anew for that and for each of its other passes (`xnnpack.preparation`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Symbol, Writer, function
from ....ops import CAT
from ..xnnpack.limits import LARGEST_CAT
from ..xnnpack.patterns import as_integer_op
from .looks import literal_sizes
from .steps import on_grid

__all__ = ["cats_of_few"]

aten = torch.ops.aten
cat = function(aten.cat.default)


def cats_of_few(gm: GraphModule) -> GraphModule:
    """Values stay: integers lie on one grid all the way. A stack is a cat, reshaped."""
    wide = [node for node in gm.graph.nodes if node.target in (*CAT, aten.stack.default) and _is_wide(node)]
    write = Writer(gm, "cats_of_few")
    for node in wide:
        with write.before(node):
            write.replace(node, _cat(node, write) if node.target in CAT else _stack(node, write))
    return tidy(gm) if wide else gm


def _is_wide(node: Node) -> bool:
    fits = node.target in CAT or literal_sizes(node).count(-1) < 2
    return fits and len(bind(node)["tensors"]) > LARGEST_CAT and node.meta["val"].dtype.is_floating_point


def _cat(node: Node, write: Writer) -> Symbol:
    bound, kernel = bind(node), as_integer_op(node)
    near = None if kernel is None else (kernel.quantize, kernel.inputs[0])
    return _tree([write(part) for part in bound["tensors"]], bound["dim"], near)


def _stack(node: Node, write: Writer) -> Symbol:
    sizes = literal_sizes(node)
    dim, parts = bind(node)["dim"] % len(sizes), [write(part) for part in bind(node)["tensors"]]
    if dim == len(sizes) - 1:
        return _tree([part.unsqueeze(dim) for part in parts], dim)
    return _tree(parts, dim).reshape(sizes)  # type: ignore[no-any-return]


def _tree(parts: list[Any], dim: int, near: tuple[Node, Node] | None = None) -> Symbol:
    """`near`: the quantize of the result and the dequantize of the first part, where XNNPACK moves integers."""

    def joined(group: list[Any]) -> Any:
        if len(group) == 1:
            return group[0]
        return cat(group, dim) if near is None else on_grid(cat(group, dim), near[0], like=near[1])

    while len(parts) > LARGEST_CAT:
        parts = [joined(parts[start : start + LARGEST_CAT]) for start in range(0, len(parts), LARGEST_CAT)]
    return cat(parts, dim)  # type: ignore[no-any-return]
