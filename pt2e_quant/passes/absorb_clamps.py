"""Drop relu, relu6 and hardtanh before a quantize that saturates at or within their bounds."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph.module import tidy
from ..grid import Grid
from ..ops import HARDTANH, RELU6, RELUS, is_call, is_quantize

__all__ = ["absorb_clamps"]


def absorb_clamps(gm: GraphModule) -> GraphModule:
    """Ask the quantize itself what becomes of both bounds."""
    for quantize in filter(is_quantize, gm.graph.nodes):
        grid, clamp = Grid.of(quantize), quantize.args[0]
        if grid is None or not is_call(clamp) or clamp.target not in RELUS or len(clamp.users) != 1:
            continue
        if grid.quantize(torch.tensor(_bounds(clamp))).tolist() == [*grid.bounds]:
            clamp.replace_all_uses_with(clamp.args[0])
    return tidy(gm)


def _bounds(clamp: Node) -> tuple[float, float]:
    if clamp.target in HARDTANH:
        bound = bind(clamp)
        return float(bound["min_val"]), float(bound["max_val"])
    return 0.0, 6.0 if clamp.target in RELU6 else torch.finfo(torch.float32).max
