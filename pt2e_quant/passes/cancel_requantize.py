"""Replace quantize(dequantize(q, p), p) by q. With equal qparams, float32 returns every code of 8 or 16 bits."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph.module import tidy
from ..grid import Grid
from ..ops import is_dequantize, is_quantize

__all__ = ["cancel_requantize"]


def cancel_requantize(gm: GraphModule) -> GraphModule:
    """Cancel the pairs between which nothing changes, integers from outside that exceed the bounds included."""
    for quantize in list(filter(is_quantize, gm.graph.nodes)):
        dequantize, grid = quantize.args[0], Grid.of(quantize)
        if grid is not None and is_dequantize(dequantize) and _returns_each_code(dequantize, grid):
            quantize.replace_all_uses_with(dequantize.args[0])
    return tidy(gm)


def _returns_each_code(dequantize: Node, grid: Grid) -> bool:
    codes, whole = dequantize.args[0], torch.iinfo(grid.dtype)
    inside = grid.bounds == (whole.min, whole.max) or (is_quantize(codes) and Grid.of(codes) == grid)  # type: ignore[arg-type]
    exact = whole.bits <= 16 and bind(dequantize)["out_dtype"] in (None, torch.float32)
    return exact and inside and Grid.of(dequantize) == grid
