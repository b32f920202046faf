"""The integer reference: every op against integers by hand, the float graph, and XNNPACK in ExecuTorch's runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CaptureError
from pt2e_quant.pt2e.representation import Rounding, reference_representation_rewrite
from pt2e_quant.report import Report
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.lowering.handmade import Body, Grid, Weight, bias, dynamic, per_token
from tests.nets import MLP, ConvNet, Residual, export
from tests.test_ops import SHOULD_PRESERVE, keywords, sample

IN, OUT, OTHER = Grid(0.0371, -5), Grid(0.0417, 3), Grid(0.0213, 11)
aten = torch.ops.aten
FLOAT_BORDERS = ("quantized_decomposed.quantize", "quantized_decomposed.dequantize", "quantized_decomposed.choose")


def graph(body: nn.Module, *inputs: Tensor) -> GraphModule:
    return torch.export.export(body.eval(), inputs).module()


def both(body: nn.Module, *inputs: Tensor, rounding: Rounding = Rounding.FLOAT32_HALF_EVEN) -> tuple[Any, Any]:
    """What the converted graph and its integer reference compute."""
    converted = graph(body, *inputs)
    return converted(*inputs), reference_representation_rewrite(converted, rounding=rounding)(*inputs)


def float_ops(gm: GraphModule) -> list[str]:
    """Calls with a floating-point result, those at the borders left out."""
    calls = (node for node in gm.graph.nodes if node.op == "call_function")
    values = ((node, node.meta["val"]) for node in calls if not str(node.target).startswith(FLOAT_BORDERS))
    return [str(node.target) for node, value in values if isinstance(value, Tensor) and value.is_floating_point()]


def left(gm: GraphModule) -> dict[str, str]:
    return explain(gm).record.representation.left


def codes(x: Tensor, grid: Grid) -> np.ndarray:
    return grid.quantize(x).numpy().astype(np.int64) - grid.zero_point


def to_real(q: np.ndarray, grid: Grid) -> np.ndarray:
    clamped = np.clip(q + grid.zero_point, grid.qmin, grid.qmax) - grid.zero_point
    return (clamped * np.float32(grid.scale)).astype(np.float32)


def requantized(acc: np.ndarray, factor: np.ndarray | np.float32, grid: Grid = OUT) -> np.ndarray:
    """As XNNPACK's scalar kernel: a float32 product, lrintf."""
    return to_real(np.rint(acc.astype(np.float32) * factor).astype(np.int64), grid)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_convolution_sums_int32_products_and_requantizes_with_one_float32_factor():
    weight, b, x = Weight((8, 2, 3, 3)), bias(8), torch.randn(2, 6, 7, 9)
    body = Body(lambda m, x: OUT(F.conv2d(IN(x), m.w(), m.b, stride=2, padding=1, groups=3)), w=weight, b=b)
    weight.values = weight.values[:6]
    weight.scale, weight.zero_point, body.b = weight.scale[:6], weight.zero_point[:6], nn.Parameter(b[:6].detach())
    padded = np.pad(codes(x, IN), ((0, 0), (0, 0), (1, 1), (1, 1)))
    s_w, values = weight.scale.numpy(), weight.values.numpy().astype(np.int64)
    steps = s_w * np.float32(IN.scale)
    acc = np.empty((2, 6, 4, 5), np.int64)
    for channel in range(6):
        first = channel // 2 * 2
        for row in range(4):
            for column in range(5):
                window = padded[:, first : first + 2, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                acc[:, channel, row, column] = (window * values[channel]).sum((1, 2, 3))
        acc[:, channel] += int(np.rint(body.b[channel].item() / steps[channel]))
    expected = requantized(acc, (steps / np.float32(OUT.scale))[:, None, None])
    np.testing.assert_array_equal(both(body, x)[1].numpy(), expected)


def test_a_linear_with_relu_ends_at_the_zero_point():
    weight, b, x = Weight((5, 12)), bias(5), torch.randn(7, 12)
    body = Body(lambda m, x: OUT(F.relu(F.linear(IN(x), m.w(), m.b))), w=weight, b=b)
    steps = weight.scale.numpy() * np.float32(IN.scale)
    acc = codes(x, IN) @ weight.values.numpy().astype(np.int64).T + np.rint(b.detach().numpy() / steps).astype(np.int64)
    expected = np.maximum(requantized(acc, steps / np.float32(OUT.scale)), 0)
    np.testing.assert_array_equal(both(body, x)[1].numpy(), expected)


def test_an_addition_has_21_bit_multipliers_one_shift_and_rounds_ties_up():
    x, y = torch.randn(40, 50), torch.randn(40, 50)
    ratios = [np.float32(g.scale) / np.float32(OUT.scale) for g in (IN, OTHER)]
    shift = 20 - math.floor(math.log2(max(ratios)))
    a, b = (int(np.rint(ratio * 2.0**shift)) for ratio in ratios)
    expected = to_real((codes(x, IN) * a - codes(y, OTHER) * b + 2 ** (shift - 1)) >> shift, OUT)
    np.testing.assert_array_equal(both(Body(lambda m, x, y: OUT(IN(x) - OTHER(y))), x, y)[1].numpy(), expected)


def test_an_addition_rounds_ties_up_and_a_mean_to_the_even_code():
    """Scales that are powers of two, so that nothing but the tie is left to round: 0.25 a + 0.5 b, and (a + b) / 2."""
    quarter, half, one = Grid(0.25, 1), Grid(0.5), Grid(1.0, 3)
    a, b = torch.arange(-20, 20).repeat_interleave(3) * 0.25, torch.arange(-3, 3).repeat(20) * 0.5
    exact = a.numpy().astype(np.float64) + b.numpy()
    got = both(Body(lambda m, x, y: one(quarter(x) + half(y))), a, b)[1]
    np.testing.assert_array_equal(got.numpy(), np.floor(exact + 0.5))
    pairs = torch.stack([a[:40], b[:40]])
    exact = pairs.mean(0).numpy().astype(np.float64)
    got = both(Body(lambda m, x: one(quarter(x).mean((0,)))), pairs)[1]
    np.testing.assert_array_equal(got.numpy(), np.rint(exact + 3) - 3)
    assert (exact % 1 == 0.5).sum() > 4


def test_a_product_of_two_tensors_requantizes_the_product_of_codes():
    x, y = torch.randn(40, 50), torch.randn(50)
    factor = np.float32(IN.scale) * np.float32(OTHER.scale) / np.float32(OUT.scale)
    expected = requantized(codes(x, IN) * codes(y, OTHER), factor)
    np.testing.assert_array_equal(both(Body(lambda m, x, y: OUT(IN(x) * OTHER(y))), x, y)[1].numpy(), expected)


def test_a_mean_rounds_the_code_itself_half_to_even():
    x = torch.randn(4, 6, 5, 7)
    factor = np.float32(IN.scale) / 35 / np.float32(OUT.scale)
    mean = codes(x, IN).sum((2, 3), keepdims=True).astype(np.float32) * np.float32(factor)
    expected = to_real(np.rint(mean + np.float32(OUT.zero_point)).astype(np.int64) - OUT.zero_point, OUT)
    np.testing.assert_array_equal(both(Body(lambda m, x: OUT(IN(x).mean((2, 3), True))), x)[1].numpy(), expected)


def test_adaptive_pooling_sums_windows_of_different_sizes():
    x = torch.randn(3, 4, 7, 10)
    centred, expected = codes(x, IN), np.empty((3, 4, 3, 4), np.int64)
    for i in range(3):
        for j in range(4):
            rows, columns = slice(i * 7 // 3, -((-(i + 1) * 7) // 3)), slice(j * 10 // 4, -((-(j + 1) * 10) // 4))
            window = centred[:, :, rows, columns]
            exact = window.sum((2, 3)) * IN.scale / (window.shape[2] * window.shape[3] * OUT.scale)
            expected[:, :, i, j] = np.rint(exact)
    got = both(Body(lambda m, x: OUT(F.adaptive_avg_pool2d(IN(x), (3, 4)))), x)[1]
    np.testing.assert_array_equal(got.numpy(), to_real(expected, OUT))


def test_the_fixed_point_rounding_is_that_of_gemmlowp():
    weight, x = Weight((5, 12), None), torch.randn(7, 12)
    body = Body(lambda m, x: OUT(F.linear(IN(x), m.w())), w=weight)
    acc = codes(x, IN) @ weight.values.numpy().astype(np.int64).T
    fraction, exponent = math.frexp(float(np.float32(IN.scale)) * float(np.float32(0.004)) / OUT.scale)
    high = (acc * round(fraction * 2**31) + 2**30) >> 31  # SaturatingRoundingDoublingHighMul
    expected = to_real((high + (1 << (-exponent - 1)) - (high < 0)) >> -exponent, OUT)  # RoundingDivideByPOT
    got = both(body, x, rounding=Rounding.FIXED_POINT_HALF_AWAY)[1]
    np.testing.assert_array_equal(got.numpy(), expected)


# --- the float graph --------------------------------------------------------------------------------------------------

WITHIN_ONE_LSB: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "conv2d, same, depthwise": lambda: (
        Body(
            lambda m, x: OUT(F.conv2d(IN(x), m.w(), m.b, padding="same", groups=6)), w=Weight((6, 1, 3, 5)), b=bias(6)
        ),
        (torch.randn(2, 6, 7, 9),),
    ),
    "conv2d, dilation, hardtanh": lambda: (
        Body(lambda m, x: OUT(F.hardtanh(F.conv2d(IN(x), m.w(), dilation=2), -0.7, 2.9)), w=Weight((7, 6, 2, 3), None)),
        (torch.randn(2, 6, 7, 9),),
    ),
    "conv2d without a batch": lambda: (
        Body(lambda m, x: OUT(F.conv2d(IN(x), m.w(), m.b, stride=2)), w=Weight((7, 6, 3, 3)), b=bias(7)),
        (torch.randn(6, 7, 9),),
    ),
    "conv1d": lambda: (
        Body(lambda m, x: OUT(F.conv1d(IN(x), m.w(), m.b, padding=2, groups=2)), w=Weight((4, 3, 3)), b=bias(4)),
        (torch.randn(2, 6, 11),),
    ),
    "conv3d": lambda: (
        Body(lambda m, x: OUT(F.conv3d(IN(x), m.w(), m.b)), w=Weight((4, 3, 2, 3, 2)), b=bias(4)),
        (torch.randn(2, 3, 4, 5, 6),),
    ),
    "conv_transpose2d, groups": lambda: (
        Body(
            lambda m, x: OUT(F.conv_transpose2d(IN(x), m.w(), m.b, stride=2, groups=2)),
            w=Weight((6, 2, 3, 3), 1),
            b=bias(4),
        ),
        (torch.randn(2, 6, 5, 4),),
    ),
    "aten.convolution": lambda: (
        Body(
            lambda m, x: OUT(aten.convolution(IN(x), m.w(), m.b, [2, 1], [1, 0], [1, 1], False, [0, 0], 3)),
            w=Weight((6, 2, 3, 3)),
            b=bias(6),
        ),
        (torch.randn(2, 6, 7, 9),),
    ),
    "zeros around a convolution": lambda: (
        Body(lambda m, x: OUT(F.conv2d(F.pad(IN(x), (1, 0, 2, 1)), m.w())), w=Weight((7, 6, 3, 3))),
        (torch.randn(2, 6, 7, 9),),
    ),
    "weights with a zero point for each channel": lambda: (
        Body(lambda m, x: OUT(F.linear(IN(x), m.w(), m.b)), w=Weight((5, 12), zero_point=9), b=bias(5)),
        (torch.randn(7, 12),),
    ),
    "addmm": lambda: (
        Body(lambda m, x: OUT(torch.addmm(m.b, IN(x), m.w())), w=Weight((12, 5), 1), b=bias(5)),
        (torch.randn(7, 12),),
    ),
    "linear on 3-D": lambda: (
        Body(lambda m, x: OUT(F.relu6(F.linear(IN(x), m.w()))), w=Weight((5, 12))),
        (torch.randn(2, 3, 12),),
    ),
    "bmm": lambda: (
        Body(lambda m, x, y: OUT(torch.bmm(IN(x), OTHER(y)))),
        (torch.randn(3, 4, 9), torch.randn(3, 9, 5)),
    ),
    "scaled matmul of heads": lambda: (
        Body(lambda m, x, y: OUT(torch.matmul(IN(x), OTHER(y).transpose(-1, -2)) / math.sqrt(9))),
        (torch.randn(2, 3, 4, 9), torch.randn(2, 3, 5, 9)),
    ),
    "a product with a negative number": lambda: (Body(lambda m, x: OUT(IN(x) * -0.37)), (torch.randn(9, 8),)),
    "add, relu": lambda: (Body(lambda m, x, y: OUT(F.relu(IN(x) + OTHER(y)))), (torch.randn(9, 8), torch.randn(8))),
    "a convolution plus another": lambda: (
        Body(
            lambda m, x: OUT(F.conv1d(IN(x), m.v()) + F.conv1d(IN(x), m.w())), v=Weight((4, 6, 1)), w=Weight((4, 6, 1))
        ),
        (torch.randn(2, 6, 11),),
    ),
    "relu before a mean": lambda: (
        Body(lambda m, x: OUT(F.relu(IN(x)).mean((1,)))),
        (torch.randn(9, 8),),
    ),
    "mean of everything": lambda: (Body(lambda m, x: Grid(0.003, 4)(IN(x).mean())), (torch.randn(9, 8),)),
    "adaptive_avg_pool1d": lambda: (Body(lambda m, x: OUT(F.adaptive_avg_pool1d(IN(x), 4))), (torch.randn(2, 3, 10),)),
    "avg_pool2d": lambda: (
        Body(lambda m, x: OUT(F.avg_pool2d(IN(x), (3, 2), stride=2, padding=1, divisor_override=5))),
        (torch.randn(2, 3, 8, 9),),
    ),
    "avg_pool1d": lambda: (Body(lambda m, x: OUT(F.avg_pool1d(IN(x), 3))), (torch.randn(2, 3, 10),)),
    "embedding": lambda: (
        Body(lambda m, i: OUT(F.embedding(i, m.w())), w=Weight((20, 6), spread=0.02)),
        (torch.randint(0, 20, (3, 4)),),
    ),
    "embedding, one scale": lambda: (
        Body(lambda m, i: OUT(F.embedding(i, m.w())), w=Weight((20, 6), None, spread=0.02)),
        (torch.randint(0, 20, (3, 4)),),
    ),
    "another grid": lambda: (Body(lambda m, x: OUT(IN(x).transpose(0, 1))), (torch.randn(9, 8),)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("rounding", Rounding, ids=lambda rounding: rounding.name)
@pytest.mark.parametrize("name", WITHIN_ONE_LSB)
def test_the_reference_is_within_one_lsb_of_the_float_graph_and_has_no_float_op(name: str, rounding: Rounding):
    """One rounding of a number that float32 knows to 1e-6: at most a neighbour code, where it is close to a tie."""
    body, inputs = WITHIN_ONE_LSB[name]()
    converted = graph(body, *inputs)
    reference = reference_representation_rewrite(converted, rounding=rounding)
    if name == "a convolution plus another" and rounding is Rounding.FIXED_POINT_HALF_AWAY:
        assert "takes 8-bit operands" in " ".join(left(reference).values())
        return
    assert left(reference) == {}
    assert float_ops(reference) == []
    expected, got = converted(*inputs), reference(*inputs)
    assert got.shape == expected.shape
    assert expected.numel() == 1 or expected.unique().numel() > 5, "a constant output proves nothing"
    scale = 0.003 if name == "mean of everything" else OUT.scale
    assert ((got - expected) / scale).abs().max() <= 1.01


EXACT: dict[str, Callable[[Tensor], Any]] = {
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x),
    "clamp_min": lambda x: x.clamp_min(0.25),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.8),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(0, 1), 3, 2, 1),
    "cat": lambda x: torch.cat([x, F.relu(x)], 1),
    "stack": lambda x: torch.stack([x[0], x[1]]),
    "pad": lambda x: F.pad(x, (1, 2)),
    "reflect": lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect"),
    "tril": torch.tril,
    "split": lambda x: torch.split(x, [2, 4], 1)[1],
    "max over a dimension": lambda x: x.max(1).values,
    "permute, view": lambda x: x.permute(0, 2, 3, 1).reshape(2, -1),
    "dropout": lambda x: F.dropout(x, 0.3, training=False),
    "slice with a step": lambda x: x[:, ::2],
    "gather": lambda x: x[:, torch.tensor([4, 0, 4])],
}


