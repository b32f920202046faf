"""broken_rules: what convert_pt2e returns passes, and each rule is found where a graph was broken."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.arguments import set_argument
from pt2e_quant.testing import CONVERTED_RULES, broken_rules
from tests.nets import MLP, ConvNet, export
from tests.pt2e.kit import DYNAMIC, STATIC, Toy, annotate, dequantizes, quantizes, the_call

X = torch.randn(3, 10)
EXPORTED = export(MLP(), X)
aten = torch.ops.aten


def converted(config=STATIC, **options) -> GraphModule:
    prepared = prepare_pt2e(EXPORTED, Toy(config))
    prepared(X)
    return convert_pt2e(prepared, **options)


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_a_converted_graph_passes(config):
    assert broken_rules(converted(config), (X,)) == []
    images = torch.randn(2, 3, 8, 8)
    prepared = prepare_pt2e(export(ConvNet(), images), Toy(STATIC))
    prepared(images)
    assert broken_rules(convert_pt2e(prepared), (images,)) == []


def share_a_dequantize(gm: GraphModule) -> None:
    dequantize = next(node for node in dequantizes(gm) if aten.linear.default in {user.target for user in node.users})
    (user,) = dequantize.users
    with gm.graph.inserting_after(user):
        negative = gm.graph.call_function(aten.neg.default, (dequantize,))
        negative.meta["val"] = dequantize.meta["val"]


def change_a_scale(gm: GraphModule) -> None:
    set_argument(next(node for node in dequantizes(gm) if node.args[0].op != "get_attr"), "scale", 0.5)


def keep_a_float_weight(gm: GraphModule) -> None:
    gm.register_buffer("old_weight", torch.randn(2, 2))


def leave_an_observer(gm: GraphModule) -> None:
    linear = next(node for node in gm.graph.nodes if node.target is aten.linear.default)
    gm.add_module("observer", torch.nn.Identity())
    with gm.graph.inserting_after(linear):
        call = gm.graph.call_module("observer", (linear,))
        call.meta["val"] = linear.meta["val"]


def leave_an_annotation(gm: GraphModule) -> None:
    annotate(the_call(gm, aten.relu.default))


def quantize_for_nobody(gm: GraphModule) -> None:
    quantize = quantizes(gm)[0]
    with gm.graph.inserting_after(quantize):
        gm.graph.call_function(quantize.target, quantize.args).meta["val"] = quantize.meta["val"]


def forget_a_value(gm: GraphModule) -> None:
    del the_call(gm, aten.relu.default).meta["val"]


def record_a_wrong_type(gm: GraphModule) -> None:
    relu = the_call(gm, aten.relu.default)
    relu.meta["val"] = relu.meta["val"].to(torch.float16)


def record_a_wrong_shape(gm: GraphModule) -> None:
    relu = the_call(gm, aten.relu.default)
    relu.meta["val"] = relu.meta["val"][:1]


@pytest.mark.parametrize(
    ("rule", "fault", "message"),
    [
        ("one-dequantize-per-use", share_a_dequantize, "read 2 times, by linear, neg"),
        ("pairs-agree", change_a_scale, "it has (0.5, "),
        ("no-float-copy", keep_a_float_weight, "stored, but nothing reads it"),
        ("nothing-left-over", leave_an_observer, "still calls observer"),
        ("nothing-left-over", leave_an_annotation, "still carries its annotation"),
        ("nothing-left-over", quantize_for_nobody, "computes what nobody reads"),
        ("values-recorded", forget_a_value, "no value is recorded"),
        ("values-recorded", record_a_wrong_type, "recorded as torch.float16 [3, 24], it computes torch.float32"),
        ("values-recorded", record_a_wrong_shape, "recorded as torch.float32 [1, 24], it computes torch.float32 [3"),
    ],
)
def test_a_broken_graph_is_found(rule, fault, message):
    gm = converted()
    fault(gm)
    gm.recompile()
    (finding,) = broken_rules(gm, (X,), "mlp")
    assert (finding.rule, finding.model) == (rule, "mlp")
    assert message in finding.message
    assert rule in CONVERTED_RULES


def test_weights_that_are_quantized_on_every_call_are_found():
    found = broken_rules(converted(fold_quantize=False))
    assert {finding.rule for finding in found} == {"no-float-copy"}
    assert len(found) == 2  # one for each linear


def test_recorded_values_are_compared_only_with_inputs():
    gm = converted()
    forget_a_value(gm)
    assert broken_rules(gm) == []
