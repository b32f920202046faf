"""Operators that ExecuTorch takes apart when it lowers become their parts before, where passes can still see them.

Taken apart later, the parts would share one dequantize, and ExecuTorch's passes on memory layouts misplace a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ....graph.module import tidy
from ....graph.write import Symbol, Writer
from ....ops import COMPOSITE

__all__ = ["take_apart"]

aten = torch.ops.aten
_NO_STEP = 15.0  # exp(-15) is below the rounding of a float32 near 15
_WHOLE = frozenset((*COMPOSITE, aten.unfold.default, aten.elu.default))


def take_apart(gm: GraphModule) -> GraphModule:
    """Replace each such operator by core ATen operators: those that torch writes it with; or, for softplus (that of
    mish too) and elu (celu and selu too), operators that XNNPACK has: what it lacks cuts a delegate in two.
    """
    write = Writer(gm, "take_apart")
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _WHOLE]
    for node in found:
        if all("val" in source.meta for source in node.all_input_nodes):
            with write.before(node):
                write.replace(node, _parts(node, write))
    return tidy(gm) if found else gm


def _parts(node: Node, write: Writer) -> Symbol:
    sources = node.all_input_nodes
    values = [source.meta["val"] for source in sources]

    def whole(*tensors: Tensor) -> Any:
        given = dict(zip(sources, tensors, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    table = {**core_aten_decompositions(), **_FORMULAS}
    traced = make_fx(whole, decomposition_table=table)(*values)
    known: dict[Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), map(write, sources), strict=True))
    for part in traced.graph.nodes:
        if part.op == "call_function":
            args, kwargs = map_arg((part.args, part.kwargs), lambda used: known[used])
            known[part] = write.call(part.target, *args, **kwargs)
        elif part.op == "get_attr":
            known[part] = write.constant(getattr(traced, str(part.target)))
    return known[traced.graph.output_node().args[0]]  # type: ignore[index,no-any-return]


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(beta * x)) / beta, where exp is of nothing positive: it cannot overflow, so no threshold is needed.

    Beyond the threshold torch returns x itself, which is this within exp(-threshold) / beta: a step where that is low.
    """
    scaled = _times(x, beta)
    smooth = _times(scaled.relu() + (1 + scaled.abs().neg().exp()).log(), 1 / beta)
    return smooth if threshold >= _NO_STEP else torch.where(scaled > threshold, x, smooth)


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """scale * x where x > 0, else scale * alpha * (exp(input_scale * x) - 1): one of two terms is always 0."""
    below = _times(x, input_scale).neg().relu().neg()
    return _times(x.relu(), scale) + _times(below.exp() - 1, scale * alpha)


def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return _elu(x, alpha, 1.0, 1 / alpha)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


_FORMULAS = {aten.softplus.default: _softplus, aten.elu.default: _elu, aten.celu.default: _celu}
