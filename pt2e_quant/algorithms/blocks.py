"""Blocks: a prepared graph in pieces that lie one after the other, each with the sites in it and what it hands on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch.fx import GraphModule, Node

from ..graph.module import is_guard
from ..where import module_path
from .sites import Site
from .stream import Round, Stream

__all__ = ["Block", "Per", "blocks_of"]

Per = Literal["layer", "block"]


@dataclass(frozen=True, eq=False)
class Block:
    """Neighbours in a graph.

    name:  path of the module, or name of the op that it begins with
    nodes: all of them, in order; nothing but constants lies between two blocks
    sites: those among them
    """

    name: str
    nodes: tuple[Node, ...]
    sites: tuple[Site, ...]

    @property
    def ends(self) -> list[Node]:
        """The nodes that others read after the block."""
        inside = set(self.nodes)
        return [node for node in self.computed if any(user not in inside or user.op == "output" for user in node.users)]

    @property
    def computed(self) -> list[Node]:
        """The nodes that compute something."""
        return [node for node in self.nodes if node.op.startswith("call_") and not is_guard(node)]

    @property
    def sources(self) -> list[Node]:
        """The values from before the block that it reads."""
        inside = set(self.nodes)
        read = dict.fromkeys(source for node in self.computed for source in node.all_input_nodes)
        return [node for node in read if node not in inside and node.op != "get_attr"]

    def run(self, stream: Stream, inputs: Mapping[Node, Any], through: Round | None = None) -> list[Any]:
        """What the ends are, as the converted graph computes them from these inputs; see `Stream.compute`."""
        values = dict(inputs)
        for node in self.computed:
            values[node] = stream.compute(node, values, through)
        return [values[node] for node in self.ends]

    def run_exact(self, stream: Stream, inputs: Mapping[Node, Any]) -> list[Any]:
        """What the ends are in the float model."""
        values = dict(inputs)
        for node in self.computed:
            values[node] = stream.compute_exact(node, values)
        return [values[node] for node in self.ends]


def blocks_of(gm: GraphModule, sites: Iterable[Site], per: Per) -> tuple[list[Node], list[Block]]:
    """(inputs and constants before the first block; the blocks, which hold all other nodes).

    Args:
        gm: a prepared graph.
        sites: of it.
        per: 'layer': a block begins with each site. 'block': with each change of the module, where its path ends with
            its first number ('layers.3') or has one name ('stem'); ops of no module go on with the block before.
    """
    of = {site.node: site for site in sites}
    nodes = list(gm.graph.nodes)
    first = next((at for at, node in enumerate(nodes) if node.op.startswith("call_")), len(nodes))
    pieces = [list(piece) for _, piece in groupby(nodes[first:], _Numbers(of, per))]
    blocks: list[list[Node]] = []
    for piece in pieces:
        if blocks and (of.keys().isdisjoint(piece) or of.keys().isdisjoint(blocks[-1])):
            blocks[-1] += piece
        else:
            blocks.append(piece)
    return nodes[:first], [_block(piece, of, per) for piece in blocks]


def _block(piece: list[Node], of: dict[Node, Site], per: Per) -> Block:
    inside = tuple(of[node] for node in piece if node in of)
    begin = inside[0].node if inside else piece[0]
    name = begin.name if per == "layer" else _path(begin)
    return Block(name or begin.name, tuple(piece), inside)


class _Numbers:
    """Of nodes in their order, which piece each is in."""

    def __init__(self, of: dict[Node, Site], per: Per) -> None:
        self._of, self._per = of, per
        self._number, self._path = 0, ""

    def __call__(self, node: Node) -> int:
        path = _path(node)
        if self._per == "layer":
            self._number += node in self._of
        elif path and path != self._path:
            self._number, self._path = self._number + 1, path
        return self._number


def _path(node: Node) -> str:
    """'layers.3' of a node in 'layers.3.attention.query', 'stem' of one in 'stem.conv', '' of one in no module."""
    names = (module_path(node) or "").split(".")
    end = next((at for at, name in enumerate(names) if name.isdigit()), 0)
    return ".".join(names[: end + 1])
