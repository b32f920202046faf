"""A user can demand coverage, and learns of every miss; nested graphs are part of the account (users' pain 1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import explain, prepare_pt2e
from pt2e_quant.errors import CoverageError, TargetingError
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import MLP, export

STATIC = get_symmetric_quantization_config()
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.left = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cond(x.sum() > 0, lambda y: self.left(y), lambda y: y.relu(), (x,))


@pytest.mark.parametrize("require", ["linear", ["linear"], ["up", "down"], ["linear*"], ["u*"]])
def test_what_is_quantized_satisfies_the_demand(require):
    prepared = prepare_pt2e(export(MLP(), torch.randn(3, 10)), XNNPACKQuantizer(STATIC), require=require)
    assert {"linear", "linear_1"} <= {decision.node for decision in explain(prepared).quantized}


def test_a_miss_is_named_with_its_module_its_line_and_the_reason():
    quantizer = XNNPACKQuantizer(STATIC).set_module_name("down", None)
    with pytest.raises(CoverageError) as caught:
        prepare_pt2e(export(MLP(), torch.randn(3, 10)), quantizer, require="linear")
    text = str(caught.value)
    assert text.startswith("1 of the 2 ops that must be quantized stay in float")
    for part in ("linear_1 = aten.linear.default", "module name 'down'", "in module 'down'", "nets.py:"):
        assert part in text


def test_a_module_demands_its_weighted_ops_only():
    """The relu inside a dynamic MLP is float by design, and no reason to refuse the module around it."""
    exported = export(nn.Sequential(MLP()), torch.randn(3, 10))
    assert (
        explain(prepare_pt2e(exported, XNNPACKQuantizer(DYNAMIC), require=["0"])).skipped[0].op == "aten.relu.default"
    )


@pytest.mark.parametrize("entry", ["lineer_9", "conv", "encoder.0"])
def test_a_demand_that_names_nothing_is_an_error(entry):
    with pytest.raises(TargetingError, match="no such op or module"):
        prepare_pt2e(export(MLP(), torch.randn(3, 10)), XNNPACKQuantizer(STATIC), require=[entry])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch, while it captures cond
@pytest.mark.parametrize("strict", [False, True])
def test_ops_in_the_branches_of_cond_stand_in_the_report_and_count_as_misses(strict):
    exported = export(Branches(), torch.randn(2, 4), strict=strict)
    quantizer = XNNPACKQuantizer(STATIC).set_module_name("left", None)
    report = explain(prepare_pt2e(exported, quantizer))
    nested = [decision for decision in report.skipped if "." in decision.node]
    assert sorted(decision.op for decision in nested) == ["aten.linear.default", "aten.relu.default"]
    with pytest.raises(CoverageError, match="1 of the 2 ops") as caught:
        prepare_pt2e(exported, quantizer, require="linear")
    assert "true_graph_0.linear_1 = aten.linear.default: kept in float by module name 'left'" in str(caught.value)
