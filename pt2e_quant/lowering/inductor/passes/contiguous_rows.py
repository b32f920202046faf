"""Copy what a linear reads out of order, when its input has more than two dimensions.

Such a linear becomes a bmm of expanded tensors. Inductor finds its pattern for static sizes only, and takes whatever is
added to the product for a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from ....graph.write import Writer, call
from ....ops import LINEAR, is_call, is_dequantize

__all__ = ["contiguous_rows"]

_COPY = torch.ops.aten.clone.default
_HALF = torch.ops.quantized_decomposed.convert_element_type.no_fuse


def contiguous_rows(gm: GraphModule) -> GraphModule:
    """Copy the integers where the input is dequantized, the numbers where a weight in float16 multiplies them."""
    write = Writer(gm, "contiguous_rows")
    for node in list(gm.graph.nodes):
        if not is_call(node) or node.target not in LINEAR:
            continue
        x, weight = node.args[:2]
        value = x.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() <= 2 or value.is_contiguous():
            continue
        reader, read = (x, x.args[0]) if is_dequantize(x) and is_dequantize(weight) else (node, x)
        if reader is x or weight.target is _HALF:
            with write.before(reader):
                copied = call(_COPY, write(read), memory_format=torch.contiguous_format)
            reader.replace_input_with(read, copied.node)
    return gm
