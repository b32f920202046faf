"""Grafts: quantized layers in a float graph, any number of them. Each is computed from what then stands before it.

With one layer quantized, the graph shows what that layer does to the outputs; with all but one, what that one costs.
Before this: `layers.layers_of`. After it: `sensitivity`, `exact_sensitivity`, `mixed_precision`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..errors import CaptureError
from ..graph.attributes import attribute, free_name, set_attribute
from ..graph.module import ExportedModule, clone, finish, tidy
from ..graph.run import writes_to_buffer
from ..ops import is_call
from ..pt2e.record import record_of
from .compare import copy_to_run
from .layers import Layer, layers_of
from .pairs import join

__all__ = ["Grafts"]


class Grafts:
    """A float model, and the layers of a converted one that can be put into it.

    Args:
        exact: the float model, exported.
        found: what convert_pt2e made of it.
        asked_by: for messages.

    Raises:
        CaptureError: `found` is no converted graph, or no layer of it stems from `exact`.
    """

    def __init__(self, exact: ExportedProgram | GraphModule, found: GraphModule, asked_by: str) -> None:
        record = record_of(found)
        if record is None or record.stage != "converted" or record.representation is not None:
            raise CaptureError(f"{asked_by} takes the graph that convert_pt2e returned, before lowering")
        self.exact, self.found = copy_to_run(exact), copy_to_run(found)
        self._pairs, layers = layers_of(join(self.exact, self.found))
        self._needed = {layer: list(self._nodes(layer)) for layer in layers}
        self.layers = [layer for layer in layers if self._quantizes(layer)]
        if not self.layers:
            raise CaptureError(f"{asked_by}: no quantized layer of the converted graph stems from the float model")

    def put(self, layers: Iterable[Layer]) -> ExportedModule:
        """The float model with these layers quantized."""
        graft = _Graft(self)
        for layer in layers:
            graft.put(layer)
        return finish(tidy(graft.gm))  # type: ignore[arg-type]

    def beside(self) -> tuple[ExportedModule, list[tuple[Node, Node]]]:
        """The float model with all layers quantized beside the float ones, which go on, and the last nodes of both."""
        graft = _Graft(self)
        ends = [(graft.stands[layer.end], graft.copy(layer)[layer.held]) for layer in self.layers]
        return graft.gm, ends

    def source(self, node: Node, layer: Layer) -> Node | None:
        """The float node whose value a layer reads there; None inside of the layer."""
        twin = self._pairs.values.get(node)
        return twin if twin is not None and node not in self._pairs.grids and twin is not layer.end else None

    def needed(self, layer: Layer) -> list[Node]:
        """The nodes of the converted graph that compute a layer, in their order."""
        return self._needed[layer]

    def _nodes(self, layer: Layer) -> Iterator[Node]:
        held = [node for node, twin in self._pairs.values.items() if twin is layer.end]  # rounded in one way or several
        needed, pending = set[Node](), held
        while pending:
            node = pending.pop()
            if node not in needed and node.op != "placeholder" and self.source(node, layer) is None:
                needed.add(node)
                pending += node.all_input_nodes
        yield from (node for node in self.found.graph.nodes if node in needed)

    def _quantizes(self, layer: Layer) -> bool:
        """Whether something is rounded in a layer, and nothing is written to a buffer."""
        nodes = self._needed[layer]
        written = any(map(writes_to_buffer, nodes))
        return not written and any("quantized_decomposed" in str(node.target) for node in nodes)


class _Graft:
    """A copy of the float model at work.

    stands: by node of the float model, what has its value in the copy
    held:   by node of a layer that was put in, its copy: of a tensor rounded in two ways, each reader gets its own
    """

    def __init__(self, grafts: Grafts) -> None:
        self._of = grafts
        self.gm = clone(grafts.exact)
        self.stands: dict[Node, Node] = dict(zip(grafts.exact.graph.nodes, self.gm.graph.nodes, strict=True))
        self.held: dict[Node, Node] = {}
        self._names = free_name(self.gm, "_graft_")

    def put(self, layer: Layer) -> None:
        end = self.stands[layer.end]
        made = set(self.gm.graph.nodes)
        self.held.update(self.copy(layer))
        self.stands[layer.end] = self.held[layer.held]
        end.replace_all_uses_with(self.stands[layer.end], delete_user_cb=lambda user: user in made)
        if is_call(end) and not end.users:
            self.gm.graph.erase_node(end)  # what writes to the memory of another tensor would stay otherwise

    def copy(self, layer: Layer) -> dict[Node, Node]:
        """Copy the nodes of a layer after its float ones."""
        copies: dict[Node, Node] = {}
        place: Node = self.stands[layer.end]
        for node in self._of.needed(layer):
            with self.gm.graph.inserting_after(place):
                place = copies[node] = self._copy_one(node, layer, copies)
        return copies

    def _copy_one(self, node: Node, layer: Layer, copies: dict[Node, Node]) -> Node:
        if node.op == "get_attr":
            name = next(self._names)
            set_attribute(self.gm, name, attribute(self._of.found, str(node.target)))
            read: Node = self.gm.graph.get_attr(name)
            read.meta.update(node.meta)
            return read
        copy: Node = self.gm.graph.node_copy(node, lambda source: self._standing(source, layer, copies))
        return copy

    def _standing(self, source: Node, layer: Layer, copies: dict[Node, Node]) -> Node:
        twin = self._of.source(source, layer)
        if twin is None and source.op == "placeholder":
            twin = layer.end
        if twin is None:
            return copies[source]
        return self.held.get(source, self.stands[twin])
