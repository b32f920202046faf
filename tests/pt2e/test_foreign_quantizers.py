"""Quantizers of other projects work as they are: the engine reads annotations by their fields."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CalibrationError
from pt2e_quant.quantizer import ComposableQuantizer
from tests.nets import MLP, ConvNet, export
from tests.pt2e.kit import STATIC, Toy, calls, quantizes, relative_error

pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")

from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)

aten = torch.ops.aten

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def foreign(**options: Any) -> XNNPACKQuantizer:
    """ExecuTorch's quantizer, on torchao's classes. It exports its patterns for each graph, which takes seconds."""
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **options))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet()


@pytest.fixture(scope="module")
def prepared(model: nn.Module) -> GraphModule:
    return prepare_pt2e(export(model, X), foreign())


def test_its_uncalibrated_observers_are_named(prepared):
    with pytest.raises(CalibrationError, match=r"(?s)never saw data.*in module 'act1'"):
        convert_pt2e(prepared)


def test_the_xnnpack_quantizer_of_executorch_quantizes(prepared, model):
    prepared(X)
    converted = convert_pt2e(prepared)
    assert {"conv2d", "conv2d_1", "linear"} <= {decision.node for decision in explain(converted).quantized}
    assert relative_error(converted(X), model(X)) < 0.1  # 8 bits through five ops: some 1/255 each


def test_the_report_describes_its_specs(prepared):
    record = explain(prepared).record
    assert {decision.rule for decision in record.quantized} == {"XNNPACKQuantizer"}
    assert any("per channel of dim 0, symmetric, PerChannelMinMaxObserver" in group.spec for group in record.groups)


def test_observers_of_torchao_watch(prepared):
    kinds = {type(module).__module__.split(".")[0] for name, module in prepared.named_children() if "post" in name}
    assert kinds == {"torchao"}


@pytest.mark.slow
def test_its_dynamic_configuration_needs_no_data():
    converted = convert_pt2e(prepare_pt2e(export(MLP(), torch.randn(4, 10)), foreign(is_dynamic=True)))
    assert len(calls(converted, torch.ops.quantized_decomposed.choose_qparams.tensor)) == 2


class Cat(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y * 3], 1)


@pytest.mark.slow
def test_it_shares_scales_as_it_says():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    gm = prepare_pt2e(export(Cat(), x, y), foreign())
    gm(x, y)
    (cat,) = calls(convert_pt2e(gm), aten.cat.default)
    assert len({dq.args[1:] for dq in cat.args[0]}) == 1


@pytest.mark.slow
def test_it_composes_with_a_quantizer_of_ours():
    """Ours has the second linear, from -120; theirs the rest, from -128; the tensor between them is requantized."""
    x = torch.randn(4, 10)
    ours = Toy().set_module_name("down", STATIC)
    gm = prepare_pt2e(export(MLP(), x), ComposableQuantizer([ours, foreign()]))
    gm(x)
    assert [node.args[3] for node in quantizes(convert_pt2e(gm))] == [-128, -128, -120, -120]
