"""What the fuzz tests found, each in the smallest model that shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import AnnotationError
from pt2e_quant.quantizer import SharedQuantizationSpec
from pt2e_quant.testing import broken_rules
from tests.nets import export
from tests.pt2e.kit import ACT, STATIC, ByHand, Toy, annotate, quantizes, the_call

aten = torch.ops.aten
PER_TENSOR = replace(ACT, quant_min=-127, quant_max=127, qscheme=torch.per_tensor_symmetric)


class SoftWeights(nn.Module):
    """A constant that is computed from a parameter: softmax(w), added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.softmax(self.weight, 0)


def test_a_constant_and_the_constant_computed_from_it_are_both_quantized():
    """The value of the second was looked for after the observer of the first, which cannot be called by then."""

    def function(gm: GraphModule) -> None:
        softmax, add = the_call(gm, aten.softmax.int), the_call(gm, aten.add.Tensor)
        annotate(softmax, {softmax.args[0]: ACT}, ACT)
        annotate(add, dict.fromkeys(add.all_input_nodes, ACT), ACT)

    x = torch.randn(3, 6)
    model = export(SoftWeights(), x)
    prepared = prepare_pt2e(model, ByHand(function))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert broken_rules(converted, (x,)) == []
    assert all(node.op != "get_attr" or "weight" not in str(node.target) for node in converted.graph.nodes)
    step = max(group.scale for group in explain(converted).groups)
    assert (converted(x) - model.module()(x)).abs().max() < 2 * step


@pytest.mark.parametrize(
    "alias",
    [lambda x: torch.dropout(x, 0.3, False), lambda x: torch.ops.aten._unsafe_view(x, [3, 4])],
    ids=["dropout", "unsafe_view"],
)
def test_a_write_through_an_op_that_returns_its_input_is_seen(alias):
    """In inference, dropout returns its input itself, though its schema does not say so: `y` and `z` are one tensor."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x + x)
            z = alias(y)
            z.add_(x)
            return y + z

    x = torch.randn(3, 4)
    model = export(Net(), x)
    expected = model.module()(x)
    prepared = prepare_pt2e(model, Toy(STATIC))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert len(quantizes(converted)) > 0
    assert (converted(x) - expected).abs().max() < 0.05 * expected.abs().max()
    reasons = {decision.node: decision.reason for decision in explain(converted).skipped}
    assert "writes to the memory of" in reasons["add_"]


def test_a_constant_behind_one_that_shares_with_an_activation_is_quantized():
    """What shares with an activation is observed in every run, so what is computed from it is not known at convert."""

    def function(gm: GraphModule) -> None:
        softmax, add = the_call(gm, aten.softmax.int), the_call(gm, aten.add.Tensor)
        x = add.args[0]
        annotate(add, {x: ACT, softmax: PER_TENSOR})
        annotate(softmax, {softmax.args[0]: SharedQuantizationSpec((x, add))})

    x = torch.randn(3, 6)
    model = export(SoftWeights(), x)
    prepared = prepare_pt2e(model, ByHand(function))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert broken_rules(converted, (x,)) == []
    step = max(group.scale for group in explain(converted).groups)
    assert (converted(x) - model.module()(x)).abs().max() < 2 * step


def test_the_body_of_a_branch_cannot_be_quantized_as_if_it_were_a_parameter():
    """It is read by a get_attr without a recorded value, as a parameter may be; an observer would have been called on
    the graph."""

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    def function(gm: GraphModule) -> None:
        for cond in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
            annotate(cond, {cond.args[1]: ACT})

    model = export(Branch(), torch.randn(2, 3))
    with pytest.raises(AnnotationError, match="true_graph_0 is a nested graph, not one tensor"):
        prepare_pt2e(model, ByHand(function))
