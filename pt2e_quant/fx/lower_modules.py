"""From reference modules to quantized ones, by the table of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..graph.attributes import constant
from ..nn import quantized
from ..nn.intrinsic import quantized as fused
from ..nn.intrinsic.quantized import dynamic as fused_dynamic
from ..nn.quantized import dynamic
from ..nn.reference import ReferenceQuantizedModule
from ..nn.rows import resolve, row_of
from ..qtensor import QTensor, quantize_per_channel, quantize_per_tensor
from .grids import Grid

__all__ = ["PRODUCT_FUNCTIONS", "dynamic_form", "module_of_function", "plain_form", "static_form"]

_PRODUCTS = ("linear", "conv", "conv_transpose")
_OPS = torch.ops.quantized_decomposed
_F = nn.functional
PRODUCT_FUNCTIONS: dict[Any, tuple[str, str]] = {
    _F.linear: ("Linear", "LinearReLU"),
    **{getattr(_F, f"conv{n}d"): (f"Conv{n}d", f"ConvReLU{n}d") for n in (1, 2, 3)},
}


def static_form(module: nn.Module, grid: Grid) -> nn.Module | None:
    """The quantized form of a module whose input is codes, on a grid; None where there is none."""
    row, root = row_of(module), _root(module)
    kind: Any = resolve(row.quantized) if row is not None and row.quantized else None
    if row is None or not hasattr(kind, "from_reference") or row.kernel in ("embedding", "recurrent"):
        return None
    if row.kernel in _PRODUCTS and not _is_rounded(root, torch.qint8):
        return None
    made = kind.from_reference(root, grid.scale, grid.zero_point)
    if row.post == "leaky_relu":
        made.negative_slope = module[1].negative_slope  # type: ignore[index]
    return _like(root, made)


def dynamic_form(module: nn.Module) -> nn.Module | None:
    """The quantized form of a module whose input gets a grid while it runs."""
    row, root = row_of(module), _root(module)
    kind: Any = resolve(row.dynamic) if row is not None and row.dynamic else None
    if kind is None or not _is_rounded(root, torch.qint8):
        return None
    return _like(root, kind.from_reference(root))


def plain_form(module: nn.Module) -> nn.Module | None:
    """The quantized form of a module that takes and returns real numbers: of tables, recurrent layers, float16."""
    row, root = row_of(module), _root(module)
    if row is None or not isinstance(root, ReferenceQuantizedModule):
        return None
    name = row.quantized if row.kernel == "embedding" else row.dynamic
    by_itself = row.kernel in ("embedding", "recurrent") or _is_rounded(root, torch.float16)
    kind: Any = resolve(name) if by_itself and name else None
    return None if kind is None else _like(root, kind.from_reference(root))


def module_of_function(node: Node, grid: Grid | None, *, relu: bool) -> nn.Module | None:
    """The quantized module of F.linear or a convolution with constant weight and bias; None for any other.

    grid: of the result; None for a linear whose input gets a grid while it runs
    """
    given: list[Any] = [*node.args, *([None] * (7 - len(node.args)))]
    given[2:] = [node.kwargs.get(n, v) for n, v in zip(_NAMES, given[2:], strict=True)]
    weight, bias = _quantized_weight(given[1]), given[2]
    held = None if bias is None else constant(bias)
    if weight is None or (bias is not None and held is None) or isinstance(given[4], str):
        return None
    rooms = (quantized, fused) if grid is not None else (dynamic, fused_dynamic)
    kind: Any = getattr(rooms[relu], PRODUCT_FUNCTIONS[node.target][relu], None)
    if kind is None:
        return None
    if node.target is _F.linear:
        made = kind(weight.shape[1], weight.shape[0], held is not None)
    else:
        stride, padding, dilation, groups = (
            one if one is not None else k for one, k in zip(given[3:], (1, 0, 1, 1), strict=True)
        )
        sizes = weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:])
        made = kind(*sizes, stride, padding, dilation, groups, held is not None)
    made.set_weight_bias(weight, held)
    if grid is not None:
        made.scale, made.zero_point = grid.scale, grid.zero_point
    return made  # type: ignore[no-any-return]


_NAMES = ("bias", "stride", "padding", "dilation", "groups")


def _quantized_weight(node: Any) -> QTensor | None:
    """The integers of (parameter, quantize, dequantize)."""
    source = node.args[0] if isinstance(node, Node) and node.args else None
    value: Tensor | None = constant(source.args[0]) if isinstance(source, Node) and source.args else None
    if value is None or not isinstance(source, Node):
        return None
    if source.target is _OPS.quantize_per_tensor.default and source.args[5] is torch.int8:
        return quantize_per_tensor(value.detach(), source.args[1], source.args[2], torch.qint8)  # type: ignore[arg-type]
    if source.target is _OPS.quantize_per_channel.default and source.args[6] is torch.int8:
        scales, zeros = constant(source.args[1]), constant(source.args[2])
        return quantize_per_channel(value.detach(), scales, zeros, source.args[3], torch.qint8)  # type: ignore[arg-type]
    return None


def _root(module: Any) -> Any:
    return module[0] if isinstance(module, nn.Sequential) else module


def _is_rounded(root: nn.Module, dtype: torch.dtype) -> bool:
    return isinstance(root, ReferenceQuantizedModule) and getattr(root, "weight_dtype", None) is dtype


def _like(root: nn.Module, made: nn.Module) -> nn.Module:
    parameter = next(root.parameters(), None)
    return made.train(root.training) if parameter is None else made.train(root.training).to(parameter.device)
