"""Drop what computes nothing: between an operator and its quantize it keeps backends from seeing one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..arguments import mutates
from ..graph.module import tidy
from ..ops import CAST, COPY, DROPOUT, EXPAND, SLICE, is_call, is_value_preserving

__all__ = ["remove_identities"]

aten = torch.ops.aten

_MAY_CHANGE_NOTHING = frozenset((*COPY, *CAST, *EXPAND, *SLICE))
_MAY_COPY = frozenset((*CAST, aten.clone.default, aten.contiguous.default))


def remove_identities(gm: GraphModule) -> GraphModule:
    """Drop dropout in inference, detach, checks of dtypes, and copies and views that change nothing."""
    for check in gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        gm.graph.erase_node(check)  # export leaves one beside each .to(); the dtypes are those of this graph
    writes = any(is_call(node) and mutates(node.target) for node in gm.graph.nodes)
    for node in list(gm.graph.nodes):
        if is_call(node) and _is_identity(node, writes) and not _is_needed_as_a_result(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
    return tidy(gm)


def _is_identity(node: Node, graph_writes: bool) -> bool:
    if node.target in DROPOUT:
        return is_value_preserving(node)
    if node.target not in _MAY_CHANGE_NOTHING or not node.all_input_nodes:
        return False
    if node.target in _MAY_COPY and graph_writes:
        return False  # the copy may be there to survive a write to the original
    old, new = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    return isinstance(old, Tensor) and isinstance(new, Tensor) and _layout(old) == _layout(new)


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.device, tuple(map(str, value.shape)), tuple(map(str, value.stride()))


def _is_needed_as_a_result(node: Node) -> bool:
    """Without the node, the graph would return one of its own inputs or parameters, or a value twice.

    The body of a loop must do neither: torch refuses results that share memory.
    """
    source = node.all_input_nodes[0]
    taken = source.op != "call_function" or any(user.op == "output" for user in source.users)
    return taken and any(user.op == "output" for user in node.users)
