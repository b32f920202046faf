"""The grid of one tensor, read from a quantize or dequantize."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .arguments import bind

__all__ = ["grid"]


def grid(node: Node) -> tuple[Any, ...]:
    """(scale, zero_point, quant_min, quant_max, dtype) of a per-tensor quantize or dequantize."""
    bound = bind(node)
    return tuple(bound[name] for name in ("scale", "zero_point", "quant_min", "quant_max", "dtype"))
