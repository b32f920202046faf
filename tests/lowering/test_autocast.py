"""Lowering under autocast: a program computes what its graph says, or an error says why it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import LoweringError
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.quantizer import Quantizer
from quantizers.onnx_runtime import OnnxRuntimeQuantizer, get_onnx_runtime_quantization_config
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export


def converted(quantizer: Quantizer) -> GraphModule:
    x = torch.randn(1, 3, 8, 8)
    prepared = prepare_pt2e(export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 1)), x), quantizer)
    prepared(x)
    return convert_pt2e(prepared)


def test_executorch_computes_in_float32():
    """Its quantize ends the process when it meets bfloat16."""
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    graph = converted(XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
    with torch.autocast("cpu", torch.bfloat16):
        program = lower_to_executorch(graph)
    assert program.verified
    assert program.run(torch.randn(1, 3, 8, 8))[0].dtype is torch.float32


def test_onnx_computes_in_float32():
    pytest.importorskip("onnxruntime")
    from pt2e_quant.lowering.onnx import lower_to_onnx

    graph = converted(OnnxRuntimeQuantizer().set_global(get_onnx_runtime_quantization_config()))
    with torch.autocast("cpu", torch.bfloat16):
        program = lower_to_onnx(graph)
    assert program.verified
    assert program.run(torch.randn(1, 3, 8, 8))[0].dtype is torch.float32


def x86() -> GraphModule:
    return converted(X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()))


@pytest.mark.slow
def test_inductor_computes_in_bfloat16_between_integers():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        program = lower_to_inductor(x86())
    assert program.verified
    assert [kernel.kernel for kernel in program.kernels] == ["onednn.qconv_pointwise"] * 2
    assert program(torch.randn(1, 3, 8, 8)).dtype is torch.bfloat16


def test_inductor_has_no_kernels_for_float16():
    graph = x86()
    with torch.autocast("cpu", torch.float16), pytest.raises(LoweringError, match="autocast to float16"):
        lower_to_inductor(graph)
