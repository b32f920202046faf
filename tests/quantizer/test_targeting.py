"""Who gets which configuration: node > module name > module type > operator > global."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import TargetingError
from pt2e_quant.meta import ANNOTATION_KEY
from pt2e_quant.quantizer import QuantizationConfig
from tests.nets import ConvNet, export
from tests.pt2e.kit import ACT, PER_CHANNEL, STATIC, Toy, calls, dequantizes, quantizes

aten = torch.ops.aten


class MyLinear(nn.Linear):
    """A user's own kind of linear."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4, eps=1e-3)
        self.act = nn.ReLU()
        self.linear = MyLinear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.act(self.norm(self.conv(x))))


class Net(nn.Module):
    """Two blocks in a list, and a head that is a plain linear."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(2, 4, 6)
EXPORTED = {strict: export(Net(), X, strict=strict) for strict in (True, False)}

ALL = {"conv1d", "relu", "linear", "conv1d_1", "relu_1", "linear_1", "linear_2"}
FIRST = {"conv1d", "relu", "linear"}
SECOND = {"conv1d_1", "relu_1", "linear_1"}


def _id(value: object) -> str:
    """Sets print in another order in every process; parallel test runners compare names."""
    return " ".join(sorted(value)) if isinstance(value, (set, frozenset)) else str(value)


@pytest.fixture(params=[True, False], ids=["strict", "non-strict"])
def exported(request: pytest.FixtureRequest) -> torch.export.ExportedProgram:
    return EXPORTED[request.param]


def bounded(quant_max: int) -> QuantizationConfig:
    """STATIC with another upper bound, to tell who was configured by what."""
    activation = dataclasses.replace(ACT, quant_max=quant_max)
    return QuantizationConfig(activation, activation, PER_CHANNEL)


A, B, C, D, E = (bounded(number) for number in (50, 51, 52, 53, 54))


def quantized(exported: Any, quantizer: Toy) -> set[str]:
    return {decision.node for decision in explain(prepare_pt2e(exported, quantizer)).quantized}


def bounds(exported: Any, quantizer: Toy) -> dict[str, int]:
    """Upper bound of the integers of each quantized output, by node name."""
    annotations = {node.name: node.meta.get(ANNOTATION_KEY) for node in prepare_pt2e(exported, quantizer).graph.nodes}
    specs = {name: annotation.output_qspec for name, annotation in annotations.items() if annotation is not None}
    return {name: spec.quant_max for name, spec in specs.items() if spec is not None}


# --- what each selector covers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "argument", "covered"),
    [
        ("set_module_name", "blocks.0", FIRST),
        ("set_module_name", "blocks.1.conv", {"conv1d_1", "relu_1"}),
        ("set_module_name", "blocks.*", FIRST | SECOND),
        ("set_module_name", "*.linear", {"linear", "linear_1"}),
        ("set_module_name", "", ALL),
        ("set_module_type", Block, FIRST | SECOND),
        ("set_module_type", nn.Conv1d, {"conv1d", "relu", "conv1d_1", "relu_1"}),
        ("set_module_type", MyLinear, {"linear", "linear_1"}),
        ("set_module_type", nn.Linear, {"linear", "linear_1", "linear_2"}),
        ("set_module_type", "torch.nn.modules.conv.Conv1d", {"conv1d", "relu", "conv1d_1", "relu_1"}),
        ("set_operator_type", aten.conv1d.default, {"conv1d", "relu", "conv1d_1", "relu_1"}),
        ("set_operator_type", aten.conv1d, {"conv1d", "relu", "conv1d_1", "relu_1"}),
        ("set_operator_type", aten.linear.default, {"linear", "linear_1", "linear_2"}),
        ("set_node_name", "linear_1", {"linear_1"}),
        ("set_node_name", "linear*", {"linear", "linear_1", "linear_2"}),
        ("set_global", None, ALL),
    ],
    ids=_id,
)
def test_a_selector_quantizes_what_it_names_and_nothing_else(exported, selector, argument, covered):
    quantizer = Toy()
    arguments = (STATIC,) if selector == "set_global" else (argument, STATIC)
    assert quantized(exported, getattr(quantizer, selector)(*arguments)) == covered


@pytest.mark.parametrize(
    ("selector", "argument", "covered"),
    [
        ("set_module_name", "blocks.0", FIRST),
        ("set_module_name", "blocks.1.conv", {"conv1d_1"}),
        ("set_module_type", nn.Conv1d, {"conv1d", "conv1d_1"}),
        ("set_module_type", nn.ReLU, {"relu", "relu_1"}),
        ("set_operator_type", aten.conv1d, {"conv1d", "conv1d_1"}),
        ("set_node_name", "linear_1", {"linear_1"}),
    ],
    ids=_id,
)
def test_none_keeps_what_a_selector_names_in_float(exported, selector, argument, covered):
    """Users' item 17: None is float."""
    quantizer = getattr(Toy(STATIC), selector)(argument, None)
    left = ALL - quantized(exported, quantizer)
    assert left - {"relu", "relu_1"} == covered - {"relu", "relu_1"}  # no rule of Toy takes a relu without its conv


