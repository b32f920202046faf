"""Pairs of layers of a float graph between which a factor for each channel can pass, with their parameters at work."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph.attributes import attribute
from ..graph.constants import Constants
from ..graph.module import ExportedModule
from ..ops import LINEAR, PRODUCTS, factors, is_conv, is_conv_transpose
from ..passes.fold_batch_norm import fold_batch_norm
from ..passes.private_copy import private_copy
from ..passes.runner import run_pass
from .folds import channels_of, find_fold
from .sites import set_parameter

__all__ = ["Pair", "pairs_of", "ready", "spread_over"]

Refused = tuple[Node, list[Node], str]
Values = dict[Node, Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer, and those that read what it makes.

    x:      the tensor between them
    path:   the nodes from the producer to x
    rows:   of each channel of x, the row of the producer's weight that makes it
    values: parameters at work, by the node that reads them, of all pairs of a graph
    """

    producer: Node
    readers: tuple[Node, ...]
    x: Node
    path: tuple[Node, ...]
    rows: Tensor
    values: Values

    def row_ranges(self) -> Tensor:
        """The largest magnitude of each row of the producer's weight."""
        return self.values[factors(self.producer)[1]].abs().flatten(1).amax(1)

    def column_ranges(self) -> Tensor:
        """The largest magnitude that a row's channels meet in the readers' weights, for each row of the producer."""
        each = torch.stack([_columns(self.values[factors(node)[1]], node).abs().amax(1) for node in self.readers]).amax(
            0
        )
        found = each.new_zeros(len(self.values[factors(self.producer)[1]]))
        return found.scatter_reduce(0, self.rows, each, "amax")

    def divide_rows(self, by: Tensor) -> None:
        """Divide what each row makes, and multiply its channels where they are read."""
        weight, bias = factors(self.producer)[1:]
        self.values[weight] = self.values[weight] / by.reshape(-1, *[1] * (self.values[weight].dim() - 1))
        if bias is not None:
            self.values[bias] = self.values[bias] / by
        for node in self.readers:
            read = factors(node)[1]
            self.values[read] = _times(self.values[read], by[self.rows], node)

    def write(self, gm: GraphModule) -> None:
        """Put the parameters at work into the graph."""
        for layer in (self.producer, *self.readers):
            for node in factors(layer)[1:]:
                if node in self.values:
                    set_parameter(gm, node, self.values[node])


def ready(model: ExportedProgram | GraphModule) -> ExportedModule:
    """A copy of a float model to work on, batch norms folded."""
    return run_pass(fold_batch_norm, private_copy(model))


def pairs_of(gm: GraphModule, *, clamps: bool = False) -> tuple[list[Pair], list[Refused]]:
    """The pairs of a float graph, in its order; and (tensor, readers, why no factor passes) of the others.

    Args:
        gm: the graph, batch norms folded.
        clamps: as `find_fold` takes it.
    """
    constants = Constants(gm)
    groups: dict[Node, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if node.target in PRODUCTS and factors(node)[1] in constants:
            groups[factors(node)[0]].append(node)
    values: Values = {}
    pairs: list[Pair] = []
    refused: list[Refused] = []
    for x, readers in groups.items():
        found = _pair(x, readers, values, clamps)
        if isinstance(found, Pair):
            pairs.append(found)
            _collect(gm, found)
        else:
            refused.append((x, readers, found))
    return pairs, refused


def _pair(x: Node, readers: list[Node], values: Values, clamps: bool) -> Pair | str:
    if not all(_is_own(factors(node)[1]) for node in readers):
        return "a weight is computed, or other operators read it too"
    if len({channels_of(node) for node in readers}) > 1:
        return "its readers have their channels in different dimensions"
    fold = find_fold(x, readers, clamps=clamps)
    if isinstance(fold, str):
        return fold
    producer = fold.producer
    if producer.target not in LINEAR and not is_conv(producer):
        return f"{producer.name}, which makes it, has no rows"
    if len(fold.places) > 1 + (factors(producer)[2] is not None):
        return f"a vector is added on the way from {producer.name}"
    return Pair(producer, tuple(readers), x, fold.path, fold.rows, values)


def _is_own(parameter: Node) -> bool:
    return parameter.op == "get_attr" and len(parameter.users) == 1


def _collect(gm: GraphModule, pair: Pair) -> None:
    for layer in (pair.producer, *pair.readers):
        for node in factors(layer)[1:]:
            if node is not None and node.op == "get_attr":
                pair.values.setdefault(node, attribute(gm, str(node.target)).detach())


def _columns(weight: Tensor, node: Node) -> Tensor:
    """The weight as (input channels, everything else)."""
    if is_conv_transpose(node):
        return weight.flatten(1)
    groups = 1 if node.target in LINEAR else int(bind(node)["groups"])
    return weight.unflatten(0, (groups, -1)).movedim(2, 1).flatten(0, 1).flatten(1)  # type: ignore[no-any-return]


def _times(weight: Tensor, by: Tensor, node: Node) -> Tensor:
    """The weight with a factor for each input channel."""
    if is_conv_transpose(node):
        return weight * by.reshape(-1, *[1] * (weight.dim() - 1))
    groups = 1 if node.target in LINEAR else int(bind(node)["groups"])
    wide = by.reshape(groups, 1, -1, *[1] * (weight.dim() - 2)).repeat_interleave(len(weight) // groups, 1)
    return weight * wide.flatten(0, 1)


def spread_over(weight: Tensor, constants: Tensor, node: Node) -> Tensor:
    """What a layer without padding makes of an input that has one constant in each channel, its bias aside."""
    return _times(weight, constants, node).flatten(1).sum(1)
