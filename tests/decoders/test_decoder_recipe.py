"""The recipe for decoders on a small Llama without training: what it quantizes, stores, shares, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from benchmarks.tiny_llama import Config, TinyLlama, export, greedy, int8_quantizers, lower, quantize
from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import SharingError, SpecError
from pt2e_quant.lowering.executorch.program import ExecutorchMethods
from pt2e_quant.ops import LINEAR
from quantizers.cache import CacheQuantizer, get_cache_config
from quantizers.decoder import get_decoder_quantizer
from quantizers.xnnpack import get_symmetric_quantization_config
from tests.nets import sqnr

CONFIG = Config(vocabulary=64, width=64, layers=1, hidden=96, length=24)
CACHES = ("blocks.0.attention.key_cache", "blocks.0.attention.value_cache")


def small() -> TinyLlama:
    """With weights of norms other than 1: after those, values of a quantized table lie between two codes for ever."""
    torch.manual_seed(0)
    model = TinyLlama(CONFIG).eval()
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
    return model


def text(length: int, seed: int = 1) -> Tensor:
    return torch.randint(CONFIG.vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Made:
    exported: ExportedProgram
    plain: GraphModule
    integer: GraphModule

    def fresh(self) -> GraphModule:
        """The graph with the integer cache, empty."""
        return convert_pt2e(_prepared(self.exported), integer_buffers=["*cache"])


def _prepared(exported: ExportedProgram) -> GraphModule:
    prepared = prepare_pt2e(exported, get_decoder_quantizer(integer_cache=True))
    with torch.no_grad():
        prepared(text(16), torch.arange(16))
    return prepared


@pytest.fixture(scope="module")
def made() -> Made:
    exported = export(small())
    prepared = _prepared(exported)
    return Made(exported, convert_pt2e(prepared), convert_pt2e(prepared, integer_buffers=["*cache"]))


@pytest.fixture(scope="module")
def program(made: Made) -> ExecutorchMethods:
    pytest.importorskip("executorch")
    return lower(made.integer)


def test_every_linear_and_the_table_are_quantized(made):
    ops = [decision.op for decision in explain(made.plain).quantized]
    linears = [node for node in made.exported.graph.nodes if node.target in LINEAR]
    assert len(linears) == 8
    assert ops.count("aten.linear.default") == len(linears)
    assert ops.count("aten.embedding.default") == 1


def test_a_tied_table_of_4_bits_is_quantized_once(made):
    stored = [value for name, value in made.plain.named_buffers() if tuple(value.shape) == (64, 64)]
    assert [value.dtype for value in stored].count(torch.int8) == 3  # query, out, and the table that is the head
    assert all(parameter.dim() == 1 for parameter in made.plain.parameters())  # the norms have them


def test_an_integer_cache_computes_what_the_float_cache_computes(made):
    with torch.no_grad():
        one, other = made.fresh(), made.plain
        for inputs in ((text(9), torch.arange(9)), (text(1, 3), torch.tensor([9]))):
            assert torch.equal(one(*inputs), other(*inputs))


def test_an_integer_cache_is_a_quarter_of_the_size_and_starts_with_zeros(made):
    caches = {name: value for name, value in made.fresh().named_buffers() if "cache" in name}
    assert tuple(caches) == CACHES
    assert all(value.dtype is torch.int8 and not value.any() for value in caches.values())
    assert {qparams.zero_point for qparams in explain(made.integer).buffers.values()} == {0}


def test_the_program_computes_what_the_graph_computes_in_both_methods(made, program):
    """Per token and per group are exact in XNNPACK. A value on the edge of two codes may fall to the other side.

    One such, of 64 values that are about 40 steps large, is 50 dB below them; a cache that is not shared is not 10 dB.
    """
    graph = made.fresh()
    program.reset()
    with torch.no_grad():
        for name, inputs in (
            ("prefill", (text(9), torch.arange(9))),
            ("decode", (text(1, 3), torch.tensor([9]))),
            ("decode", (text(1, 4), torch.tensor([10]))),
            ("prefill", (text(3, 5), torch.arange(11, 14))),
        ):
            assert sqnr(graph(*inputs), program[name].run(*inputs)[0].clone()) > 40


def test_the_program_writes_the_tokens_that_the_graph_writes(made, program):
    program.reset()
    graph = made.fresh()
    prompt = text(5)[0]
    of_file = greedy(lambda *x: program["prefill"].run(*x)[0], lambda *x: program["decode"].run(*x)[0], prompt, 6)
    assert of_file.tokens == greedy(graph, graph, prompt, 6).tokens


def test_methods_share_the_caches(program):
    assert program.shared == CACHES


def test_every_linear_is_an_integer_kernel_in_both_methods(program):
    assert [method.count("dynamic") for method in program.values()] == [8, 8]


def test_a_tied_table_stands_twice_in_the_file_and_a_remark_says_so(program):
    """Half a byte for each of 64 x 64 values, and a float32 scale for each 32 of them."""
    for method in program.values():
        (remark,) = method.remarks
        assert remark.node == "embedding"
        assert remark.text.startswith("its table is also the weight of linear_7; their kernels read different layouts")
        assert f"the file has it twice, {64 * 32 + 4 * 128} bytes more than once" in remark.text


def test_a_tied_table_of_8_bits_and_a_head_of_4_are_refused_by_name(made):
    with pytest.raises(SharingError, match=r"weight' would be stored 2 times, each time as other integers"):
        quantize(made.exported, get_decoder_quantizer(embedding_bits=8))


def test_a_table_that_is_not_tied_has_8_bits_on_request():
    model = small()
    model.head.weight = nn.Parameter(torch.randn(64, 64))
    graph = quantize(export(model), get_decoder_quantizer(embedding_bits=8))
    assert 100 < max(int(value.max()) for value in graph.buffers() if value.dtype is torch.int8) <= 127


@pytest.mark.parametrize(("arguments", "message"), [((16,), "multiple of 32"), ((32, 6), "8 or 4 bits, got 6")])
def test_what_has_no_kernel_is_an_error(arguments, message):
    with pytest.raises(SpecError, match=message):
        get_decoder_quantizer(*arguments)


def test_attention_that_stays_whole_hides_no_linear_after_its_mask(made):
    """On x86 attention is one operator; what its mask holds ends there, and the linears after it are quantized."""
    report = explain(prepare_pt2e(made.exported, int8_quantizers()["inductor"]))
    assert [decision.op for decision in report.quantized].count("aten.linear.default") == 8


# --- what is written to buffers ---------------------------------------------------------------------------------------


class Write(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("cache", torch.zeros(6, 4))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        self.how(self.cache, torch.tanh(x), at)
        return self.cache + 1


def _put(cache, x, at):
    cache[at] = x


def _shift(cache, x, at):
    cache.copy_(torch.cat([cache[2:], x]))


WRITES = {"index_copy_": lambda cache, x, at: cache.index_copy_(0, at, x), "index_put_": _put, "copy_": _shift}
INPUTS = torch.linspace(-3, 2, 8).reshape(2, 4), torch.tensor([1, 3])


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_rounded_to_steps_of_the_largest(name):
    prepared = prepare_pt2e(torch.export.export(Write(WRITES[name]), INPUTS), CacheQuantizer())
    prepared(*INPUTS)
    converted = convert_pt2e(prepared, integer_buffers=["cache"])
    values = torch.tanh(INPUTS[0])
    scale = float(values.abs().max()) / 127.5
    assert explain(converted).buffers["cache"].scale == pytest.approx(scale, rel=1e-6)
    written = converted(*INPUTS)[[4, 5] if name == "copy_" else INPUTS[1]] - 1
    torch.testing.assert_close(written, torch.round(values / scale).clamp(-128, 127) * scale, rtol=0, atol=1e-6)


def _onto_a_result(cache, x, at):
    cache.copy_(torch.zeros(6, 4).index_copy_(0, at, x))


REFUSED = {
    "accumulate": (
        lambda cache, x, at: cache.index_put_((at,), x, accumulate=True), get_cache_config(), "index_put_",
        "it adds to what the buffer holds",
    ),
    "dynamic": (
        WRITES["index_copy_"], get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True), "index_copy_",
        "a buffer keeps its integers",
    ),
    "no buffer": (_onto_a_result, get_cache_config(), "index_copy_", "which is not a buffer of the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_buffer_cannot_hold_stays_float_with_the_reason(name):
    how, config, node, reason = REFUSED[name]
    prepared = prepare_pt2e(torch.export.export(Write(how), INPUTS), CacheQuantizer(config), allow_empty=True)
    assert reason in next(d.reason for d in explain(prepared).record.decisions if d.node == node)
