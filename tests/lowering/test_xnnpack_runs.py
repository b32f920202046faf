"""Graphs that XNNPACK runs in integers: nothing outside delegates, and the numbers of the converted graph.

Each row is lowered and executed in ExecuTorch's runtime; the rows of one table are branches of one program. Tolerance:
XNNPACK requantizes with its own rounding of the scale product, so an output may be one step of its grid (1 LSB) off.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from tests.lowering.handmade import Body, Branches, Grid, Groups, Weight, bias, dynamic, per_token
from tests.quick import quick

pytest.importorskip("executorch")

IN, OUT, OTHER = Grid(0.03, -5), Grid(0.04, 3), Grid(0.02, 11)
IMAGE = (2, 6, 8, 10)


def lower(body: torch.nn.Module, *inputs: Tensor, dynamic_shapes: Any = None) -> ExecutorchProgram:
    return lower_to_executorch(torch.export.export(body.eval(), inputs, dynamic_shapes=dynamic_shapes))


def assert_within_one_lsb(got: Tensor, expected: Tensor, grid: Grid = OUT) -> None:
    assert got.shape == expected.shape
    assert got.unique().numel() > 1, "a constant output proves nothing"
    assert ((got - expected) / grid.scale).abs().max() <= 1.01


def assert_one_integer_delegate(program: ExecutorchProgram) -> None:
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


Row = Callable[[], tuple[Body, tuple[int, ...]]]  # a body and the shape of its input

LINEARS: dict[str, Row] = {
    "linear": lambda: (product(F.linear, Weight((17, 10)), 17), (3, 10)),
    "per tensor": lambda: (product(F.linear, Weight((17, 10), None), 17), (3, 10)),
    "no bias, 4-D": lambda: (product(F.linear, Weight((17, 10)), None), IMAGE),
    "relu, 3-D": lambda: (product(F.linear, Weight((17, 10)), 17, F.relu), (2, 5, 10)),
    "hardtanh": lambda: (product(F.linear, Weight((17, 10)), 17, hardtanh), (3, 10)),
    "relu6, 1-D": lambda: (product(F.linear, Weight((17, 10)), 17, F.relu6), (10,)),
    "4-bit weights": lambda: (product(F.linear, Weight((17, 10), bounds=(-8, 7), spread=0.05), 17), (3, 10)),
    "mm": lambda: (product(mm, Weight((10, 17), None), None), (3, 10)),
    "matmul": lambda: (product(matmul, Weight((10, 17), None), None), (3, 10)),
    "addmm, per tensor": lambda: (product(addmm, Weight((10, 17), None), 17), (3, 10)),
    "mm, relu": lambda: (product(mm, Weight((10, 17), None), None, F.relu), (3, 10)),
    "matmul, relu6": lambda: (product(matmul, Weight((10, 17), None), None, F.relu6), (3, 10)),
    "addmm, hardtanh": lambda: (product(addmm, Weight((10, 17), 1), 17, hardtanh), (3, 10)),
    "addmm, axis 1": lambda: (product(addmm, Weight((10, 17), 1), 17), (3, 10)),
}
CONV2D: dict[str, Row] = {
    "stride, padding": lambda: (product(F.conv2d, Weight((7, 6, 3, 3)), 7, stride=2, padding=1), IMAGE),
    "per tensor, dilation": lambda: (
        product(F.conv2d, Weight((7, 6, 3, 2), None), 7, padding=(2, 1), dilation=2),
        IMAGE,
    ),
    "no bias": lambda: (product(F.conv2d, Weight((7, 6, 3, 3)), None), IMAGE),
    "groups": lambda: (product(F.conv2d, Weight((8, 3, 3, 3)), 8, groups=2), IMAGE),
    "depthwise relu6": lambda: (product(F.conv2d, Weight((6, 1, 3, 3)), 6, F.relu6, groups=6, padding=1), IMAGE),
    "depthwise, two outputs each": lambda: (product(F.conv2d, Weight((12, 1, 3, 3)), 12, groups=6), IMAGE),
    "same": lambda: (product(F.conv2d, Weight((7, 6, 3, 5)), 7, padding="same"), IMAGE),
    "same, even kernel": lambda: (product(F.conv2d, Weight((7, 6, 4, 2)), 7, padding="same"), IMAGE),
    "zeros around": lambda: (product(pad_then_conv2d, Weight((7, 6, 3, 3)), 7), IMAGE),
    "relu in place": lambda: (product(F.conv2d, Weight((7, 6, 3, 3)), 7, F.relu_), IMAGE),
    "hardtanh": lambda: (product(F.conv2d, Weight((7, 6, 1, 1)), 7, hardtanh), IMAGE),
    "dropout, relu": lambda: (product(F.conv2d, Weight((7, 6, 1, 1)), 7, relu_and_dropout), IMAGE),
}
CONV1D: dict[str, Row] = {
    "stride, padding": lambda: (product(F.conv1d, Weight((7, 6, 3)), 7, stride=2, padding=1), (2, 6, 11)),
    "groups, relu": lambda: (product(F.conv1d, Weight((4, 3, 3)), 4, F.relu, groups=2), (2, 6, 11)),
    "depthwise, same": lambda: (product(F.conv1d, Weight((6, 1, 3)), None, groups=6, padding="same"), (2, 6, 11)),
}
CONV_TRANSPOSE: dict[str, Row] = {
    "2-D": lambda: (
        product(F.conv_transpose2d, Weight((6, 7, 3, 3), 1), 7, stride=2, padding=1, output_padding=(1, 0)),
        IMAGE,
    ),
    "groups, per tensor": lambda: (
        product(F.conv_transpose2d, Weight((6, 4, 3, 3), None), 8, F.relu, groups=2, dilation=2),
        IMAGE,
    ),
    "1-D": lambda: (product(F.conv_transpose1d, Weight((6, 7, 3), 1), None, stride=2), (2, 6, 11)),
}


def hardtanh(y: Tensor) -> Tensor:
    return F.hardtanh(y, -2.0, 3.0)


def relu_and_dropout(y: Tensor) -> Tensor:
    return F.dropout(F.relu(y), 0.3, training=False)


def mm(x: Tensor, weight: Tensor, _: None) -> Tensor:
    return torch.mm(x, weight)


def matmul(x: Tensor, weight: Tensor, _: None) -> Tensor:
    return torch.matmul(x, weight)


def addmm(x: Tensor, weight: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, x, weight)


def pad_then_conv2d(x: Tensor, weight: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (1, 0, 2, 1)), weight, b)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.8),
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "clamp_min": lambda x: x.clamp_min(0.25),
    "mean": lambda x: x.mean((-1, 2), keepdim=True),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "x + x": lambda x: x + x,
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d, stride and padding": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d, ceil_mode and dilation": lambda x: F.max_pool2d(x, 2, 2, dilation=2, ceil_mode=True),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "view": lambda x: x.view(2, 48, 10),
    "flatten": lambda x: x.flatten(1),
    "unsqueeze(-1)": lambda x: x.unsqueeze(-1),
    "unsqueeze(1)": lambda x: x.unsqueeze(1),
    "slice": lambda x: x[:, 1:4],
    "narrow": lambda x: x.narrow(-1, 2, 5),
    "select": lambda x: x[:, -2],
    "detach": lambda x: x.detach(),
    "every third column": lambda x: x[..., 1::3],
    "every second image": lambda x: x[1::2],
    "every second row of some": lambda x: x[:, :, 1:7:2],
    "crop": lambda x: F.pad(x, (-2, -1, 0, -3)),
    "max_pool2d of one image": lambda x: F.max_pool2d(OUT(x[1]), 2),
}
TWO_GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool2d": lambda x: OUT(F.max_pool2d(IN(x), 2)),
    "permute": lambda x: OUT(IN(x).permute(0, 2, 3, 1)),
    "squeeze": lambda x: OUT(IN(IN(x)[:1]).squeeze(0)),
    "slice": lambda x: OUT(IN(x)[:, 1:4]),
    "cat": lambda x: OUT(torch.cat([IN(x), OUT(x), OTHER(x)], 1)),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "add relu": lambda a, b: F.relu(a + b),
    "add in place": lambda a, b: a.add_(b),
    "sub": torch.sub,
    "mul": torch.mul,
}
NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}
BROADCAST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}


def _unary(function: Callable[[Tensor], Tensor]) -> tuple[Body, tuple[int, ...]]:
    """Between two other integer kernels, on one grid, as a value-preserving operator stands in a model."""
    return Body(lambda m, x: OUT(F.hardtanh(OUT(function(OUT(F.hardtanh(OUT(x), -3.0, 3.0)))), -2.0, 2.0))), IMAGE


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Body, tuple[int, ...]]:
    return Body(lambda m, x: OUT(function(IN(x), OTHER(x)))), IMAGE


def _broadcast(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Body, tuple[int, ...]]:
    return Body(lambda m, x: OUT(function(IN(x), OTHER(OTHER(x)[..., :1])))), IMAGE


def _number(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Body, tuple[int, ...]]:
    return Body(lambda m, x: OUT(function(IN(x), OTHER(x.amax())))), IMAGE


def _two_grids(function: Callable[[Tensor], Tensor]) -> tuple[Body, tuple[int, ...]]:
    return Body(lambda m, x: function(x)), IMAGE


def _rows(make: Callable[[Any], Any], functions: dict[str, Any]) -> dict[str, Row]:
    return {name: functools.partial(make, function) for name, function in functions.items()}


TABLES: dict[str, dict[str, Row]] = {
    "linear": LINEARS,
    "conv2d": CONV2D,
    "conv1d": CONV1D,
    "conv_transpose": CONV_TRANSPOSE,
    "one tensor": _rows(_unary, UNARY),
    "two tensors": _rows(_binary, BINARY),
    "two tensors of different shape": _rows(_broadcast, BROADCAST),
    "moved to another grid": _rows(_two_grids, TWO_GRIDS),
}


@functools.cache
def lowered_table(table: str) -> tuple[ExecutorchProgram, dict[str, tuple[Tensor, Tensor]]]:
    """The program of all rows of a table, and for each row (what the program computes, what the graph computes)."""
    torch.manual_seed(0)
    bodies, shapes = zip(*(row() for row in TABLES[table].values()), strict=True)
    model, inputs = Branches(list(bodies)), [torch.randn(shape) for shape in shapes]
    program = lower(model, *inputs)
    return program, dict(zip(TABLES[table], zip(program.run(*inputs), model(*inputs), strict=True), strict=True))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("table", "name"), [(table, name) for table, rows in TABLES.items() for name in rows])
def test_the_program_computes_what_the_converted_graph_computes(table: str, name: str) -> None:
    """Users' item 23: every row of the table runs in the runtime and agrees with the reference within 1 LSB."""
    _, outputs = lowered_table(table)
    assert_within_one_lsb(*outputs[name])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("table", TABLES)
