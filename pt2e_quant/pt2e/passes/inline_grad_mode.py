"""Inline the bodies of `with torch.no_grad()` regions, so that their ops are seen like all others.

torch.export wraps such a region in wrap_with_set_grad_enabled, a call of a nested graph. Whether gradients are recorded
changes no value of a model that is being quantized for inference.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ...graph import attribute, set_attribute, tidy

__all__ = ["inline_grad_mode"]


def inline_grad_mode(gm: GraphModule) -> GraphModule:
    """Replace each wrap_with_set_grad_enabled(enabled, body, *args) by the nodes of its body, nested ones included."""
    wrapper = torch.ops.higher_order.wrap_with_set_grad_enabled
    if not gm.graph.find_nodes(op="call_function", target=wrapper):
        return gm
    while calls := gm.graph.find_nodes(op="call_function", target=wrapper):
        for call in calls:
            _inline(gm, call)
    return tidy(gm)


def _inline(gm: GraphModule, call: Node) -> None:
    body = attribute(gm, str(call.args[1].target))  # type: ignore[union-attr]
    inputs = iter(call.args[2:])
    copies: dict[Node, Node] = {}
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)  # type: ignore[assignment]
            elif node.op == "output":
                _replace_outputs(call, [copies.get(value, value) for value in node.args[0]])
            else:
                if node.op == "get_attr":
                    _adopt(gm, body, str(node.target))
                copies[node] = gm.graph.node_copy(node, copies.__getitem__)
    gm.graph.erase_node(call)


def _replace_outputs(call: Node, values: list[Node]) -> None:
    for user in list(call.users):  # the call returns a tuple, every user is a getitem
        user.replace_all_uses_with(values[user.args[1]])  # type: ignore[index]
        user.graph.erase_node(user)


def _adopt(gm: GraphModule, body: GraphModule, target: str) -> None:
    """Make an attribute of the body (a nested graph) reachable from the outer module."""
    if not hasattr(gm, target.split(".")[0]):
        set_attribute(gm, target, attribute(body, target))
