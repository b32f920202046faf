"""Write one op as several; between dequantize and quantize on one grid each of them becomes an integer kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ....graph.write import Symbol, Writer, call
from ....grid import Grid
from ....ops import is_quantize

__all__ = ["Step", "dequantized", "on_grid", "replace_by_steps"]

Step = Callable[[Symbol], Any]


def replace_by_steps(write: Writer, node: Node, steps: Sequence[Step], source: Node | None = None) -> None:
    """Put steps in the place of a node, on the node's input or on `source`."""
    source = source or node.all_input_nodes[0]
    integer = _is_enclosed(source, node)
    with write.before(node):
        value: Any = dequantized(write(source.args[0]), source) if integer else write(source)
        for number, step in enumerate(steps):
            value = step(on_grid(value, source) if integer and number else value)
    write.replace(node, value)


def on_grid(value: Symbol, dequantize: Node) -> Any:
    """Quantize and dequantize a value on the grid of a dequantize."""
    grid = Grid.of(dequantize)
    return dequantized(call(torch.ops.quantized_decomposed.quantize_per_tensor.default, value, *_of(grid)), dequantize)


def _of(grid: Grid | None) -> tuple[Any, ...]:
    return grid.arguments if grid is not None else ()


def dequantized(codes: Symbol, dequantize: Node) -> Any:
    """Integers dequantized as another dequantize does it."""
    return call(dequantize.target, codes, *dequantize.args[1:], **dequantize.kwargs)


def _is_enclosed(source: Node, node: Node) -> bool:
    """The source is a dequantize, and all that reads the node is a quantize on the same grid."""
    users, grid = list(node.users), Grid.of(source)
    return grid is not None and len(users) == 1 and is_quantize(users[0]) and Grid.of(users[0]) == grid
