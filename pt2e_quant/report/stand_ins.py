"""Copies of a prepared model in which other modules stand in the place of its observers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from ..where import in_graph

__all__ = ["watched", "with_stand_ins"]

_PREFIX = "_stand_in_"


def with_stand_ins(
    prepared: GraphModule, observers: Container[str], make: Callable[[str, Node], nn.Module]
) -> GraphModule:
    """A copy that shares the parameters, with stand-ins in nested graphs as well.

    Args:
        prepared: the model; stays as it is.
        observers: paths of those to replace.
        make: the stand-in for one call of an observer, given the observer's path and the call.
    """
    twin = copy.deepcopy(prepared, {id(parameter): parameter for parameter in prepared.parameters()})
    count = 0
    for path, gm in [(path, gm) for path, gm in twin.named_modules() if isinstance(gm, GraphModule)]:
        for node in gm.graph.find_nodes(op="call_module"):
            name = f"{path}.{node.target}" if path else str(node.target)
            if name in observers:
                module = make(name, node)
                node.target = f"{_PREFIX}{count}"
                gm.add_module(node.target, module)
                count += 1
        gm.recompile()
    return twin


def watched(call: Node) -> str:
    """Name of the tensor that an observer is called on; stand-ins in between count as that tensor."""
    value: Any = call.args[0]
    while value.op == "call_module" and str(value.target).startswith(_PREFIX):
        value = value.args[0]
    return in_graph(call.graph.owning_module, value.name)
