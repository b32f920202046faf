"""layers_of: the pairs of two graphs, one for each layer: an op, and what alone reads it up to where it is rounded.

`relu(conv2d(x))` is rounded after the relu: with exact inputs, the error there is that of the weights and of the
rounding together. Before this: `pairs.join`. After it: `sensitivity`, which asks what the errors of a layer do to the
outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from ..where import exported_name
from .pairs import Pairs

__all__ = ["Layer", "layers_of"]


@dataclass(frozen=True)
class Layer:
    """Neighbours in a float graph that are quantized together.

    name:  that of the op in the program that was exported, by which selectors of a quantizer know it
    nodes: the op, or the batch norm that is folded into it, then what follows alone; the last has the value that others
           read
    held:  the node of the quantized graph that holds this value
    """

    name: str
    nodes: tuple[Node, ...]
    held: Node

    @property
    def end(self) -> Node:
        return self.nodes[-1]


def layers_of(pairs: Pairs) -> tuple[Pairs, list[Layer]]:
    """(the pairs without the values inside of layers, the layers in the order of the quantized graph)."""
    held = dict(pairs.shown)  # of a tensor that is rounded in two ways, the last one
    ends = {node: _end(node, held, pairs) for node in held}
    inside = {node: ends[node] for node in held if ends[node] is not node}
    coarse = replace(
        pairs,
        values={node: twin for node, twin in pairs.values.items() if twin not in inside},
        parts={node: inside.get(twin, twin) for node, twin in pairs.parts.items()},
        grids={node: grid for node, grid in pairs.grids.items() if pairs.values[node] not in inside},
        shown=[(twin, node) for twin, node in held.items() if twin not in inside],
    )
    layers = []
    for twin, node in coarse.shown:
        nodes = (*(before for before, end in inside.items() if end is twin), twin)
        layers.append(Layer(exported_name(held[nodes[0]]), nodes, node))
    return coarse, layers


def _end(node: Node, held: dict[Node, Node], pairs: Pairs) -> Node:
    """Where the value of an op is rounded, if ops without parameters that read it alone lead there; else the op."""
    end = node
    while held[end] not in pairs.rounded:
        reader = next(iter(end.users), None)
        if reader is None or len(end.users) > 1 or reader not in held or reader.all_input_nodes != [end]:
            return node
        end = reader
    return end