def test_the_report_says_which_selector_kept_an_op_in_float(exported):
    report = explain(prepare_pt2e(exported, Toy(STATIC).set_module_name("blocks.0", None)))
    reasons = {decision.node: decision.reason for decision in report.skipped}
    assert reasons == dict.fromkeys(FIRST, "kept in float by module name 'blocks.0'")


def test_what_no_selector_names_says_so(exported):
    report = explain(prepare_pt2e(exported, Toy().set_module_name("head", STATIC)))
    assert {decision.reason for decision in report.skipped} == {"no selector covers it"}


def test_convolutions_of_a_folded_net_can_be_named_by_module():
    """Users' item 17: selectors work after batch norm was folded.

    In torchao's XNNPACKQuantizer, set_module_name and set_module_type never reach a convolution.
    """
    convnet = export(ConvNet(), torch.randn(1, 3, 16, 16))
    assert quantized(convnet, Toy().set_module_name("stem", STATIC)) == {"conv2d", "relu_"}
    assert quantized(convnet, Toy().set_module_type(nn.Conv2d, STATIC)) == {"conv2d", "relu_", "conv2d_1"}


def test_a_module_that_is_called_twice_is_named_once(exported):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.other(self.linear(x)))

    model = export(Twice(), torch.randn(2, 4))
    assert quantized(model, Toy().set_module_name("linear", STATIC)) == {"linear", "linear_2"}


# --- precedence -------------------------------------------------------------------------------------------------------

WEAKEST_FIRST = [
    ("set_global", ()),
    ("set_operator_type", (aten.linear,)),
    ("set_operator_type", (aten.linear.default,)),
    ("set_module_type", (Block,)),
    ("set_module_type", (nn.Linear,)),
    ("set_module_type", (MyLinear,)),
    ("set_module_name", ("*.linear",)),
    ("set_module_name", ("blocks.1",)),
    ("set_module_name", ("blocks.1.linear",)),
    ("set_node_name", ("linear_*",)),
    ("set_node_name", ("linear_1",)),
]


@pytest.mark.parametrize(
    ("weaker", "stronger"),
    list(itertools.pairwise(WEAKEST_FIRST)),
    ids=lambda selector: f"{selector[0]}{selector[1]}",
)
@pytest.mark.parametrize("stronger_first", [True, False])
def test_the_narrower_selector_wins_whatever_was_set_first(weaker, stronger, stronger_first):
    """Users' item 17: node > module name > module type > operator > global."""
    quantizer = Toy()
    selectors = [(weaker, A), (stronger, B)]
    for (method, arguments), config in reversed(selectors) if stronger_first else selectors:
        getattr(quantizer, method)(*arguments, config)
    assert bounds(EXPORTED[False], quantizer)["linear_1"] == 51


@pytest.mark.parametrize(("first", "second"), [("blocks.*", "*.linear"), ("*.linear", "blocks.*")])
def test_of_two_globs_the_one_set_last_wins(first, second):
    quantizer = Toy().set_module_name(first, A).set_module_name(second, B)
    assert bounds(EXPORTED[False], quantizer)["linear_1"] == 51


def test_all_kinds_of_selector_together():
    quantizer = (
        Toy(A)
        .set_operator_type(aten.linear, B)
        .set_module_type(Block, C)
        .set_module_name("blocks.1", D)
        .set_node_name("linear_1", E)
    )
    assert bounds(EXPORTED[False], quantizer) == {
        "relu": 52,
        "linear": 52,
        "relu_1": 53,
        "linear_1": 54,
        "linear_2": 51,
    }


def test_a_selector_that_a_stronger_one_hides_everywhere_is_no_error():
    quantizer = Toy().set_operator_type(aten.linear, A).set_operator_type(aten.linear.default, B)
    assert set(bounds(EXPORTED[False], quantizer).values()) == {51}


def test_the_convolutions_choice_decides_for_what_is_fused_to_it():
    """Naming the convolution must not tear it from its relu, which only the global selector names."""
    quantizer = Toy(A).set_module_type(nn.Conv1d, B)
    found = bounds(EXPORTED[False], quantizer)
    assert (found["relu"], "conv1d" in found) == (51, False)


