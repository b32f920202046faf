"""Passes for Inductor keep every value that they say they keep; breaches of its contract are errors with names."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant.errors import LoweringError
from pt2e_quant.graph.attributes import attribute
from pt2e_quant.graph.module import clone, finish
from pt2e_quant.lowering.inductor.contract import check_inductor_contract
from pt2e_quant.lowering.inductor.passes.contiguous_rows import contiguous_rows
from pt2e_quant.lowering.inductor.passes.conv1d_as_conv2d import conv1d_as_conv2d
from pt2e_quant.lowering.inductor.passes.drop_unread_rounding import drop_unread_rounding
from pt2e_quant.lowering.inductor.passes.exact_without_vnni import exact_without_vnni
from pt2e_quant.lowering.inductor.passes.merge_linears import merge_linears
from pt2e_quant.lowering.inductor.passes.move_integers import move_integers
from pt2e_quant.lowering.inductor.passes.pointwise_as_linear import pointwise_as_linear
from pt2e_quant.lowering.inductor.passes.run_time_qparams import run_time_qparams
from pt2e_quant.lowering.inductor.passes.second_channel import second_channel
from pt2e_quant.lowering.inductor.passes.whole_codes import whole_codes
from pt2e_quant.meta import MERGED_KEY
from pt2e_quant.passes.absorb_clamps import absorb_clamps
from pt2e_quant.passes.own_dequantizes import own_dequantizes
from tests.lowering.handmade import Grid, Weight, dynamic
from tests.pt2e.kit import calls

aten = torch.ops.aten
Q = torch.ops.quantized_decomposed
GRID = Grid(0.02, 131, 0, 255, torch.uint8)
OTHER = Grid(0.05, 100, 0, 255, torch.uint8)


class Body(nn.Module):
    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def graph(function, x: Tensor, **parts: nn.Module) -> GraphModule:
    return torch.export.export(Body(function, **parts), (x,)).module()


def passed(step, function, x: Tensor, **parts: nn.Module) -> GraphModule:
    """The graph after a pass, whose values are asserted to be those before, to the last bit or float rounding."""
    before = graph(function, x, **parts)
    after = finish(step(clone(before)))
    torch.testing.assert_close(after(x), before(x), atol=1e-6, rtol=1e-6)
    return after


MOVES = {
    "view": lambda x: x.view(2, 4, 9),
    "permute and slice": lambda x: GRID(x.permute(0, 2, 3, 1))[:, 1:],
    "cat": lambda x: torch.cat([GRID(x), GRID(x * 2)], 1),
    "pad": lambda x: nn.functional.pad(x, (1, 2, 0, 1)),
    "pixel_shuffle": lambda x: nn.functional.pixel_shuffle(x, 2),
}


@pytest.mark.parametrize("name", MOVES)
def test_values_are_moved_as_integers(name):
    gm = passed(move_integers, lambda n, x: GRID(MOVES[name](GRID(x))), torch.randn(2, 4, 3, 3))
    moved = [node for node in gm.graph.nodes if str(node.target).startswith("aten.") and "mul" not in str(node.target)]
    assert moved
    assert all(node.meta["val"].dtype is torch.uint8 for node in moved)


UNMOVED = {
    "other grid": lambda x: OTHER(GRID(x).flatten(1)),
    "ones": lambda x: GRID(nn.functional.pad(GRID(x), (1, 1), value=1.0)),
    "reflected": lambda x: GRID(nn.functional.pad(GRID(x), (1, 1, 1, 1), mode="reflect")),
    "read twice": lambda x: (lambda y: GRID(y) + y)(GRID(x).flatten(1)),
    "one of two in float": lambda x: GRID(torch.cat([GRID(x), x], 1)),
}


@pytest.mark.parametrize("name", UNMOVED)
def test_what_is_no_mere_move_stays(name):
    gm = passed(move_integers, lambda n, x: UNMOVED[name](x), torch.randn(2, 4, 3, 3))
    ops = [node for node in gm.graph.nodes if str(node.target).startswith("aten.")]
    assert all(node.meta["val"].dtype is torch.float32 for node in ops)


def test_rounding_that_nothing_reads_is_dropped():
    x = torch.randn(2, 5)
    gm = finish(drop_unread_rounding(clone(graph(lambda n, x: torch.sigmoid(GRID(x)), x))))
    assert calls(gm, Q.quantize_per_tensor.default) == []
    torch.testing.assert_close(gm(x), torch.sigmoid(x))


KEPT = {
    "linear": lambda n, x: nn.functional.linear(GRID(x), n.w()),
    "requantized": lambda n, x: OTHER(GRID(x).mean(1, True)) @ torch.ones(1, 1),
    "the other operand of a sum": lambda n, x: nn.functional.linear(GRID(x), n.w()) + GRID(torch.tanh(x)),
}


@pytest.mark.parametrize("name", ["linear", "the other operand of a sum"])
def test_rounding_that_an_integer_kernel_reads_is_kept(name):
    x = torch.randn(2, 5)
    before = graph(KEPT[name], x, w=Weight((5, 5)))
    after = finish(drop_unread_rounding(clone(before)))
    assert len(calls(after, Q.quantize_per_tensor.default)) == len(calls(before, Q.quantize_per_tensor.default))


@pytest.mark.parametrize(("shape", "kernel"), [((2, 1, 6, 6), (3, 1, 2, 2)), ((2, 1, 7), (3, 1, 2))], ids=str)
def test_one_channel_gets_a_second_one_of_zeros_where_sizes_are_dynamic(shape, kernel):
    convolve = nn.functional.conv2d if len(shape) == 4 else nn.functional.conv1d
    body, x = Body(lambda n, x: convolve(GRID(x), n.w()), w=Weight(kernel)), torch.randn(shape)
    batch = torch.export.Dim("batch", min=1, max=9)
    before = torch.export.export(body, (x,), dynamic_shapes={"x": {0: batch}}).module()
    after = finish(second_channel(clone(before)))
    assert len(calls(after, aten.constant_pad_nd.default)) == 1
    torch.testing.assert_close(after(x), before(x), atol=1e-6, rtol=1e-6)
    (size, *_) = next(node.meta["val"].shape for node in after.graph.nodes if node.op == "placeholder")
    assert size.node.shape_env.bound_sympy(size.node.expr).upper == 9, "computed for the example, it narrows nothing"
    fixed = torch.export.export(body, (x,)).module()
    assert calls(finish(second_channel(clone(fixed))), aten.constant_pad_nd.default) == []


CONV1D = {
    "relu, quantize": lambda n, x: GRID(torch.relu(nn.functional.conv1d(GRID(x), n.w(), padding=2, dilation=2))),
    "same, float": lambda n, x: torch.sigmoid(nn.functional.conv1d(GRID(x), n.w(), n.b.bias, padding="same")),
    "stride, flatten": lambda n, x: nn.functional.conv1d(GRID(x), n.w(), None, 3).flatten(1),
}


@pytest.mark.parametrize("name", CONV1D)
def test_a_convolution_in_one_dimension_becomes_one_of_height_one(name):
    gm = passed(conv1d_as_conv2d, CONV1D[name], torch.randn(2, 4, 9), w=Weight((3, 4, 3)), b=nn.Linear(1, 3))
    assert not [node for node in gm.graph.nodes if "conv1d" in str(node.target)]


RANGES = {"around zero": (-3.0, 4.0), "positive": (2.0, 3.0), "negative": (-3.0, -2.0), "zeros": (0.0, 0.0)}


@pytest.mark.parametrize("name", RANGES)
def test_qparams_of_run_time_are_those_of_the_graph_and_stored_before_a_loop_reads_them(name):
    low, high = RANGES[name]
    x = torch.rand(3, 7) * (high - low) + low
    before = graph(lambda n, x: dynamic(x), x)
    after = finish(run_time_qparams(clone(before)))
    assert torch.equal(after(x), before(x))
    assert calls(after, Q.choose_qparams.tensor) == calls(after, Q.quantize_per_tensor.tensor) == []
    assert len(calls(after, aten.as_strided.default)) == 2


SATURATED = Grid(6 / 255, 0, 0, 255, torch.uint8)
ABSORBED = {
    "relu on a grid from zero": (torch.relu, Grid(0.02, 0, 0, 255, torch.uint8)),
    "relu6 on a grid to six": (nn.functional.relu6, SATURATED),
    "hardtanh beyond the grid": (lambda x: nn.functional.hardtanh(x, -3.1, 2.9), Grid(0.02, 128, 0, 255, torch.uint8)),
}
NOT_ABSORBED = {
    "relu on a grid from below zero": (torch.relu, GRID),
    "relu6 on a grid beyond six": (nn.functional.relu6, Grid(6.1 / 255, 0, 0, 255, torch.uint8)),
    "hardtanh one step inside": (lambda x: nn.functional.hardtanh(x, -2.54, 9.0), Grid(0.02, 128, 0, 255, torch.uint8)),
    "read twice": (torch.relu, lambda y: SATURATED(y) + y),
}


def _clamps(gm: GraphModule) -> int:
    return sum(len(calls(gm, getattr(aten, name).default)) for name in ("relu", "relu6", "hardtanh"))


@pytest.mark.parametrize("name", ABSORBED)
def test_a_clamp_that_saturation_does_is_dropped(name):
    clamp, grid = ABSORBED[name]
    x = torch.linspace(-9, 9, 4001)
    before = graph(lambda n, x: grid(clamp(x)), x)
    after = finish(absorb_clamps(clone(before)))
    assert torch.equal(after(x), before(x))
    assert (_clamps(before), _clamps(after)) == (1, 0)


@pytest.mark.parametrize("name", NOT_ABSORBED)
def test_a_clamp_within_the_grid_is_kept(name):
    clamp, grid = NOT_ABSORBED[name]
    x = torch.linspace(-9, 9, 4001)
    before = graph(lambda n, x: grid(clamp(x)), x)
    after = finish(absorb_clamps(clone(before)))
    assert torch.equal(after(x), before(x))
    assert _clamps(after) == _clamps(before) > 0


POINTWISE = {
    "bias, relu": lambda n, x: SATURATED(torch.relu(nn.functional.conv2d(GRID(x), n.w(), n.b.bias))),
    "no bias": lambda n, x: OTHER(nn.functional.conv2d(GRID(x), n.w())).mean((2, 3)),
}
NOT_POINTWISE = {
    "stride 2": lambda n, x: OTHER(nn.functional.conv2d(GRID(x), n.w(), stride=2)),
    "padded": lambda n, x: OTHER(nn.functional.conv2d(GRID(x), n.w(), padding=1)),
    "sigmoid between": lambda n, x: OTHER(torch.sigmoid(nn.functional.conv2d(GRID(x), n.w()))),
    "read by a sum": lambda n, x: OTHER(nn.functional.conv2d(GRID(x), n.w())) + 1.5,
    "float input": lambda n, x: OTHER(nn.functional.conv2d(x, n.w())),
    "padded before": lambda n, x: OTHER(nn.functional.conv2d(nn.functional.pad(GRID(x), (1, 2, 0, 1)), n.w())),
}
SHARED = {
    "in one dimension": (conv1d_as_conv2d, lambda x, w: nn.functional.conv1d(x, w), (2, 4, 7), (6, 4, 3)),
    "of size one": (pointwise_as_linear, lambda x, w: nn.functional.conv2d(x, w), (2, 4, 3, 5), (6, 4, 1, 1)),
}


@pytest.mark.parametrize("name", SHARED)
def test_others_that_read_the_same_values_keep_them(name):
    step, convolve, shape, kernel = SHARED[name]

    def function(n: Body, x: Tensor) -> Tensor:
        read, weight = GRID(x), n.w()
        return OTHER(convolve(read, weight)).sum() + read + weight.sum()

    passed(lambda gm: step(own_dequantizes(gm)), function, torch.randn(shape), w=Weight(kernel))


def test_a_padded_convolution_in_one_dimension_keeps_its_padding():
    def function(n: Body, x: Tensor) -> Tensor:
        return OTHER(nn.functional.conv1d(nn.functional.pad(GRID(x), (1, 2)), n.w()))

    passed(conv1d_as_conv2d, function, torch.randn(2, 4, 7), w=Weight((6, 4, 3)))


@pytest.mark.parametrize("name", POINTWISE)
def test_a_convolution_of_size_one_becomes_a_linear_over_pixels(name):
    parts = {"w": Weight((6, 4, 1, 1)), "b": nn.Linear(1, 6)}
    gm = passed(pointwise_as_linear, POINTWISE[name], torch.randn(2, 4, 3, 5), **parts)
    assert (len(calls(gm, aten.linear.default)), calls(gm, aten.conv2d.default)) == (1, [])


@pytest.mark.parametrize("name", NOT_POINTWISE)
def test_other_convolutions_stay(name):
    gm = passed(pointwise_as_linear, NOT_POINTWISE[name], torch.randn(2, 4, 3, 5), w=Weight((6, 4, 1, 1)))
    assert calls(gm, aten.linear.default) == []


def test_rows_out_of_order_are_copied_as_integers():
    def function(n: Body, x: Tensor) -> Tensor:
        return nn.functional.linear(GRID(x.transpose(1, 2)), n.w())

    gm = passed(contiguous_rows, function, torch.randn(2, 6, 4), w=Weight((12, 6)))
    (copied,) = calls(gm, aten.clone.default)
    assert copied.args[0].target is Q.quantize_per_tensor.default


HALVED = {
    "linear": (lambda n, x: nn.functional.linear(GRID(x), n.w()), (3, 6), (4, 6)),
    "convolution": (lambda n, x: nn.functional.conv2d(GRID(x), n.w(), padding=1), (2, 4, 5, 5), (6, 4, 3, 3)),
    "in groups": (lambda n, x: nn.functional.conv2d(GRID(x), n.w(), groups=2), (2, 6, 5, 5), (4, 3, 2, 2)),
}


@pytest.mark.parametrize("name", HALVED)
def test_without_vnni_a_weight_is_two_halves_that_fit_sixteen_bits(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    function, shape, kernel = HALVED[name]
    gm = passed(exact_without_vnni, function, torch.randn(shape), w=Weight(kernel))
    (weight,) = calls(gm, Q.dequantize_per_channel.default)
    assert int(weight.args[0].meta["val"].shape[1]) == 2 * kernel[1]
    assert int(attribute(gm, weight.args[0].target).short().abs().max()) * 2 * 255 < 2**15


def test_without_vnni_products_with_equal_weights_keep_one_each(monkeypatch):
    """Inductor's patterns are for one reader of a weight."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)

    def function(n: Body, x: Tensor) -> Tensor:
        return nn.functional.linear(GRID(nn.functional.linear(GRID(x), n.w())), n.same())

    weight = Weight((6, 6))
    gm = passed(exact_without_vnni, function, torch.randn(3, 6), w=weight, same=copy.deepcopy(weight))
    assert len({dequantize.args[0].target for dequantize in calls(gm, Q.dequantize_per_channel.default)}) == 2


