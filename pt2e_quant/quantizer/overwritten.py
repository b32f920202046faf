"""Tensors that cannot be quantized, because an op writes to their memory and somebody reads it under another name.

Quantizing makes a copy: an op that writes to a copy leaves the original as it was, and a copy made before the write
misses it. Rules refuse such tensors with a reason; the plan of the engine does so for quantizers of other kinds.
"""

from __future__ import annotations

from collections import defaultdict

from torch._ops import OpOverload
from torch.fx import Graph, Node

from ..ops import argument_index, mutated_arguments

__all__ = ["overwritten", "overwritten_reason"]


def overwritten(graph: Graph) -> dict[Node, Node]:
    """For each tensor that must not be copied, the op that writes to its memory.

    That is the written tensor itself, when it lives on outside the graph (a parameter, a buffer, an input) or another
    name of its memory is read behind the write; and those other names.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    base: dict[Node, Node] = {}
    names: dict[Node, list[Node]] = defaultdict(list)
    writes: list[tuple[Node, Node]] = []
    for node in graph.nodes:
        base[node] = base[source] if (source := _memory_of(node)) is not None else node
        names[base[node]].append(node)
        writes += [(node, target) for target in _written(node)]
    found: dict[Node, Node] = {}
    for write, target in writes:
        stale = [
            name
            for name in names[base[target]]
            if name is not write and position[name] < position[write] < max(map(position.__getitem__, name.users))
        ]
        if stale or base[target].op in ("get_attr", "placeholder"):
            found.update(dict.fromkeys((target, *stale), write))
    return found


def overwritten_reason(tensor: Node, write: Node) -> str:
    return f"{write.name} writes to the memory of {tensor.name}, which a quantized copy would miss"


def _memory_of(node: Node) -> Node | None:
    """The argument whose memory the result of a view or an in-place op lies in."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    returned = {name for result in node.target._schema.returns if result.alias_info for name in _sets(result)}
    for argument in node.target._schema.arguments:
        index = argument_index(node.target, argument.name)
        if returned and argument.alias_info and index is not None and index < len(node.args):
            value = node.args[index]
            if isinstance(value, Node) and not returned.isdisjoint(_sets(argument)):
                return value
    return None


def _sets(item: object) -> set[str]:
    return set(item.alias_info.before_set)  # type: ignore[attr-defined]


def _written(node: Node) -> list[Node]:
    if node.op != "call_function":
        return []
    values = [node.args[index] for index in mutated_arguments(node.target) if index < len(node.args)]
    return [value for value in values if isinstance(value, Node)]
