"""spares_streams: sums that a norm reads, and steps of a recurrence, stay in float; products with weights do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from pt2e_quant import Report, explain, prepare_pt2e
from pt2e_quant.quantizer import INPUT, OUTPUT, RuleQuantizer, op, rule
from tests.nets import export
from tests.pt2e.kit import STATIC, Toy

aten = torch.ops.aten
plus, times = op(aten.add.Tensor), op(aten.mul.Tensor)


@rule(a=INPUT, b=INPUT, output=OUTPUT)
def mul(a, b):
    return times(a, b)


class Careful(Toy):
    rules = (*Toy.rules, mul)
    spares_streams = True


class Net(nn.Module):
    """`function(net, x)`, with two linears that differ and layers to call."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.f, self.g = function, nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.cell = nn.LayerNorm(6, eps=1e-3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def fate(function: Callable[..., Tensor], quantizer: RuleQuantizer | None = None) -> Report:
    x = torch.randn(4, 3, 6)
    return explain(prepare_pt2e(export(Net(function), x), quantizer or Careful(STATIC)))


def codes(report: Report, *ops: str) -> list[str | None]:
    """Why the ops of these names stayed in float, in graph order; None for what is quantized."""
    return [d.code for d in report.record.decisions if d.op.removeprefix("aten.").partition(".")[0] in ops]


READ_BY_A_NORM: dict[str, Callable[..., Tensor]] = {
    "layer norm": lambda n, x: n.norm(n.f(x) + x),
    "layer norm, after a view": lambda n, x: n.norm((n.f(x) + x).view(12, 6).view(4, 3, 6)),
    "layer norm, of the mean": lambda n, x: n.norm((n.f(x) + x).mean(1)),
    "group norm": lambda n, x: F.group_norm(n.f(x) + x, 3),
    "rms norm": lambda n, x: F.rms_norm(n.f(x) + x, (6,)),
    "rms norm, written out": lambda n, x: (lambda y: y * torch.rsqrt(y.pow(2).mean(-1, True)))(n.f(x) + x),
}
READ_BY_NONE: dict[str, Callable[..., Tensor]] = {
    "an activation": lambda n, x: torch.relu(n.f(x) + x),
    "a linear, then a norm": lambda n, x: n.norm(n.g(n.f(x) + x)),
    "cubes": lambda n, x: (n.f(x) + x).pow(3).mean(-1),
    "the norm of something else": lambda n, x: n.norm(x) * torch.sigmoid(n.f(x) + x),
}


@pytest.mark.parametrize("name", READ_BY_A_NORM)
def test_a_sum_that_a_norm_reads_stays_in_float(name):
    report = fate(READ_BY_A_NORM[name])
    assert codes(report, "add") == ["normalized"]
    assert codes(report, "linear") == [None]


@pytest.mark.parametrize("name", READ_BY_NONE)
def test_a_sum_that_no_norm_reads_is_quantized(name):
    assert codes(fate(READ_BY_NONE[name]), "add") == [None]


def unrolled(n: Net, x: Tensor) -> Tensor:
    """h' = tanh(cell(h)) * x + x: a weight that is used in each of three steps."""
    h = x[:, 0]
    for step in range(3):
        h = torch.tanh(n.cell(h)) * x[:, step] + x[:, step]
    return n.f(h + h)


def looped(n: Net, x: Tensor) -> Tensor:
    def body(h: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(n.cell(h)) * step + step
        return h, h.clone()

    return n.f(scan(body, x[:, 0].clone(), x, dim=1)[1])


def used_twice_side_by_side(n: Net, x: Tensor) -> Tensor:
    return torch.tanh(n.cell(x)) * x + torch.relu(n.cell(-x))


def in_a_row(n: Net, x: Tensor) -> Tensor:
    return n.g(torch.tanh(n.f(x)) * x + x)


def test_the_steps_of_an_unrolled_recurrence_stay_in_float():
    report = fate(unrolled)
    assert set(codes(report, "mul", "add")) == {"recurrence"}
    assert codes(report, "linear") == [None] * 4


def test_so_do_those_in_the_body_of_a_loop():
    report = fate(looped)
    assert set(codes(report, "mul", "add")) == {"recurrence"}
    assert codes(report, "linear") == [None] * 2


@pytest.mark.parametrize("function", [used_twice_side_by_side, in_a_row])
def test_a_weight_whose_result_does_not_come_back_makes_no_recurrence(function):
    assert set(codes(fate(function), "mul", "add")) == {None}


@pytest.mark.parametrize("function", [unrolled, READ_BY_A_NORM["layer norm"]])
def test_a_selector_narrower_than_the_global_one_quantizes_them(function):
    quantizer = Careful(STATIC).set_operator_type(aten.add.Tensor, STATIC)
    assert set(codes(fate(function, quantizer), "add")) == {None}


def test_the_reason_names_the_norm_and_the_selector_that_overrules_it():
    report = fate(READ_BY_A_NORM["layer norm"])
    (add,) = (decision for decision in report.skipped if decision.code == "normalized")
    assert add.reason is not None
    assert add.reason.startswith("layer_norm normalizes it")
    assert "set_operator_type(torch.ops.aten.add.Tensor, ...)" in add.reason


def test_a_quantizer_that_does_not_ask_for_it_quantizes_all():
    assert codes(fate(READ_BY_A_NORM["layer norm"], Toy(STATIC)), "add") == [None]
