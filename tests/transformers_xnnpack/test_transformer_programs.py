"""Transformers as .pte: one delegate, integer linears, quantized embeddings, the numbers of the converted graph."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from pt2e_quant.quantizer import ComposableQuantizer, Quantizer
from quantizers.embedding import EmbeddingQuantizer, get_embedding_config
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config, get_symmetric_quantization_config
from tests.nets import sqnr
from tests.transformers_xnnpack.small_transformers import bert, export_tokens, llama, tokens

pytest.importorskip("executorch")
pytest.importorskip("transformers")

INTEGERS_AND_MASKS = {"int64", "bool"}


@dataclass(frozen=True)
class Outcome:
    converted: GraphModule
    program: ExecutorchProgram
    inputs: tuple[Tensor, Tensor]
    of_model: Tensor
    of_graph: Tensor
    of_file: Tensor


def run(model, exported, quantizer: Quantizer, inputs: tuple[Tensor, Tensor]) -> Outcome:
    converted = convert_pt2e(prepare_pt2e(exported, quantizer))
    program = lower_to_executorch(converted)
    with torch.no_grad():
        return Outcome(converted, program, inputs, model(*inputs), converted(*inputs), program.run(*inputs)[0].clone())


@pytest.fixture(scope="module")
def encoder() -> Outcome:
    """BERT with a dynamic length: linears per token, embeddings in 8 bits."""
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer().set_global(config)])
    model = bert()
    return run(model, export_tokens(model), quantizer, tokens(length=17, padding=5))


@pytest.fixture(scope="module")
def decoder() -> Outcome:
    """Llama with 4-bit weights in groups of 32 and 4-bit embeddings; rotary, grouped heads, RMSNorm, SwiGLU."""
    quantizer = ComposableQuantizer(
        [EmbeddingQuantizer(get_embedding_config(4, 32)), XNNPACKQuantizer().set_global(get_8da4w_config(32))]
    )
    model = llama(tied=False)
    return run(model, export_tokens(model, length=False), quantizer, tokens(padding=0))


@pytest.fixture(params=["encoder", pytest.param("decoder", marks=pytest.mark.slow)])
def outcome(request) -> Outcome:
    return request.getfixturevalue(request.param)


def test_there_is_one_delegate(outcome):
    assert outcome.program.delegates == 1


def test_every_linear_is_an_integer_kernel(outcome):
    linears = {node.name for node in outcome.converted.graph.nodes if node.target is torch.ops.aten.linear.default}
    assert len(linears) >= 6
    assert {kernel.node for kernel in outcome.program.kernels if kernel.precision == "dynamic"} == linears


def test_the_program_computes_what_the_converted_graph_computes(outcome):
    """Per token and per group are exact in XNNPACK; the float operators differ by rounding (1e-7 of a value, 120 dB).

    A value on the edge between two codes may fall to the other side: hence no more than 60 dB are asked for.
    """
    assert sqnr(outcome.of_graph, outcome.of_file) > 60


def test_quantizing_keeps_the_signal(encoder, decoder):
    assert sqnr(encoder.of_model, encoder.of_graph) > 30  # 8 bits everywhere, about 40 dB for one place
    assert sqnr(decoder.of_model, decoder.of_graph) > 10  # 4 bits: 20 dB for one place, in a chain of 8


def test_tables_are_read_by_the_kernels_for_quantized_embeddings(encoder, decoder):
    outside = {left.op for left in encoder.program.undelegated}
    assert "quantized_decomposed.embedding_byte.default" in outside
    assert "quantized_decomposed.embedding_4bit.default" in {left.op for left in decoder.program.undelegated}
    assert not any("dequantize" in op for op in outside)


def test_outside_is_nothing_but_tables_and_integers(outcome):
    """What is left: embeddings, positions and masks, which are integers or booleans or made from such."""
    of_numbers = {"linear", "bmm", "softmax", "layer_norm", "mean", "expand", "mul", "sub", "rsqrt", "gelu", "sigmoid"}
    assert not {left.op for left in outcome.program.undelegated if left.op.split(".")[1].strip("_") in of_numbers}
