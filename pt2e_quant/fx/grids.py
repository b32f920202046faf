"""Quantize and dequantize nodes of a converted graph, their grids, and the buffers that keep these."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..graph.attributes import insert_attribute
from ..where import module_path

__all__ = ["Grid", "Names", "grid_of", "is_dequantize", "is_quantize"]

_OPS = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Grid:
    """One scale and zero point, and the type that stores q."""

    scale: float
    zero_point: int
    dtype: torch.dtype


def is_quantize(node: object) -> bool:
    """A quantize with one scale that is known."""
    return isinstance(node, Node) and node.target is _OPS.quantize_per_tensor.default


def is_dequantize(node: object, *, dynamic: bool = False) -> bool:
    """A dequantize with one scale that is known; or, `dynamic`, with one that is chosen while the model runs."""
    overload = _OPS.dequantize_per_tensor.tensor if dynamic else _OPS.dequantize_per_tensor.default
    return isinstance(node, Node) and node.target is overload


@functools.lru_cache(maxsize=4096)
def grid_of(node: Node) -> Grid:
    """The grid of a quantize or dequantize."""
    _, scale, zero_point, _, _, dtype = node.args
    return Grid(float(scale), int(zero_point), dtype)  # type: ignore[arg-type]


class Names:
    """The buffers for scale and zero point of each quantize, under the reference's names.

    They are numbered before anything is lowered: what a module takes in leaves a gap.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._prefix: dict[Node, tuple[str, int]] = {}
        counts: Counter[str] = Counter()
        taken = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
        for node in gm.graph.nodes:
            if is_quantize(node):
                prefix = _prefix(node)
                while f"{prefix}_scale_{counts[prefix]}" in taken:
                    counts[prefix] += 1
                self._prefix[node] = prefix, counts[prefix]
                counts[prefix] += 1

    def buffers(self, quantize: Node) -> tuple[Node, Node]:
        """Nodes that read them, at the graph's insertion point."""
        prefix, number = self._prefix[quantize]
        grid = grid_of(quantize)
        values = torch.tensor(grid.scale, dtype=torch.float32), torch.tensor(grid.zero_point)
        return tuple(  # type: ignore[return-value]
            insert_attribute(self._gm, f"{prefix}_{what}_{number}", value, quantize, "convert_fx")
            for what, value in zip(("scale", "zero_point"), values, strict=True)
        )


def _prefix(quantize: Node) -> str:
    """The path of what computes the tensor; for an input of the model, of what reads it first."""
    source: Node = quantize.args[0]  # type: ignore[assignment]
    if source.op != "placeholder":
        return _path(source).replace(".", "_")
    readers = (reader for dequantize in quantize.users for reader in dequantize.users)
    first = next(readers, None)
    return f"{_path(first)}_input".replace(".", "_") if first is not None else ""


def _path(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else module_path(node) or ""