def test_a_relu_that_is_named_itself_is_not_fused_into_a_convolution_that_was_configured_otherwise():
    quantizer = Toy(A).set_module_name("blocks.0.act", None)
    found = bounds(EXPORTED[False], quantizer)
    assert ("conv1d" in found, "relu" in found, "relu_1" in found) == (True, False, True)


# --- filter, parts of a configuration ---------------------------------------------------------------------------------


def test_the_filter_function_comes_on_top_of_every_selector():
    quantizer = Toy(A).set_node_name("linear_1", B).set_filter_function(lambda node: "linear" not in node.name)
    assert bounds(EXPORTED[False], quantizer) == {"relu": 50, "relu_1": 50}


def test_the_filter_function_reaches_a_concatenation():
    class Cat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x + x], 1)

    quantizer = Toy(STATIC).set_filter_function(lambda node: node.target is not aten.cat.default)
    assert quantized(export(Cat(), torch.randn(2, 3)), quantizer) == {"add"}


def test_weight_only_keeps_activations_in_float():
    prepared = prepare_pt2e(EXPORTED[False], Toy(STATIC.weight_only()))
    converted = convert_pt2e(prepared)
    assert quantizes(converted) == []
    assert {node.args[0].op for node in dequantizes(converted)} == {"get_attr"}


def test_activation_only_keeps_weights_in_float():
    prepared = prepare_pt2e(EXPORTED[False], Toy(STATIC.activation_only()))
    prepared(X)
    converted: GraphModule = convert_pt2e(prepared)
    assert {node.args[1].op for node in calls(converted, aten.linear.default, aten.conv1d.default)} == {"get_attr"}
    assert len(quantizes(converted)) == 1 + 5  # the input, two relus, three linears


def test_one_layer_can_be_weight_only():
    """Users' item 17: overrides for weights alone."""
    quantizer = Toy(STATIC).set_module_name("head", STATIC.weight_only())
    prepared = prepare_pt2e(EXPORTED[False], quantizer)
    prepared(X)
    head = calls(convert_pt2e(prepared), aten.linear.default)[-1]
    assert head.args[1].args[0].op == "get_attr"
    assert [user.op for user in head.users] == ["output"]


# --- selectors that match nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "argument", "nearest"),
    [
        ("set_module_name", "blocks.0.cnov", "blocks.0.conv"),
        ("set_module_name", "block.*", "blocks.0"),
        ("set_module_type", nn.Conv2d, "torch.nn.modules.conv.Conv1d"),
        ("set_module_type", "torch.nn.modules.linear.Linera", "torch.nn.modules.linear.Linear"),
        ("set_operator_type", aten.conv2d.default, "aten.conv1d.default"),
        ("set_operator_type", aten.lstm, "aten."),
        ("set_node_name", "linear_7", "linear_1"),
    ],
    ids=_id,
)
@pytest.mark.parametrize("config", [STATIC, None], ids=["config", "None"])
def test_a_selector_that_matches_nothing_names_the_nearest(exported, selector, argument, nearest, config):
    """Users' item 17: a name or pattern without a match raises with the nearest ones."""
    quantizer = getattr(Toy(STATIC), selector)(argument, config)
    with pytest.raises(TargetingError) as caught:
        prepare_pt2e(exported, quantizer)
    assert "matches nothing. Did you mean '" in str(caught.value)
    assert nearest in str(caught.value)
    assert "''" not in str(caught.value)


def test_a_batch_norm_that_was_folded_away_cannot_be_named():
    with pytest.raises(TargetingError, match="matches nothing"):
        prepare_pt2e(EXPORTED[False], Toy(STATIC).set_module_name("blocks.0.norm", None))


@pytest.mark.parametrize("argument", ["conv", torch.relu, nn.Conv1d], ids=["name", "function", "module"])
def test_what_is_no_operator_is_refused(argument):
    with pytest.raises(
        TargetingError, match=r"is not an operator: pass an overload such as torch\.ops\.aten\.add\.Tensor"
    ):
        prepare_pt2e(EXPORTED[False], Toy(STATIC).set_operator_type(argument, None))


@pytest.mark.parametrize("quantizer", [Toy, lambda: Toy(None)], ids=["nothing set", "global None"])
def test_a_quantizer_without_any_configuration_says_what_to_call(quantizer):
    with pytest.raises(TargetingError, match=r"Toy has no configuration; call set_global\(\.\.\.\)"):
        prepare_pt2e(EXPORTED[False], quantizer())


def test_names_cannot_be_matched_on_a_graph_that_records_none():
    model = EXPORTED[False].module()
    for node in model.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    with pytest.raises(TargetingError, match="records no module name at all; export the model again"):
        prepare_pt2e(model, Toy().set_module_name("head", STATIC))
