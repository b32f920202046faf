"""Graphs that XNNPACK does not run as they stand: the pre-flight names the node; without it, this is what happens.

What happens was measured. A test that fails here after an update of ExecuTorch says that a rule of the contract has
changed: a defect was repaired (drop the rule), or took another form.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pt2e_quant.errors import LoweringError
from pt2e_quant.lowering.executorch import lower, lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from pt2e_quant.lowering.executorch.xnnpack.contract import check_xnnpack_contract
from tests.lowering.handmade import Body, Branches, Grid, Groups, Q, Weight, bias, dynamic, per_token
from tests.quick import quick

pytest.importorskip("executorch")

IN, OUT = Grid(0.03, -5), Grid(0.04, 3)
UNSIGNED = Grid(0.03, 120, 0, 255, torch.uint8)
SHORT = Grid(0.0003, 0, -32768, 32767, torch.int16)
NARROW, SYMMETRIC = Grid(0.3, 0, -8, 7), Grid(0.01, 0, -127, 127)
ROWS, IMAGE = (3, 24), (2, 6, 8, 10)

Row = tuple[str, str, Callable[[], tuple[Body, tuple[int, ...]]]]  # rule, name of the node, the graph


def linear(weight: Weight, *, x: Grid = IN, y: Grid = OUT) -> Body:
    return Body(lambda m, a: y(F.linear(x(a), m.w(), m.b)), w=weight, b=bias(17))


def channels(**changes: Any) -> Weight:
    return Weight((17, 24), **changes)


def shared(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> Body:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        dequantized = IN(x)
        return one(dequantized), other(dequantized)

    return Body(forward)


def unfolded(m: Any, x: Tensor) -> Tensor:
    quantizer = (m.w.scale, m.w.zero_point, 0, -127, 127, torch.int8)
    q = Q.quantize_per_channel.default(m.float_weight, *quantizer)
    return OUT(F.linear(IN(x), Q.dequantize_per_channel.default(q, *quantizer)))


def symmetric_dynamic(m: Any, x: Tensor) -> Tensor:
    scale, zero_point = Q.choose_qparams_symmetric.tensor(x, -127, 127, 1e-7, torch.int8)
    q = Q.quantize_per_tensor.tensor(x, scale, zero_point, -127, 127, torch.int8)
    return F.linear(Q.dequantize_per_tensor.tensor(q, scale, zero_point, -127, 127, torch.int8), m.w())


def per_channel_operand(m: Any, x: Tensor) -> Tensor:
    w = m.w
    return OUT(IN(x) + Q.dequantize_per_channel.default(w.values, w.scale, w.zero_point, 1, -127, 127, torch.int8))


WRONG: dict[str, Row] = {
    "zero point of a channel": (
        "weight_zero_point_is_zero",
        "linear",
        lambda: (linear(channels(zero_point=5)), ROWS),
    ),
    "zero point of a channel, dynamic": (
        "weight_zero_point_is_zero",
        "linear",
        lambda: (Body(lambda m, x: F.linear(per_token(x), m.w()), w=channels(zero_point=5)), ROWS),
    ),
    "uint8 linear": (
        "inputs_and_output_are_int8",
        "linear",
        lambda: (linear(channels(), x=UNSIGNED, y=UNSIGNED), ROWS),
    ),
    "uint8 relu": (
        "inputs_and_output_are_int8",
        "relu",
        lambda: (Body(lambda m, x: UNSIGNED(F.relu(UNSIGNED(x)))), ROWS),
    ),
    "narrow range": (
        "activations_use_the_whole_range",
        "quantize_per_tensor",
        lambda: (linear(channels(), x=NARROW, y=NARROW), ROWS),
    ),
}
INIT: dict[str, Row] = {
    "scale in float64": (
        "weight_scale_is_float32",
        "linear",
        lambda: (linear(channels(scale_dtype=torch.float64)), ROWS),
    ),
    "scale in bfloat16": (
        "weight_scale_is_float32",
        "linear",
        lambda: (linear(channels(scale_dtype=torch.bfloat16)), ROWS),
    ),
    "zero point of a tensor": (
        "weight_zero_point_is_zero",
        "linear",
        lambda: (linear(channels(axis=None, zero_point=4)), ROWS),
    ),
    "axis of linear": (
        "weight_axis_is_the_output_channel",
        "linear",
        lambda: (Body(lambda m, x: OUT(F.linear(IN(x), m.w())), w=channels(axis=1)), ROWS),
    ),
    "axis of conv": (
        "weight_axis_is_the_output_channel",
        "conv2d",
        lambda: (Body(lambda m, x: OUT(F.conv2d(IN(x), m.w())), w=Weight((6, 6, 3, 3), 1)), IMAGE),
    ),
}
FAILS_TO_LOWER: dict[str, Row] = {
    "groups of 16": (
        "weight_groups_are_of_4_bits_and_multiples_of_32",
        "linear",
        lambda: (Body(lambda m, x: F.linear(per_token(x), m.w()), w=Groups((8, 64), 16)), (3, 64)),
    ),
    "groups of 8 bits": (
        "weight_groups_are_of_4_bits_and_multiples_of_32",
        "linear",
        lambda: (Body(lambda m, x: F.linear(per_token(x), m.w()), w=Groups((8, 64), 32, (-127, 127))), (3, 64)),
    ),
    "symmetric dynamic": (
        "dynamic_qparams_are_asymmetric",
        "choose_qparams_symmetric",
        lambda: (Body(symmetric_dynamic, w=channels()), ROWS),
    ),
    "per-channel product": (
        "weight_axis_is_the_output_channel",
        "mm",
        lambda: (Body(lambda m, x: OUT(torch.mm(IN(x), m.w())), w=Weight((24, 17), 1)), ROWS),
    ),
    "axis of addmm": (
        "weight_axis_is_the_output_channel",
        "addmm",
        lambda: (
            Body(lambda m, x: OUT(torch.addmm(m.b, IN(x), m.w())), w=Weight((24, 17), 0), b=bias(17)),
            ROWS,
        ),
    ),
    "int16": (
        "inputs_and_output_are_int8",
        "linear",
        lambda: (linear(channels(), x=SHORT, y=SHORT), ROWS),
    ),
    "per-channel operand": (
        "operands_are_quantized_per_tensor",
        "add",
        lambda: (Body(per_channel_operand, w=Weight((1, 6, 1, 1), 1)), IMAGE),
    ),
}
FAILS_TO_RUN: dict[str, Row] = {
    "conv3d": (
        "convolutions_have_one_or_two_dimensions",
        "conv3d",
        lambda: (Body(lambda m, x: OUT(F.conv3d(IN(x), m.w())), w=Weight((7, 6, 3, 3, 3))), (1, 6, 4, 5, 6)),
    ),
}
REPAIRED: dict[str, Callable[[], tuple[Body, tuple[int, ...]]]] = {
    "dequantize shared with an output": lambda: (shared(lambda d: OUT(F.relu(d)), lambda d: d), ROWS),
    "dequantize shared with a float operator": lambda: (shared(lambda d: OUT(F.relu(d)), torch.sigmoid), ROWS),
    "relu and max_pool2d share a dequantize": lambda: (
        shared(lambda d: OUT(F.relu(d)), lambda d: IN(F.max_pool2d(d, 2))),
        IMAGE,
    ),
    "factors of addmm": lambda: (
        Body(lambda m, x: OUT(torch.addmm(m.b, IN(x), m.w(), beta=2.0)), w=Weight((24, 17), None), b=bias(17)),
        ROWS,
    ),
}
FORBIDDEN = WRONG | INIT | FAILS_TO_LOWER | FAILS_TO_RUN


def export(row: Row) -> tuple[torch.export.ExportedProgram, Body, Tensor]:
    body, shape = row[2]()
    x = torch.randn(shape)
    return torch.export.export(body.eval(), (x,)), body, x


def executorch_version() -> str:
    from executorch import version

    return str(version.__version__)


def outputs(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def largest_difference(program: ExecutorchProgram, body: Body, x: Tensor) -> float:
    pairs = zip(program.run(x), outputs(body(x)), strict=True)
    return max(float((got - expected).detach().abs().max()) for got, expected in pairs)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_preflight_refuses_and_names_the_node(name: str) -> None:
    """Users' item 23: a check of the backend's invariants fails ahead of time and names the node."""
    rule, node, _ = FORBIDDEN[name]
    exported, _, _ = export(FORBIDDEN[name])
    with pytest.raises(
        LoweringError, match=r"^the model breaks \d+ XNNPACK requirements? and was not lowered"
    ) as error:
        lower_to_executorch(exported)
    assert f"[{rule}]\n" in str(error.value)
    assert f"node {node} = " in str(error.value)
    assert "handmade.py" in str(error.value) or "test_xnnpack_contract.py" in str(error.value)  # the source line


def test_the_preflight_names_every_node_at_once() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return OUT(F.linear(OUT(F.linear(IN(x), m.w1())), m.w2()))

    body = Body(forward, w1=channels(zero_point=1), w2=Weight((5, 17), scale_dtype=torch.float64))
    with pytest.raises(LoweringError, match="breaks 2 XNNPACK requirements") as error:
        lower_to_executorch(torch.export.export(body.eval(), (torch.randn(ROWS),)))
    assert "node linear = " in str(error.value)
    assert "node linear_1 = " in str(error.value)


@pytest.mark.parametrize("name", quick(WRONG, lambda position, _: position == 0))
def test_without_the_preflight_the_numbers_are_wrong(name: str) -> None:
    exported, body, x = export(WRONG[name])
    program = lower_to_executorch(exported, preflight=False, verify=False)
    assert largest_difference(program, body, x) > 1.5 * OUT.scale


@pytest.mark.parametrize("name", quick(INIT, lambda position, _: position == 0))
def test_without_the_preflight_the_program_does_not_load(name: str) -> None:
    exported, body, x = export(INIT[name])
    program = lower_to_executorch(exported, preflight=False, verify=False)
    if name == "zero point of a tensor" and executorch_version().startswith("1.4."):
        assert largest_difference(program, body, x) > 1.5 * OUT.scale
        return
    with pytest.raises(LoweringError, match="runtime cannot load this program"):
        program.run(x)


@pytest.mark.parametrize("name", quick(FAILS_TO_LOWER, lambda position, _: position == 0))
def test_without_the_preflight_executorch_fails_while_lowering(name: str) -> None:
    exported, _, _ = export(FAILS_TO_LOWER[name])
    with pytest.raises(LoweringError, match=r"^ExecuTorch cannot"):
        lower_to_executorch(exported, preflight=False, verify=False)


@pytest.mark.parametrize("name", FAILS_TO_RUN)
def test_without_the_preflight_the_program_fails_while_running(name: str) -> None:
    exported, _, x = export(FAILS_TO_RUN[name])
    program = lower_to_executorch(exported, preflight=False, verify=False)
    with pytest.raises(LoweringError, match="runtime failed on inputs"):
        program.run(x)


def test_what_passes_repair_computes_the_numbers_of_the_graph() -> None:
    bodies, shapes = zip(*(make() for make in REPAIRED.values()), strict=True)
    model, inputs = Branches(list(bodies)).eval(), tuple(torch.randn(shape) for shape in shapes)
    expected = [value for branch in model(*inputs) for value in outputs(branch)]
    got = lower_to_executorch(torch.export.export(model, inputs)).run(*inputs)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).detach().abs().max() < 1.01 * OUT.scale


@pytest.mark.slow
def test_a_weight_quantized_while_running_is_refused_and_would_end_the_process(tmp_path: Any) -> None:
    body = Body(unfolded, w=channels(), float_weight=torch.randn(17, 24) * 0.1)
    exported = torch.export.export(body.eval(), (torch.randn(ROWS),))
    with pytest.raises(LoweringError, match="weights_are_stored_as_integers"):
        lower_to_executorch(exported)
    path = lower_to_executorch(exported, preflight=False, verify=False).save(tmp_path / "unfolded.pte")
    script = (
        "import torch, executorch.kernels.quantized\n"
        "from executorch.runtime import Runtime\n"
        f"Runtime.get().load_program({str(path)!r}).load_method('forward').execute([torch.zeros({ROWS})])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert "quantize_per_channel_out" in done.stderr


def test_what_executorch_takes_apart_is_checked_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it shared a dequantize after our passes had run."""
    kept = tuple(step for step in lower.FOR_EXECUTORCH if step.__name__ != "own_dequantizes")
    monkeypatch.setattr(lower, "FOR_EXECUTORCH", kept)
    body = shared(lambda d: OUT(F.relu(d)), torch.sigmoid)
    exported = torch.export.export(body.eval(), (torch.randn(ROWS),))
    with pytest.raises(LoweringError, match="XNNPACK would compute on wrong numbers") as error:
        lower_to_executorch(exported)
    assert "feed 2 operators (aten.relu.default, aten.sigmoid.default)" in str(error.value)
    assert "aten.sigmoid.default reads the integers of" in str(error.value)
    assert "node dequantize_per_tensor = " in str(error.value)


