"""What torchao promises to authors of quantizers holds here: each kind of spec, the callback, rewrites of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.algorithms import correct_bias
from pt2e_quant.errors import ConversionError, QuantizationError
from tests.foreign.test_same_as_the_peer import even_out, ours, theirs
from tests.peer.canonical import differences
from tests.pt2e.kit import quantizes, the_call

pytest.importorskip("torchao")

from torchao.quantization.pt2e import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

pytestmark = pytest.mark.filterwarnings(r"ignore:::torchao\.")

aten = torch.ops.aten


def activation(observer: Any = MinMaxObserver, **options: Any) -> QuantizationSpec:
    return QuantizationSpec(torch.uint8, observer, 0, 250, torch.per_tensor_affine, **options)


WEIGHT = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -119, 119, torch.per_channel_symmetric, ch_axis=0)
SIGMOID = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)


class ByHand(Quantizer):
    """A quantizer of torchao that is one function of the graph."""

    def __init__(self, function: Callable[[GraphModule], None]) -> None:
        self.function = function

    def annotate(self, model: GraphModule) -> GraphModule:
        self.function(model)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def annotate(node: Node, inputs: dict[Node, Any], output: Any = None) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, output, _annotated=True)


class Net(nn.Module):
    """Two linears, sigmoid, a cat of two results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.sigmoid(self.first(x)), self.second(x)], 1)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
BATCHES = ((X,), (2 * X,), (X - 1,))


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (X,))


def bias_qparams(sources: list[Any]) -> tuple[Tensor, Tensor]:
    scales = [source.calculate_qparams()[0] for source in sources]
    return scales[0] * scales[1], torch.zeros_like(scales[1], dtype=torch.int64)


def all_kinds(model: GraphModule) -> None:
    linears, cat = (
        model.graph.find_nodes(op="call_function", target=aten.linear.default),
        the_call(model, aten.cat.default),
    )
    for node in linears:
        x, weight, bias = node.args
        derived = DerivedQuantizationSpec(
            [(x, node), (weight, node)], bias_qparams, torch.int32, -(2**31), 2**31 - 1, torch.per_channel_symmetric, 0
        )
        annotate(node, {x: activation(), weight: WEIGHT, bias: derived}, activation())
    sigmoid, second = cat.args[0]
    annotate(sigmoid, {sigmoid.args[0]: activation()}, SIGMOID)
    shared = SharedQuantizationSpec((second, cat))
    annotate(cat, {second: activation(HistogramObserver), sigmoid: shared}, shared)


def test_all_four_kinds_of_spec_come_out_as_in_torchao(program):
    one, other = ours(program, BATCHES, ByHand(all_kinds)), theirs(program, BATCHES, ByHand(all_kinds))
    assert even_out(other) == set()
    assert differences(one, other) == []
    assert torch.equal(one(X), other(X))
    kinds = {str(node.target).split(".")[1] for node in one.graph.nodes if "quantize" in str(node.target)}
    assert kinds == {"quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel"}


# --- one tensor, the same integers, observers that differ -------------------------------------------------------------


def linears_with(first: Any, second: Any, output: Any = None) -> ByHand:
    """Both linears read x, each with its own spec; `output` is that of x itself."""

    def function(model: GraphModule) -> None:
        for node, spec in zip(
            model.graph.find_nodes(op="call_function", target=aten.linear.default), (first, second), strict=True
        ):
            annotate(node, {node.args[0]: spec})
        if output is not None:
            annotate(node.args[0], {}, output)

    return ByHand(function)


MIN_MAX, AVERAGE = activation(MinMaxObserver), activation(MovingAverageMinMaxObserver.with_args(eps=2**-9))


@pytest.mark.parametrize(
    ("first", "second", "output"),
    [(MIN_MAX, AVERAGE, None), (AVERAGE, MIN_MAX, None), (MIN_MAX, MIN_MAX, AVERAGE), (AVERAGE, MIN_MAX, MIN_MAX)],
    ids=["first reader", "first reader, average", "producer, average", "producer"],
)
def test_a_tensor_is_quantized_once_with_the_observer_of_its_producer_or_first_reader(program, first, second, output):
    quantizer = linears_with(first, second, output)
    one, other = ours(program, BATCHES, quantizer), theirs(program, BATCHES, quantizer)
    assert differences(one, other) == []
    assert len(quantizes(one)) == 1
    (group,) = explain(one).groups
    assert ("MovingAverage" in group.spec) is ((output or first) is AVERAGE)


