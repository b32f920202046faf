"""Integer weights beside float values: linears with float inputs, and tables that are looked up.

Weights and tables stay integers in memory and in packages, those of 4 bits two in a byte. In bfloat16, linears become
the kernels that torch has for them. In float32 and float16 the same kernels use no vector instructions and take 2 to 60
times as long (torch 2.13, batches of 1 to 128) as a loop that dequantizes the weight before an ordinary product,
so there the graph gets that loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import EMBEDDING_BAG, LINEAR
from .integer_linears import rewrite_linear
from .integer_tables import rewrite_bag, rewrite_table
from .stored import Forms

__all__ = ["integer_weights"]

aten = torch.ops.aten

_REWRITES: dict[Any, Callable[[Node, Forms], None]] = {
    **dict.fromkeys(LINEAR, rewrite_linear),
    aten.embedding.default: rewrite_table,
    **dict.fromkeys(EMBEDDING_BAG, rewrite_bag),
}


def integer_weights(gm: GraphModule) -> GraphModule:
    """Multiply by and look up integers where a graph dequantizes a whole constant matrix."""
    write = Writer(gm, "integer_weights", "_integers_")
    forms = Forms(write)
    for node in list(gm.graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            with write.before(node):
                rewrite(node, forms)
    return tidy(gm)
