"""Write the mean over the last dimension as a linear by 1/n: XNNPACK averages over height and width only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Symbol, Writer, function
from .looks import is_float32

__all__ = ["has_fixed_rows", "mean", "means_to_linears"]

aten = torch.ops.aten
linear = function(aten.linear.default)


def means_to_linears(gm: GraphModule) -> GraphModule:
    """Each mean.dim over the last dimension alone."""
    write = Writer(gm, "means_to_linears", "_mean_weight_")
    for node in gm.graph.find_nodes(op="call_function", target=aten.mean.dim):
        bound = bind(node)
        x, dims = bound["self"], bound["dim"]
        if not has_fixed_rows(x) or dims is None or bound["dtype"] is not None:
            continue
        rank = x.meta["val"].dim()
        if [dim % rank for dim in dims] == [rank - 1]:
            with write.before(node):
                value = mean(write(x))
                write.replace(node, value if bound["keepdim"] else value.squeeze(-1))
    return tidy(gm)


def mean(x: Symbol) -> Any:
    """The mean of each row, with keepdim."""
    width = x.shape[-1]
    weight = nn.Parameter(torch.full((1, width), 1 / width), requires_grad=False)
    return linear(x, x.writer.constant(weight))


def has_fixed_rows(x: Any) -> bool:
    return is_float32(x) and x.meta["val"].dim() > 0 and isinstance(x.meta["val"].shape[-1], int)