NARROW = Grid(0.02, 60, 10, 127, torch.uint8)


def test_codes_end_at_the_bounds_of_their_grid_where_a_kernel_would_not_look_at_these():
    def function(n: Body, x: Tensor) -> Tensor:
        return (
            NARROW(nn.functional.linear(GRID(x), n.w()))
            + NARROW(nn.functional.conv1d(GRID(x[..., None]), n.c()))[..., 0]
        )

    parts = {"w": Weight((4, 6)), "c": Weight((4, 6, 1))}
    gm = passed(whole_codes, function, 9 * torch.randn(8, 6), **parts)
    bounds = [node.args[3:5] for node in calls(gm, Q.quantize_per_tensor.default)]
    assert bounds == [(0, 255)] * 4
    assert len(calls(gm, aten.hardtanh.default)) == len(calls(gm, aten.clamp_max.default)) == 1


def projections(n: Body, x: Tensor, quantize=GRID, bias: bool = True) -> list[Tensor]:
    read = quantize(x)
    return [nn.functional.linear(read, w(), b.bias if bias else None) for w, b in ((n.a, n.c), (n.b, n.d))]


MERGED = {
    "rows": lambda n, x: torch.mul(*projections(n, x)),
    "no bias": lambda n, x: torch.mul(*projections(n, x, bias=False)),
    "at run time": lambda n, x: torch.mul(*projections(n, x, quantize=dynamic)),
    "silu": lambda n, x: (lambda a, b: nn.functional.silu(a) * b)(*projections(n, x)),
    "a view that needs rows that touch": lambda n, x: torch.mul(*(y.view(len(y), -1) for y in projections(n, x))),
}


