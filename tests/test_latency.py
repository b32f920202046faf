"""Profiles: medians by hand, and kernels of each runtime joined with the nodes that they compute."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.latency import KernelTime, Profile, profile_of
from quantizers.onnx_runtime import OnnxRuntimeQuantizer, get_onnx_runtime_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export


class Net(nn.Module):
    """Two products in one delegate of XNNPACK, an op that it lacks, a product in another delegate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.wide, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 256), nn.Linear(256, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.wide(self.conv(x).relu().flatten(2).transpose(1, 2))
        return self.head(torch.cumsum(rows, 1))


def converted(quantizer, x: Tensor):
    prepared = prepare_pt2e(export(Net(), x), quantizer)
    prepared(x)
    return convert_pt2e(prepared)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_row_is_the_median_over_runs_of_all_its_calls():
    calls = [("add", (), 1.0), ("conv", ("c",), 7.0), ("add", (), 2.0)] + [("add", (), 4.0), ("conv", ("c",), 5.0)] * 2
    calls.insert(5, ("add", (), 3.0))  # runs: add 1 + 2, 4 + 3, 4 + 6; conv 7, 5, 5
    calls.append(("add", (), 6.0))
    found = profile_of([20.0, 30.0, 10.0], calls)
    assert found == Profile(20.0, (KernelTime("add", 2, 7.0), KernelTime("conv", 1, 5.0, ("c",))))
    assert found.elsewhere == 8.0
    assert found.of_nodes() == {"c": 5.0}
    assert json.loads(found.to_json())["kernels"][1]["nodes"] == ["c"]
    assert str(found.kernels[1]).split() == ["5", "us", "1", "x", "conv", "of", "c"]


def test_onnxruntime_tells_the_time_of_each_node(x):
    pytest.importorskip("onnxruntime")
    from pt2e_quant.lowering.onnx import lower_to_onnx

    config = get_onnx_runtime_quantization_config()
    graph = converted(OnnxRuntimeQuantizer().set_global(config), x)
    program = lower_to_onnx(graph, verify=False)
    profile = program.profile(x, runs=3)
    timed = {(node, kernel.kernel) for kernel in profile.kernels for node in kernel.nodes}
    assert {(kernel.node, kernel.kernel) for kernel in program.kernels if kernel.precision == "int8"} <= timed
    assert {("conv2d", "QLinearConv"), ("linear_1", "QGemm")} <= timed
    assert all(kernel.calls == 1 for kernel in profile.kernels if kernel.nodes)


@pytest.mark.slow
def test_executorch_tells_the_time_of_the_products_of_each_delegate(x):
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    config = get_symmetric_quantization_config(is_per_channel=True)
    program = lower_to_executorch(converted(XNNPACKQuantizer().set_global(config), x), verify=False)
    profile = program.profile(x, runs=3)
    by_node = {node: kernel.kernel for kernel in profile.kernels for node in kernel.nodes}
    assert program.delegates == 2
    assert set(by_node) == {"conv2d", "linear", "linear_1", "cumsum"}
    assert by_node["conv2d"].startswith("Convolution (NHWC")
    assert by_node["linear"].startswith("Fully Connected (NC")
    assert by_node["linear_1"].startswith("Fully Connected (NC")
    assert by_node["cumsum"] == "portable"
    assert profile.microseconds > sum(kernel.microseconds for kernel in profile.kernels) > 0
