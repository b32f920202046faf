"""Rewrite a converted graph so that integers flow where quantize -> dequantize -> float op -> quantize stood.

One walk over the nodes: `forms` says of each op what its result is in integers, if all its operands are; a quantize
takes that and becomes a requantization. What nobody reads any more, the whole float path most often, is dropped.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...errors import CaptureError
from ...graph.constants import Constants
from ...graph.module import ExportedModule, clone, collector_paused, finish, tidy
from ...graph.nested import graphs, name_nested
from ...graph.write import Symbol, Writer
from ...grid import Grid
from ...meta import RECORD_KEY
from ...ops import DEQUANTIZE, QUANTIZE
from ...requantization import NoIntegerForm, Rounding
from ...where import node_id
from ..record import Record, Representation, record_of
from .forms import integer_form
from .operands import Call
from .products import PRODUCTS
from .values import Integers, Lookup, Value

__all__ = ["reference_representation_rewrite"]

_Q = torch.ops.quantized_decomposed


@collector_paused()
def reference_representation_rewrite(
    model: GraphModule, *, rounding: Rounding = Rounding.FLOAT32_HALF_EVEN
) -> ExportedModule:
    """A converted model in integer arithmetic: between its quantized ops only integer tensors flow.

    Float remains at the borders (the quantize of an input, the dequantize of an output or before a float op), in
    the qparams that dynamic quantization computes at run time, and in ops without an integer form;
    `explain(result)` names those with the reason. Nested graphs (the branches of cond, the bodies of loops) stay as
    they are.

    Args:
        model: what convert_pt2e, or another project's convert, returned. Stays as it was.
        rounding: how sums become codes.

    Returns:
        A module with the calling convention of `model`.

    Raises:
        CaptureError: `model` is no graph.
    """
    if not isinstance(model, GraphModule):
        raise CaptureError(
            f"reference_representation_rewrite takes what convert_pt2e returned, got {type(model).__name__}"
        )
    gm = clone(model)
    name_nested(gm)
    walk = _Walk(gm, rounding)
    before = list(gm.graph.nodes)
    for node in before:
        walk.visit(node)
    read = _read(gm, walk.values)
    walk.products_to_float(read)
    for node in reversed(before):
        if node not in read:
            gm.graph.erase_node(node)
    tidy(gm)
    alive = {node.name for node in gm.graph.nodes}
    record = record_of(model) or Record("converted", "another project", [], [], [], [])
    gm.meta[RECORD_KEY] = replace(record, representation=walk.account(alive))
    return finish(gm)


@dataclass
class _Walk:
    """State of one walk.

    values: what a node is in integers
    formed: float ops that have an integer form here, with the type they compute in
    left:   those that have none, with the reason
    codes:  the node that holds what a quantize gave, by the name of the quantize
    grids:  what those codes stand for
    """

    gm: GraphModule
    rounding: Rounding
    values: dict[Node, Value] = field(default_factory=dict)
    formed: dict[Node, str] = field(default_factory=dict)
    left: dict[Node, str] = field(default_factory=dict)
    codes: dict[str, Node] = field(default_factory=dict)
    grids: dict[Node, Grid] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.constants = Constants(self.gm)
        self.writer = Writer(self.gm, "reference_representation_rewrite", "_integer_constant_")

    def visit(self, node: Node) -> None:
        if node.op != "call_function":
            return
        try:
            with self.writer.before(node):
                self._rewrite(node)
        except NoIntegerForm as reason:
            self.left[node] = str(reason)

    def _rewrite(self, node: Node) -> None:
        if node.target is operator.getitem:
            self._getitem(node)
        elif node.target is _Q.quantize_per_tensor.default:
            self._quantize(node)
        elif node.target is torch.ops.aten.sym_size.int:
            self._size(node)
        elif self._reads_integers(node):
            self._form(node)

    def _reads_integers(self, node: Node) -> bool:
        """Whether a node takes part at all: a dequantize, or a float op after one."""
        if node.target in DEQUANTIZE:
            return True
        takes_part = node.target not in QUANTIZE and (Call.is_real(node) or "val" not in node.meta)
        return takes_part and any(source in self.values or self._is_unread(source) for source in node.all_input_nodes)

    def _form(self, node: Node) -> None:
        form = integer_form(node)
        if form is None:
            raise NoIntegerForm(f"{node.target} has no integer form")
        if any("val" not in each.meta for each in (node, *node.all_input_nodes) if each.op != "placeholder"):
            raise NoIntegerForm("the graph does not record its values' shapes")
        unreadable = next((self.left[source] for source in node.all_input_nodes if self._is_unread(source)), None)
        if unreadable is not None and node.target not in PRODUCTS:
            raise NoIntegerForm(unreadable)
        value = form(Call(node, self.values, self.constants, self.writer))
        self.values[node] = value
        if node.target not in DEQUANTIZE:
            self.formed[node] = _describe(value)

    def _is_unread(self, source: Node) -> bool:
        return source in self.left and source.target in DEQUANTIZE

    def _getitem(self, node: Node) -> None:
        source = self.values.get(node.args[0])  # type: ignore[arg-type]
        if isinstance(source, Integers) and Call.is_real(node):
            self.values[node] = replace(source, codes=self.writer.call(operator.getitem, source.codes, node.args[1]))

    def _size(self, node: Node) -> None:
        """The size of a float tensor is that of its codes, which stay."""
        source = self.values.get(node.args[0])  # type: ignore[arg-type]
        if isinstance(source, Integers):
            node.replace_input_with(node.args[0], source.codes.node)  # type: ignore[arg-type]

    def _quantize(self, node: Node) -> None:
        out, value = Grid.of(node), self.values.get(node.all_input_nodes[0])
        if out is None or value is None:
            return
        codes: Symbol = value.quantized(out, self.rounding, self.writer)
        node.replace_all_uses_with(codes.node)
        self.codes[node.name] = codes.node
        self.grids[codes.node] = out

    def products_to_float(self, read: set[Node]) -> None:
        """Products that are still read as real numbers: sum integers, and scale the sum."""
        for node, value in self.values.items():
            if node in read and node.target in PRODUCTS and isinstance(value, Integers | Lookup):
                with self.writer.before(node):
                    node.replace_all_uses_with(value.real(node.meta["val"].dtype).node)
                read.remove(node)

    def account(self, alive: set[str]) -> Representation:
        """What became of each op; one whose integers nobody reads, as all its readers are float ops, is left."""
        left = {node.name: reason for node, reason in self.left.items() if node.name in alive} | _left_inside(self.gm)
        forms = {node.name: kind for node, kind in self.formed.items() if node.name not in alive}
        codes = {name: node.name for name, node in self.codes.items()}
        grids = {node.name: grid for node, grid in self.grids.items()}
        return Representation(self.rounding.value, forms, left, codes, grids)


def _left_inside(gm: GraphModule) -> dict[str, str]:
    """The ops that read quantized tensors in nested graphs, which hold their parameters as inputs: nothing to fold."""
    reason = "inside {}, a nested graph: those keep quantize, float op, dequantize"
    return {
        node_id(node): reason.format(path)
        for path, part in graphs(gm)
        for node in part.graph.nodes
        if path and node.op == "call_function" and any(one.target in DEQUANTIZE for one in node.all_input_nodes)
        if node.target not in QUANTIZE
    }


def _describe(value: Value) -> str:
    """The type that an op computes in."""
    if isinstance(value, Integers):
        held = value.codes.node.meta["val"]
        held = held[0] if isinstance(held, tuple | list) else held
        return str(held.dtype).removeprefix("torch.") if isinstance(held, Tensor) else "integers"
    return "a table, requantized in advance" if isinstance(value, Lookup) else "a sum with one rounding"


def _read(gm: GraphModule, values: dict[Node, Value]) -> set[Node]:
    """The nodes that an output depends on, or that have an effect.

    An in-place op with an integer form has none: it wrote to a tensor inside the float path, as all its operands are.
    Nor has a check of the dtype of such a tensor.
    """
    check = torch.ops.aten._assert_tensor_metadata.default
    read: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        inside = node in values or (node.target is check and node.args[0] in values)
        if node.op == "placeholder" or not read.isdisjoint(node.users) or (node.is_impure() and not inside):
            read.add(node)
    return read
