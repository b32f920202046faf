"""Tell the nodes of nested graphs which modules of the model they come from, for selectors, reports and messages.

Non-strict export traces the bodies of cond, while_loop, scan and map apart from the modules that call them, and records
nothing. What is certain is added: the modules around the call, and the module that owns a parameter which an op reads.
The class of that module is not known; strict export (`torch.export.export(..., strict=True)`) records it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.attributes import attribute
from ..graph.nested import nested_calls
from ..where import module_stack

__all__ = ["locate_nested_modules"]

_UNKNOWN = "?"
_KEYS = ("nn_module_stack", "stack_trace")


def locate_nested_modules(gm: GraphModule) -> GraphModule:
    """Give every op of a nested graph the origin of the call, where it has none, and the module of its parameters.

    Comes after `move_constants_in`, which brings the parameters and their names.
    """
    for call, called in nested_calls(gm):
        for body in called:
            for node in body.graph.nodes:
                if node.op == "call_function" and not node.meta.get("nn_module_stack"):
                    _locate(body, node, call)
            locate_nested_modules(body)
    return gm


def _locate(body: GraphModule, node: Node, call: Node) -> None:
    for key in _KEYS:
        if not node.meta.get(key) and call.meta.get(key):
            node.meta[key] = call.meta[key]
    owner = _owner(body, node)
    known = {path for path, _ in module_stack(node)}
    steps = owner.split(".") if owner else []
    stack: dict[str, Any] = dict(node.meta.get("nn_module_stack") or {})
    for end in range(1, len(steps) + 1):
        path = ".".join(steps[:end])
        if path not in known:
            stack[f"{call.name}.{path}"] = (path, _UNKNOWN)
    node.meta["nn_module_stack"] = stack


def _owner(body: GraphModule, node: Node) -> str:
    """Dotted path of the module that holds the first parameter or buffer that the op reads; '' for none."""
    names = (str(source.target) for source in node.all_input_nodes if source.op == "get_attr")
    found = (name.rpartition(".")[0] for name in names if isinstance(attribute(body, name), Tensor))
    return next(found, "")
