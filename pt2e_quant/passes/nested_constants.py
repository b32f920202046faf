"""Parameters of nested graphs: into the graphs that read them before quantization, out again after it.

torch.export hands a parameter that the branches of cond read to cond as an operand. Seen from inside it is an input
like any other, which cannot be stored in integers. So the engine, and quantizers with it, work on bodies that hold
their own parameters: `move_constants_in`. What the converted bodies hold becomes operands again, `move_constants_out`,
so that the graph has the form that torch.export, save and the lowerings take.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.attributes import attribute, free_name, set_attribute
from ..graph.module import tidy
from ..graph.nested import bodies, nested_calls, operands, placeholders_of_operands, set_operands, written
from ..graph.values import copy_value
from ..where import copy_origin
from .fold_weights import FROZEN

__all__ = ["move_constants_in", "move_constants_out"]


def move_constants_in(gm: GraphModule) -> GraphModule:
    """Give each body the parameters and buffers that it is passed, in place of the operands.

    Not those that are written to somewhere, and not those that a body returns: they are values of the graph around it.
    """
    calls = _calls(gm)
    if not calls:
        return gm
    overwritten = {str(node.target) for node in written(gm) if node.op == "get_attr"}
    for call, called in calls:
        arrivals = [placeholders_of_operands(call, body) for body in called]
        kept = []
        for index, operand in enumerate(operands(call)):
            arriving = [placeholders[index] for placeholders in arrivals]
            if _is_tensor(gm, operand) and str(operand.target) not in overwritten and not any(map(_returned, arriving)):
                for body, placeholder in zip(called, arriving, strict=True):
                    _own(body, placeholder, str(operand.target), attribute(gm, str(operand.target)))
            else:
                kept.append(operand)
        set_operands(call, kept)
        for body in called:
            move_constants_in(body)
    return tidy(gm)


def _calls(gm: GraphModule) -> list[tuple[Node, list[GraphModule]]]:
    """The calls whose bodies no other call runs, with other operands."""
    calls = nested_calls(gm)
    runs = Counter(id(body) for _, called in calls for body in called)
    return [(call, called) for call, called in calls if all(runs[id(body)] == 1 for body in called)]


def _is_tensor(gm: GraphModule, node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr" and isinstance(attribute(gm, str(node.target)), Tensor)


def _returned(placeholder: Node) -> bool:
    return any(user.op == "output" for user in placeholder.users)


def _own(body: GraphModule, placeholder: Node, target: str, value: Tensor) -> None:
    if placeholder.users:
        target = _register(body, target, value)
        with body.graph.inserting_after(body.graph.find_nodes(op="placeholder")[-1]):  # later ones come before it
            node = body.graph.get_attr(target)
        node.meta.update(placeholder.meta)
        placeholder.replace_all_uses_with(node)
    body.graph.erase_node(placeholder)


def move_constants_out(gm: GraphModule) -> GraphModule:
    """Turn the parameters and buffers that bodies hold into operands; one that several bodies share is passed once."""
    if not bodies(gm):
        return gm
    for _, body in bodies(gm):
        move_constants_out(body)
    for call, called in _calls(gm):
        names: dict[int, str] = {}
        passed: dict[str, Node] = {}
        for body in called:
            for node in body.graph.find_nodes(op="get_attr"):
                value = attribute(body, str(node.target))
                if isinstance(value, Tensor) and id(value) not in names:
                    name = names[id(value)] = _register(gm, str(node.target), value)
                    if name not in passed:
                        passed[name] = _outer(gm, call, node, name)
        for body in called:
            _take(body, passed, names)
        set_operands(call, [*operands(call), *passed.values()])
    return tidy(gm)


def _outer(gm: GraphModule, call: Node, inner: Node, name: str) -> Node:
    with gm.graph.inserting_before(call):
        node = gm.graph.get_attr(name)
    return copy_value(copy_origin(node, inner, "move_constants_out"), inner)


def _take(body: GraphModule, passed: dict[str, Node], names: dict[int, str]) -> None:
    """Placeholders for all constants that a call passes, whether this body reads them or not."""
    held: dict[str, list[Node]] = {}
    for node in body.graph.find_nodes(op="get_attr"):
        name = names.get(id(attribute(body, str(node.target))))
        if name is not None:
            held.setdefault(name, []).append(node)
    last = next(reversed(body.graph.find_nodes(op="placeholder")), None)
    for name, outer in passed.items():
        with (
            body.graph.inserting_before(next(iter(body.graph.nodes)))
            if last is None
            else body.graph.inserting_after(last)
        ):
            last = body.graph.placeholder(outer.name)
        last.target = last.name  # the argument; under another name it could be that of a value of the body
        copy_value(last, outer)
        for node in held.get(name, ()):
            node.replace_all_uses_with(last)
            body.graph.erase_node(node)


def _register(gm: GraphModule, target: str, value: Tensor) -> str:
    """Hold a tensor under its name, or under a free one when another tensor has that; the name.

    Each graph folds the weights that it reads: what became the same integers is held once.
    """
    if target.startswith(FROZEN):
        held = ((name, buffer) for name, buffer in gm.named_buffers(recurse=False) if name.startswith(FROZEN))
        same = next((name for name, buffer in held if _is_same(buffer, value)), None)
        if same is not None:
            return same
    try:
        taken = attribute(gm, target)
    except AttributeError:
        taken = None
    if taken is value:
        return target
    if taken is not None:
        target = next(free_name(gm, re.sub(r"\d+$", "", target).replace(".", "_")))
    set_attribute(gm, target, value)
    return target


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
