"""Write layer_norm and rms_norm over the last dimension as means, differences and products."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Writer, function
from .means_to_linears import has_fixed_rows, mean

__all__ = ["norms_to_linears"]

aten = torch.ops.aten
rsqrt = function(aten.rsqrt.default)


def norms_to_linears(gm: GraphModule) -> GraphModule:
    """Means become linears, see `means_to_linears`."""
    write = Writer(gm, "norms_to_linears", "_mean_weight_")
    for node in [node for node in gm.graph.nodes if node.target in (aten.layer_norm.default, aten.rms_norm.default)]:
        if len(bind(node)["normalized_shape"]) == 1 and has_fixed_rows(bind(node)["input"]):
            with write.before(node):
                write.replace(node, _normalized(write, node))
    return tidy(gm)


def _normalized(write: Writer, node: Node) -> Any:
    bound = bind(node)
    x, eps = write(bound["input"]), bound["eps"]
    centered = x - mean(x) if node.target is aten.layer_norm.default else x
    value = centered * rsqrt(mean(centered * centered) + (torch.finfo(torch.float32).eps if eps is None else eps))
    if bound["weight"] is not None:
        value = value * write(bound["weight"])
    return value if bound.get("bias") is None else value + write(bound["bias"])
