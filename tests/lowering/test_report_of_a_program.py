"""The report and the program that a model was lowered to speak of the same nodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.common.program import remarks_on_float
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export

pytest.importorskip("executorch")


class Net(nn.Module):
    """Integers, a float op that XNNPACK has, one that it has not, and one that computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(torch.sigmoid(self.drop(torch.relu(self.norm(self.conv(x))))), 1)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 6, 6)


@pytest.fixture(scope="module")
def converted(x) -> GraphModule:
    prepared = prepare_pt2e(export(Net(), x), XNNPACKQuantizer(get_symmetric_quantization_config(is_per_channel=True)))
    prepared(x)
    return convert_pt2e(prepared)


@pytest.fixture(scope="module")
def program(converted) -> ExecutorchProgram:
    return lower_to_executorch(converted)


def test_every_op_of_the_report_is_delegated_or_not_by_the_same_name(converted, program):
    """Users' item 2: the node ids of the report are joinable after lowering, with delegated or not delegated."""
    report = explain(converted)
    assert report.lowered(program) == {
        "conv2d": "int8, delegate 0",
        "relu": "int8, delegate 0",
        "dropout": "removed while lowering",
        "sigmoid": "float, delegate 0",
        "cumsum": "not delegated: XNNPACK has no kernel for aten.cumsum.default",
    }
    assert set(report.lowered(lower_to_executorch(converted, backend=None)).values()) == {
        "not delegated: no backend was asked for",
        "removed while lowering",
    }


def test_its_profile_names_the_nodes_of_products_and_of_what_is_outside_of_delegates(program, x):
    profile = program.profile(x, runs=3)
    assert set(profile.of_nodes()) == {"conv2d", "cumsum"}
    kernels = {kernel.kernel for kernel in profile.kernels}
    assert {"portable", "Sigmoid (NC)"} <= kernels
    assert any(kernel.startswith("Convolution (NHWC") for kernel in kernels)
    assert profile.microseconds > sum(kernel.microseconds for kernel in profile.kernels) > 0


def test_a_graph_without_integers_is_remarked_on():
    """Lowering an export that nobody quantized is fine, and said."""
    x = torch.randn(2, 3, 6, 6)
    exported = export(nn.Conv2d(3, 5, 3), x)
    prepared = prepare_pt2e(exported, XNNPACKQuantizer(get_symmetric_quantization_config()))
    prepared(x)
    assert remarks_on_float(convert_pt2e(prepared)) == ()
    (remark,) = lower_to_executorch(exported, verify=False).remarks
    assert str(remark).startswith("output: nothing in this graph is quantized")