@pytest.mark.parametrize("name", EXACT)
def test_ops_that_only_pick_values_give_the_very_same_codes(name: str):
    converted = graph(Body(lambda m, x: OUT(EXACT[name](OUT(x)))), x := torch.randn(2, 6, 8, 10))
    reference = reference_representation_rewrite(converted)
    assert left(reference) == {}
    assert float_ops(reference) == []
    assert torch.equal(reference(x), converted(x))


def test_moved_codes_stay_eight_bits_wide():
    reference = reference_representation_rewrite(
        graph(Body(lambda m, x: OUT(OUT(x).transpose(1, 2).flatten(1))), torch.randn(2, 3, 4))
    )
    assert {
        node.meta["val"].dtype
        for node in reference.graph.find_nodes(op="call_function", target=aten.flatten.using_ints)
    } == {torch.int8}
    assert not reference.graph.find_nodes(op="call_function", target=aten._to_copy.default)


# --- scales known at run time, and results read as real numbers -------------------------------------------------------


@pytest.mark.parametrize("choose", [dynamic, per_token])
def test_a_dynamic_linear_sums_integers_and_scales_the_sum(choose: Callable[[Tensor], Tensor]):
    """Tolerance: float32 sums of 24 products in the graph against one exact sum."""
    body = Body(lambda m, x: F.linear(choose(x), m.w(), m.b), w=Weight((5, 24)), b=bias(5))
    x = torch.randn(3, 7, 24)
    reference = reference_representation_rewrite(graph(body, x))
    (product,) = reference.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert product.meta["val"].dtype is torch.int32
    torch.testing.assert_close(reference(x), body(x), rtol=1e-5, atol=1e-5)


