"""Write one op as several; between dequantize and quantize on one grid each of them becomes an integer kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ....arguments import bind
from ....graph.write import Symbol, Writer, call
from ....grid import Grid
from ....ops import is_quantize

__all__ = ["Emit", "on_grid", "replace_by_steps"]

Q = torch.ops.quantized_decomposed

Emit = Callable[[Symbol], Any]
"""Writes one op on a value."""


def replace_by_steps(write: Writer, node: Node, steps: Sequence[Emit], source: Node | None = None) -> None:
    """Put steps in the place of a node, on the node's input or on `source`."""
    source = source or node.all_input_nodes[0]
    integer = _is_enclosed(source, node)
    with write.before(node):
        value: Any = _dequantized(write(source.args[0]), source) if integer else write(source)
        for number, step in enumerate(steps):
            value = step(on_grid(value, source) if integer and number else value)
    write.replace(node, value)


def on_grid(value: Symbol, near: Node, like: Node | None = None) -> Any:
    """Quantize and dequantize a value on the grid of a quantize or dequantize; to the dtype of `like`, a dequantize."""
    grid, dtype = Grid.of(near), bind(like or near)["out_dtype"]
    qparams = grid.arguments if grid is not None else ()
    codes = call(Q.quantize_per_tensor.default, value, *qparams)
    return call(Q.dequantize_per_tensor.default, codes, *qparams, **({} if dtype is None else {"out_dtype": dtype}))


def _dequantized(codes: Symbol, dequantize: Node) -> Any:
    """Integers dequantized as another dequantize does it."""
    return call(dequantize.target, codes, *dequantize.args[1:], **dequantize.kwargs)


def _is_enclosed(source: Node, node: Node) -> bool:
    """The source is a dequantize, and all that reads the node is a quantize on the same grid."""
    users, grid = list(node.users), Grid.of(source)
    return grid is not None and len(users) == 1 and is_quantize(users[0]) and Grid.of(users[0]) == grid
