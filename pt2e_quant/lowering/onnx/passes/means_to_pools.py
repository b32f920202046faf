"""Means over whole images as GlobalAveragePool, for which onnxruntime has an integer kernel; ReduceMean has none."""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.onnx.ops import symbolic

from ....arguments import bind
from ....graph.module import tidy
from ....graph.values import rank
from ....graph.write import Writer
from ....ops import ADAPTIVE_AVG_POOL, MEAN, is_dequantize, is_quantize
from ..limits import is_whole_image
from .pairs import moved
from .sizes import sizes_of

__all__ = ["means_to_pools"]


def means_to_pools(gm: GraphModule) -> GraphModule:
    """Of means, and adaptive pools of size 1, with integers before and after them."""
    write = Writer(gm, "means_to_pools")
    for node in list(gm.graph.nodes):
        if _is_whole_mean(node) and is_dequantize(node.args[0]) and len(node.users) == 1:
            (quantize,) = node.users
            if is_quantize(quantize):
                _rewrite(write, node, quantize)
    return tidy(gm)


def _is_whole_mean(node: Node) -> bool:
    if node.op != "call_function" or node.target not in (*MEAN, *ADAPTIVE_AVG_POOL):
        return False
    dimensions, bound = rank(node.args[0]) if isinstance(node.args[0], Node) else None, bind(node)
    if dimensions is None or bound.get("dtype") is not None:
        return False
    if "output_size" in bound:  # a pool without a batch would lose its channels
        return dimensions == 2 + len(bound["output_size"]) and all(size == 1 for size in bound["output_size"])
    return is_whole_image(dimensions, bound.get("dim"))


def _rewrite(write: Writer, node: Node, quantize: Node) -> None:
    value, keeps = node.args[0].meta["val"], bind(node).get("keepdim", True)  # type: ignore[union-attr]
    with write.before(quantize, like=node):
        shape = [*sizes_of(write(node.args[0]))[:2], *[1] * (value.dim() - 2)]
        pooled = write.call(
            symbolic, "GlobalAveragePool", [node.args[0]], {}, dtype=value.dtype, shape=shape, version=1
        )
        pooled = write.call(quantize.target, pooled, *quantize.args[1:])
        pooled = pooled if keeps else moved(write, quantize, pooled, lambda x: x.flatten(1))
        write.replace(quantize, pooled)
