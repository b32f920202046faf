"""Scales and zero points that modules keep as buffers become numbers, which every backend matches."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..arguments import bind, set_argument
from ..graph.attributes import constant, written_attributes
from ..graph.module import tidy

__all__ = ["numbers_as_qparams"]

_OPS = torch.ops.quantized_decomposed
_ON_NUMBERS = {
    _OPS.quantize_per_tensor.tensor: _OPS.quantize_per_tensor.default,
    _OPS.dequantize_per_tensor.tensor: _OPS.dequantize_per_tensor.default,
}


def numbers_as_qparams(gm: GraphModule) -> GraphModule:
    """Where both are constants of one element that the graph does not write to."""
    written = written_attributes(gm)
    for target, on_numbers in _ON_NUMBERS.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            grid = {name: _number(bind(node)[name], written) for name in ("scale", "zero_point")}
            if None not in grid.values():
                for name, value in grid.items():
                    set_argument(node, name, value)
                node.target = on_numbers
    return tidy(gm)


def _number(given: Any, written: Any) -> float | int | None:
    value = constant(given)
    if value is None or value.numel() != 1 or (isinstance(given, Node) and given.target in written):
        return None
    return value.item()