def test_every_kernel_computes_with_integers(table: str) -> None:
    program, _ = lowered_table(table)
    assert program.undelegated == ()
    assert [kernel for kernel in program.kernels if kernel.precision != "int8"] == []


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_computed_while_running_is_an_operand_of_integers(name: str) -> None:
    body, shape = _number(NUMBERS[name])
    x = torch.randn(shape)
    program = lower(body, x)
    assert {kernel.op for kernel in program.kernels if kernel.precision == "int8"} == {f"aten.{name}.Tensor"}
    assert_within_one_lsb(program.run(x)[0], body(x))


@pytest.mark.parametrize("row", [LINEARS["hardtanh"], CONV2D["depthwise relu6"], CONV1D["groups, relu"]])
def test_a_single_kernel_is_one_delegate(row: Row) -> None:
    body, shape = row()
    assert_one_integer_delegate(lower(body, torch.randn(shape)))


def test_dynamic_sizes_stay_dynamic() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = OUT(F.relu(F.conv2d(IN(x), m.w(), m.b, padding=1)))
        y = OUT(F.adaptive_avg_pool2d(y, 1))
        return OUT(F.linear(OUT(y.flatten(1)), m.w2()))

    # weights below 1 in the last layer: one step of the pool, which is allowed, is less than one step of its result
    body = Body(forward, w=Weight((7, 6, 3, 3)), b=bias(7), w2=Weight((5, 7)))
    sizes = {0: Dim("batch", min=1, max=40), 2: Dim("height", min=4, max=64)}
    program = lower(body, torch.randn(IMAGE), dynamic_shapes=[(sizes,)])
    assert_one_integer_delegate(program)
    for batch, height in ((5, 17), (1, 4), (40, 20)):  # torch asks of a convolution whether the batch is below 16
        x = torch.randn(batch, 6, height, 10)
        assert_within_one_lsb(program.run(x)[0], body(x))


