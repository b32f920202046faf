"""Switches of a whole model, train and eval, and checkpoints."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import pt2e_quant
from pt2e_quant import (
    check_converted,
    convert_pt2e,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze_bn_stats,
    prepare_pt2e,
    prepare_qat_pt2e,
    update_bn_stats,
)
from pt2e_quant.errors import CaptureError, ConversionError, TargetingError
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import ConvNet, export
from tests.pt2e.kit import STATIC, Toy, calls, the_call
from tests.qat.kit import TRAINED, images, prepared, settle

aten = torch.ops.aten


def convnet() -> GraphModule:
    """Eight fake quantizers, two batch norms."""
    return prepared(ConvNet(), images(1, 4, 3, 16, 16))


SWITCHES = {
    enable_observer: 8, disable_observer: 8, enable_fake_quant: 8, disable_fake_quant: 8,
    freeze_bn_stats: 2, update_bn_stats: 2,
}  # fmt: skip


def test_switches_say_how_many_they_switched():
    graph = convnet()
    assert {switch: switch(graph) for switch in SWITCHES} == SWITCHES
    assert {switch: switch(nn.Sequential(graph)) for switch in SWITCHES} == SWITCHES


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_with_nothing_to_switch_is_an_error(switch):
    calibrating = prepare_pt2e(export(ConvNet(), images(1, 4, 3, 16, 16)), Toy().set_global(STATIC))
    with pytest.raises(TargetingError, match="nothing to"):
        switch(calibrating)


def statistics(graph: GraphModule) -> torch.Tensor:
    return graph.get_buffer("bn1.running_mean").clone()


def test_frozen_statistics_stay_through_train_and_eval_and_copies():
    graph, x = convnet().train(), images(2, 4, 3, 16, 16)
    freeze_bn_stats(graph)
    before = statistics(graph)
    for model in (graph, graph.eval().train(), copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert model.training
        model(x).sum().backward()
        assert torch.equal(statistics(model), before)
        assert bool(dict(model.named_parameters())["bn1.weight"].grad.abs().sum() > 0)
        assert [node.args[5] for node in calls(model, aten.batch_norm.default)] == [False, False]
        assert [node.args[2] for node in calls(model, aten.dropout.default)] == [True]
    update_bn_stats(graph)
    graph(x)
    assert not torch.equal(statistics(graph), before)


def test_observers_and_rounding_stop_and_go_on():
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    graph(x)
    scale = graph.activation_post_process_3.scale.clone()
    disable_observer(graph)
    graph(x * 3)
    assert torch.equal(graph.activation_post_process_3.scale, scale)
    rounded = graph(x)
    disable_fake_quant(graph)
    assert not torch.equal(graph(x), rounded)
    enable_fake_quant(graph)
    assert torch.equal(graph(x), rounded)
    enable_observer(graph)
    graph(x * 3)
    assert not torch.equal(graph.activation_post_process_3.scale, scale)


def test_training_resumes_from_a_checkpoint_bit_by_bit():
    """State of model and optimizer, loaded into a model that was prepared anew; dropout draws from the same seed."""
    batches = [images(seed, 4, 3, 16, 16) for seed in range(4)]

    def train(graph: GraphModule, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
        for x in data:
            optimizer.zero_grad()
            graph(x).square().mean().backward()
            optimizer.step()

    graph = convnet().train()
    optimizer = torch.optim.Adam(graph.parameters(), lr=0.01)  # before the first forward
    train(graph, optimizer, batches[:2])
    saved = copy.deepcopy((graph.state_dict(), optimizer.state_dict()))
    again = convnet().train()
    resumed = torch.optim.Adam(again.parameters(), lr=0.01)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for model, steps in ((graph, optimizer), (again, resumed)):
        torch.manual_seed(7)
        train(model, steps, batches[2:])
    states = graph.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


# --- types of numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_a_graph_cannot_become_one_of_another_type_and_stays_as_it_was(cast):
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    before = graph(x)
    with pytest.raises(
        CaptureError, match=r"exported in torch\.float32.*before torch\.export; or train under torch\.auto"
    ):
        cast(nn.Sequential(graph))
    assert torch.equal(graph(x), before)


def test_ranges_and_scales_stay_in_float32_whatever_the_model_computes_in():
    x = images(1, 4, 3, 16, 16).bfloat16()
    graph = prepared(ConvNet().bfloat16(), x)
    before = graph(x)
    graph.bfloat16()
    assert torch.equal(graph(x), before)
    assert {value.dtype for name, value in graph.named_buffers() if name.endswith(("scale", "_val"))} == {torch.float32}


# --- convert_pt2e -----------------------------------------------------------------------------------------------------


def test_parameters_that_are_nan_are_not_hidden_in_integers():
    graph = convnet().train()
    graph(images(2, 4, 3, 16, 16))
    with torch.no_grad():
        graph.get_parameter("head.weight")[0, 0] = float("nan")
    with pytest.raises(ConversionError, match=r"(?s)NaN.*: head\.weight\..*diverged"):
        convert_pt2e(graph)


def test_a_compiled_model_is_converted_as_it_was_before():
    graph, x = convnet(), images(2, 4, 3, 16, 16)
    graph(x)
    compiled = torch.compile(settle(graph), backend="eager")
    assert torch.equal(convert_pt2e(compiled)(x), convert_pt2e(graph)(x))


def test_a_wrapper_is_told_to_hand_out_what_it_wraps():
    with pytest.raises(ConversionError, match=r"pass its \.module"):
        convert_pt2e(torch.optim.swa_utils.AveragedModel(convnet()))


def test_the_front_door_has_it_all():
    from pt2e_quant import quantize_pt2e

    assert set(quantize_pt2e.__all__) <= set(pt2e_quant.__all__)
    with pytest.raises(CaptureError, match="exported model"):
        pt2e_quant.prepare_qat_pt2e(ConvNet(), Toy().set_global(TRAINED))


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_a_dropout_between_integers_does_not_widen_the_range_that_it_shares():
    """In training it divides by 1 - 0.6; the range is that of what goes in, and the converted linear reads integers."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.6), nn.Linear(8, 3))
    x = images(1, 64, 8)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=True))
    graph = prepare_qat_pt2e(export(model, x, train=True), quantizer)
    for _ in range(40):  # the average takes in a hundredth of each
        graph(x)
    expected = torch.relu(model[0](x)).max().detach()
    relu = the_call(graph, aten.relu.default)
    (observer,) = {graph.get_submodule(user.target) for user in relu.users}
    assert float(observer.activation_post_process.max_val) == pytest.approx(
        float(expected), rel=0.02
    )  # 8 bits before it
    converted = convert_pt2e(settle(graph))
    check_converted(graph, converted, [x])
    linear = calls(converted, aten.linear.default)[1]
    (dropout,) = calls(converted, aten.dropout.default)
    quantize = linear.args[0].args[0]
    assert quantize.args[0] is dropout
    assert quantize.args[1] == dropout.args[0].args[1]


class FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


def test_no_gradient_flows_where_the_model_lets_none():
    x = images(1, 2, 3, 8, 8)
    graph = prepared(FrozenBackbone(), x, train=True)
    graph(x).sum().backward()
    trained = {name for name, parameter in graph.named_parameters() if parameter.grad is not None}
    assert trained == {"head.weight", "head.bias"}
    converted = convert_pt2e(settle(graph))
    check_converted(graph, converted, [x])
    assert calls(converted, aten.batch_norm.default) == []