def test_observers_of_tensors_quantized_at_run_time_are_not_exchanged(program):
    """Their class and arguments say what is computed then: here two values of eps."""
    specs = (activation(PlaceholderObserver.with_args(eps=eps), is_dynamic=True) for eps in (2**-9, 2**-7))
    converted = convert_pt2e(prepare_pt2e(program, linears_with(*specs)))
    chosen = converted.graph.find_nodes(op="call_function", target=torch.ops.quantized_decomposed.choose_qparams.tensor)
    assert {node.args[3] for node in chosen} == {2**-9, 2**-7}


class PlusParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor([3.0, -2.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def test_a_parameter_that_shares_with_an_activation_is_averaged_with_it():
    """In the order of calibration, batch by batch; seen once at the end, it would weigh a hundredth."""

    def function(model: GraphModule) -> None:
        add = the_call(model, aten.add.Tensor)
        x, offset = add.args
        annotate(add, {x: AVERAGE, offset: SharedQuantizationSpec((x, add))})

    x = torch.randn(4, 3)
    program, batches = torch.export.export(PlusParameter(), (x,)), [(x,), (x / 4,), (x / 2,)]
    assert differences(ours(program, batches, ByHand(function)), theirs(program, batches, ByHand(function))) == []


# --- callback and rewrites --------------------------------------------------------------------------------------------


class FixedInput(ByHand):
    """Decides on the scale of the model's input once the observers exist."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, nn.Module]) -> None:
        for place in list(edge_or_node_to_obs_or_fq):
            if isinstance(place, tuple) and place[0].op == "placeholder":
                fixed = FixedQParamsObserver(scale=0.03125, zero_point=128, dtype=torch.uint8, quant_max=255)
                self.made = edge_or_node_to_obs_or_fq[place] = getattr(self, "made", fixed)


def test_the_callback_may_exchange_observers(program):
    quantizer = linears_with(MIN_MAX, MIN_MAX)
    quantizer = FixedInput(quantizer.function)
    one, other = ours(program, BATCHES, quantizer), theirs(program, BATCHES, quantizer)
    assert differences(one, other) == []
    assert quantizes(one)[0].args[1:3] == (0.03125, 128)


def test_qparams_derived_from_an_exchanged_observer_follow_the_new_one(program):
    """torchao derives them from the old one, which never sees data."""
    converted = ours(program, BATCHES, FixedInput(all_kinds))
    linear = converted.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    weight, bias = (getattr(converted, str(dequantize.args[1].target)) for dequantize in linear.args[1:])
    torch.testing.assert_close(bias, 0.03125 * weight)


class Rewrites(ByHand):
    """Takes only graphs of ops, as the passes of several packages do, and returns a new module."""

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        assert not model.graph.find_nodes(op="call_module", target="_guards_fn")
        model = GraphModule(model, model.graph)
        for node in model.graph.find_nodes(op="call_function", target=aten.sigmoid.default):
            node.target = aten.tanh.default
        return model


def test_a_rewrite_sees_no_guard_and_the_result_still_checks_its_inputs(program):
    prepared = prepare_pt2e(program, Rewrites(lambda model: annotate(the_call(model, aten.tanh.default), {}, MIN_MAX)))
    prepared(X)
    converted = convert_pt2e(prepared)
    assert [node.name for node in converted.graph.nodes if node.op == "call_module"] == ["_guards_fn"]
    with pytest.raises(AssertionError, match="Guard failed"):
        converted(torch.randn(5, 6))


def test_an_observer_that_fails_on_a_weight_is_named_with_it(program):
    """One scale for each channel of a bias, along an axis that it has not: torchao's observer raises an IndexError."""
    bad = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=1)

    def annotate_bias(model: GraphModule) -> None:
        node = model.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
        x, weight, bias = node.args
        annotate(node, {x: activation(), weight: WEIGHT, bias: bad}, activation())

    prepared = prepare_pt2e(program, ByHand(annotate_bias))
    prepared(X)
    with pytest.raises(ConversionError, match=r"PerChannelMinMaxObserver on first_bias, \[4\], failed: IndexError"):
        convert_pt2e(prepared)
    with pytest.raises(QuantizationError, match=r"PerChannelMinMaxObserver"):
        correct_bias(prepared, [(X,)])
