"""The Quantizer of a model that comes from eager mode: which tensors eager mode keeps as integers, and on which grid.

Before this: `bridge` marks them with taps.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from .. import ops
from ..fx.recipes import Recipe, read_recipe
from ..graph.module import tidy
from ..graph.values import is_float_tensor
from ..meta import ANNOTATION_KEY
from ..qtensor.operators import fixed_grid, keeps_grid
from ..quantizer.base import Quantizer
from ..specs import (
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpecBase,
    SharedQuantizationSpec,
    range_of,
)

__all__ = ["LEAVES", "EagerQuantizer", "Layer"]

LEAVES = -1
"""The number of a tap where integers become real numbers."""


@dataclass(frozen=True)
class Layer:
    """What the qconfig of a module says of its weight, and of an input that is quantized while it runs."""

    weight: Recipe
    activation: Recipe

    @classmethod
    def of(cls, module: nn.Module) -> Layer | None:
        """None for a module without a qconfig."""
        qconfig: Any = module.qconfig
        return None if qconfig is None else cls(read_recipe(qconfig.weight), read_recipe(qconfig.activation))


class EagerQuantizer(Quantizer):
    """Annotates what eager mode quantizes.

    Args:
        points: the spec of each tap, by its number.
        layers: path of a module with weights -> its Layer.
    """

    def __init__(self, points: Sequence[QuantizationSpecBase], layers: Mapping[str, Layer]) -> None:
        self.points, self.layers = tuple(points), dict(layers)
        self._reset()

    def _reset(self) -> None:
        self._outputs: dict[Node, QuantizationSpecBase] = {}
        self._edges: dict[tuple[Node, Node], QuantizationSpecBase] = {}
        self._first: dict[
            int, EdgeOrNode
        ] = {}  # where a point is met first; a module that is called twice has one grid

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Take the taps out, and note what they mark."""
        self._reset()
        on_codes: dict[Node, Node] = {}  # what eager mode has as integers -> the node that has their spec
        taps = model.graph.find_nodes(op="call_function", target=torch.ops.pt2e_quant.tap.default)
        for node in model.graph.nodes:
            if node in taps:
                self._enter(node, on_codes)
            elif node.op == "call_function":
                self._pass_on(node, on_codes)
        for tap in taps:
            tap.replace_all_uses_with(tap.args[0])
            model.graph.erase_node(tap)
        return tidy(model)

    def _enter(self, tap: Node, on_codes: dict[Node, Node]) -> None:
        source, point = _untapped(tap), tap.args[1]
        if point == LEAVES:
            return
        on_codes[tap] = source
        if source in self._outputs:
            return
        readers = [reader for reader in _readers(tap) if reader.op != "output"]
        if readers and any(not _is_tap(user) for user in source.users):  # others read it as it was
            for reader in readers:
                self._edges[source, reader] = self._spec(point, (source, reader))  # type: ignore[arg-type]
        else:
            self._outputs[source] = self._spec(point, source)  # type: ignore[arg-type]

    def _spec(self, point: int, place: EdgeOrNode) -> QuantizationSpecBase:
        spec = self.points[point]
        if isinstance(spec, FixedQParamsQuantizationSpec) or point not in self._first:
            self._first.setdefault(point, place)
            return spec
        return SharedQuantizationSpec(self._first[point])

    def _pass_on(self, node: Node, on_codes: dict[Node, Node]) -> None:
        """An operator that eager mode runs on codes, without an observer."""
        source = next((on_codes[one] for one in node.all_input_nodes if one in on_codes), None)
        if source is None:
            return
        spec = self._outputs.get(source) or next(one for (at, _), one in self._edges.items() if at is source)
        if node.target is operator.getitem or not is_float_tensor(node):
            on_codes[node] = source
        elif keeps_grid(node.target):
            fixed = isinstance(spec, FixedQParamsQuantizationSpec)
            self._outputs[node] = spec if fixed else SharedQuantizationSpec(self._place(source))
            on_codes[node] = node
        else:
            self._pass_fixed(node, spec, on_codes)

    def _place(self, source: Node) -> EdgeOrNode:
        return source if source in self._outputs else next(edge for edge in self._edges if edge[0] is source)

    def _pass_fixed(self, node: Node, spec: Any, on_codes: dict[Node, Node]) -> None:
        """A sigmoid or tanh, whose results have a grid of their own."""
        dtype = getattr(spec, "dtype", torch.quint8)
        grid = fixed_grid(node.target, *range_of(dtype))
        if grid is not None:
            self._outputs[node] = FixedQParamsQuantizationSpec(dtype, *grid, *range_of(dtype))
            on_codes[node] = node

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate the tensors that were tapped, what keeps their grid, and weights."""
        for node in model.graph.nodes:
            inputs: dict[Node, QuantizationSpecBase | None] = {
                one: self._edges[one, node] for one in node.all_input_nodes if (one, node) in self._edges
            }
            inputs |= self._weight(node) if node.target in ops.PRODUCTS else {}
            output = self._outputs.get(node)
            if inputs or output is not None:
                node.meta[ANNOTATION_KEY] = QuantizationAnnotation(inputs, output, _annotated=True, rule="eager")
        return model

    def _weight(self, node: Node) -> dict[Node, QuantizationSpecBase]:
        x, weight = node.args[0], node.args[1]
        path = str(getattr(weight, "target", "")).rpartition(".")[0]
        layer = self.layers.get(path)
        if layer is None or layer.weight.spec is None:
            return {}
        made: Any = {weight: layer.weight.spec}
        if layer.activation.is_dynamic and layer.activation.spec is not None:
            made[x] = layer.activation.spec
        return made  # type: ignore[no-any-return]

    def validate(self, model: GraphModule) -> None:
        """Nothing: eager mode decides."""


def _is_tap(node: Node) -> bool:
    return node.target is torch.ops.pt2e_quant.tap.default


def _untapped(node: Node) -> Node:
    while _is_tap(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _readers(tap: Node) -> Iterator[Node]:
    """What reads a tapped tensor, through further taps."""
    for user in tap.users:
        yield from _readers(user) if _is_tap(user) else (user,)
