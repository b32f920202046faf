"""Folding of quantized constants: the buffer holds what the quantize op computes, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from pt2e_quant.passes.fold_weights import fold_weights

quantize = torch.ops.quantized_decomposed.quantize_per_channel.default


@pytest.mark.parametrize("zero_point", [0, 3], ids=["symmetric", "affine"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 3, 2), 0), ((700, 401), 0), ((401, 700), 1), ((3, 200, 500), 1), ((0, 4), 0)],
    ids=["one_part", "parts_of_rows", "parts_of_columns", "parts_in_the_middle", "empty"],
)
def test_a_weight_is_quantized_to_the_codes_of_the_op(shape, axis, zero_point):
    generator = torch.Generator().manual_seed(0)
    root = nn.Module()
    root.register_buffer("weight", torch.randn(shape, generator=generator))
    root.register_buffer("scale", torch.rand(shape[axis], generator=generator) * 0.02 + 0.003)
    root.register_buffer("zero", torch.full((shape[axis],), zero_point))
    graph = Graph()
    arguments = (*map(graph.get_attr, ("weight", "scale", "zero")), axis, -127, 120, torch.int8)
    graph.output(graph.call_function(quantize, arguments))
    expected = quantize(root.weight, root.scale, root.zero, axis, -127, 120, torch.int8)
    folded = fold_weights(GraphModule(root, graph))
    assert folded._frozen_param0.dtype is torch.int8
    assert torch.equal(folded._frozen_param0, expected)