# --- left to portable kernels -----------------------------------------------------------------------------------------


def conv(activation: Callable[[Tensor], Tensor] = lambda y: y, out: Callable[[Tensor], Tensor] = OUT) -> Body:
    return Body(lambda m, x: out(activation(F.conv2d(IN(x), m.w(), m.b))), w=Weight((7, 6, 3, 3)), b=bias(7))


def float_bias(m: Any) -> Tensor:
    return Q.dequantize_per_tensor.default(m.codes, 0.0003, 0, -(2**31), 2**31 - 1, torch.int32)


CODES = torch.arange(-30, 30, 10, dtype=torch.int32)
PORTABLE: dict[str, tuple[str, str, Callable[[], tuple[Body, tuple[int, ...]]]]] = {
    "weight only": (
        "linear",
        "only its weight is quantized",
        lambda: (Body(lambda m, x: F.linear(x, m.w()), w=channels()), ROWS),
    ),
    "output not quantized": ("conv2d", "its output is not quantized", lambda: (conv(out=lambda y: y), IMAGE)),
    "sigmoid before the quantize": ("conv2d", "sigmoid stands between", lambda: (conv(torch.sigmoid), IMAGE)),
    "clamp before the quantize": ("conv2d", "clamp stands between", lambda: (conv(lambda y: y.clamp(0, 6)), IMAGE)),
    "two users of the output": (
        "conv2d",
        "its output has 2 users",
        lambda: (conv(out=lambda y: (OUT(y), IN(y))), IMAGE),  # type: ignore[arg-type, return-value]
    ),
    "dequantized bias of linear": (
        "linear",
        "its bias dequantize_per_tensor_1 is computed at run time",
        lambda: (
            Body(lambda m, x: OUT(F.linear(IN(x), m.w(), float_bias(m))), w=Weight((6, 24)), codes=CODES),
            ROWS,
        ),
    ),
    "dequantized bias of conv": (
        "conv2d",
        "its bias dequantize_per_tensor_1 is computed at run time",
        lambda: (
            Body(lambda m, x: OUT(F.conv2d(IN(x), m.w(), float_bias(m))), w=Weight((6, 6, 3, 3)), codes=CODES),
            IMAGE,
        ),
    ),
    "dynamic with per-tensor weight": (
        "linear",
        "need per-channel weights",
        lambda: (Body(lambda m, x: F.linear(per_token(x), m.w()), w=channels(axis=None)), ROWS),
    ),
    "dynamic depthwise": (
        "conv2d",
        "no dynamic depthwise convolution",
        lambda: (Body(lambda m, x: F.conv2d(dynamic(x), m.w(), groups=6), w=Weight((6, 1, 3, 3))), (1, 6, 8, 10)),
    ),
    "dynamic conv1d": (
        "conv1d",
        "dynamic convolutions are 2-d only",
        lambda: (Body(lambda m, x: F.conv1d(dynamic(x), m.w()), w=Weight((7, 6, 3))), (1, 6, 8)),
    ),
    "transposed in groups": (
        "conv_transpose2d",
        "transposed convolution needs axis=1 and groups=1",
        lambda: (
            Body(lambda m, x: OUT(F.conv_transpose2d(IN(x), m.w(), groups=2)), w=Weight((6, 4, 3, 3), 1)),
            IMAGE,
        ),
    ),
    "transposed on axis 0": (
        "conv_transpose2d",
        "transposed convolution needs axis=1 and groups=1",
        lambda: (Body(lambda m, x: OUT(F.conv_transpose2d(IN(x), m.w())), w=Weight((6, 7, 3, 3))), IMAGE),
    ),
    "conv2d without batch": (
        "conv2d",
        "its input has 3 dimensions and its weight 4",
        lambda: (conv(), IMAGE[1:]),
    ),
    "a product that repeats a computed factor": (
        "matmul",
        "its weight dequantize_per_tensor_1 is computed at run time",
        lambda: (Body(lambda m, x: OUT(torch.matmul(IN(x), OUT(x[0].t())))), (2, 5, 10)),
    ),
}


