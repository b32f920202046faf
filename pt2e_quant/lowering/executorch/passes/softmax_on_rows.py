"""Reshape to rows for a softmax over the last dimension of an image: XNNPACK takes the last one in memory.

It keeps images channels last, and so would add up over channels. A reshape brings them back into their order.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Writer, function
from ....meta import PORTABLE, mark
from ....ops import LINEAR, MATMUL, RESHAPE, SOFTMAX, SQUEEZE
from ..xnnpack.limits import CHANNELS_LAST
from .looks import literal_sizes

__all__ = ["softmax_on_rows"]

_IN_ORDER = frozenset((*RESHAPE, *SQUEEZE, *LINEAR, *MATMUL))
_WHY = "two of its sizes are dynamic, and XNNPACK may keep its input channels last, where it takes the wrong dimension"


def softmax_on_rows(gm: GraphModule) -> GraphModule:
    """Where two sizes are dynamic, softmax stays outside."""
    write, images = Writer(gm, "softmax_on_rows"), _channels_last(gm)
    for node in [node for node in gm.graph.nodes if node.target in SOFTMAX]:
        bound = bind(node)
        sizes = literal_sizes(node)
        if bound["self"] not in images or bound["dim"] % 4 != 3:
            continue
        if sizes.count(-1) > 1:
            mark(node, PORTABLE, _WHY)
            continue
        rows = [-1 if -1 in sizes[:-1] else math.prod(sizes[:-1]), sizes[-1]]
        with write.before(node):
            others = {name: value for name, value in bound.items() if name not in ("self", "dim")}
            softmax = function(node.target)(write(bound["self"]).reshape(rows), -1, **others)
            write.replace(node, softmax.reshape(sizes))
    return tidy(gm)


def _channels_last(gm: GraphModule) -> set[Node]:
    """Four-dimensional values that XNNPACK may keep so: of its operators on images, and what is computed from them."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        computed = node.target not in _IN_ORDER and not found.isdisjoint(node.all_input_nodes)
        if computed or node.target in CHANNELS_LAST or (node.op == "placeholder" and _comes_so(node.meta.get("val"))):
            found.add(node)
    return {node for node in found if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim() == 4}


def _comes_so(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and not value.is_contiguous()
