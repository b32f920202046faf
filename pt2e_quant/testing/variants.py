"""Copies of a graph that are the same model, so that a quantizer must say the same: reordered, without metadata."""

from __future__ import annotations

import copy
import heapq
import operator
import random
from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node

from ..arguments import mutates
from ..graph.module import ExportedModule, clone
from ..graph.pickle import quiet_copies

__all__ = ["backwards", "reordered", "shuffled", "without_metadata"]

Priority = Callable[[int], float]
"""Of the position of a node in the original graph; of the nodes that could come next, the smallest comes."""


def backwards(gm: GraphModule) -> ExportedModule:
    """A copy in which every node stands as early as its inputs allow, the last ones of the graph first."""
    return reordered(gm, lambda position: -position)


def shuffled(gm: GraphModule, seed: int) -> ExportedModule:
    """A copy in one of the many legal orders."""
    chance = random.Random(seed)
    places = [chance.random() for _ in gm.graph.nodes]
    return reordered(gm, places.__getitem__)


def reordered(gm: GraphModule, priority: Priority) -> ExportedModule:
    """A copy whose nodes were created in another legal order: same names, arguments and metadata.

    Nothing moves across an op that writes to memory, nor across one whose effects are not known.
    """
    graph = Graph(tracer_cls=gm.graph._tracer_cls)
    copies: dict[Node, Node] = {}
    for node in _order(gm.graph, priority):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    with quiet_copies():
        graph._codegen = copy.deepcopy(gm.graph._codegen)
    copied = clone(gm)
    copied.graph = graph
    return copied


def _order(graph: Graph, priority: Priority) -> list[Node]:
    nodes = list(graph.nodes)
    order = [node for node in nodes if node.op == "placeholder"]
    segment: list[int] = []
    for position, node in enumerate(nodes):
        if node.op == "placeholder":
            continue
        if node.op == "output" or _is_barrier(node):
            order += _sorted(nodes, segment, priority)
            order.append(node)
            segment = []
        else:
            segment.append(position)
    return order


def _is_barrier(node: Node) -> bool:
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.OpOverload):
        return mutates(node.target) or not node.users
    return node.target is not operator.getitem


def _sorted(nodes: list[Node], segment: list[int], priority: Priority) -> list[Node]:
    """The nodes of a segment in topological order, by priority where there is a choice."""
    inside = {nodes[position]: position for position in segment}
    missing = {position: sum(source in inside for source in nodes[position].all_input_nodes) for position in segment}
    ready = [(priority(position), position) for position in segment if not missing[position]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, position = heapq.heappop(ready)
        order.append(nodes[position])
        for user in nodes[position].users:
            if user in inside:
                missing[inside[user]] -= 1
                if not missing[inside[user]]:
                    heapq.heappush(ready, (priority(inside[user]), inside[user]))
    return order


def without_metadata(gm: GraphModule) -> ExportedModule:
    """A copy whose nodes know their recorded value and nothing else: no module, no source, no provenance."""
    copied = clone(gm)
    for node in copied.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    return copied
