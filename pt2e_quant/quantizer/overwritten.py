"""Tensors that cannot be quantized, because an op writes to their memory and somebody reads it under another name.

Quantizing makes a copy: an op that writes to a copy leaves the original as it was, and a copy made before the write
misses it. Rules refuse such tensors with a reason; the plan of the engine does so for quantizers of other kinds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch.fx import Graph, Node

from ..arguments import written_values
from ..ops import memory_of

__all__ = ["overwritten", "overwritten_reason"]


def overwritten(graph: Graph) -> dict[Node, Node]:
    """For each tensor that must not be copied, the op that writes to its memory.

    That is the written tensor itself, with what it is a view of, when it lives on outside the graph (a parameter, a
    buffer, an input) or another name of its memory is read after the write; and those other names.
    """
    writes = {node: targets for node in graph.nodes if (targets := written_values(node))}
    if not writes:
        return {}
    last_read = {source: index for index, node in enumerate(graph.nodes) for source in node.all_input_nodes}
    base: dict[Node, Node] = {}
    names: dict[Node, list[Node]] = defaultdict(list)  # of the memory of each base, those that may still be read
    found: dict[Node, Node] = {}
    for index, node in enumerate(graph.nodes):
        for target in writes.get(node, ()):
            memory = base[target]
            names[memory] = [name for name in names[memory] if last_read.get(name, -1) > index]
            if names[memory] or memory.op in ("get_attr", "placeholder"):
                found.update(dict.fromkeys((*_way(target), *names[memory]), node))
        shared = memory_of(node)
        base[node] = node if shared is None else base[shared]
        names[base[node]].append(node)
    return found


def overwritten_reason(tensor: Node, write: Node) -> str:
    return f"{write.name} writes to the memory of {tensor.name}, which a quantized copy would miss"


def _way(target: Node) -> Iterator[Node]:
    """The views between a written tensor and its memory: a copy of one of them would take the write."""
    view: Node | None = target
    while view is not None:
        yield view
        view = memory_of(view)
