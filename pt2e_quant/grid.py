"""The grid of one tensor: which real numbers its integers stand for, read from a quantize or dequantize."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from .arguments import bind
from .ops import is_value_preserving

__all__ = ["Grid"]

_OPS = torch.ops.quantized_decomposed
_READ = (_OPS.quantize_per_tensor.default, _OPS.dequantize_per_tensor.default)


@dataclass(frozen=True)
class Grid:
    """How the integers of a tensor with one static scale stand for real numbers: x = (q - zero_point) * scale.

    quant_min, quant_max: smallest and largest q, both included
    dtype:                the integer type that stores q
    """

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    @classmethod
    def of(cls, node: Node) -> Grid | None:
        """The grid of a quantize or dequantize with one static scale; None for any other node."""
        if node.target not in _READ:
            return None
        bound = bind(node)
        return cls(bound["scale"], bound["zero_point"], bound["quant_min"], bound["quant_max"], bound["dtype"])

    @classmethod
    def of_value(cls, node: Node) -> Grid | None:
        """The grid that the values of a node lie on: its own, or of what it only moves."""
        while is_value_preserving(node) and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return cls.of(node)

    @property
    def arguments(self) -> tuple[float, int, int, int, torch.dtype]:
        """What the q/dq ops take after the tensor."""
        return self.scale, self.zero_point, self.quant_min, self.quant_max, self.dtype

    @property
    def bounds(self) -> tuple[int, int]:
        return self.quant_min, self.quant_max

    def quantize(self, x: Tensor) -> Tensor:
        """Real numbers -> integers, exactly as the graph's own quantize does it."""
        return _OPS.quantize_per_tensor.default(x, *self.arguments)  # type: ignore[no-any-return]

    def dequantize(self, q: Tensor) -> Tensor:
        """Integers -> float32, exactly as the graph's own dequantize does it."""
        return _OPS.dequantize_per_tensor.default(q, *self.arguments)  # type: ignore[no-any-return]
