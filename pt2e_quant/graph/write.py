"""Write nodes with their origin and their value."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.traceback import NodeSource, NodeSourceAction

from .values import with_value

__all__ = ["copy_origin", "emit"]


def copy_origin(node: Node, source: Node, by: str) -> Node:
    """Give a new node the stack trace and module of the node it stems from, and say which pass made it."""
    for key in ("stack_trace", "nn_module_stack", "custom"):
        if key in source.meta:
            node.meta.setdefault(key, source.meta[key])
    origin = NodeSource(None, by, NodeSourceAction.CREATE)
    # NodeSource(source) would deep-copy the whole provenance of `source`; nobody writes to it, so it can be shared.
    origin.node_info = NodeSource.NodeInfo(source.name, str(source.target), id(source.graph))
    origin.from_node = source.meta.get("from_node", [])
    node.meta["from_node"] = [origin]
    return node


def emit(like: Node, by: str, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Add a call at the insertion point, with the origin of `like` and, where its inputs have one, its value."""
    node = like.graph.call_function(target, args, kwargs)
    copy_origin(node, like, by)
    sources = node.all_input_nodes
    if not sources or any("val" not in source.meta for source in sources):
        return node

    def value_of(source: Node) -> Any:
        return source.meta["val"]

    values = torch.fx.node.map_arg((args, kwargs), value_of)
    return with_value(node, sources[0], lambda: target(*values[0], **values[1]))
