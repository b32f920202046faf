"""Tensors that cannot be quantized, because an op writes to their memory and somebody reads it under another name.

Quantizing makes a copy: an op that writes to a copy leaves the original as it was, and a copy made before the write
misses it. Rules refuse such tensors with a reason; the plan of the engine does so for quantizers of other kinds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch._ops import OpOverload
from torch.fx import Graph, Node

from ..arguments import written_values
from ..ops import memory_of

__all__ = ["Overwritten", "overwritten_reason"]


class Overwritten:
    """The tensors of a graph that must not be copied, each with the op that writes to its memory.

    That is the written tensor itself, with what it is a view of, when it lives on outside the graph (a parameter, a
    buffer, an input) or another name of its memory is read after the write; and those other names.
    """

    def __init__(self, graph: Graph) -> None:
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._written: dict[Node, list[Node]] = defaultdict(
            list
        )  # of the memory of each base, the ops that write to it
        self._base: dict[Node, Node] = {}
        self._found: dict[Node, Node] = {}
        writes = {node: targets for node in graph.nodes if (targets := written_values(node))}
        if writes:
            self._read(graph, writes)

    def write(self, tensor: Node) -> Node | None:
        """The op whose write a copy of the tensor, for all of its readers, would miss or take; None without one."""
        return self._found.get(tensor)

    def write_missed(self, tensor: Node, reader: Node) -> Node | None:
        """The same for a copy that one reader has: None where it reads before any write, and hands no memory on."""
        write = self._found.get(tensor)
        known = isinstance(reader.target, OpOverload)
        if write is None or not known or memory_of(reader) is not None:
            return write
        born, read = self._order[tensor], self._order[reader]
        between = (write for write in self._written[self._base[tensor]] if born < self._order[write] <= read)
        return next(between, None)

    def _read(self, graph: Graph, writes: dict[Node, list[Node]]) -> None:
        last_read = {source: index for index, node in enumerate(graph.nodes) for source in node.all_input_nodes}
        names: dict[Node, list[Node]] = defaultdict(list)  # of the memory of each base, those that may still be read
        for index, node in enumerate(graph.nodes):
            for target in writes.get(node, ()):
                memory = self._base[target]
                self._written[memory].append(node)
                names[memory] = [name for name in names[memory] if last_read.get(name, -1) > index]
                if names[memory] or memory.op in ("get_attr", "placeholder"):
                    self._found.update(dict.fromkeys((*_way(target), *names[memory]), node))
            shared = memory_of(node)
            self._base[node] = node if shared is None else self._base[shared]
            names[self._base[node]].append(node)


def overwritten_reason(tensor: Node, write: Node) -> str:
    return f"{write.name} writes to the memory of {tensor.name}, which a quantized copy would miss"


def _way(target: Node) -> Iterator[Node]:
    """The views between a written tensor and its memory: a copy of one of them would take the write."""
    view: Node | None = target
    while view is not None:
        yield view
        view = memory_of(view)
