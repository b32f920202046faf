"""Quantize at run time apart what convolutions of size 1 and larger ones read.

With one quantize for both, XNNPACK's outputs were 7 to 12 dB from the graph's; two convolutions of size 3 may share it.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....ops import CONV, CONV_TRANSPOSE
from ..xnnpack.patterns import as_product

__all__ = ["own_run_time_qparams"]

_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.tensor


def own_run_time_qparams(gm: GraphModule) -> GraphModule:
    """Copy choose_qparams and quantize for the larger ones."""
    for quantize in list(gm.graph.find_nodes(op="call_function", target=_QUANTIZE)):
        kinds: dict[bool, list[Node]] = {True: [], False: []}
        for dequantize in quantize.users:
            for user in dequantize.users:
                if user.target in (*CONV, *CONV_TRANSPOSE) and as_product(user) is not None:
                    kinds[_is_of_size_1(user)].append(dequantize)
        if all(kinds.values()):
            _move(gm, quantize, kinds[False])
    return tidy(gm)


def _is_of_size_1(convolution: Node) -> bool:
    return set(convolution.args[1].meta["val"].shape[2:]) == {1}  # type: ignore[union-attr]


def _move(gm: GraphModule, quantize: Node, readers: list[Node]) -> None:
    """Let the readers read a copy."""
    qparams = quantize.all_input_nodes[1:]
    copies: dict[Node, Node] = {}
    with gm.graph.inserting_before(quantize.next):
        for node in (qparams[0].all_input_nodes[0], *qparams, quantize):
            copies[node] = gm.graph.node_copy(node, lambda source: copies.get(source, source))
    for reader in readers:
        for node, copied in copies.items():
            reader.replace_input_with(node, copied)
