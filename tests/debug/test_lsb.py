"""compare_lsb: grids are found in the graph, differences counted by hand, and a planted fault is found and located."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import QuantizedIO, convert_pt2e, prepare_pt2e
from pt2e_quant.debug import compare_lsb
from pt2e_quant.errors import CalibrationError, CaptureError, QuantizationError
from pt2e_quant.pt2e.representation import Rounding, reference_representation_rewrite
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.lowering.handmade import Body, Grid
from tests.nets import ConvNet, export

GRID = Grid(0.04, 3)


def graph(function: Any, *inputs: Tensor) -> GraphModule:
    return torch.export.export(Body(function), inputs).module()


def conv_net(**options: Any) -> GraphModule:
    quantizer = XNNPACKQuantizer(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(export(ConvNet(), torch.randn(2, 3, 16, 16)), quantizer)
    prepared(torch.randn(2, 3, 16, 16))
    return convert_pt2e(prepared, **options)


def test_differences_from_a_runtime_are_counted_in_steps_of_the_outputs_grid():
    converted = graph(lambda m, x: GRID(x), x := torch.linspace(-1, 1, 12).reshape(3, 4))
    runtime = converted(x).clone()
    runtime[1, 2] += 0.04
    runtime[2, 0] -= 3 * 0.04
    (output,) = compare_lsb(converted, None, [[runtime]], [(x,)]).outputs
    assert (output.grid.scale, output.grid.zero_point) == (0.04, 3)
    assert [d.pair for d in output.differences] == [
        ("converted", "reference"),
        ("converted", "runtime"),
        ("reference", "runtime"),
    ]
    same, apart, _ = output.differences
    assert (same.histogram, same.largest, same.first) == ({0: 12}, 0, None)
    assert (apart.histogram, apart.largest, apart.count) == ({-1: 1, 0: 10, 3: 1}, 3, 12)
    assert (apart.within(0), apart.within(1)) == (10 / 12, 11 / 12)
    assert apart.first == (0, 2, 0)  # batch 0; the value that is one step off is within reason


def test_the_first_value_off_by_one_is_named_where_none_is_further_off():
    converted = graph(lambda m, x: GRID(x), x := torch.randn(3, 4))
    runtime = [[converted(x)], [converted(x)]]
    runtime[1][0][2, 1] += 0.04
    assert compare_lsb(converted, None, runtime, [(x,), (x,)]).outputs[0].differences[1].first == (1, 2, 1)


def test_the_grid_is_found_behind_ops_that_move_values_and_not_where_there_is_none():
    converted = graph(
        lambda m, x: (GRID(x).flatten().unsqueeze(0), torch.exp(GRID(x)), GRID(x) + 1), x := torch.randn(3, 4)
    )
    moved, floating, added = compare_lsb(converted, None, None, [(x,)]).outputs
    assert moved.grid.scale == 0.04
    assert floating.grid is None
    assert added.grid is None


def test_an_output_without_a_grid_gets_the_largest_difference_and_sqnr():
    converted = graph(lambda m, x: torch.exp(GRID(x)), x := torch.zeros(3, 4))
    runtime = torch.ones(3, 4)
    runtime[1, 1] = 1.1
    differences = compare_lsb(converted, None, [[runtime]], [(x,)]).outputs[0].differences
    assert differences[0].sqnr == math.inf
    assert differences[1].largest == pytest.approx(0.1, rel=1e-6)
    assert differences[1].sqnr == pytest.approx(10 * math.log10(12 / 0.01), rel=1e-6)
    assert differences[1].first == (0, 1, 1)


def test_integer_outputs_are_compared_as_codes():
    comparison = compare_lsb(
        conv_net(quantized_io=QuantizedIO(outputs=[0])), None, None, [(torch.randn(2, 3, 16, 16),)]
    )
    assert comparison.outputs[0].grid is not None
    assert comparison.outputs[0].differences[0].histogram == {0: 10}


@pytest.mark.parametrize("which", ["converted", "reference"])
def test_a_weight_scale_that_is_off_by_a_tenth_is_found_and_located(which: str):
    good = conv_net()
    bad = copy.deepcopy(good)
    second_conv = [node for node in good.graph.nodes if str(node.target).startswith("aten.conv2d")][1]
    bad.get_buffer(second_conv.args[1].args[1].target).mul_(1.1)
    graphs = {"converted": good, "reference": good, which: bad}
    batches = [(torch.randn(2, 3, 16, 16),) for _ in range(2)]
    assert compare_lsb(good, None, None, batches).first_apart() is None
    comparison = compare_lsb(graphs["converted"], reference_representation_rewrite(graphs["reference"]), None, batches)
    assert comparison.largest() > 1
    apart = comparison.first_apart()
    assert "hardtanh" in apart.location  # the activation that is fused into the second convolution
    assert "'act2'" in apart.location
    before = comparison.tensors[: comparison.tensors.index(apart)]
    assert [tensor.differences.largest <= 1 for tensor in before] == [True]  # the first convolution
    assert f"graph and reference come apart at {apart.node}, computed by" in comparison.text()


def test_the_runtime_agrees_with_the_reference_on_every_value():
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    converted = conv_net()
    batches = [(torch.randn(2, 3, 16, 16),) for _ in range(8)]
    comparison = compare_lsb(converted, None, lower_to_executorch(converted), batches)
    by_pair = {differences.pair: differences for differences in comparison.outputs[0].differences}
    assert by_pair[("reference", "runtime")].within(0) == 1
    assert by_pair[("converted", "runtime")].within(1) >= 0.999  # what the demo promises
    assert "quantized tensors inside: at least" in comparison.text()


def test_another_rounding_can_be_compared_as_well():
    converted = conv_net()
    reference = reference_representation_rewrite(converted, rounding=Rounding.FIXED_POINT_HALF_AWAY)
    assert compare_lsb(converted, reference, None, [(torch.randn(2, 3, 16, 16),)]).largest() <= 1


def test_the_comparison_is_plain_data():
    converted = graph(lambda m, x: (GRID(x), torch.exp(GRID(x)), GRID(F.relu(x))), x := torch.randn(3, 4))
    comparison = compare_lsb(converted, None, None, [(x,)])
    plain = json.loads(comparison.to_json())
    assert plain == json.loads(json.dumps(comparison.to_dict()))
    assert plain["outputs"][0]["grid"]["dtype"] == "int8"
    assert plain["outputs"][0]["differences"][0]["histogram"] == [[0, 12]]
    assert plain["outputs"][1]["grid"] is None
    assert plain["outputs"][1]["differences"][0]["sqnr"] is None
    with pytest.raises(AttributeError):
        comparison.outputs = ()


def test_the_text_names_each_output_and_its_grid():
    converted = graph(lambda m, x: (GRID(x), torch.exp(GRID(x))), x := torch.randn(3, 4))
    text = str(compare_lsb(converted, None, None, [(x,)]))
    assert "output 0 (dequantize_per_tensor): scale 0.04, zero point 3" in text
    assert "converted - reference: equal 100.0000%, within 1 LSB 100.0000%, largest 0 LSB (+0: 12)" in text
    assert "output 1 (exp): not quantized\n  converted - reference: no grid; largest difference 0, inf dB" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda gm, x: (nn.ReLU(), None, None, [(x,)]), CaptureError, "must be a GraphModule, got ReLU"),
        (lambda gm, x: (gm, None, None, []), CalibrationError, "there is no batch"),
        (lambda gm, x: (gm, None, None, x), CalibrationError, r"for a single batch, pass \[batch\]"),
        (lambda gm, x: (gm, None, [[x], [x]], [(x,)]), QuantizationError, "those of 2 batches, there are 1"),
        (lambda gm, x: (gm, None, [[x, x]], [(x,)]), QuantizationError, "different numbers of outputs"),
        (lambda gm, x: (gm, None, [[x[0]]], [(x,)]), QuantizationError, r"cannot be compared: \(3, 4\) and \(4,\)"),
    ],
    ids=["module", "no batch", "no batches", "batches", "outputs", "shape"],
)
def test_what_cannot_be_compared_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        compare_lsb(*arguments(graph(lambda m, x: GRID(x), x := torch.randn(3, 4)), x))
