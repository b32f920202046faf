"""Graphs inside graphs: the bodies of cond, while_loop, scan and map, and of autocast regions.

torch.export keeps each body as a GraphModule that a get_attr node names, and hands it to a higher-order op. The op also
takes what the body reads, the model's parameters included: they are the *operands*, the same in every run of the body,
and become the last placeholders of it. This file knows where they stand in each op; everything else is one walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..arguments import written_values
from ..meta import NESTED_KEY
from ..ops import memory_of

__all__ = [
    "bodies",
    "carried",
    "every_node",
    "graphs",
    "is_quantized_inside",
    "name_nested",
    "nested_calls",
    "operands",
    "placeholders_of_operands",
    "set_operands",
    "written",
    "written_inputs",
]

_CARRIED_KEY = "pt2e_quant_carried"


@dataclass(frozen=True)
class _Form:
    """How a higher-order op takes its arguments.

    operands: position of the sequence of operands; of the first one, when they are not in a sequence (flat)
    carried:  position of the sequence of start values, of a loop whose results are the inputs of its next run
    """

    operands: int
    flat: bool = False
    carried: int | None = None


_HIGHER_ORDER = torch.ops.higher_order
_FORMS: dict[Any, _Form] = {
    _HIGHER_ORDER.cond: _Form(operands=3),
    _HIGHER_ORDER.while_loop: _Form(operands=3, carried=2),
    _HIGHER_ORDER.scan: _Form(operands=3, carried=1),
    _HIGHER_ORDER.map_impl: _Form(operands=2),
    _HIGHER_ORDER.wrap_with_autocast: _Form(operands=5, flat=True),
}


def bodies(gm: GraphModule) -> list[tuple[str, GraphModule]]:
    """The graphs that this one calls, each once, with the attribute that holds it."""
    targets = dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr"))
    found = ((target, _submodule(gm, target)) for target in targets)
    return [(target, body) for target, body in found if isinstance(body, GraphModule)]


def graphs(gm: GraphModule, path: str = "", *, opaque: bool = True) -> Iterator[tuple[str, GraphModule]]:
    """The graph and all graphs nested in it, outer before inner, with their dotted paths ('' is the outermost).

    opaque: with the bodies of ops of unknown form, which are never quantized.
    """
    yield path, gm
    for target, body in bodies(gm):
        if opaque or is_quantized_inside(gm, target):
            yield from graphs(body, f"{path}.{target}" if path else target, opaque=opaque)


def every_node(gm: GraphModule) -> list[Node]:
    """The nodes of the graph and of all graphs nested in it."""
    return [node for _, part in graphs(gm) for node in part.graph.nodes]


def is_quantized_inside(gm: GraphModule, target: str) -> bool:
    """True when all that calls this body is of a form known here."""
    return all(
        user.target in _FORMS for node in gm.graph.find_nodes(op="get_attr", target=target) for user in node.users
    )


def name_nested(gm: GraphModule) -> GraphModule:
    """Let every nested graph remember where it hangs, and how many values its loop carries; for names and messages."""
    for path, part in graphs(gm):
        if path:
            part.meta[NESTED_KEY] = path
        for call, called in nested_calls(part):
            start = _FORMS[call.target].carried
            for body in called:
                body.meta[_CARRIED_KEY] = 0 if start is None else len(call.args[start])  # type: ignore[arg-type]
    return gm


def carried(body: GraphModule) -> list[tuple[Node, Node]]:
    """(input, result) of the body of a loop, for each result that is this input in the next run. Needs `mark`."""
    results = body.graph.output_node().args[0]
    if not isinstance(results, (tuple, list)):
        return []  # the condition of a loop
    count = body.meta.get(_CARRIED_KEY, 0)
    pairs = zip(body.graph.find_nodes(op="placeholder")[:count], results[:count], strict=True)
    return [(start, result) for start, result in pairs if isinstance(result, Node)]


def nested_calls(gm: GraphModule) -> list[tuple[Node, list[GraphModule]]]:
    """Calls of a known form, with the bodies that they run."""
    bodies_by_name = dict(bodies(gm))
    found = []
    for node in gm.graph.nodes if bodies_by_name else ():
        if node.op == "call_function" and node.target in _FORMS:
            sources = [source for source in node.args if isinstance(source, Node) and source.op == "get_attr"]
            called = [bodies_by_name[str(s.target)] for s in sources if str(s.target) in bodies_by_name]
            found.append((node, called))
    return found


def operands(call: Node) -> list[Any]:
    """What the bodies of a call read besides the values that a loop carries, or that scan and map take apart."""
    form = _FORMS[call.target]
    return list(call.args[form.operands :] if form.flat else call.args[form.operands])  # type: ignore[arg-type]


def set_operands(call: Node, values: list[Any]) -> None:
    """Replace the operands; the placeholders of the bodies are the caller's business."""
    form = _FORMS[call.target]
    before = call.args[: form.operands]
    if form.flat:
        call.args = (*before, *values)
    else:
        kind = list if isinstance(call.args[form.operands], list) else tuple
        call.args = (*before, kind(values), *call.args[form.operands + 1 :])


def placeholders_of_operands(call: Node, body: GraphModule) -> list[Node]:
    """The placeholders that the operands of a call arrive at, in their order."""
    count = len(operands(call))
    return body.graph.find_nodes(op="placeholder")[-count:] if count else []


def written(gm: GraphModule) -> set[Node]:
    """Parameters, buffers and inputs that an op of the graph, or of a graph nested in it, writes to."""
    return {node for node, _ in _writes(gm) if node.op in ("get_attr", "placeholder")}


def written_inputs(gm: GraphModule) -> dict[Node, Node]:
    """The inputs of the graph among them, each with an op that writes to it."""
    return {node: by for node, by in _writes(gm) if node.op == "placeholder"}


def _writes(gm: GraphModule) -> Iterator[tuple[Node, Node]]:
    """The memory that is written to, by the node whose it is, and the op that writes."""
    for node in gm.graph.nodes:
        for target in written_values(node):
            while (viewed := memory_of(target)) is not None:
                target = viewed  # up to where the memory is
            yield target, node
    for call, called in nested_calls(gm):
        for body in called:
            inner = written(body)
            pairs = zip(operands(call), placeholders_of_operands(call, body), strict=True)
            written_in_it = (operand for operand, placeholder in pairs if placeholder in inner)
            yield from ((operand, call) for operand in written_in_it if isinstance(operand, Node))


def _submodule(gm: GraphModule, target: str) -> nn.Module | None:
    module: nn.Module | None = gm
    for name in target.split("."):
        module = None if module is None else module._modules.get(name)  # most targets are parameters: getattr is slow
    return module
