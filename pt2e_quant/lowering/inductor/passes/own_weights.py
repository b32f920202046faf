"""Give every product an integer weight of its own, where several read one, such as all steps of an RNN.

Inductor merges equal dequantizes, and its patterns are for one reader. It packs the weight for each product anyway.
"""

from __future__ import annotations

from collections import Counter

from torch.fx import GraphModule

from ....graph.attributes import constant, free_name, insert_attribute
from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import is_dequantize
from ...common.gemm import gemms

__all__ = ["own_weights"]


def own_weights(gm: GraphModule) -> GraphModule:
    """Copy the weight for each product but the last."""
    write, names = Writer(gm, "own_weights"), free_name(gm, "_own_weight_")
    readers: Counter[str] = Counter()
    for node in filter(is_dequantize, gm.graph.nodes):
        if constant(node.args[0]) is not None:
            readers[str(node.args[0].target)] += len(node.users)
    for gemm in gemms(gm):
        values = constant(gemm.weight.args[0])
        if values is None or readers[name := str(gemm.weight.args[0].target)] < 2:  # type: ignore[union-attr]
            continue
        readers[name] -= 1
        with write.before(gemm.node, like=gemm.weight):
            own = insert_attribute(gm, next(names), values.clone(), like=gemm.weight, by="own_weights")
            weight = write.call(gemm.weight.target, own, *gemm.weight.args[1:], **gemm.weight.kwargs)
        gemm.node.replace_input_with(gemm.weight, weight.node)
    return tidy(gm)
