"""Give a bias that several nodes read, as when a module is called twice, to each integer kernel as its own copy.

XNNPACK makes a bias an integer with the scale of input times weight, and does so once: for its first reader.
"""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.fx import GraphModule

from ....graph.attributes import constant, free_name, insert_attribute
from ....graph.module import tidy
from ..xnnpack.patterns import as_product

__all__ = ["own_biases"]


def own_biases(gm: GraphModule) -> GraphModule:
    """Of static kernels: dynamic ones add a bias in float."""
    readers = Counter(str(node.target) for node in gm.graph.find_nodes(op="get_attr") for _ in node.users)
    names = free_name(gm, "_bias_")
    for node in list(gm.graph.nodes):
        product = as_product(node)
        if product is None or product.dynamic or product.bias is None or readers[str(product.bias.target)] < 2:
            continue
        value = constant(product.bias)
        if value is not None:
            copied = nn.Parameter(value.detach().clone(), requires_grad=False)
            with gm.graph.inserting_before(node):
                own = insert_attribute(gm, next(names), copied, like=product.bias, by="own_biases")
            node.replace_input_with(product.bias, own)
    return tidy(gm)
