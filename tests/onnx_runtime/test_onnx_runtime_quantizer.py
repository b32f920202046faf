"""OnnxRuntimeQuantizer: the contract of quantizers, its configurations, and the reasons why it leaves an operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pt2e_quant import explain, prepare_pt2e
from pt2e_quant.errors import SpecError
from pt2e_quant.quantizer import QuantizationConfig
from pt2e_quant.testing import assert_conforms
from quantizers.onnx_runtime import (
    OnnxRuntimeQuantizer,
    get_onnx_runtime_quantization_config,
    get_onnx_runtime_weight_only_config,
)

STATIC = get_onnx_runtime_quantization_config()


@pytest.mark.slow
@pytest.mark.parametrize("config", [STATIC, get_onnx_runtime_quantization_config(is_dynamic=True)])
def test_the_contract_is_kept(config):
    assert_conforms(OnnxRuntimeQuantizer().set_global(config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "of 4 and of 8 bits, got bits=3"),
        ({"group_size": 48}, "groups of 48: .* blocks of 16, 32, 64"),
        ({"group_size": 8}, "groups of 8: "),
    ],
)
def test_weights_without_a_kernel_are_refused(arguments, message):
    with pytest.raises(SpecError, match=message):
        get_onnx_runtime_weight_only_config(**arguments)


class Net(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(24, 8)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return self.function(self, x)


def decision(function, config, op: str, shape=(1, 4, 8, 8)):
    exported = torch.export.export(Net(function).eval(), (torch.randn(shape),))
    prepared = prepare_pt2e(exported, OnnxRuntimeQuantizer().set_global(config), allow_empty=True)
    return next(one for one in explain(prepared).record.decisions if one.op.startswith(f"aten.{op}."))


FOUR_BITS = get_onnx_runtime_weight_only_config(4, 32)


@pytest.mark.parametrize(
    ("op", "function", "config", "reason"),
    [
        ("conv2d", lambda n, x: n.conv(x), FOUR_BITS, "the configuration keeps activations in float"),
        ("conv2d", lambda n, x: F.conv2d(x, n.weight * x.mean()), STATIC, "is computed at run time"),
        ("linear", lambda n, x: n.linear(x.reshape(2, 5, 24)), FOUR_BITS, "24 inputs do not split into groups of 32"),
        ("add", lambda n, x: torch.add(n.conv(x), n.conv(x * 2), alpha=2), STATIC, "alpha=2; the kernel adds with 1"),
        ("mul", lambda n, x: n.conv(x) * 3.0, STATIC, "one operand is a constant"),
        ("mul", lambda n, x: n.conv(x) * n.weight[0, :1, :1, :1], STATIC, "one operand is a constant"),
        ("mean", lambda n, x: n.conv(x).mean(1), STATIC, "means over whole images only"),
        ("adaptive_avg_pool2d", lambda n, x: F.adaptive_avg_pool2d(n.conv(x), 2), STATIC, "whole images only"),
        ("matmul", lambda n, x: n.conv(x) @ x, STATIC, "unless set_operator_type"),
        ("conv_transpose2d", lambda n, x: F.conv_transpose2d(x, n.weight), STATIC, "transposed convolutions"),
    ],
)
def test_what_has_no_kernel_stays_in_float_with_the_reason(op, function, config, reason):
    shape = (1, 10, 24) if op == "linear" else (1, 4, 8, 8)
    found = decision(function, config, op, shape)
    assert not found.quantized
    assert reason in found.reason
    assert found.code != "arguments", "the way out for all arguments alike"


def test_weights_of_another_type_are_refused():

    asymmetric = QuantizationConfig(STATIC.input_activation, STATIC.output_activation, STATIC.input_activation)
    assert "int8 weights with zero point 0" in decision(lambda n, x: n.conv(x), asymmetric, "conv2d").reason
