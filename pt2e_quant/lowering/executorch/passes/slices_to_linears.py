"""Write slices of the last dimension, where other dimensions are dynamic, as a linear that picks columns.

XNNPACK slices tensors of fixed shape only. Rotary embeddings take halves of each head, unrolled RNNs their gates. Sums
of one value and zeros are exact, as long as all values are finite.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Writer, function
from .looks import comes_from_integers, is_float32, literal_sizes

__all__ = ["slices_to_linears"]

aten = torch.ops.aten
linear = function(aten.linear.default)


def slices_to_linears(gm: GraphModule) -> GraphModule:
    """Not of what is computed outside of any delegate anyway."""
    write = Writer(gm, "slices_to_linears", "_columns_")
    for node in gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        x, columns = node.all_input_nodes[0], _columns(node)
        if columns is not None and is_float32(x) and not comes_from_integers(x):
            picked = torch.eye(literal_sizes(x)[-1])[columns].contiguous()
            with write.before(node):
                weight = write.constant(nn.Parameter(picked, requires_grad=False))
                write.replace(node, linear(write(bind(node)["self"]), weight))
    return tidy(gm)


def _columns(node: Node) -> slice | None:
    """The columns of a slice of the last dimension, alone of fixed size; None for other slices."""
    bound, sizes = bind(node), literal_sizes(node.all_input_nodes[0])
    start, end = 0 if bound["start"] is None else bound["start"], sizes[-1] if bound["end"] is None else bound["end"]
    inner = bound["dim"] % len(sizes) == len(sizes) - 1 and sizes[-1] > 0 and -1 in sizes
    known = isinstance(start, int) and isinstance(end, int)
    return slice(start, end, bound["step"]) if inner and known else None
