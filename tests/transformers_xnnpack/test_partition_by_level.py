"""Partitions: as few as the operators outside allow, never one that depends on itself."""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from pt2e_quant.lowering.executorch.partition import by_level


def graph_of(**inputs: list[str]) -> dict[str, Node]:
    """A graph of additions by name; each takes the nodes that are listed."""
    graph, nodes = Graph(), {}
    for name, sources in inputs.items():
        args = tuple(nodes[source] for source in sources)
        nodes[name] = graph.call_function(operator.add, args) if args else graph.placeholder(name)
    graph.output(nodes[name])
    return nodes


def parts(nodes: dict[str, Node], *groups: str) -> list[list[str]] | None:
    names = {node: name for name, node in nodes.items()}
    graph = next(iter(nodes.values())).graph
    found = by_level(graph, [[nodes[name] for name in group.split()] for group in groups])
    return None if found is None else [[names[node] for node in part] for part in found]


def test_without_an_operator_outside_there_is_one():
    nodes = graph_of(x=[], a=["x"], b=["a"], c=["a", "b"])
    assert parts(nodes, "a", "b", "c") == [["a", "b", "c"]]


def test_an_operator_outside_on_the_way_makes_two():
    nodes = graph_of(x=[], a=["x"], out=["a"], b=["out", "a"])
    assert parts(nodes, "a", "b") == [["a"], ["b"]]


def test_an_operator_outside_beside_the_way_makes_none():
    nodes = graph_of(x=[], a=["x"], mask=["x"], b=["a", "mask"])
    assert parts(nodes, "a", "b") == [["a", "b"]]


def test_groups_that_interleave_are_merged():
    """Query and key share a quantized input, as one group; what reads them comes in between in the graph."""
    nodes = graph_of(x=[], q=["x"], view_q=["q"], k=["x"], view_k=["k"], product=["view_q", "view_k"])
    assert parts(nodes, "q k", "view_q", "view_k", "product") == [["q", "view_q", "k", "view_k", "product"]]


def test_a_group_that_depends_on_itself_through_the_outside_is_given_back():
    nodes = graph_of(x=[], a=["x"], out=["a"], b=["out"])
    assert parts(nodes, "a b") is None
