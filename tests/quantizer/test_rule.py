"""A rule puts specs on what a pattern captures, or says why not; of several rules the first that fits has a node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import AnnotationError
from pt2e_quant.meta import ANNOTATION_KEY
from pt2e_quant.quantizer import (
    BIAS,
    INHERIT,
    INPUT,
    OUTPUT,
    WEIGHT,
    Match,
    QuantizationConfig,
    QuantizationSpec,
    Rule,
    RuleQuantizer,
    SharedQuantizationSpec,
    one_scale,
    op,
    refusals,
    rule,
    same_as,
)
from tests.nets import export
from tests.pt2e.kit import ACT, PER_CHANNEL, STATIC, quantizes, the_call

aten = torch.ops.aten

linear = op(aten.linear.default)
conv_transpose = op(aten.conv_transpose1d.default)
relu = op(aten.relu.default)
plus = op(aten.add.Tensor)
concatenate = op(aten.cat.default)
permute = op(aten.permute.default)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


X, Y, W = torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 3)


def annotated(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], *rules: Rule, config: QuantizationConfig = STATIC
) -> GraphModule:
    """The graph of a function after a backend with these rules has annotated it."""
    return RuleQuantizer(config, rules).annotate(export(Function(function), *inputs).module())


def annotation(gm: GraphModule, target: Any) -> Any:
    return the_call(gm, target).meta.get(ANNOTATION_KEY)


def by_name(inputs: dict[Node, Any]) -> dict[str, Any]:
    return {node.name: spec for node, spec in inputs.items()}


# --- specs ------------------------------------------------------------------------------------------------------------


def test_roles_stand_for_fields_of_the_users_configuration():
    @rule(x=INPUT, w=WEIGHT, b=BIAS, output=OUTPUT)
    def fused(x, w, b):
        return linear(x, w, b)

    config = dataclasses.replace(STATIC, bias=ACT)
    inputs = (X, W, torch.randn(4))
    found = annotation(annotated(nn.functional.linear, inputs, fused, config=config), aten.linear.default)
    assert by_name(found.input_qspec_map) == {"inputs_0": ACT, "inputs_1": PER_CHANNEL, "inputs_2": ACT}
    assert (found.output_qspec, found.rule) == (ACT, "fused")


def test_a_role_that_the_configuration_leaves_empty_stays_float():
    @rule(x=INPUT, w=WEIGHT, output=OUTPUT)
    def fused(x, w, b):
        return linear(x, w, b)

    gm = annotated(nn.functional.linear, (X, W), fused, config=STATIC.weight_only())
    found = annotation(gm, aten.linear.default)
    assert by_name(found.input_qspec_map) == {"inputs_1": PER_CHANNEL}
    assert found.output_qspec is None


def test_a_role_may_name_the_axis_of_the_channels():
    @rule(w=WEIGHT.at(1))
    def transposed(x, w, b):
        return conv_transpose(x, w, b)

    gm = annotated(nn.functional.conv_transpose1d, (torch.randn(1, 3, 5), torch.randn(3, 4, 2)), transposed)
    (spec,) = annotation(gm, aten.conv_transpose1d.default).input_qspec_map.values()
    assert spec == dataclasses.replace(PER_CHANNEL, ch_axis=1)


def test_a_spec_may_be_written_out_or_computed_from_the_configuration():
    literal = QuantizationSpec(torch.uint8, ACT.observer_or_fake_quant_ctr, 3, 200, torch.per_tensor_affine)

    @rule(a=literal, b=lambda config: dataclasses.replace(config.input_activation, quant_max=77))
    def add(a, b):
        return plus(a, b)

    found = annotation(annotated(torch.add, (X, Y), add), aten.add.Tensor)
    assert by_name(found.input_qspec_map) == {"inputs_0": literal, "inputs_1": dataclasses.replace(ACT, quant_max=77)}


def test_a_capture_without_a_spec_stays_float():
    @rule(a=INPUT)
    def add(a, b):
        return plus(a, b)

    assert by_name(annotation(annotated(torch.add, (X, Y), add), aten.add.Tensor).input_qspec_map) == {"inputs_0": ACT}


def test_interior_nodes_are_claimed_and_keep_full_precision():
    @rule(a=INPUT, b=INPUT, output=OUTPUT)
    def add_relu(a, b):
        return relu(plus(a, b))

    gm = annotated(lambda x, y: torch.relu(x + y), (X, Y), add_relu)
    inner, outer = annotation(gm, aten.add.Tensor), annotation(gm, aten.relu.default)
    assert (inner._annotated, inner.output_qspec, len(inner.input_qspec_map)) == (True, None, 2)
    assert (outer._annotated, outer.output_qspec, outer.input_qspec_map) == (True, ACT, {})


# --- sharing ----------------------------------------------------------------------------------------------------------


@rule(a=INPUT, b=same_as("a"), output=same_as("a"))
def one_scale_add(a, b):
    return plus(a, b)


@rule(a=same_as("b"), b=INPUT, output=same_as("b"))
def one_scale_add_from_the_right(a, b):
    return plus(a, b)


@pytest.mark.parametrize(("found", "first", "second"), [(one_scale_add, 0, 1), (one_scale_add_from_the_right, 1, 0)])
def test_same_as_shares_with_the_use_of_another_capture(found, first, second):
    gm = annotated(torch.add, (X, Y), found)
    node = the_call(gm, aten.add.Tensor)
    edges = [(source, node) for source in node.args]
    specs = node.meta[ANNOTATION_KEY].input_qspec_map
    assert specs[node.args[first]] == ACT
    assert specs[node.args[second]] == SharedQuantizationSpec(edges[first])
    assert node.meta[ANNOTATION_KEY].output_qspec == SharedQuantizationSpec(edges[first])


def test_same_as_a_capture_that_the_configuration_leaves_float_is_float():
    config = dataclasses.replace(STATIC, input_activation=None)
    found = annotation(annotated(torch.add, (X, Y), one_scale_add, config=config), aten.add.Tensor)
    assert (found.input_qspec_map, found.output_qspec) == ({}, None)


@pytest.mark.parametrize("found", [one_scale_add, one_scale_add_from_the_right], ids=lambda found: found.name)
def test_same_as_the_same_tensor_is_one_spec(found):
    specs = annotation(annotated(lambda x: x + x, (X,), found), aten.add.Tensor).input_qspec_map
    assert by_name(specs) == {"inputs_0": ACT}


@rule(tensors=one_scale(INPUT), output=same_as("tensors"))
def cat(*tensors):
    return concatenate(tensors)


@pytest.mark.parametrize(
    "function",
    [lambda x, y: torch.cat([x, y], 1), lambda x, y: torch.cat([x, x], 1), lambda x, y: torch.cat([x, y, x], 1)],
    ids=["x y", "x x", "x y x"],
)
def test_one_scale_gives_all_tensors_of_a_list_the_same_qparams(function):
    prepared = prepare_pt2e(export(Function(function), X, Y * 3), RuleQuantizer(STATIC, (cat,)))
    prepared(X, Y * 3)
    assert len({node.args[1:] for node in quantizes(convert_pt2e(prepared))}) == 1


@rule(x=INHERIT, output=same_as("x"))
def move(x):
    return permute(x)


def test_inherit_takes_the_qparams_of_the_producer_through_any_number_of_ops():
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x + y).permute(1, 0).permute(1, 0)

    prepared = prepare_pt2e(export(Function(function), X, Y), RuleQuantizer(STATIC, (move, one_scale_add)))
    prepared(X, Y)
    report = explain(convert_pt2e(prepared))
    assert [group.members[-1] for group in report.groups] == ["permute_1"]
    assert len(report.groups[0].members) == 7  # three uses and the results of add, permute and permute_1


def test_inherit_refuses_where_the_producer_is_float():
    gm = annotated(lambda x: x.permute(1, 0), (X,), move)
    assert annotation(gm, aten.permute.default) is None
    assert [refusal.reason for refusal in refusals(the_call(gm, aten.permute.default))] == [
        "its input is not quantized"
    ]


# --- refusals ---------------------------------------------------------------------------------------------------------


def wide(match: Match) -> str | None:
    value = match.value("a")
    return f"{value.shape[-1]} channels, the kernel takes 2" if value is not None and value.shape[-1] > 2 else None


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[wide])
def narrow_add(a, b):
    return plus(a, b)


@rule(a=INPUT)
def any_add(a, b):
    return plus(a, b)


def test_the_reason_that_unless_returns_stands_in_the_report():
    prepared = prepare_pt2e(export(Function(torch.add), X, Y), RuleQuantizer(STATIC, (narrow_add,)), allow_empty=True)
    assert [(d.node, d.reason) for d in explain(prepared).skipped] == [("add", "3 channels, the kernel takes 2")]


def test_unless_sees_the_configuration():
    seen = []

    @rule(a=INPUT, unless=[lambda match: seen.append(match.config)])
    def add(a, b):
        return plus(a, b)

    annotated(torch.add, (X, Y), add)
    assert seen == [STATIC]


def test_the_first_rule_that_does_not_refuse_takes_the_node():
    gm = annotated(torch.add, (X, Y), narrow_add, any_add, one_scale_add)
    assert annotation(gm, aten.add.Tensor).rule == "any_add"


def test_a_refusal_is_not_reported_where_another_rule_took_the_node():
    prepared = prepare_pt2e(export(Function(torch.add), X, Y), RuleQuantizer(STATIC, (narrow_add, any_add)))
    assert explain(prepared).skipped == []


def test_a_node_belongs_to_one_match_only():
    @rule(a=INPUT, output=OUTPUT)
    def chain(a):
        return relu(relu(a))

    gm = annotated(lambda x: torch.relu(torch.relu(torch.relu(x))), (X,), chain)
    claimed = [node.name for node in gm.graph.nodes if ANNOTATION_KEY in node.meta]
    assert claimed == ["relu", "relu_1"]


def test_rules_that_fitted_nothing_are_listed():
    prepared = prepare_pt2e(export(Function(torch.add), X, Y), RuleQuantizer(STATIC, (any_add, one_scale_add, cat)))
    assert explain(prepared).unused_rules == ["one_scale_add", "cat"]


def test_integer_operands_are_refused_with_their_dtype():
    gm = annotated(lambda x, n: x + n, (X, torch.tensor([[1, 2, 3]])), narrow_add)
    (refusal,) = refusals(the_call(gm, aten.add.Tensor))
    assert (refusal.by, refusal.reason) == (
        "narrow_add",
        "'b' (inputs_1) is int64, only float32, float16 and bfloat16 are quantized",
    )


def test_an_operand_without_recorded_value_is_refused():
    gm = export(Function(torch.add), X, Y).module()
    del the_call(gm, aten.add.Tensor).args[1].meta["val"]
    RuleQuantizer(STATIC, (narrow_add,)).annotate(gm)
    (refusal,) = refusals(the_call(gm, aten.add.Tensor))
    assert refusal.reason == "'b' (inputs_1) has no meta['val'], its dtype is unknown; export the model again"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torch.sin, "no rule for aten.sin.default"),
        (lambda x: x.add(3.0), "no rule for aten.add.Tensor fits these arguments"),
        (lambda x: torch.exp(x), "exp runs in float on this chip"),
    ],
    ids=["unknown op", "known op", "op with a reason"],
)
def test_an_op_that_no_rule_takes_says_why(function, reason):
    class Backend(RuleQuantizer):
        rules = (any_add,)
        reasons = {aten.exp.default: "exp runs in float on this chip"}  # noqa: RUF012

    prepared = prepare_pt2e(export(Function(function), X), Backend(STATIC), allow_empty=True)
    assert [decision.reason for decision in explain(prepared).skipped] == [reason]


def test_transforms_of_a_backend_run_before_it_annotates():
    def swap(gm: GraphModule) -> GraphModule:
        node = the_call(gm, aten.add.Tensor)
        node.args = node.args[::-1]
        return gm

    class Backend(RuleQuantizer):
        rules = (any_add,)
        transforms = (swap,)

    prepared = prepare_pt2e(export(Function(torch.add), X, Y), Backend(STATIC))
    assert [decision.inputs.keys() for decision in explain(prepared).quantized] == [{"inputs_1"}]


# --- rules that contradict themselves ---------------------------------------------------------------------------------


def a_plus_b(a, b):
    return plus(a, b)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"x": INPUT}, r"rule 'a_plus_b' has a spec for 'x'; its captures are \['a', 'b'\]"),
        ({"b": same_as("a")}, "lets 'b' share with 'a', which has no spec in this rule"),
        ({"a": INPUT, "output": same_as("c")}, "lets 'output' share with 'c', which has no spec"),
        ({"a": same_as("b"), "b": same_as("a")}, "lets 'a' share with 'b', which shares with 'a'; name that one"),
        ({"a": INPUT, "output": INHERIT}, "an output is one tensor with no producer"),
        ({"a": INPUT, "output": one_scale(INPUT)}, "an output is one tensor with no producer"),
    ],
    ids=["unknown capture", "shares with none", "output shares with none", "circle", "output inherits", "output list"],
)
def test_a_rule_that_contradicts_itself_is_refused_when_it_is_made(specs, message):
    with pytest.raises(AnnotationError, match=message):
        rule(**specs)(a_plus_b)


def test_a_rule_has_the_name_of_its_function_unless_it_gets_another():
    assert rule(a=INPUT)(a_plus_b).name == "a_plus_b"
    assert rule(a=INPUT, name="sum")(a_plus_b).name == "sum"
