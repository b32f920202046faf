"""Each reason for leaving an op in float has a code that scripts can count on, and a way out that people can read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import Report, explain, prepare_pt2e
from pt2e_quant.quantizer import ComposableQuantizer, Quantizer, refuse
from pt2e_quant.reasons import WAYS_OUT
from tests.nets import export
from tests.pt2e.kit import STATIC, ByHand, Toy, annotate, the_call

aten = torch.ops.aten


class Odd(nn.Module):
    """One op for each reason."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept, self.taken = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, eps=1e-2)
        self.constant = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = torch.tanh(x)  # no rule
        x = self.kept(self.norm(x))  # no layer to fold into; kept in float by a selector
        x = self.taken(x)  # marked by another quantizer
        doubles = x.double() + x.double()  # a dtype that q/dq do not take
        shaped = torch.sigmoid(x).view(2, 2, 4)  # an integer op after a float one
        written = self.linear(x)
        view = written[:, :2]
        written.mul_(0.25)  # what linear computed is overwritten
        branch = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
        return doubles, shaped, view, branch, x + (self.constant + self.constant)


class Marks(Quantizer):
    def annotate(self, model: GraphModule) -> GraphModule:
        annotate(next(n for n in model.graph.nodes if n.name == "linear_1"))
        return model

    def validate(self, model: GraphModule) -> None:
        pass


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    with torch.no_grad():
        model = export(Odd(), torch.randn(4, 4))
    quantizer = Toy(STATIC).set_module_name("kept", None)
    return explain(prepare_pt2e(model, ComposableQuantizer([Marks(), quantizer])))


@pytest.mark.parametrize(
    ("code", "node"),
    [
        ("unsupported_op", "tanh"),
        ("not_folded", "batch_norm"),
        ("config_none", "linear"),
        ("already_annotated", "linear_1"),
        ("dtype", "add"),
        ("input_not_quantized", "view"),
        ("overwritten", "linear_2"),
        ("unsupported_op", "true_graph_0.sin"),
        ("constant", "add_1"),
    ],
)
def test_the_code_says_which_kind_of_reason_it_is(report, code, node):
    """Users' item 2: a reason code for each op that was skipped."""
    (decision,) = [decision for decision in report.skipped if decision.node == node]
    assert decision.code == code, decision


def test_every_reason_has_a_code_with_a_way_out(report):
    assert {decision.code for decision in report.skipped} <= WAYS_OUT.keys()
    for decision in report.skipped:
        assert f"{decision.code}: {WAYS_OUT[decision.code]}" in report.why(decision.node)


def test_integers_have_a_code_of_their_own():
    class Ids(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return x + ids

    def function(gm: GraphModule) -> None:
        add = the_call(gm, aten.add.Tensor)
        annotate(add, {add.args[1]: STATIC.input_activation})

    model = export(Ids(), torch.randn(2, 3), torch.ones(3, dtype=torch.int64))
    for quantizer in (ByHand(function), Toy(STATIC)):
        (skipped,) = explain(prepare_pt2e(model, quantizer, allow_empty=True)).skipped
        assert skipped.code == "non_float"


def test_an_op_that_nobody_spoke_of_was_not_annotated():
    model = export(nn.Tanh(), torch.randn(2, 3))
    (skipped,) = explain(prepare_pt2e(model, ByHand(lambda gm: None), allow_empty=True)).skipped
    assert (skipped.code, skipped.reason) == ("not_annotated", "ByHand did not annotate it")


def test_no_selector_has_a_code():
    model = export(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(2, 3))
    (skipped,) = explain(prepare_pt2e(model, Toy().set_module_name("0", STATIC))).skipped
    assert skipped.code == "not_selected"


def test_a_quantizer_of_ones_own_may_give_a_code():
    def function(gm: GraphModule) -> None:
        refuse(the_call(gm, aten.tanh.default), "mine", "the chip is too small", "unsupported_op")

    model = export(nn.Tanh(), torch.randn(2, 3))
    (skipped,) = explain(prepare_pt2e(model, ByHand(function), allow_empty=True)).skipped
    assert (skipped.code, skipped.reason) == ("unsupported_op", "the chip is too small")