def test_a_dynamic_convolution_sums_integers():
    body = Body(lambda m, x: F.relu(F.conv2d(dynamic(x), m.w(), m.b)), w=Weight((5, 3, 2, 2)), b=bias(5))
    x = torch.randn(1, 3, 6, 7)
    reference = reference_representation_rewrite(graph(body, x))
    assert (
        reference.graph.find_nodes(op="call_function", target=aten.conv2d.default)[0].meta["val"].dtype is torch.int32
    )
    torch.testing.assert_close(reference(x), body(x), rtol=1e-5, atol=1e-5)


def test_a_static_product_that_is_read_as_real_numbers_is_summed_in_integers():
    body = Body(lambda m, x: torch.sigmoid(F.linear(IN(x), m.w(), m.b)), w=Weight((5, 24)), b=bias(5))
    x = torch.randn(7, 24)
    reference = reference_representation_rewrite(graph(body, x))
    assert (
        reference.graph.find_nodes(op="call_function", target=aten.linear.default)[0].meta["val"].dtype is torch.int32
    )
    torch.testing.assert_close(reference(x), body(x), rtol=1e-5, atol=1e-4)  # the bias is rounded to s_x * s_w, 1.5e-4


def test_half_precision_models_get_their_dtype_back():
    q = torch.ops.quantized_decomposed

    def forward(m: Any, x: Tensor) -> Tensor:
        codes = q.quantize_per_tensor.default(x, 0.03, 2, -128, 127, torch.int8)
        x = q.dequantize_per_tensor.default(codes, 0.03, 2, -128, 127, torch.int8, out_dtype=torch.float16)
        return torch.mm(x, x.t())

    x = torch.randn(4, 6).half()
    reference = reference_representation_rewrite(graph(Body(forward), x))
    assert reference(x).dtype is torch.float16
    torch.testing.assert_close(reference(x), forward(None, x), rtol=2e-3, atol=2e-3)  # float16 keeps 11 bits


