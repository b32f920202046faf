"""Compute quantized weights once: each quantize of a constant becomes an integer buffer `_frozen_paramN`.

The float weight goes when nothing else reads it. A weight quantized once and read by several consumers is stored once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...graph import Constants, free_name, insert_attribute, tidy

__all__ = ["FROZEN", "fold_weights"]

FROZEN = "_frozen_param"
"""What the names of the buffers with integer weights start with."""


def fold_weights(gm: GraphModule) -> GraphModule:
    """Replace every quantize op (and cast of a constant) on constant inputs by a buffer with its result."""
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
    """The value of a quantize op. Per channel it is computed in place, by the op's formula: the same bits, faster."""
    if node.target is not torch.ops.quantized_decomposed.quantize_per_channel.default:
        return constants.value(node)  # type: ignore[no-any-return]
    source, scale, zero_point, axis, low, high, dtype = node.args
    weight, scale, zero_point = (constants.value(argument) for argument in (source, scale, zero_point))  # type: ignore[arg-type]
    shape = [1] * weight.dim()
    shape[axis] = -1  # type: ignore[index]
    codes = (weight.to(torch.float32) * (1.0 / scale).reshape(shape)).round_()
    if zero_point.any():
        codes.add_(zero_point.reshape(shape))
    return codes.clamp_(low, high).to(dtype)  # type: ignore[no-any-return]


def _is_quantize(target: object) -> bool:
    """quantize_per_tensor, quantize_per_channel, ... and no_fuse casts to half precision, of any q/dq dialect."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.split("::")[1]
    return name.startswith("quantize_")
