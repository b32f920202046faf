"""Rewrites before annotation keep every value, and stay away from what they cannot express."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import prepare_pt2e
from pt2e_quant.errors import QuantizationError
from pt2e_quant.graph.module import clone, finish
from pt2e_quant.quantizer import clamp_to_hardtanh, lift_scalars, matmul_to_linear, mean_keeps_dims
from pt2e_quant.where import source_line
from tests.nets import export
from tests.pt2e.kit import Nothing, calls, the_call

aten = torch.ops.aten


class Function(nn.Module):
    """A function of its inputs and of a constant matrix."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("matrix", torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.matrix)


def transformed(
    transform: Callable[[GraphModule], GraphModule], function: Callable[..., Tensor], x: Tensor
) -> GraphModule:
    """The graph after the transform, whose values are asserted to be those of the function."""
    model = Function(function)
    gm = finish(transform(clone(export(model, x).module())))
    torch.testing.assert_close(gm(x), model(x))
    return gm


X = torch.randn(2, 3)
IMAGE = torch.randn(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x, m: x + 1.5, aten.add.Tensor),
        (lambda x, m: x * 2, aten.mul.Tensor),
        (lambda x, m: x - 0.25, aten.sub.Tensor),
        (lambda x, m: (x * 1.0).add_(1.5), aten.add_.Tensor),
    ],
    ids=["add", "mul", "sub", "in-place add"],
)
def test_numbers_become_buffers(function, op):
    gm = transformed(lift_scalars, function, X)
    node = the_call(gm, op)
    assert node.args[1].op == "get_attr"
    assert node.args[1].meta["val"].shape == ()


def test_an_integer_plus_one_stays_an_integer():
    """It would become a float, and an embedding after it would crash."""
    gm = transformed(lift_scalars, lambda x, m: x + 1, torch.tensor([1, 2]))
    assert the_call(gm, aten.add.Tensor).args[1] == 1


def test_a_number_that_changes_the_dtype_stays_a_number():
    gm = transformed(lift_scalars, lambda x, m: x + 1.5, torch.tensor([1, 2]))
    assert the_call(gm, aten.add.Tensor).args[1] == 1.5


def test_half_precision_numbers_are_half_precision_buffers():
    gm = transformed(lift_scalars, lambda x, m: x + 1.5, X.half())
    assert the_call(gm, aten.add.Tensor).args[1].meta["val"].dtype is torch.float16


@pytest.mark.parametrize(
    "function",
    [
        lambda x, m: x @ m,
        torch.mm,
        lambda x, m: torch.addmm(m[0], x, m),
        lambda x, m: x.unsqueeze(0) @ m,
    ],
    ids=["matmul", "mm", "addmm", "3-d matmul"],
)
def test_a_product_with_a_constant_matrix_becomes_linear(function):
    gm = transformed(matmul_to_linear, function, X)
    assert calls(gm, aten.mm.default, aten.matmul.default, aten.addmm.default) == []
    assert the_call(gm, aten.linear.default).args[1].meta["val"].shape == (5, 3)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x, m: torch.addmm(m[0], x, m, alpha=2), aten.addmm.default),
        (lambda x, m: torch.addmm(m[0], x, m, beta=0.5), aten.addmm.default),
        (lambda x, m: x.T @ x, aten.matmul.default),
        (lambda x, m: torch.matmul(x, m[:, 0]), aten.matmul.default),
        (lambda x, m: torch.addmm(m[:2, :], x, m), aten.addmm.default),
    ],
    ids=["alpha", "beta", "no constant", "vector", "2-d bias"],
)
def test_other_products_stay(function, op):
    assert calls(transformed(matmul_to_linear, function, X), aten.linear.default) == []


def test_two_products_with_one_matrix_share_the_weight():
    gm = transformed(matmul_to_linear, lambda x, m: x @ m + (x * 2) @ m, X)
    first, second = calls(gm, aten.linear.default)
    assert first.args[1] is second.args[1]


@pytest.mark.parametrize("dims", [(2, 3), (-1, -2)])
def test_the_mean_over_height_and_width_keeps_its_dimensions(dims):
    gm = transformed(mean_keeps_dims, lambda x, m: x.mean(dims), IMAGE)
    assert the_call(gm, aten.mean.dim).args[2] is True
    assert the_call(gm, aten.mean.dim).meta["val"].shape == (2, 3, 1, 1)


@pytest.mark.parametrize(
    "function",
    [lambda x, m: x.mean((1, 2)), lambda x, m: x.mean((2, 3), keepdim=True), lambda x, m: x[0].mean((1, 2))],
    ids=["other dimensions", "kept already", "3-d"],
)
def test_other_means_stay(function):
    assert calls(transformed(mean_keeps_dims, function, IMAGE), aten.flatten.using_ints) == []


@pytest.mark.parametrize(
    ("function", "op", "bounds"),
    [
        (lambda x, m: x.clamp(-1, 2.5), aten.hardtanh.default, (-1.0, 2.5)),
        (lambda x, m: x.clamp(min=0), aten.relu.default, ()),
        (lambda x, m: torch.clamp_min(x, 0.0), aten.relu.default, ()),
    ],
    ids=["two bounds", "min 0", "clamp_min 0"],
)
def test_clamps_get_the_name_that_backends_fuse(function, op, bounds):
    assert the_call(transformed(clamp_to_hardtanh, function, X), op).args[1:] == bounds


@pytest.mark.parametrize(
    "function",
    [lambda x, m: x.clamp(max=2.0), lambda x, m: x.clamp(min=0.5), lambda x, m: x.clamp(m[0, 0], m[0, 1])],
    ids=["max", "min above 0", "tensors"],
)
def test_other_clamps_stay(function):
    gm = transformed(clamp_to_hardtanh, function, X)
    assert calls(gm, aten.hardtanh.default, aten.relu.default) == []


class LosesTheOutput(Nothing):
    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        graph = torch.fx.Graph()
        graph.graph_copy(model.graph, {})
        return GraphModule(model, graph)


def test_a_rewrite_that_loses_the_output_is_named():
    with pytest.raises(QuantizationError, match=r"'transform_for_annotation' returned a graph without an output"):
        prepare_pt2e(export(nn.ReLU(), X), LosesTheOutput(), allow_empty=True)


def test_a_rewritten_op_keeps_its_place_in_the_users_code():
    gm = transformed(mean_keeps_dims, lambda x, m: x.mean((2, 3)), IMAGE)
    for op in (aten.mean.dim, aten.flatten.using_ints):
        assert source_line(the_call(gm, op)).endswith("return self.function(x, self.matrix)")
