"""Write adaptive max pooling, for which ExecuTorch has no kernel, as max pooling or as maxima of parts.

Output i of n along a dimension of size s is the maximum of [floor(i * s / n), ceil((i + 1) * s / n)), as in
torch.nn.AdaptiveMaxPool2d. Where n divides s these are the windows of max_pool2d.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Writer, function
from ....ops import ADAPTIVE_MAX_POOL, op_name
from .looks import literal_sizes
from .steps import Emit, replace_by_steps

__all__ = ["adaptive_max_pools"]

aten = torch.ops.aten
cat, maximum, pool = function(aten.cat.default), function(aten.amax.default), function(aten.max_pool2d.default)


def adaptive_max_pools(gm: GraphModule) -> GraphModule:
    """In one and two dimensions, of fixed size. Where the indices are read as well, it stays."""
    found = [node for node in gm.graph.nodes if node.target in ADAPTIVE_MAX_POOL and _is_rewritten(node)]
    write = Writer(gm, "adaptive_max_pools")
    for node in found:
        for values in filter(_is_read, list(node.users)):
            replace_by_steps(write, values, _steps(node), source=node.all_input_nodes[0])
        for unread in (*node.users, node):
            gm.graph.erase_node(unread)
    return tidy(gm) if found else gm


def _is_rewritten(node: Node) -> bool:
    dimensions = len(bind(node)["output_size"])
    fixed = all(size >= 0 for size in literal_sizes(node.all_input_nodes[0])[-dimensions:])
    reads_values = all(user.target is operator.getitem and user.args[1] == 0 for user in filter(_is_read, node.users))
    return op_name(node) != "adaptive_max_pool3d" and fixed and reads_values


def _is_read(node: Node) -> bool:
    return bool(node.users)


def _steps(node: Node) -> list[Emit]:
    wanted: Sequence[int] = bind(node)["output_size"]
    sizes = literal_sizes(node.all_input_nodes[0])
    pooled = range(len(sizes) - len(wanted), len(sizes))
    if len(wanted) == 2 and all(sizes[dim] % count == 0 for dim, count in zip(pooled, wanted, strict=True)):
        window = [sizes[dim] // count for dim, count in zip(pooled, wanted, strict=True)]
        return [lambda x: pool(x, window)]
    return [step for dim, count in zip(pooled, wanted, strict=True) for step in _along(dim, sizes[dim], count)]


def _along(dim: int, size: int, count: int) -> list[Emit]:
    windows = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    return [lambda x: cat([maximum(x.slice(dim, start, end), [dim], True) for start, end in windows], dim)]
