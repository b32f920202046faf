"""The mean over height and width keeps its dimensions and is flattened then: some kernels know only that."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..checks import checked
from ..errors import CaptureError
from ..graph.module import tidy
from ..graph.write import Writer, function

__all__ = ["mean_keeps_dims"]

aten = torch.ops.aten
mean = function(aten.mean.dim)


@checked(CaptureError)
def mean_keeps_dims(gm: GraphModule) -> GraphModule:
    """Split the mean over height and width of a 4-d tensor into one with keepdim=True and a flatten."""
    write, changed = Writer(gm, "mean_keeps_dims"), False
    for node in gm.graph.find_nodes(op="call_function", target=aten.mean.dim):
        x, dims, keep = (*node.args, False)[:3]
        value = x.meta.get("val")
        spatial = isinstance(value, Tensor) and value.dim() == 4 and sorted(d % 4 for d in dims or ()) == [2, 3]
        if keep or not spatial:
            continue
        with write.before(node):
            write.replace(node, mean(write(x), dims, True, **node.kwargs).flatten(1))
        changed = True
    return tidy(gm) if changed else gm