# --- activations quantized while running ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "shape"),
    quick(
        itertools.product((17, None), ((3, 10), (10,), (2, 5, 10), (2, 3, 5, 10))),
        lambda _, case: case in ((17, (2, 5, 10)), (None, (10,))),
    ),
)
def test_per_token_linear_is_exact(shape: tuple[int, ...], outputs: int | None) -> None:
    weight = Weight((17, 10))
    body = Body(
        lambda m, x: F.relu(F.linear(per_token(x), m.w(), m.b if outputs else None)),
        w=weight,
        **({"b": bias(17)} if outputs else {}),
    )
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[0])[(...,) + (None,) * (len(shape) - 1)]
    program = lower(body, x)
    assert program.undelegated == ()
    assert program.kernels[0].precision == "dynamic"
    expected = body(x).detach()
    torch.testing.assert_close(program.run(x)[0], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


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
    program = lower(body, x)
    assert (program.delegates, program.undelegated, program.count("dynamic")) == (1, (), 3)
    for got, wanted in zip(program.run(x), body(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [32, 64])
def test_groups_of_4_bits_are_exact(size: int) -> None:
    body = Body(lambda m, x: F.linear(per_token(x), m.w()), w=Groups((8, 64), size))
    x = torch.randn(3, 64)
    program = lower(body, x)
    assert (program.delegates, program.undelegated, program.count("dynamic")) == (1, (), 1)
    torch.testing.assert_close(program.run(x)[0], body(x), rtol=1e-5, atol=1e-5)


def test_dynamic_conv2d_between_factors_of_channels_is_exact() -> None:
    """As normalized inputs and layer scale have them: executorch issue 20376."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(dynamic(x * m.mean + m.mean), m.w(), m.b, groups=2, padding=1)) * m.gamma
        return F.conv2d(dynamic(y), m.w2()) - m.mean[:, :1]

    factors = {"mean": torch.rand(1, 6, 1, 1) + 0.1, "gamma": torch.rand(1, 8, 1, 1) + 0.1}
    body = Body(forward, w=Weight((8, 3, 3, 3)), b=bias(8), w2=Weight((5, 8, 3, 3)), **factors)
    x = torch.randn(1, 6, 8, 10)
    program = lower(body, x)
    assert (program.delegates, program.undelegated, program.remarks) == (1, (), ())
    assert program.count("dynamic") == 2
    apart = (program.run(x)[0] - body(x)).abs() > 1e-5
    assert apart.double().mean() < 0.1  # a value at the edge of two steps moves the 45 outputs around it


# --- everything else --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 6])
def test_cat_of_any_number_of_tensors_is_exact(count: int) -> None:
    body = Body(lambda m, *xs: OUT(torch.cat([OUT(x) for x in xs], -1)))
    inputs = tuple(torch.randn(2, 3, 4) for _ in range(count))
    program = lower(body, *inputs)
    assert_one_integer_delegate(program)
    torch.testing.assert_close(program.run(*inputs)[0], body(*inputs), rtol=0, atol=1e-6)


PARTS: dict[str, Callable[[Tensor], Any]] = {
    "split": lambda x: x.split([1, 2, 3], 1),
    "chunk": lambda x: x.chunk(2, -1),
    "unbind": lambda x: x.unbind(1),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_tensor_are_integer_slices(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        parts = [OUT(part) for part in PARTS[name](OUT(F.relu(OUT(x))))]
        return OUT(torch.cat([*parts[1:], parts[0]], 1 if name == "split" else -1))

    body, x = Body(forward), torch.randn(IMAGE)
    program = lower(body, x)
    assert_one_integer_delegate(program)
    torch.testing.assert_close(program.run(x)[0], body(x), rtol=0, atol=1e-6)


def test_kernels_that_share_weight_and_bias_each_compute_with_their_own_scales() -> None:
    """XNNPACK makes the bias an integer for its first reader; the second has another input scale."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return OUT(F.linear(IN(x), m.w(), m.b)), OUT(F.linear(OTHER(x), m.w(), m.b))

    body = Body(forward, w=Weight((17, 10)), b=bias(17))
    x = torch.randn(3, 10)
    program = lower(body, x)
    assert program.undelegated == ()
    for got, expected in zip(program.run(x), body(x), strict=True):
        assert_within_one_lsb(got, expected)


@pytest.mark.parametrize(
    "amounts",
    quick([((1, 2),), ((0, 1, 2, 0),), ((0, 0, 0, 0, 0, 2),), ((1, -1, -2, 3),)], lambda position, _: position == 3),
)
def test_padding_that_no_convolution_takes_in_runs(amounts: tuple[int, ...]) -> None:
    body = Body(lambda m, x: OUT(F.relu(F.pad(OUT(x), amounts))))
    x = torch.randn(IMAGE)
    program = lower(body, x)
    assert (program.delegates, program.undelegated) == (1, ())
    assert_within_one_lsb(program.run(x)[0], body(x))


def test_padding_of_channels_in_front_of_a_convolution_runs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return OUT(F.conv2d(F.pad(IN(x), (0, 0, 0, 0, 0, 1)), m.w(), m.b))

    body, x = Body(forward, w=Weight((5, 7, 3, 3)), b=bias(5)), torch.randn(IMAGE)
    program = lower(body, x)
    assert (program.delegates, program.undelegated) == (1, ())
    assert_within_one_lsb(program.run(x)[0], body(x))


def test_constants_as_operands_run_in_integers() -> None:
    codes = OTHER.quantize(torch.randn(1, 6, 1, 1))
    body = Body(lambda m, x: OUT(IN(x) * OTHER.dequantize(m.codes)), codes=codes)
    x = torch.randn(IMAGE)
    program = lower(body, x)
    assert_one_integer_delegate(program)
    assert_within_one_lsb(program.run(x)[0], body(x))


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
    program = lower(body, x)
    assert_one_integer_delegate(program)
    # Each of the six kernels in a row may be 1 LSB off, and the linear weighs six inputs by up to 127 * 0.02.
    steps = ((program.run(x)[0] - body(x)) / OUT.scale).abs()
    assert steps.max() <= 6


def test_float_operators_between_integer_ones_stay_in_the_delegate() -> None:
    body = Body(lambda m, x: OUT(F.relu(OUT(torch.sigmoid(OUT(F.relu(OUT(x))))))))
    x = torch.randn(IMAGE)
    program = lower(body, x)
    assert (program.delegates, program.undelegated) == (1, ())
    assert [(kernel.op, kernel.precision) for kernel in program.kernels] == [
        ("aten.relu.default", "int8"),
        ("aten.sigmoid.default", "float"),
        ("aten.relu.default", "int8"),
    ]
    assert_within_one_lsb(program.run(x)[0], body(x))
