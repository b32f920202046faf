"""Graphs that XNNPACK runs in integers: one delegate, nothing outside, and the numbers of the converted graph.

Each row is lowered and executed in ExecuTorch's runtime. Tolerance: XNNPACK requantizes with its own rounding of the
scale product, so an output may be one step of its grid (1 LSB) off; most are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from pt2e_quant.lowering.executorch import lower_to_executorch
from tests.lowering.handmade import Body, Grid, Groups, Weight, bias, dynamic, per_token

pytest.importorskip("executorch")

IN, OUT, OTHER = Grid(0.03, -5), Grid(0.04, 3), Grid(0.02, 11)
IMAGE = (2, 6, 8, 10)


def run(body: Body, *inputs: Tensor, dynamic_shapes: Any = None) -> Any:
    exported = torch.export.export(body.eval(), inputs, dynamic_shapes=dynamic_shapes)
    return lower_to_executorch(exported)


def assert_equal_within_one_lsb(program: Any, body: Body, *inputs: Tensor, grid: Grid = OUT) -> None:
    expected = body(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, wanted in zip(program.run(*inputs), expected, strict=True):
        assert got.shape == wanted.shape
        steps = ((got - wanted) / grid.scale).abs()
        assert steps.max() <= 1.01
        assert steps.max() > 0 or got.unique().numel() > 1, "a constant output proves nothing"


def assert_all_integer(program: Any) -> None:
    assert program.undelegated == ()
    assert program.delegates == 1
    assert {kernel.precision for kernel in program.kernels} == {"int8"}


# --- convolutions and products ----------------------------------------------------------------------------------------


def product(
    op: Callable[..., Tensor],
    weight: Weight,
    outputs: int | None,
    activation: Callable[[Tensor], Tensor] = lambda y: y,
    **literals: Any,
) -> Body:
    """dq(x), dq(w) -> op -> activation -> q; with a bias when `outputs` says how many channels it has."""
    parts = {"weight": weight} | ({"b": bias(outputs)} if outputs else {})

    def forward(m: Any, x: Tensor) -> Tensor:
        return OUT(activation(op(IN(x), m.weight(), m.b if outputs else None, **literals)))

    return Body(forward, **parts)


def hardtanh(y: Tensor) -> Tensor:
    return F.hardtanh(y, -2.0, 3.0)


LINEARS = {
    "linear": lambda: (product(F.linear, Weight((17, 10)), 17), (3, 10)),
    "linear, per tensor": lambda: (product(F.linear, Weight((17, 10), None), 17), (3, 10)),
    "linear without bias, 4-D": lambda: (product(F.linear, Weight((17, 10)), None), IMAGE),
    "linear relu, 3-D": lambda: (product(F.linear, Weight((17, 10)), 17, F.relu), (2, 5, 10)),
    "linear hardtanh": lambda: (product(F.linear, Weight((17, 10)), 17, hardtanh), (3, 10)),
    "linear relu6, 1-D": lambda: (product(F.linear, Weight((17, 10)), 17, F.relu6), (10,)),
    "linear of 4-bit weights": lambda: (product(F.linear, Weight((17, 10), bounds=(-8, 7), spread=0.05), 17), (3, 10)),
}
CONVOLUTIONS = {
    "conv2d": lambda: (product(F.conv2d, Weight((7, 6, 3, 3)), 7, stride=2, padding=1), IMAGE),
    "conv2d, per tensor": lambda: (
        product(F.conv2d, Weight((7, 6, 3, 2), None), 7, padding=(2, 1), dilation=2),
        IMAGE,
    ),
    "conv2d without bias": lambda: (product(F.conv2d, Weight((7, 6, 3, 3)), None), IMAGE),
    "conv2d in groups": lambda: (product(F.conv2d, Weight((8, 3, 3, 3)), 8, groups=2), IMAGE),
    "depthwise": lambda: (product(F.conv2d, Weight((6, 1, 3, 3)), 6, F.relu6, groups=6, padding=1), IMAGE),
    "depthwise, two outputs each": lambda: (product(F.conv2d, Weight((12, 1, 3, 3)), 12, groups=6), IMAGE),
    "conv2d same": lambda: (product(F.conv2d, Weight((7, 6, 3, 5)), 7, padding="same"), IMAGE),
    "conv2d same, even kernel": lambda: (product(F.conv2d, Weight((7, 6, 4, 2)), 7, padding="same"), IMAGE),
    "conv2d relu": lambda: (product(F.conv2d, Weight((7, 6, 3, 3)), 7, F.relu), IMAGE),
    "conv2d hardtanh": lambda: (product(F.conv2d, Weight((7, 6, 1, 1)), 7, hardtanh), IMAGE),
    "conv1d": lambda: (product(F.conv1d, Weight((7, 6, 3)), 7, stride=2, padding=1), (2, 6, 11)),
    "conv1d in groups, relu": lambda: (product(F.conv1d, Weight((4, 3, 3)), 4, F.relu, groups=2), (2, 6, 11)),
    "conv_transpose2d": lambda: (
        product(F.conv_transpose2d, Weight((6, 7, 3, 3), 1), 7, stride=2, padding=1, output_padding=(1, 0)),
        IMAGE,
    ),
    "conv_transpose2d in groups, per tensor": lambda: (
        product(F.conv_transpose2d, Weight((6, 4, 3, 3), None), 8, F.relu, groups=2, dilation=2),
        IMAGE,
    ),
    "conv_transpose1d": lambda: (product(F.conv_transpose1d, Weight((6, 7, 3), 1), None, stride=2), (2, 6, 11)),
}


@pytest.mark.parametrize("name", [*LINEARS, *CONVOLUTIONS])
def test_convolutions_and_linears_run_in_integers(name: str) -> None:
    body, shape = (LINEARS | CONVOLUTIONS)[name]()
    x = torch.randn(shape)
    program = run(body, x)
    assert_all_integer(program)
    assert_equal_within_one_lsb(program, body, x)


MATRIX = {
    "mm, per tensor": Body(lambda m, x: OUT(F.relu(torch.mm(IN(x), m.w()))), w=Weight((10, 17), None)),
    "addmm, per tensor": Body(lambda m, x: OUT(torch.addmm(m.b, IN(x), m.w())), w=Weight((10, 17), None), b=bias(17)),
    "addmm, axis 1": Body(lambda m, x: OUT(torch.addmm(m.b, IN(x), m.w())), w=Weight((10, 17), 1), b=bias(17)),
    "matmul, per tensor": Body(lambda m, x: OUT(torch.matmul(IN(x), m.w())), w=Weight((10, 17), None)),
}


@pytest.mark.parametrize("name", MATRIX)
def test_products_with_a_weight_of_inputs_by_outputs_run_in_integers(name: str) -> None:
    x = torch.randn(3, 10)
    program = run(MATRIX[name], x)
    assert_all_integer(program)
    assert_equal_within_one_lsb(program, MATRIX[name], x)


def test_dynamic_sizes_stay_dynamic() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = OUT(F.relu(F.conv2d(IN(x), m.w(), m.b, padding=1)))
        y = OUT(F.adaptive_avg_pool2d(y, 1))
        return OUT(F.linear(OUT(y.flatten(1)), m.w2()))

    body = Body(forward, w=Weight((7, 6, 3, 3)), b=bias(7), w2=Weight((5, 7), spread=0.02))
    sizes = {0: Dim("batch", min=1, max=16), 2: Dim("height", min=4, max=64)}
    program = run(body, torch.randn(IMAGE), dynamic_shapes=[(sizes,)])
    assert_all_integer(program)
    assert_equal_within_one_lsb(program, body, torch.randn(5, 6, 17, 10))
    assert_equal_within_one_lsb(program, body, torch.randn(1, 6, 4, 10))


# --- activations quantized while running --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 10), (10,), (2, 5, 10), (2, 3, 5, 10)])
@pytest.mark.parametrize("outputs", [17, None])
def test_per_token_linear_is_exact(shape: tuple[int, ...], outputs: int | None) -> None:
    weight = Weight((17, 10))
    body = Body(
        lambda m, x: F.relu(F.linear(per_token(x), m.w(), m.b if outputs else None)),
        w=weight,
        **({"b": bias(17)} if outputs else {}),
    )
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[0])[(...,) + (None,) * (len(shape) - 1)]
    program = run(body, x)
    assert program.undelegated == ()
    assert [kernel.precision for kernel in program.kernels][0] == "dynamic"
    torch.testing.assert_close(program.run(x)[0], body(x), rtol=1e-5, atol=1e-5 * float(body(x).abs().max()))


def test_three_linears_share_one_dynamic_quantize() -> None:
    Q = torch.ops.quantized_decomposed

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        scale, zero_point = Q.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        q = Q.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
        parts = [
            Q.dequantize_per_token.default(q, scale, zero_point, -128, 127, torch.int8, torch.float32) for _ in "qkv"
        ]
        return tuple(F.linear(part, w()) for part, w in zip(parts, (m.q, m.k, m.v), strict=True))

    body = Body(forward, q=Weight((8, 10)), k=Weight((8, 10)), v=Weight((5, 10)))
    x = torch.randn(2, 5, 10)
    program = run(body, x)
    assert (program.delegates, program.undelegated, program.count("dynamic")) == (1, (), 3)
    for got, wanted in zip(program.run(x), body(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [32, 64])
def test_groups_of_4_bits_are_exact(size: int) -> None:
    body = Body(lambda m, x: F.linear(per_token(x), m.w()), w=Groups((8, 64), size))
    x = torch.randn(3, 64)
    program = run(body, x)
    assert (program.delegates, program.undelegated, program.count("dynamic")) == (1, (), 1)
    torch.testing.assert_close(program.run(x)[0], body(x), rtol=1e-5, atol=1e-5)


def test_dynamic_conv2d_is_exact_for_one_image() -> None:
    body = Body(lambda m, x: F.relu(F.conv2d(dynamic(x), m.w(), m.b, groups=2)), w=Weight((8, 3, 3, 3)), b=bias(8))
    x = torch.randn(1, 6, 8, 10)
    program = run(body, x)
    assert (program.delegates, program.undelegated, program.remarks) == (1, (), ())
    torch.testing.assert_close(program.run(x)[0], body(x), rtol=1e-5, atol=1e-5)


# --- everything else ----------------------------------------------------------------------------------------------------

BINARY: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "add": lambda m, a, b: OUT(IN(a) + OTHER(b)),
    "add relu": lambda m, a, b: OUT(F.relu(IN(a) + OTHER(b))),
    "add in place": lambda m, a, b: OUT(IN(a).add_(OTHER(b))),
    "sub": lambda m, a, b: OUT(IN(a) - OTHER(b)),
    "mul": lambda m, a, b: OUT(IN(a) * OTHER(b)),
    "add, broadcast": lambda m, a, b: OUT(IN(a) + OTHER(b[:1, :, :1, :1])),
    "mul, broadcast": lambda m, a, b: OUT(IN(a[:, :1]) * OTHER(b[:, :, :1, :1])),
    "cat": lambda m, a, b: OUT(torch.cat([OUT(a), OUT(b), OUT(a * 0.5)], 1)),
    "cat of six": lambda m, a, b: OUT(torch.cat([OUT(a + i / 4.0) for i in range(5)] + [OUT(b)], -1)),
}


@pytest.mark.parametrize("name", BINARY)
def test_operators_on_two_tensors_run_in_integers(name: str) -> None:
    body, inputs = Body(BINARY[name]), (torch.randn(IMAGE), torch.randn(IMAGE))
    program = run(body, *inputs)
    assert program.undelegated == ()
    assert program.delegates == 1
    assert program.kernels[-1].precision == "int8"
    assert_equal_within_one_lsb(program, body, *inputs)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.8),
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "clamp_min": lambda x: x.clamp_min(0.25),
    "mean": lambda x: x.mean((-1, 2), keepdim=True),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "x + x": lambda x: x + x,
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d, ceil_mode and dilation": lambda x: F.max_pool2d(x, 2, 2, dilation=2, ceil_mode=True),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "view": lambda x: x.view(2, 48, 10),
    "flatten": lambda x: x.flatten(1),
    "unsqueeze(-1)": lambda x: x.unsqueeze(-1),
    "unsqueeze(1)": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:1].squeeze(0) if x.shape[0] == 1 else x.reshape(1, 2, 6, 80).squeeze(0),
    "slice": lambda x: x[:, 1:4],
    "narrow": lambda x: x.narrow(-1, 2, 5),
    "select": lambda x: x[:, -2],
    "dropout": lambda x: F.dropout(F.relu(x), 0.3, training=False),
    "detach": lambda x: F.relu(x.detach()),
}


@pytest.mark.parametrize("name", UNARY)
def test_operators_on_one_tensor_run_in_integers(name: str) -> None:
    """Between two other integer kernels, on one grid, as a value-preserving operator stands in a model."""
    body = Body(lambda m, x: OUT(F.relu(OUT(UNARY[name](OUT(F.relu6(OUT(x))))))))
    x = torch.randn(IMAGE)
    program = run(body, x)
    assert (program.delegates, program.undelegated) == (1, ())
    assert_equal_within_one_lsb(program, body, x)


INTEGER_PARTS: dict[str, Callable[[Tensor], Any]] = {
    "split": lambda x: x.split(3, 1),
    "split, uneven": lambda x: x.split([1, 2, 3], 1),
    "chunk": lambda x: x.chunk(2, -1),
    "unbind": lambda x: x.unbind(1),
    "slices": lambda x: (x[:, :2], x[:, 2:4], x[:, 4:]),
}


@pytest.mark.parametrize("name", INTEGER_PARTS)
def test_parts_of_a_tensor_are_integer_slices(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        codes = OUT.quantize(F.relu(OUT(x)))
        if name == "slices":
            parts = [OUT.dequantize(codes)[:, start : start + 2] for start in (0, 2, 4)]
        else:
            parts = INTEGER_PARTS[name](OUT.dequantize(codes))
        total = F.relu(OUT(parts[0]))
        for part in parts[1:]:
            total = OUT(torch.cat([OUT(total), OUT(part)], 1))
        return total

    body, x = Body(forward), torch.randn(IMAGE)
    program = run(body, x)
    assert_all_integer(program)
    assert_equal_within_one_lsb(program, body, x)


def test_constants_as_operands_run_in_integers() -> None:
    codes = OTHER.quantize(torch.randn(1, 6, 1, 1))
    body = Body(lambda m, x: OUT(IN(x) * OTHER.dequantize(m.codes)), codes=codes)
    x = torch.randn(IMAGE)
    program = run(body, x)
    assert_all_integer(program)
    assert_equal_within_one_lsb(program, body, x)


def test_a_residual_block_is_one_delegate() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        codes = OUT.quantize(F.relu(F.conv2d(IN(x), m.w1(), m.b1, padding=1)))
        left = OUT(F.conv2d(OUT.dequantize(codes), m.w2(), m.b2, padding=1, groups=6))
        right = OUT(F.conv2d(OUT.dequantize(codes), m.w3()))
        y = OUT(F.relu(left + right))
        y = OUT(OUT(F.adaptive_avg_pool2d(y, 1)).flatten(1))
        return OUT(F.linear(y, m.w4(), m.b4))

    body = Body(
        forward,
        w1=Weight((6, 6, 3, 3)),
        b1=bias(6),
        w2=Weight((6, 1, 3, 3), spread=0.02),
        b2=bias(6),
        w3=Weight((6, 6, 1, 1), spread=0.01),
        w4=Weight((5, 6), None, spread=0.02),
        b4=bias(5),
    )
    x = torch.randn(IMAGE)
    program = run(body, x)
    assert_all_integer(program)
    # Each of the six kernels in a row may be 1 LSB off, and the linear weighs six inputs by up to 127 * 0.02.
    steps = ((program.run(x)[0] - body(x)) / OUT.scale).abs()
    assert steps.max() <= 6


def test_float_operators_between_integer_ones_stay_in_the_delegate() -> None:
    body = Body(lambda m, x: OUT(F.relu(OUT(torch.sigmoid(OUT(F.relu(OUT(x))))))))
    x = torch.randn(IMAGE)
    program = run(body, x)
    assert (program.delegates, program.undelegated) == (1, ())
    assert [(kernel.op, kernel.precision) for kernel in program.kernels] == [
        ("aten.relu.default", "int8"),
        ("aten.sigmoid.default", "float"),
        ("aten.relu.default", "int8"),
    ]
    assert_equal_within_one_lsb(program, body, x)
