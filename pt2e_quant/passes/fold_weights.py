"""Compute quantized weights once: each quantize of a constant becomes an integer buffer `_frozen_paramN`.

The float weight goes when nothing else reads it. A weight quantized once and read by several consumers is stored once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.attributes import free_name, insert_attribute
from ..graph.constants import Constants
from ..graph.module import tidy

__all__ = ["FROZEN", "fold_weights"]

FROZEN = "_frozen_param"
"""What the names of the buffers with integer weights start with."""

# Values quantized at once. The memory of one part serves the next: a new page costs more than what is computed there.
_PART = 1 << 18


def fold_weights(gm: GraphModule) -> GraphModule:
    """Replace every quantize op on constant inputs by a buffer with its result. Casts of constants stay."""
    constants = Constants(gm)
    names = free_name(gm, FROZEN)
    for node in list(gm.graph.nodes):
        if node not in constants or not _is_quantize(node.target):
            continue
        value = _quantized(node, constants).contiguous()
        with gm.graph.inserting_before(node):
            frozen = insert_attribute(gm, next(names), value, like=node, by="fold_weights")
        constants.note(frozen)
        node.replace_all_uses_with(frozen)
    return tidy(gm)


def _quantized(node: Node, constants: Constants) -> Tensor:
    """The value of a quantize op. Per channel it is computed in parts, by the op's formula: the same bits, faster."""
    if node.target is not torch.ops.quantized_decomposed.quantize_per_channel.default:
        return constants.value(node)  # type: ignore[no-any-return]
    arguments: Any = node.args
    weight, scale, zero_point = map(constants.value, arguments[:3])
    axis, low, high, dtype = arguments[3:]
    axis %= weight.dim()
    shape = [1] * weight.dim()
    shape[axis] = -1
    inverse, zero_point = (1.0 / scale).reshape(shape), zero_point.reshape(shape) if zero_point.any() else None
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    channels = max(1, _PART * weight.shape[axis] // max(1, weight.numel()))
    for start in range(0, weight.shape[axis], channels):
        part = (slice(None),) * axis + (slice(start, start + channels),)
        codes = (weight[part].to(torch.float32) * inverse[part]).round_()
        if zero_point is not None:
            codes.add_(zero_point[part])
        result[part] = codes.clamp_(low, high)
    return result


def _is_quantize(target: object) -> bool:
    """quantize_per_tensor, quantize_per_channel, ..., of any q/dq dialect."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.split("::")[1]
    return name.startswith("quantize_")