@pytest.mark.parametrize("name", quick(PORTABLE, lambda position, _: position % 4 == 0))
def test_what_xnnpack_refuses_runs_in_portable_kernels_with_the_right_numbers(name: str) -> None:
    node, reason, make = PORTABLE[name]
    body, shape = make()
    x = torch.randn(shape)
    program = lower_to_executorch(torch.export.export(body.eval(), (x,)))
    reasons = {left.reason for left in program.undelegated if left.node == node}
    assert len(reasons) == 1
    assert reason in reasons.pop()
    # Another order of sums may move a value that lies between two steps of the output grid to the other one.
    assert largest_difference(program, body, x) < 1.01 * OUT.scale


def test_a_product_of_more_than_256_steps_of_its_output_runs_in_portable_kernels() -> None:
    """XNNPACK refuses to load it: its requantization takes factors below 256."""

    def body(factor: float) -> Body:
        weight = channels()
        weight.scale.fill_(0.002)
        fine = Grid(IN.scale * 0.002 / factor, 3)
        return Body(lambda m, x: fine(F.linear(IN(x), m.w())), w=weight)

    factors = (255.0, 257.0)
    model, x = Branches([body(factor) for factor in factors]).eval(), torch.randn(ROWS)
    program = lower_to_executorch(torch.export.export(model, (x, x)))
    assert [(kernel.node, kernel.precision) for kernel in program.kernels if "linear" in kernel.op] == [
        ("linear", "int8")
    ]
    (reason,) = {left.reason for left in program.undelegated if left.node == "linear_1"}
    assert reason.startswith("a step of its input times one of its weight is 257 steps of its output")
    for got, expected, factor in zip(program.run(x, x), model(x, x), factors, strict=True):
        assert expected.unique().numel() > 1
        assert (got - expected).abs().max() < 1.01 * IN.scale * 0.002 / factor