def test_rows_of_a_weight_only_embedding_are_looked_up_as_integers():
    body = Body(lambda m, i: F.embedding(i, m.w()), w=Weight((20, 6), zero_point=-7))
    indices = torch.randint(0, 20, (3, 4))
    reference = reference_representation_rewrite(graph(body, indices))
    first = reference.graph.find_nodes(op="call_function", target=aten.embedding.default)[0]
    assert first.meta["val"].dtype is torch.int8
    torch.testing.assert_close(reference(indices), body(indices), rtol=1e-6, atol=0)


# --- where there is no integer form -----------------------------------------------------------------------------------

REASONS: dict[str, tuple[Callable[..., Any], str]] = {
    "softmax": (lambda m, x: OUT(torch.softmax(IN(x), -1)), "aten.softmax.int has no integer form"),
    "alpha": (lambda m, x: OUT(torch.add(IN(x), OTHER(x), alpha=2)), "alpha=2"),
    "float operand": (lambda m, x: OUT(IN(x) + m.b), "its operand b is not quantized"),
    "cat": (lambda m, x: OUT(torch.cat([IN(x), OTHER(x)])), "its operands have different scales"),
    "nearest": (lambda m, x: OUT(F.interpolate(IN(x)[None], scale_factor=2.0)[0]), "no kernel of it for integers"),
    "bound": (lambda m, x: OUT(F.hardtanh(IN(x), -0.4, 1.0).mean(1)), "values that end at -0.4"),
    "dynamic to static": (lambda m, x: OUT(F.linear(dynamic(x), m.w())), "known at run time only"),
    "bias": (lambda m, x: OUT(F.linear(IN(x), m.w(), x[0, :5])), "is computed at run time"),
    "large bias": (lambda m, x: OUT(F.linear(IN(x), m.w(), m.b * 1e7)), "its bias does not fit 32-bit integers"),
    "divisor": (lambda m, x: OUT(IN(x) / OTHER(x + 9)), "it divides by a tensor"),
    "tiny output scale": (lambda m, x: Grid(1e-12)(IN(x)), "do not fit 64-bit integers"),
    "moved channels": (lambda m, x: OUT(torch.mm(IN(x), m.w().t())), "a scale per channel"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_stays_in_float_is_named_with_the_reason_and_computes_the_same(name: str):
    function, reason = REASONS[name]
    parts = {"w": Weight((5, 8)), "b": nn.Parameter(torch.randn(5 if "bias" in name else 8))}
    x = torch.randn(3, 8)
    converted = graph(Body(function, **parts), x)
    reference = reference_representation_rewrite(converted)
    assert [stays for stays in left(reference).values() if reason in stays], left(reference)
    torch.testing.assert_close(reference(x), converted(x), rtol=1e-5, atol=1e-5)


def test_the_report_says_what_is_integer_and_what_is_not_and_survives_json():
    reference = reference_representation_rewrite(
        graph(Body(lambda m, x: OUT(torch.softmax(OUT(F.relu(IN(x) + OTHER(x))), -1))), torch.randn(3, 8))
    )
    report = explain(reference)
    text = report.text()
    assert "Integer arithmetic, rounding: float32, half to even\n  add: a sum with one rounding\n  relu:" in text
    assert "Quantized, without an integer form\n  softmax: aten.softmax.int has no integer form" in text
    assert Report.from_json(report.to_json()).text() == text


def test_a_plain_module_is_refused():
    with pytest.raises(CaptureError, match="takes what convert_pt2e returned, got ReLU"):
        reference_representation_rewrite(nn.ReLU())


# --- sums that leave int32 --------------------------------------------------------------------------------------------


def test_sums_that_can_leave_int32_are_int64_and_right():
    """70,000 products of up to 255 * 127 reach 2.27e9, beyond 2^31; XNNPACK's int32 would wrap."""
    body = Body(lambda m, x: Grid(900.0)(F.linear(Grid(1.0, -128)(x), m.w())), w=Weight((2, 70_000), None, spread=1.0))
    body.w.values.fill_(127)
    body.w.values[1] = -127
    x = torch.full((1, 70_000), 255.0)
    reference = reference_representation_rewrite(graph(body, x))
    assert (
        reference.graph.find_nodes(op="call_function", target=aten.linear.default)[0].meta["val"].dtype is torch.int64
    )
    assert reference(x).tolist() == [[127 * 900.0, -128 * 900.0]]


def test_a_sum_of_dynamic_length_is_int64():
    body = Body(lambda m, x: OUT(torch.mm(IN(x).t(), OTHER(x))))
    length = torch.export.Dim("length", min=2, max=64)
    converted = torch.export.export(body, (torch.randn(6, 4),), dynamic_shapes=[({0: length},)]).module()
    reference = reference_representation_rewrite(converted)
    assert reference.graph.find_nodes(op="call_function", target=aten.mm.default)[0].meta["val"].dtype is torch.int64
    x = torch.randn(17, 4)
    assert ((reference(x) - converted(x)) / OUT.scale).abs().max() <= 1.01


# --- the runtime ------------------------------------------------------------------------------------------------------


def test_the_reference_gives_what_xnnpack_gives():
    """Bit for bit; of averages, whose float32 steps are not published, one code in a hundred may be a neighbour."""
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    def forward(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        image, other = IN(x), OTHER(y)
        conv = F.relu(F.conv2d(image, m.w(), m.b, stride=2, padding=1, groups=2))
        return (
            OUT(conv),
            OUT(F.conv2d(IN(x), m.v(), m.b, padding="same")),
            OUT(F.linear(IN(x), m.l(), m.c)),
            OUT(F.relu(IN(x) + OTHER(y))),
            OUT(IN(x) - other),
            OUT(IN(x) * OTHER(y)),
            OTHER(F.max_pool2d(OTHER(y), 2)),
            OUT(IN(x).mean((2, 3), True)),
        )

    body = Body(
        forward, w=Weight((8, 3, 3, 3)), b=bias(8), v=Weight((8, 6, 3, 3), None), l=Weight((17, 10)), c=bias(17)
    )
    inputs = torch.randn(5, 6, 8, 10), torch.randn(5, 6, 8, 10)
    converted = graph(body, *inputs)
    program = lower_to_executorch(converted, inputs)
    reference = reference_representation_rewrite(converted)(*inputs)
    differing = [int((a != b).sum()) for a, b in zip(program.run(*inputs), reference, strict=True)]
    assert differing[:-1] == [0] * 7
    assert differing[-1] <= reference[-1].numel() * 0.01


@pytest.mark.parametrize(
    ("model", "shape", "per_channel"),
    [
        pytest.param(ConvNet(), (2, 3, 16, 16), True, id="conv", marks=pytest.mark.slow),
        pytest.param(Residual(), (2, 4, 9, 9), False, id="residual"),
        pytest.param(MLP(), (8, 10), True, id="mlp", marks=pytest.mark.slow),
    ],
)
def test_models_compute_in_integers_what_the_runtime_computes(
    model: nn.Module, shape: tuple[int, ...], per_channel: bool
):
    """The float graph may round an operand of an add the other way, and then the sum: two steps for two layers."""
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    torch.manual_seed(0)
    prepared = prepare_pt2e(
        export(model, torch.randn(shape)), XNNPACKQuantizer(get_symmetric_quantization_config(per_channel))
    )
    for _ in range(4):
        prepared(torch.randn(shape))
    converted, reference = convert_pt2e(prepared), convert_pt2e(prepared, use_reference_representation=True)
    assert float_ops(reference) == []
    assert left(reference) == {}
    program, x = lower_to_executorch(converted), torch.randn(shape)
    scale = explain(converted).groups[-1].scale
    assert ((program.run(x)[0] - reference(x)) / scale).abs().max() <= 1.01
    assert ((converted(x) - reference(x)) / scale).abs().max() <= 2.01


# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.fixture
def converted() -> GraphModule:
    prepared = prepare_pt2e(
        export(ConvNet(), torch.randn(2, 3, 16, 16)), XNNPACKQuantizer(get_symmetric_quantization_config())
    )
    prepared(torch.randn(2, 3, 16, 16))
    return convert_pt2e(prepared)


def test_the_converted_model_stays_as_it_was(converted: GraphModule):
    code = converted.code
    reference_representation_rewrite(converted)
    assert converted.code == code
    assert explain(converted).record.representation is None


def test_weights_stay_eight_bits_wide_and_are_shared_with_the_converted_model(converted: GraphModule):
    reference = reference_representation_rewrite(converted)
    assert reference._frozen_param0.dtype is torch.int8
    assert reference._frozen_param0.data_ptr() == converted._frozen_param0.data_ptr()


def test_the_reference_exports_again(converted: GraphModule, tmp_path: Any):
    x, reference = torch.randn(2, 3, 16, 16), reference_representation_rewrite(converted)
    torch.export.save(torch.export.export(reference, (x,)), tmp_path / "reference.pt2")
    assert torch.equal(torch.export.load(tmp_path / "reference.pt2").module()(x), reference(x))


def test_integer_borders_leave_no_float_at_all():
    from pt2e_quant import QuantizedIO

    prepared = prepare_pt2e(
        export(ConvNet(), torch.randn(2, 3, 16, 16)), XNNPACKQuantizer(get_symmetric_quantization_config())
    )
    prepared(torch.randn(2, 3, 16, 16))
    reference = convert_pt2e(prepared, quantized_io=QuantizedIO([0], [0]), use_reference_representation=True)
    values = [node.meta["val"] for node in reference.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert values
    assert not any(value.is_floating_point() for value in values)


# --- every op that only moves values ----------------------------------------------------------------------------------

SIZED_BY_DATA = ("narrow.Tensor", "tensor_indices_or_sections")  # torch.export evaluates these samples' sizes itself
MOVES = [op for op in SHOULD_PRESERVE if not op._schema.is_mutable]
MOVES = [op for op in MOVES if not str(op).endswith(SIZED_BY_DATA)]
FLOAT_ONLY = ("upsample_nearest", "adaptive_max_pool", "im2col", "native_dropout", "max_pool1d_with_indices")


@pytest.mark.parametrize("op", MOVES, ids=str)
def test_every_op_that_moves_values_moves_codes_or_says_why_not(op: Any):
    args, kwargs = sample(op), keywords(op)
    leaves, tree = pytree.tree_flatten(args)
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def forward(m: Any, *inputs: Tensor) -> list[Tensor]:
        given = iter(inputs)
        grid = [OUT(next(given)) if any(leaf is f for f in floats) else leaf for leaf in leaves]
        results = pytree.tree_leaves(op(*pytree.tree_unflatten(grid, tree), **kwargs))
        return [OUT(result) for result in results if result.is_floating_point()]

    converted = graph(Body(forward), *floats)
    reference = reference_representation_rewrite(converted)
    assert left(reference) == {} or any(name in str(op) for name in FLOAT_ONLY), left(reference)
    assert left(reference) or float_ops(reference) == []
    assert all(map(torch.equal, reference(*floats), converted(*floats)))