@pytest.mark.parametrize("name", MERGED)
def test_linears_that_read_the_same_integers_become_one(name):
    parts = {"a": Weight((8, 6)), "b": Weight((8, 6)), "c": nn.Linear(1, 8), "d": nn.Linear(1, 8)}
    gm = passed(merge_linears, MERGED[name], torch.randn(2, 3, 6), **parts)
    (merged,) = calls(gm, aten.linear.default)
    assert merged.meta[MERGED_KEY] == ("linear", "linear_1")


APART = {
    "what is fused": lambda n, x: torch.mul(*(torch.relu(y) for y in projections(n, x))),
    "outputs in integers": lambda n, x: torch.mul(*(GRID(y) for y in projections(n, x))),
    "outputs of the program": lambda n, x: tuple(y.transpose(1, 2) for y in projections(n, x)),
    "two grids": lambda n, x: nn.functional.linear(GRID(x), n.a()) * nn.functional.linear(OTHER(x), n.b()),
}


@pytest.mark.parametrize("name", APART)
def test_linears_stay_apart_for(name):
    parts = {"a": Weight((8, 6)), "b": Weight((8, 6)), "c": nn.Linear(1, 8), "d": nn.Linear(1, 8)}
    gm = passed(merge_linears, APART[name], torch.randn(2, 3, 6), **parts)
    assert len(calls(gm, aten.linear.default)) == 2


