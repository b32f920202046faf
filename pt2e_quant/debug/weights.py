"""How many bytes the weights of an op take: in float, and as they are stored in a converted graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph.attributes import constant
from ..ops import is_dequantize
from ..where import computed_name

__all__ = ["float_bytes", "stored_bytes"]


def float_bytes(exact: GraphModule, ops: Collection[str]) -> dict[str, int]:
    """Bytes of the weights (parameters of two dimensions or more) of these ops, those that have any."""
    found: dict[str, int] = {}
    for node in exact.graph.nodes:
        if node.name in ops or computed_name(node) in ops:
            weights = [value for source in node.all_input_nodes if (value := constant(source)) is not None]
            size = sum(value.numel() * value.element_size() for value in weights if value.dim() > 1)
            found.update({node.name: size} if size else {})
    return found


def stored_bytes(nodes: Iterable[Node], found: GraphModule) -> float:
    """Bytes of the integers and scales among the nodes of a layer, 4 bits packed in pairs; 0 where there are none."""
    return sum(_stored(node) for node in nodes if is_dequantize(node))


def _stored(dequantize: Node) -> float:
    codes = constant(dequantize.args[0])
    if codes is None or codes.dim() < 2:
        return 0.0
    arguments = bind(dequantize)
    spread = arguments["quant_max"] - arguments["quant_min"]
    scales = [value for source in dequantize.all_input_nodes[1:] if (value := constant(source)) is not None]
    of_scales = sum(one.numel() * one.element_size() for one in scales if one.is_floating_point())
    return codes.numel() * (0.5 if spread < 16 else codes.element_size()) + of_scales
