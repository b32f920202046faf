"""Drop quantize-dequantize pairs of activations that no integer kernel reads: they cost time and precision."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....meta import DROPPED_KEY
from ....ops import ADD, MAX_POOL, is_quantize
from ...common.entry import origin
from ...common.gemm import as_gemm

__all__ = ["drop_unread_rounding"]

_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


def drop_unread_rounding(gm: GraphModule) -> GraphModule:
    """gm.meta[DROPPED_KEY] lists the quantize nodes by the names that they have in the converted graph."""
    for quantize in list(filter(is_quantize, gm.graph.nodes)):
        readers = list(quantize.users)
        if not readers or not all(reader.target is _DEQUANTIZE for reader in readers):
            continue
        if any(_reads_integers(user, reader) for reader in readers for user in reader.users):
            continue
        gm.meta.setdefault(DROPPED_KEY, []).append(origin(quantize))
        for reader in readers:
            reader.replace_all_uses_with(quantize.args[0])
    return tidy(gm)


def _reads_integers(user: Node, value: Node) -> bool:
    """An integer kernel begins at the user, or what the user makes of the integers is one again: a shorter way."""
    gemm = as_gemm(user)
    if gemm is not None:
        return gemm.activation is value
    if user.target in ADD:
        return any(_is_integer_product(other) for other in user.all_input_nodes if other is not value)
    return user.target in MAX_POOL or any(is_quantize(after) for after in user.users)


def _is_integer_product(node: Node) -> bool:
    gemm = as_gemm(node)
    return gemm is not None and gemm.is_integer
