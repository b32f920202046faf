"""Rewrites for XNNPACK alone: own biases, padding on the grid of its input, products of computed tensors as bmm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pt2e_quant.graph.module import clone, finish
from pt2e_quant.lowering.executorch.passes.matmul_to_bmm import matmul_to_bmm
from pt2e_quant.lowering.executorch.passes.own_biases import own_biases
from pt2e_quant.lowering.executorch.passes.parts_to_slices import parts_to_slices
from pt2e_quant.lowering.executorch.passes.quantize_padding import quantize_padding
from pt2e_quant.ops import op_name
from tests.lowering.handmade import Body, Grid, Weight, bias

A, B, C = Grid(0.03, -5), Grid(0.04, 3), Grid(0.2, 7)
X = torch.linspace(-2, 2, 24).reshape(2, 3, 4)
QDQ = ["quantize_per_tensor", "dequantize_per_tensor"]


def changed(step: Callable[..., Any], body: Any, *inputs: Tensor) -> torch.fx.GraphModule:
    """The graph after a step that must not change its values."""
    model = body if isinstance(body, Body) else Body(lambda m, *x: body(*x))
    original = torch.export.export(model.eval(), inputs).module()
    graph_module = clone(original)
    step(graph_module)
    finish(graph_module)
    torch.testing.assert_close(graph_module(*inputs), original(*inputs), rtol=1e-6, atol=1e-6)
    return graph_module


def ops(graph_module: torch.fx.GraphModule) -> list[str]:
    return [op_name(node) for node in graph_module.graph.nodes if node.op == "call_function"]


def biases(graph_module: torch.fx.GraphModule) -> list[str]:
    linears = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return [str(node.args[2].target) for node in linears]


def twice(m: Any, x: Tensor) -> Tensor:
    return B(F.linear(A(x), m.w(), m.b)) + B(F.linear(C(10 * x), m.w(), m.b))


def test_a_module_called_twice_gets_a_bias_for_each_call() -> None:
    assert len(set(biases(changed(own_biases, Body(twice, w=Weight((5, 4)), b=bias(5)), X)))) == 2


def test_a_bias_that_a_float_op_reads_as_well_is_copied() -> None:
    body = Body(lambda m, x: B(F.linear(A(x), m.w(), m.b)) * m.b, w=Weight((5, 4)), b=bias(5))
    assert biases(changed(own_biases, body, X)) != ["b"]


def test_a_bias_with_one_reader_stays() -> None:
    body = Body(lambda m, x: B(F.linear(A(x), m.w(), m.b)), w=Weight((5, 4)), b=bias(5))
    assert biases(changed(own_biases, body, X)) == ["b"]


def test_a_bias_of_float_linears_stays() -> None:
    body = Body(lambda m, x: F.linear(x, m.w, m.b) + F.linear(2 * x, m.w, m.b), w=torch.randn(5, 4), b=bias(5))
    assert set(biases(changed(own_biases, body, X))) == {"b"}


def test_zeros_padded_to_integers_are_quantized_on_their_grid() -> None:
    graph_module = changed(quantize_padding, lambda x: torch.sigmoid(F.pad(A(x), (1, 2))), X)
    assert ops(graph_module) == [*QDQ, "pad", *QDQ, "sigmoid"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pad(A(x), (1, 2), value=0.5),
        lambda x: F.pad(A(x), (1, 2), mode="reflect"),
        lambda x: F.pad(x, (1, 2)),
        lambda x: A(F.pad(A(x), (1, 2))),
    ],
)
def test_other_padding_stays(function: Callable[[Tensor], Tensor]) -> None:
    assert ops(changed(quantize_padding, function, X)).count("quantize_per_tensor") <= 2
    assert ops(changed(quantize_padding, function, X)) == ops(changed(lambda gm: gm, function, X))


def test_zeros_in_front_of_an_integer_convolution_stay() -> None:
    body = Body(lambda m, x: B(F.conv1d(F.pad(A(x), (1, 2)), m.w())), w=Weight((5, 3, 2)))
    assert ops(changed(quantize_padding, body, X)) == ops(changed(lambda gm: gm, body, X))


@pytest.mark.parametrize(
    ("shapes", "written"),
    [
        (((2, 3), (3, 4)), ["reshape", "reshape", "bmm", "view"]),
        (((5, 2, 3), (5, 3, 4)), ["bmm"]),
        (((6, 5, 2, 3), (6, 5, 3, 4)), ["reshape", "reshape", "bmm", "view"]),
        (((5, 2, 3), (3, 4)), ["matmul"]),
        (((6, 5, 2, 3), (1, 5, 3, 4)), ["matmul"]),
        (((2, 3), (3,)), ["matmul"]),
        (((3,), (3,)), ["matmul"]),
    ],
    ids=str,
)
def test_a_product_of_computed_tensors_is_a_bmm_unless_one_is_repeated(shapes, written) -> None:
    left, right = (torch.randn(shape) for shape in shapes)
    assert ops(changed(matmul_to_bmm, lambda x, y: x @ y, left, right)) == written


@pytest.mark.parametrize(
    ("function", "padded"),
    [
        (lambda x: x[:, 1::3], False),
        (lambda x: x[:, -9:-1:4], False),
        (lambda x: x[1::2], False),  # 1, 3, 5 of 0 to 6
        (lambda x: x[2::3], False),  # 2 and 5 are the second of (1, 2, 3) and (4, 5, 6)
        (lambda x: x[::2], True),  # 6 has no neighbour
        (lambda x: x[:, ::3], True),
    ],
)
def test_every_nth_value_is_one_of_n_that_lie_beside_each_other(function, padded) -> None:
    written = ops(changed(parts_to_slices, lambda x: function(x) + 1.0, torch.arange(70.0).reshape(7, 10)))
    assert written == ["slice", *["constant_pad_nd"] * padded, "reshape", "slice", "reshape", "add"]


def test_one_value_of_a_slice_in_steps_is_a_slice() -> None:
    assert ops(changed(parts_to_slices, lambda x: x[-1::4] * 2.0, torch.arange(6.0).reshape(3, 2))) == ["slice", "mul"]


def test_a_product_by_a_weight_stays() -> None:
    body = Body(lambda m, x: B(torch.mm(A(x), m.w())), w=Weight((4, 5), None))
    assert "mm" in ops(changed(matmul_to_bmm, body, X[0]))