# name: (function, shape, weight, words of the error)
BREACHES = {
    "transposed": (
        lambda n, x: nn.functional.conv_transpose2d(GRID(x), n.w()), (2, 4, 5, 5), lambda: Weight((4, 3, 2, 2), 1),
        "for that of an ordinary convolution",
    ),
    "zero point": (
        lambda n, x: nn.functional.linear(GRID(x), n.w()), (2, 6), lambda: Weight((4, 6), zero_point=3),
        "a zero point other than 0",
    ),
    "axis": (
        lambda n, x: nn.functional.linear(GRID(x), n.w()), (2, 6), lambda: Weight((4, 6), 1), "channels on axis 1",
    ),
    "float64": (
        lambda n, x: nn.functional.linear(GRID(x), n.w()), (2, 6), lambda: Weight((4, 6), scale_dtype=torch.float64),
        "float64",
    ),
    "signed": (
        lambda n, x: nn.functional.conv2d(Grid(0.02, 3)(x), n.w()), (2, 4, 5, 5), lambda: Weight((3, 4, 2, 2)),
        "int8 activations",
    ),
    "padding only": (
        lambda n, x: nn.functional.conv2d(GRID(x), n.w(), None, (1, 2), 1, 2), (2, 4, 8, 1),
        lambda: Weight((3, 4, 3, 2)),
        "a window sees padding only",
    ),
    "pool": (
        lambda n, x: OTHER(nn.functional.max_pool2d(GRID(x), 2)), (2, 4, 5, 5), lambda: Weight((3, 4, 2, 2)),
        "max pooling on integers keeps their scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREACHES)
def test_what_would_run_wrongly_is_an_error_that_names_the_node(name):
    function, shape, weight, words = BREACHES[name]
    gm = graph(function, torch.randn(shape), w=weight())
    with pytest.raises(LoweringError, match=words) as caught:
        check_inductor_contract(gm)
    assert re.match(r"the model breaks \d Inductor requirements? and was not compiled", str(caught.value))
    assert "node " in str(caught.value)


def test_what_is_sound_has_no_breach():
    """Two pools: one keeps the grid of its input, the other does not and is the one finding."""
    gm = graph(
        lambda n, x: OTHER(nn.functional.max_pool2d(GRID(nn.functional.max_pool2d(GRID(x), 2)), 2)),
        torch.randn(2, 4, 9, 9),
    )
    with pytest.raises(
        LoweringError, match=r"(?s)^the model breaks 1 Inductor requirement and was not compiled.*node max_pool2d_1 "
    ) as caught:
        check_inductor_contract(gm)
    assert "node max_pool2d " not in str(caught.value)
