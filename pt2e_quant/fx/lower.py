"""Lower a reference model: (dequantize, operator, quantize) becomes one operator on QTensors, where there is one.

What has none stays: its operands are dequantized, it computes in float, and its result is quantized.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..backend_config import BackendPatternConfig, ObservationType
from ..backend_config.native import native
from ..graph.attributes import attribute, free_name, set_attribute
from ..graph.module import tidy
from ..graph.values import copy_value, is_float_tensor
from ..qtensor.tensor import NAMES
from ..where import copy_origin
from . import functions
from .grids import Names, grid_of, is_dequantize, is_quantize
from .lower_modules import PRODUCT_FUNCTIONS, dynamic_form, module_of_function, plain_form, static_form
from .matching import Patterns, module_of

__all__ = ["lower"]

_BY = "convert_fx"
_RELUS = (nn.functional.relu, torch.relu, "relu")
_PAIRS: dict[Any, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    operator.add: (functions.add, functions.add_relu),
    torch.add: (functions.add, functions.add_relu),
    operator.mul: (functions.mul, functions.mul_relu),
    torch.mul: (functions.mul, functions.mul_relu),
    torch.matmul: (functions.matmul, None),
}
"""Function of two tensors -> that on QTensors, and with a relu after it."""


def lower(gm: GraphModule) -> GraphModule:
    """Lower a reference model, in place."""
    work = _Lowering(gm)
    for node in list(gm.graph.nodes):
        if node.op in ("call_module", "call_function", "call_method"):
            work.visit(node)
    work.keep_floats()
    tidy(gm)
    work.write_borders()
    return tidy(gm)


class _Lowering:
    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._names = Names(gm)
        self._calls = {node: str(node.target) for node in gm.graph.find_nodes(op="call_module")}
        self._modules = {path: attribute(gm, path) for path in self._calls.values()}

    def visit(self, node: Node) -> None:
        """Lower what ends in front of a quantize, or begins behind dequantizes alone."""
        if node.target in _ASKING and not isinstance(node.meta.get("val"), Tensor):
            _read_codes(node)
        module = self._modules.get(self._calls.get(node, ""))
        if module is not None and self._plain(node, module):
            return
        if node.target is nn.functional.linear and self._dynamic_product(node):
            return
        after = self._quantize_after(node)
        if after is None or not self._are_codes(node, after):
            return
        last, quantize = after
        if last is not node:
            self._pair(node, quantize, relu=True)
        elif module is not None:
            self._module(node, module, quantize)
        elif node.target in _PAIRS or node.target in PRODUCT_FUNCTIONS:
            self._pair(node, quantize, relu=False)
        if quantize in self._gm.graph.nodes and self._keeps_grid(node, quantize):
            self._take_codes(node, quantize)

    def _plain(self, node: Node, module: nn.Module) -> bool:
        """Modules that take and return real numbers."""
        made = plain_form(module)
        if made is not None:
            self._swap(node, made)
            return True
        dynamic = next((one for one in node.all_input_nodes if is_dequantize(one, dynamic=True)), None)
        made = None if dynamic is None else dynamic_form(module)
        if dynamic is None or made is None:
            return False
        node.replace_input_with(dynamic, dynamic.all_input_nodes[0].all_input_nodes[0])
        self._swap(node, made)
        return True

    def _quantize_after(self, node: Node) -> tuple[Node, Node] | None:
        """(the node itself or the relu after it, the one quantize that reads that)."""
        user = next(iter(node.users), None)
        if user is None or len(node.users) != 1:
            return None
        if is_quantize(user):
            return node, user
        then = next(iter(user.users), None)
        wanted = node.target in _PAIRS or node.target in PRODUCT_FUNCTIONS
        return (
            (user, then)
            if wanted and self._is_relu(user) and len(user.users) == 1 and then and is_quantize(then)
            else None
        )

    def _are_codes(self, node: Node, after: tuple[Node, Node]) -> bool:
        """Every float operand is dequantized, from the type of the result."""
        dtype = grid_of(after[1]).dtype
        operands = [one for one in node.all_input_nodes if is_float_tensor(one)]
        data = operands[:1] if node.target in PRODUCT_FUNCTIONS else operands
        return bool(data) and all(is_dequantize(one) and grid_of(one).dtype is dtype for one in data)

    def _module(self, node: Node, module: nn.Module, quantize: Node) -> None:
        made = static_form(module, grid_of(quantize))
        if made is not None:
            self._swap(node, made)
            self._take_codes(node, quantize)

    def _pair(self, node: Node, quantize: Node, *, relu: bool) -> None:
        if node.target in PRODUCT_FUNCTIONS:
            self._product(node, quantize, relu)
            return
        function = _PAIRS[node.target][relu] if node.target in _PAIRS else None
        if function is None or len(node.args) != 2 or not all(isinstance(one, Node) for one in node.args):
            return
        with self._gm.graph.inserting_before(quantize):
            grid = self._names.buffers(quantize)
            made = self._gm.graph.call_function(function, (*(one.args[0] for one in node.args), *grid))  # type: ignore[union-attr]
        self._write(made, quantize)

    def _product(self, node: Node, quantize: Node, relu: bool) -> None:
        """A function with a constant weight becomes a module."""
        made = module_of_function(node, grid_of(quantize), relu=relu)
        if made is not None:
            self._call(made, node.args[0].args[0], quantize)  # type: ignore[union-attr]

    def _dynamic_product(self, node: Node) -> bool:
        """A linear whose input gets a grid while it runs, and the relu after it."""
        operand, user = node.args[0], next(iter(node.users), None)
        relu = len(node.users) == 1 and user is not None and self._is_relu(user)
        made = module_of_function(node, None, relu=relu) if is_dequantize(operand, dynamic=True) else None
        if made is None:
            return False
        self._call(made, operand.args[0].args[0], user if relu else node)  # type: ignore[union-attr, arg-type]
        return True

    def _call(self, made: nn.Module, operand: Any, old: Node) -> None:
        path = next(free_name(self._gm, "_packed_weight_"))
        set_attribute(self._gm, path, made)
        with self._gm.graph.inserting_before(old):
            call = self._gm.graph.call_module(path, (operand,))
        self._write(call, old)

    def _is_relu(self, node: Node) -> bool:
        return node.target in _RELUS or isinstance(module_of(self._gm, node), nn.ReLU)

    def _write(self, made: Node, old: Node) -> None:
        copy_origin(copy_value(made, old), old, _BY)
        old.replace_all_uses_with(made)
        self._gm.graph.erase_node(old)

    def _keeps_grid(self, node: Node, quantize: Node) -> bool:
        """The operator runs on the codes, and its result has the grid that is asked for."""
        grid = grid_of(quantize)
        match = next(_same_grid().ending_at(self._gm, node), None)
        if match is None:
            return False
        if match.config.observation_type is ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT:
            return all(grid_of(one) == grid for one in node.all_input_nodes if is_float_tensor(one))
        fixed = match.config.dtype_configs[0].output_dtype_with_constraints
        return (grid.scale, grid.zero_point) == (fixed.scale_exact_match, fixed.zero_point_exact_match)

    def _take_codes(self, node: Node, quantize: Node) -> None:
        _read_codes(node)
        quantize.replace_all_uses_with(node)
        self._gm.graph.erase_node(quantize)

    def _swap(self, node: Node, made: nn.Module) -> None:
        """Of a module that several nodes call, each gets its own from the second on."""
        path = self._calls.pop(node)
        if self._modules[path] is not attribute(self._gm, path):
            node.target = next(free_name(self._gm, f"{path.replace('.', '_')}_"))
        set_attribute(self._gm, str(node.target), made)

    def keep_floats(self) -> None:
        """Calls that were not lowered, of modules that other calls have replaced, get the float module back."""
        for node, path in self._calls.items():
            if self._modules[path] is not attribute(self._gm, path):
                node.target = next(free_name(self._gm, f"{path.replace('.', '_')}_"))
                set_attribute(self._gm, str(node.target), self._modules[path])

    def write_borders(self) -> None:
        """What is left of quantize and dequantize, as functions of QTensors."""
        for node in list(self._gm.graph.nodes):
            if is_quantize(node) and grid_of(node).dtype in NAMES:
                self._write_quantize(node)
        for node in list(self._gm.graph.nodes):
            if is_dequantize(node) and not is_quantize(node.args[0]) and "per_tensor" in str(node.target):
                self._write_dequantize(node)

    def _write_quantize(self, node: Node) -> None:
        with self._gm.graph.inserting_before(node):
            arguments = (node.args[0], *self._names.buffers(node), NAMES[grid_of(node).dtype])
            made = self._gm.graph.call_function(functions.quantize, arguments)
        self._write(made, node)

    def _write_dequantize(self, node: Node) -> None:
        """One for all that read a tensor in float."""
        source: Node = node.args[0]  # type: ignore[assignment]
        known = next((user for user in source.users if user.target == "dequantize"), None)
        if known is None:
            with self._gm.graph.inserting_after(source):
                known = self._gm.graph.call_method("dequantize", (source,))
            copy_origin(copy_value(known, node), node, _BY)
        node.replace_all_uses_with(known)
        self._gm.graph.erase_node(node)


_ASKING: tuple[Any, ...] = (getattr, "size", "dim", "numel")
"""What asks a tensor for a fact that its codes have too."""


def _read_codes(node: Node) -> None:
    for operand in node.all_input_nodes:
        if is_dequantize(operand):
            node.replace_input_with(operand, operand.args[0])  # type: ignore[arg-type]


@functools.cache
def _same_grid() -> Patterns:
    return Patterns(one for one in native().configs if _stays_on_grid(one))


def _stays_on_grid(config: BackendPatternConfig) -> bool:
    """Patterns of one operator whose result lies on the grid of its input, or on one that is known."""
    shares = config.observation_type is ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    fixed = config.dtype_configs and config.dtype_configs[0].output_dtype_with_constraints.scale_exact_match is not None
    return len(config.sequence) == 1 and (shares or bool(fixed)) and config.pattern not in _NOT_ON_CODES


_NOT_ON_CODES: tuple[Any, ...] = (nn.Softmax, operator.floordiv)
"""Operators on real numbers that QTensors do not have."""
