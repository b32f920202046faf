"""Inline the bodies of regions that change no value, so that their ops are seen like all others.

torch.export wraps `with torch.no_grad()` in wrap_with_set_grad_enabled and `with torch.autocast(...)` in
wrap_with_autocast, calls of nested graphs. Whether gradients are recorded changes no value of a model that is being
quantized for inference; a model that is to be trained gets detaches where a region without gradients ends. An autocast
that is switched off changes none either, unless one that is on lies around it; those that are on keep their graphs,
whose ops compute in another dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graph.attributes import attribute, free_name, set_attribute
from ..graph.module import tidy
from ..graph.nested import bodies, nested_calls
from ..graph.write import Writer, function

__all__ = ["inline_regions"]

_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_BODY: dict[Any, int] = {_GRAD_MODE: 1, _AUTOCAST: 4}
"""Position of the body among the arguments; what it reads comes after it."""


def inline_regions(gm: GraphModule, *, in_autocast: bool = False, to_train: bool = False) -> GraphModule:
    """Replace each call of such a region, nested ones included, by the nodes of its body.

    Args:
        gm: the graph.
        in_autocast: it lies in a region with autocast.
        to_train: no gradient may flow where none did.
    """
    if not bodies(gm):
        return gm
    while calls := [node for node in gm.graph.nodes if _changes_nothing(node, in_autocast)]:
        for call in calls:
            if to_train:
                _stop_gradients(gm, call)
            _inline(gm, call)
    for call, called in nested_calls(gm):
        for body in called:
            inline_regions(body, in_autocast=in_autocast or call.target is _AUTOCAST, to_train=to_train)
    return tidy(gm)


def _changes_nothing(node: Node, in_autocast: bool) -> bool:
    if node.target is _AUTOCAST:
        enabled = node.args[2]
        return not enabled and not in_autocast
    return node.target is _GRAD_MODE


def _stop_gradients(gm: GraphModule, call: Node) -> None:
    """Detach the results of a region without gradients; what lies inside then gets none."""
    if call.target is _GRAD_MODE and not call.args[0]:
        write = Writer(gm, "inline_regions")
        for result in list(call.users):
            write.follow(result, function(torch.ops.aten.detach.default))


def _inline(gm: GraphModule, call: Node) -> None:
    position = _BODY[call.target]
    body = attribute(gm, str(call.args[position].target))  # type: ignore[union-attr]
    inputs = iter(call.args[position + 1 :])
    copies: dict[Node, Node] = {}
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)  # type: ignore[assignment]
            elif node.op == "output":
                _replace_outputs(call, [copies.get(value, value) for value in node.args[0]])
            else:
                copies[node] = gm.graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    copies[node].target = _adopt(gm, body, str(node.target))
    gm.graph.erase_node(call)


def _replace_outputs(call: Node, values: list[Node]) -> None:
    for user in list(call.users):  # the call returns a tuple, every user is a getitem
        user.replace_all_uses_with(values[user.args[1]])  # type: ignore[index]
        user.graph.erase_node(user)


def _adopt(gm: GraphModule, body: GraphModule, target: str) -> str:
    """Make an attribute of the body (a nested graph) reachable from the outer module; the name that it has there."""
    value = attribute(body, target)
    name = target
    if hasattr(gm, target.partition(".")[0]):
        name = next(free_name(gm, target.replace(".", "_") + "_"))
    set_attribute(gm, name, value)
    return name
