"""Give a cat that reads one tensor only, as rotary embeddings do, a second: XNNPACK counts different tensors."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import CAT, is_dequantize
from .looks import is_float32

__all__ = ["copies_to_concatenate"]


def copies_to_concatenate(gm: GraphModule) -> GraphModule:
    """A product by 1 is the copy."""
    write = Writer(gm, "copies_to_concatenate")
    for node in [node for node in gm.graph.nodes if node.target in CAT]:
        parts: Any = node.args[0]
        if len(parts) < 2 or len(set(parts)) > 1 or not is_float32(node) or is_dequantize(parts[0]):
            continue
        with write.before(node):
            copy = write(parts[0]) * 1.0
        node.update_arg(0, [copy.node, *parts[1:]])
    return tidy(gm)
