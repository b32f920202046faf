"""Graphs in half precision: after the passes float32 lies between integers, the model's dtype everywhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant.graph.module import clone, finish
from pt2e_quant.lowering.inductor.passes.cast_float16 import cast_float16
from pt2e_quant.lowering.inductor.passes.float32_between_integers import float32_between_integers
from pt2e_quant.lowering.inductor.remarks import remarks_on
from tests.lowering.handmade import Body, Weight
from tests.pt2e.kit import calls

aten = torch.ops.aten
Q = torch.ops.quantized_decomposed
GRID = (0.02, 120, 0, 255, torch.uint8)


def rounded(x: Tensor) -> Tensor:
    """What convert_pt2e writes around an activation of a model in half precision."""
    return Q.dequantize_per_tensor.default(Q.quantize_per_tensor.default(x, *GRID), *GRID, out_dtype=x.dtype)


def linear(n: Body, x: Tensor, w: Weight, bias: Tensor | None = None) -> Tensor:
    weight = Q.dequantize_per_channel.default(
        w.values, w.scale, w.zero_point, 0, *w.bounds, torch.int8, out_dtype=x.dtype
    )
    return F.linear(rounded(x), weight, bias)


GRAPHS = {
    "ends in float": lambda n, x: linear(n, x, n.w, n.b) * 2,
    "ends in integers": lambda n, x: linear(n, F.relu(linear(n, x, n.w, n.b)), n.v),
    "sum of two products": lambda n, x: F.relu(linear(n, x, n.w, n.b) + linear(n, x, n.v)) * 2,
    "sum with a float": lambda n, x: x + F.gelu(linear(n, x, n.w, n.b)),
}


def passed(name: str, dtype: torch.dtype) -> tuple[GraphModule, GraphModule, Tensor]:
    torch.manual_seed(0)
    parts = {
        "w": Weight((8, 8), spread=0.01),
        "v": Weight((8, 8), spread=0.01),
        "b": nn.Parameter(torch.randn(8, dtype=dtype)),
    }
    x = torch.randn(32, 8, dtype=dtype)
    before = torch.export.export(Body(GRAPHS[name], **parts), (x,)).module()
    return before, finish(cast_float16(float32_between_integers(clone(before)))), x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_products_of_integers_are_computed_in_float32(name, dtype):
    """Within two steps of the grid: the graph rounds to 8 or 11 bits what the program does not round."""
    before, after, x = passed(name, dtype)
    assert {node.meta["val"].dtype for node in calls(after, aten.linear.default)} == {torch.float32}
    with torch.no_grad():
        found, wanted = after(x), before(x)
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted, atol=2 * GRID[0], rtol=2.0**-6)


def test_a_sum_of_two_products_is_not_cast_on_the_way():
    _, after, _ = passed("sum of two products", torch.bfloat16)
    (added,) = calls(after, aten.add.Tensor)
    assert [source.target for source in added.all_input_nodes] == [aten.linear.default] * 2


def test_float16_is_cast_where_inductor_quantizes_float32_and_bfloat16_only():
    _, after, _ = passed("ends in float", torch.float16)
    (quantize,) = calls(after, Q.quantize_per_tensor.default)
    assert quantize.args[0].meta["val"].dtype is torch.float32
    assert not [node for node in after.graph.nodes if node.kwargs.get("out_dtype") is torch.float16]


def test_what_rounds_less_than_the_graph_is_remarked_on():
    before, _, _ = passed("ends in integers", torch.bfloat16)
    rounding = {remark.text for remark in remarks_on(before) if "VNNI" not in remark.text}
    assert rounding == {"its kernel computes in float32, where the graph rounds to bfloat16"}
