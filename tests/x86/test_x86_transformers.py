"""Transformers through Inductor: every linear on integers, shared inputs quantized once, sizes other than compiled for.

Weights are random. SQNR is that of the last hidden states against the float model, on inputs that calibration and
compilation did not see. Eight bits over the range of a normal tensor cost about 40 dB at one place; a dozen of such
places on one residual stream stay above 25 dB, the bound that users were promised.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.inductor import InductorProgram, lower_to_inductor
from quantizers.x86_inductor import X86InductorQuantizer
from tests.nets import sqnr
from tests.transformers_xnnpack.small_transformers import bert, export_tokens, tokens, vit
from tests.x86.x86_rows import RECIPES

pytest.importorskip("transformers")

aten = torch.ops.aten
Q = torch.ops.quantized_decomposed
BOUND = 25.0


@dataclass(frozen=True)
class Outcome:
    """linears: how many the float graph has; exact, found: outputs of the float model and of the program."""

    linears: int
    converted: GraphModule
    program: InductorProgram
    exact: Tensor
    found: Tensor


def export(name: str, attention: str) -> tuple[torch.nn.Module, ExportedProgram, list[tuple[Tensor, ...]]]:
    """The model with dynamic sizes, and three inputs of sizes other than that of the example."""
    torch.manual_seed(1)
    if name == "bert":
        model = bert(attention, layers=2)
        return model, export_tokens(model, batch=True), [tokens(length, 3) for length in (20, 7, 31)]
    model = vit(attention, layers=2)
    with torch.no_grad():
        batch = {"pixels": {0: Dim("batch", max=8)}}
        exported = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=batch)
    return model, exported, [(torch.randn(size, 3, 16, 16),) for size in (1, 5, 8)]


@functools.cache
def outcome(name: str, attention: str, recipe: str) -> Outcome:
    model, exported, inputs = export(name, attention)
    quantizer = X86InductorQuantizer().set_operator_type(aten.linear.default, RECIPES[recipe])
    prepared = prepare_pt2e(exported, quantizer, require=["linear"])
    with torch.no_grad():
        for batch in inputs[1:]:
            prepared(*batch)
        converted = convert_pt2e(prepared)
        program = lower_to_inductor(converted)
        exact, found = model(*inputs[0]), program(*inputs[0])
    linears = exported.graph.find_nodes(op="call_function", target=aten.linear.default)
    return Outcome(len(linears), converted, program, exact, found)


QUICK = [("bert", "sdpa", "dynamic")]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=" ".join(case))
    for case in ((n, a, r) for n in ("bert", "vit") for a in ("sdpa", "eager") for r in ("dynamic", "static"))
]


@pytest.mark.parametrize(("name", "attention", "recipe"), CASES)
def test_every_linear_becomes_an_integer_kernel(name, attention, recipe):
    made = outcome(name, attention, recipe)
    kernels = [kernel.precision for kernel in made.program.kernels if kernel.op == "aten.linear.default"]
    assert kernels == ["int8" if recipe == "static" else "dynamic"] * made.linears
    assert made.linears == 12
    assert made.program.fallbacks == ()


@pytest.mark.parametrize(("name", "attention", "recipe"), CASES)
def test_the_program_is_near_the_float_model_on_other_sizes(name, attention, recipe):
    made = outcome(name, attention, recipe)
    assert made.found.shape == made.exact.shape
    assert sqnr(made.exact, made.found) >= BOUND


def test_query_key_and_value_are_quantized_once_and_computed_by_one_kernel():
    made = outcome("bert", "sdpa", "dynamic")
    chosen = made.converted.graph.find_nodes(op="call_function", target=Q.choose_qparams.tensor)
    assert len(chosen) == 2 * 4  # of two layers: the inputs of attention, of its output, of the two of the MLP
    assert [kernel.node for kernel in made.program.kernels[:3]] == ["linear", "linear_1", "linear_2"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_positions_and_attention_are_not_observed(attention):
    prepared = prepare_pt2e(
        export_tokens(bert(attention, layers=2), batch=True), X86InductorQuantizer().set_global(RECIPES["static"])
    )
    watched = {
        node.args[0] for node in prepared.graph.nodes if node.op == "call_module" and "activation_p" in node.name
    }
    activations = {node for node in watched if node.op != "get_attr"}
    readers = {str(user.target) for node in activations for user in node.users if user.op == "call_function"}
    assert all(node.meta["val"].dtype is torch.float32 for node in watched)
    assert readers <= {"aten.linear.default", "aten.add.Tensor", "aten.gelu.default", "aten.view.default"}
    assert len(activations) == 2 * 4


@pytest.mark.slow
def test_a_package_takes_other_sizes_too():
    made = outcome("bert", "sdpa", "dynamic")
    package, inputs = lower_to_inductor(made.converted, mode="aoti"), tokens(17, 5)
    torch.testing.assert_close(package(*inputs), made.program(*inputs), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_products_of_attention_on_request_stay_float_and_are_remarked_on():
    model, exported, inputs = export("bert", "sdpa")
    quantizer = X86InductorQuantizer().set_operator_type(aten.linear.default, RECIPES["static"])
    quantizer.set_function_type_qconfig(torch.matmul, RECIPES["static"])
    prepared = prepare_pt2e(exported, quantizer, decompose={"sdpa"})
    with torch.no_grad():
        for batch in inputs[1:]:
            prepared(*batch)
        program = lower_to_inductor(convert_pt2e(prepared))
        assert sqnr(model(*inputs[0]), program(*inputs[0])) >= BOUND
    dropped = [remark for remark in program.remarks if "no integer kernel reads it" in remark.text]
    assert dropped
    assert [kernel.op for kernel in program.kernels].count("aten.linear.default") == 12
    assert not [kernel for kernel in program.kernels if "matmul" in kernel.op]


@pytest.mark.slow
def test_minilm_keeps_its_embeddings_with_the_recipes_of_the_benchmark():
    from benchmarks import transformers_models as minilm

    if importlib.util.find_spec(minilm.PACKAGE) is None:
        pytest.skip(f"{minilm.PACKAGE}, a package with the weights of MiniLM, is not installed")
    model, tokenize = minilm.load_minilm()
    texts = [tokenize(text) for text in minilm.sentences(20)]
    with torch.no_grad():
        exported = torch.export.export(model, texts[8])
        exact = torch.cat([model(*text) for text in texts[8:]])
        dynamic = minilm.inductor_dynamic(exported, texts[:8])
        static = minilm.inductor_static(exported, texts[:8])
        found, other = (torch.cat([program(*text) for text in texts[8:]]) for program in (dynamic, static))
    assert dynamic.count("dynamic") == static.count("int8") + static.count("dynamic") == 36
    assert sqnr(exact, found) >= 20.0
    assert torch.cosine_similarity(exact, found).mean() >= 0.995
    assert sqnr(exact, other) >= 18.0
