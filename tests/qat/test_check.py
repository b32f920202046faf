"""check_converted: each rounding by itself, and what adds up."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from pt2e_quant import check_converted, convert_pt2e, disable_fake_quant, prepare_qat_pt2e
from pt2e_quant.errors import CalibrationError, ConversionError
from pt2e_quant.graph.attributes import attribute
from tests.nets import ConvNet, export
from tests.pt2e.kit import Toy, calls
from tests.qat.kit import TRAINED, AllConvs, images, prepared, settle, sgd

aten = torch.ops.aten


def convnet() -> GraphModule:
    return prepared(ConvNet(), images(1, 4, 3, 16, 16))


def test_a_converted_model_that_is_not_of_this_training_is_refused():
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    sgd(graph.train(), [x])
    converted = convert_pt2e(settle(graph))
    parity = check_converted(graph, converted, [x, x * 0.5])
    assert max(parity.largest, *parity.steps) <= 1.0
    assert list(parity.own) == ["x", "relu_", "conv2d_1", "dropout", "linear"]
    assert parity.values == 2 * 4 * 5
    with torch.no_grad():
        graph.get_parameter("head.weight").mul_(1.3)
    with pytest.raises(ConversionError, match=r"(?s)is [\d.e+]+ steps off.*Convert it again"):
        check_converted(graph, converted, [x])


def test_the_check_leaves_both_models_as_they_were():
    graph, x = convnet().train(), images(2, 4, 3, 16, 16)
    graph(x)
    converted = convert_pt2e(graph)
    before = copy.deepcopy(graph.state_dict())
    check_converted(graph, converted, [x * 3])
    assert graph.training
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())


def test_a_check_of_nothing_is_an_error():
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    graph(x)
    with pytest.raises(CalibrationError, match="no batch"):
        check_converted(graph, convert_pt2e(graph), [])
    with pytest.raises(ConversionError, match="second argument"):
        check_converted(graph, graph, [x])


@pytest.mark.parametrize("first", [lambda _, made: made, lambda *_: ConvNet()], ids=["converted", "float"])
def test_the_check_is_against_a_model_that_rounds(first):
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    graph(x)
    converted = convert_pt2e(graph)
    with pytest.raises(ConversionError, match="first argument"):
        check_converted(first(graph, converted), converted, [x])


def test_numbers_of_bfloat16_may_differ_by_their_last_bits_as_well():
    torch.manual_seed(1)
    graph, x = prepared(ConvNet().bfloat16(), images(1, 4, 3, 16, 16).bfloat16()), images(51, 4, 3, 16, 16).bfloat16()
    graph(x)
    converted = convert_pt2e(settle(graph))
    parity = check_converted(graph, converted, [x])
    assert parity.largest <= 3.0  # one step, and two numbers of 256 steps with 8 bits


def test_each_operator_since_the_last_rounding_has_last_bits_of_its_own():
    """A convolution and a hardswish in bfloat16 before one rounding: twice the two steps that one of them may bring."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 4, 1)).bfloat16()
    x = images(4, 8, 3, 16, 16).bfloat16()
    quantizer = AllConvs().set_global(replace(TRAINED, output_activation=None))
    graph = prepare_qat_pt2e(export(model, x), quantizer)
    graph(x)
    converted = convert_pt2e(settle(graph))
    parity = check_converted(graph, converted, [x])
    assert 3.0 < parity.largest <= 5.0


def test_the_error_counts_the_values_that_are_off():
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    graph(x)
    converted = convert_pt2e(settle(graph))
    with torch.no_grad():
        graph.get_parameter("head.weight")[0].neg_()
    with pytest.raises(ConversionError, match=r"4 of its values are further off"):  # one output of four images
        check_converted(graph, converted, [x])


def test_a_step_in_the_middle_is_no_fault_though_outputs_are_further_off():
    """All values before the first rounding are moved by 0.9 steps, so that it gives at most the next integer."""
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    graph(x)
    converted = convert_pt2e(settle(graph))
    stem = calls(converted, aten.conv2d.padding)[0]
    (relu,) = stem.users
    (quantize,) = relu.users
    with torch.no_grad():
        attribute(converted, stem.args[2].target).add_(0.9 * quantize.args[1])
    parity = check_converted(graph, converted, [x])
    assert {name: steps for name, steps in parity.own.items() if steps} == {"relu_": pytest.approx(1.0, rel=1e-4)}
    assert max(parity.steps) > 1.5


def test_only_the_layer_that_changed_is_named():
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    graph(x)
    converted = convert_pt2e(settle(graph))
    with torch.no_grad():
        graph.get_parameter("depthwise.weight").mul_(1.2)
    with pytest.raises(ConversionError, match=r"conv2d_1 is .*\n.*dequantize.*\n.*'depthwise'.*\n  Was") as caught:
        check_converted(graph, converted, [x])
    assert str(caught.value).count("steps off") == 1


def test_a_model_whose_rounding_is_off_is_told_to_switch_it_on():
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    graph(x)
    converted = convert_pt2e(graph)
    disable_fake_quant(graph)
    with pytest.raises(ConversionError, match="enable_fake_quant"):
        check_converted(graph, converted, [x])


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, self.yes, self.no, (x,)) + 1


def test_roundings_inside_of_branches_are_compared_by_themselves_too():
    x = images(1, 16, 3)
    graph = prepare_qat_pt2e(export(Branch(), x.abs()), Toy().set_global(TRAINED))
    for batch in (x.abs(), -x.abs()):
        graph(batch)
    converted = convert_pt2e(settle(graph))
    inside = {name for name in check_converted(graph, converted, [x.abs(), -x.abs()]).own if "." in name}
    assert inside == {
        "true_graph_0.x", "true_graph_0.relu", "true_graph_0.linear_1", "false_graph_0.x", "false_graph_0.linear",
    }  # fmt: skip
