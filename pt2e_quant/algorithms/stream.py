"""Stream: all batches at one place of a prepared graph, in float and rounded, on their way to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..arguments import written_values
from ..debug.pairs import observes
from ..graph.attributes import attribute
from ..graph.module import ExportedModule, clone, is_guard
from ..graph.run import Held, batches_of, flat_inputs, on_batch, readers_of
from ..pt2e.observed import QParams
from ..pt2e.record import record_of
from .rounding import rounded
from .sites import Site, grid_of, set_parameter

__all__ = ["Lane", "Stream"]

Round = Callable[[Node, str, Tensor], Tensor]
"""What stands behind an observer: (the node that calls it or that reads the weight, its name, value) to value."""


class Lane:
    """One batch: what nodes further on still read, by node.

    exact:   in the float model that the stream began with
    rounded: in the graph at work, as convert would make it now
    """

    def __init__(self, gm: GraphModule, batch: Any) -> None:
        self.inputs = iter(flat_inputs(gm, batch))
        self.exact, self.rounded = Held(readers_of(gm)), Held(readers_of(gm))

    def release(self, node: Node) -> None:
        """A node is computed, and all its readers that have been are done with what they read."""
        for source in (*node.all_input_nodes, node):
            self.exact.release(source)
            self.rounded.release(source)


class Stream:
    """Goes through a prepared graph node by node, with all batches.

    Args:
        gm: the graph at work, a `working_copy`: what is set in it counts from then on. Nodes are added before this.
        data: batches, as `graph.run.batches_of` takes them.
        asked_by: for messages.

    `of_weights` are the observers of constants, which nothing calls.

    Raises:
        CalibrationError: there is no batch, or one is not for this model.
    """

    def __init__(self, gm: ExportedModule, data: Iterable[Any], asked_by: str) -> None:
        self.gm, self._original = gm, clone(gm)
        self.lanes = [Lane(gm, batch) for batch in batches_of(data, asked_by)]
        self._engines = {True: Interpreter(gm), False: Interpreter(self._original)}
        record = record_of(gm)
        points = [] if record is None else record.points_by_graph()[""]
        self._weights = {(p.producer, user): p.observer for p in points if p.constant for user in p.consumers}
        self.of_weights = frozenset(self._weights.values())
        self._grids: dict[str, QParams | None] = {}
        self._read: dict[tuple[Node, str], Tensor] = {}
        self.outputs: list[tuple[list[Any], list[Any]]] = []
        self._nodes, self._at = list(gm.graph.nodes), 0

    def advance(self, nodes: Iterable[Node], after: Callable[[Node], None] | None = None) -> None:
        """Compute nodes, the next ones of the graph in its order, for all batches.

        Args:
            nodes: the nodes.
            after: called with each when it is computed, and before what it read is let go.

        Raises:
            CalibrationError: the graph fails on a batch.
        """
        with torch.no_grad(), on_batch(self.gm, "the prepared graph"):
            for node in nodes:
                self._read.clear()
                self._at += 1
                for lane in self.lanes:
                    self._step(lane, node)
                if after is not None:
                    after(node)
                for lane in self.lanes:
                    lane.release(node)

    def advance_to(self, node: Node) -> None:
        """Compute all that comes before a node further on, for all batches; raises as `advance`."""
        self.advance(self._nodes[self._at : self._nodes.index(node, self._at)])

    def pass_by(self, site: Site) -> None:
        """Compute a site, which is next, and let its weight in the float model go; raises as `advance`."""
        self.advance([site.node])
        set_parameter(self._original, site.weight, torch.empty(0))

    def _step(self, lane: Lane, node: Node) -> None:
        if node.op == "placeholder":
            lane.exact[node] = lane.rounded[node] = next(lane.inputs)
        elif node.op == "output":
            ends = [map_arg(node.args, self._lookup(values)) for values in (lane.exact, lane.rounded)]
            self.outputs.append((pytree.tree_leaves(ends[0]), pytree.tree_leaves(ends[1])))
        elif node.op != "get_attr" and not is_guard(node):
            lane.exact[node] = self.compute_exact(node, lane.exact)
            lane.rounded[node] = self.compute(node, lane.rounded)

    def compute_exact(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """A node in the float model."""
        if observes(self.gm, node):
            return values[node.args[0]]  # type: ignore[index]  # observers are called on nodes
        return self._run(node, self._lookup(values, exact=True), at_work=False)

    def compute(self, node: Node, values: Mapping[Node, Any], through: Round | None = None) -> Any:
        """A node as the converted graph will compute it.

        Args:
            node: an op or the call of an observer.
            values: of what it reads, but for parameters.
            through: what to do in the place of each observer; None rounds.
        """
        through = through or self.round
        if observes(self.gm, node):
            source: Any = node.args[0]
            value = values[source] if source in values else attribute(self.gm, str(source.target))
            return through(node, str(node.target), value)
        look = self._lookup(values)
        return self._run(node, lambda source: self._weight(node, source, look(source), through), at_work=True)

    def round(self, node: Node, name: str, value: Tensor) -> Tensor:
        """What the observer of this name makes of a value. Of a constant, the grid is that of its values."""
        if name in self.of_weights:
            if (node, name) not in self._read:
                qparams = grid_of(self.gm, name, value)
                self._read[node, name] = value if qparams is None else rounded(value, qparams)
            return self._read[node, name]
        qparams = self.grid(name)
        return value if qparams is None else rounded(value, qparams)

    def grid(self, name: str) -> QParams | None:
        """The grid of an observer of activations."""
        if name not in self._grids:
            self._grids[name] = grid_of(self.gm, name)
        return self._grids[name]

    def forget_grid(self, name: str) -> None:
        """An observer was exchanged."""
        self._grids.pop(name, None)

    def _weight(self, node: Node, source: Node, value: Any, through: Round) -> Any:
        observer = self._weights.get((source.name, node.name))
        return value if observer is None else through(source, observer, value)

    def _lookup(self, values: Mapping[Node, Any], *, exact: bool = False) -> Callable[[Node], Any]:
        gm = self._original if exact else self.gm

        def look(node: Node) -> Any:
            return attribute(gm, str(node.target)) if node.op == "get_attr" else values[node]

        return look

    def _run(self, node: Node, look: Callable[[Node], Any], *, at_work: bool) -> Any:
        written = {source: look(source).clone() for source in written_values(node)}
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: written.get(source, look(source)))
        return getattr(self._engines[at_work], node.op)(node.target, args, kwargs)

    def ends(self) -> Iterator[tuple[list[Any], list[Any]]]:
        """Outputs of each batch, flat: in float and rounded; known when the last node is computed."""
        yield from self.outputs
