"""lower_to_onnx on whole architectures: a ResNet, a MobileNet, an encoder, and a decoder with weights of 4 bits."""

from __future__ import annotations

import pytest
import torch

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.onnx import OnnxProgram, lower_to_onnx
from quantizers.onnx_runtime import (
    OnnxRuntimeQuantizer,
    get_onnx_runtime_quantization_config,
    get_onnx_runtime_weight_only_config,
)
from tests.models.architectures import small_bert, small_mobilenet_v2, small_resnet
from tests.transformers_xnnpack.small_transformers import export_tokens, llama, tokens


def lowered(exported, config, batches) -> OnnxProgram:
    prepared = prepare_pt2e(exported, OnnxRuntimeQuantizer().set_global(config))
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return lower_to_onnx(convert_pt2e(prepared))


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_resnet, small_mobilenet_v2], ids=["resnet", "mobilenet"])
def test_images_within_one_step(make):
    model = make()
    batches = [tuple(torch.randn_like(x) for x in model.inputs) for _ in range(2)]
    program = lowered(model.export(), get_onnx_runtime_quantization_config(), batches)
    assert program.verified.outputs[0].steps <= 1.01
    assert program.fallbacks == ()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_encoder_as_the_graph(dynamic):
    model = small_bert()
    program = lowered(model.export(), get_onnx_runtime_quantization_config(is_dynamic=dynamic), [model.inputs])
    assert program.verified
    assert program.count("dynamic" if dynamic else "int8") >= 13


@pytest.mark.slow
def test_a_decoder_of_4_bits_with_texts_of_any_length():
    exported = export_tokens(llama())
    program = lowered(exported, get_onnx_runtime_weight_only_config(4, 32), [])
    assert [kernel.kernel for kernel in program.kernels] == ["MatMulNBits"] * 8
    ids, mask = tokens(length=23)
    expected = exported.module()(ids, mask)
    assert program(ids, mask).shape == expected.shape