def test_the_stock_partitioner_fails_on_a_refused_convolution() -> None:
    """The defect that lower_to_executorch repairs: see _executorch.xnnpack_partitioner."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    body, x = conv(torch.sigmoid), torch.randn(IMAGE)
    edge = to_edge_transform_and_lower(
        torch.export.export(body.eval(), (x,)),
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    method = Runtime.get().load_program(edge.to_executorch().buffer).load_method("forward")
    try:
        (got,) = method.execute([x])
    except RuntimeError:  # its delegate writes nothing where the convolution reads, so anything may happen
        return
    assert (got - body(x)).abs().max() > 5 * OUT.scale


# --- lowered, with a remark -------------------------------------------------------------------------------------------


def test_dynamic_qparams_of_a_tensor_are_chosen_per_row() -> None:
    body, x = Body(lambda m, x: F.linear(dynamic(x), m.w()), w=channels()), torch.randn(ROWS)
    program = lower_to_executorch(torch.export.export(body.eval(), (x,)))
    (remark,) = program.remarks
    assert remark.node == "linear"
    assert "for each row" in remark.text
    expected = torch.cat([body(row[None]) for row in x])
    torch.testing.assert_close(program.run(x)[0], expected, rtol=1e-5, atol=1e-5)
    assert largest_difference(program, body, x) > 1e-4


def test_xnnpack_saturates_one_step_below_a_symmetric_range() -> None:
    body = linear(channels(), x=SYMMETRIC, y=SYMMETRIC)
    x = torch.randn(ROWS)
    program = lower_to_executorch(torch.export.export(body.eval(), (x,)))
    assert {remark.node for remark in program.remarks} == {"quantize_per_tensor", "quantize_per_tensor_1"}
    assert largest_difference(program, body, x) == pytest.approx(SYMMETRIC.scale, rel=1e-3)


def test_dtype_as_a_keyword_is_harmless_because_the_graph_is_exported_again() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q = Q.quantize_per_tensor.default(x, 0.03, -5, -128, 127, dtype=torch.int8)
        return OUT(F.linear(Q.dequantize_per_tensor.default(q, 0.03, -5, -128, 127, dtype=torch.int8), m.w()))

    body, x = Body(forward, w=channels()), torch.randn(ROWS)
    module = torch.export.export(body.eval(), (x,)).module()
    for node in module.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default):
        node.kwargs, node.args = {"dtype": node.args[5]}, node.args[:5]
    program = lower_to_executorch(module, (x,))
    assert (program.delegates, program.undelegated) == (1, ())
    assert largest_difference(program, body, x) < 1.01 * OUT.scale


def test_a_graph_that_keeps_the_contract_has_no_findings() -> None:
    body, x = linear(channels()), torch.randn(ROWS)
    assert check_xnnpack_contract(torch.export.export(body.eval(), (x,)).module()) == ()
