"""Quantize a single number as a vector of one: ExecuTorch's pass on memory layouts looks for a first dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Writer, call
from ....ops import is_dequantize, is_quantize
from .looks import literal_sizes

__all__ = ["numbers_to_vectors"]


def numbers_to_vectors(gm: GraphModule) -> GraphModule:
    """Readers that repeat it over their other operand take the vector; others get the number back."""
    write = Writer(gm, "numbers_to_vectors")
    for node in [node for node in gm.graph.nodes if is_quantize(node) and _is_number(node)]:
        with write.before(node):
            codes: Any = call(node.target, write(node.args[0]).reshape([1]), *node.args[1:], **node.kwargs)
        for dequantize in list(node.users):
            with write.before(dequantize):
                if not is_dequantize(dequantize):
                    dequantize.replace_input_with(node, codes.reshape([]).node)
                    continue
                value: Any = call(dequantize.target, codes, *dequantize.args[1:], **dequantize.kwargs)
                repeated = all(user.op == "call_function" and not _is_number(user) for user in dequantize.users)
                write.replace(dequantize, value if repeated else value.reshape([]))
    return tidy(gm)


def _is_number(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and literal_sizes(node) == []
