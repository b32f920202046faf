"""Let readers of a tensor that an op has written to read that op's result, so that data flow is what the graph shows.

    conv = conv2d(x, w); relu_(conv); conv + 1     becomes     conv = conv2d(x, w); r = relu_(conv); r + 1

Both names are one tensor, so no value changes. Without this, a quantized copy made before relu_ would be read.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ..arguments import is_in_place
from ..graph.module import tidy

__all__ = ["follow_in_place"]


def follow_in_place(gm: GraphModule) -> GraphModule:
    """Redirect each read after an in-place op from the op's first argument to its result."""
    newest: dict[Node, Node] = {}
    changed = False
    for node in gm.graph.nodes:
        for source in node.all_input_nodes if newest else ():
            latest = source
            while latest in newest:
                latest = newest[latest]
            if latest is not source:
                newest[source] = latest
                node.replace_input_with(source, latest)
                changed = True
        if node.op == "call_function" and is_in_place(node.target) and isinstance(node.args[0], Node):
            newest[node.args[0]] = node
    return tidy(gm) if changed else gm
