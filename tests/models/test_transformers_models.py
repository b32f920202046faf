"""Whole models: prepare, calibrate, convert, lower and run ResNet and MobileNetV2 (static) and BERT (dynamic).

The quick tests take small configurations, the slow ones those of the benchmarks: ResNet-18, MobileNetV2 and BERT base.
Weights are random, so the numbers say what quantization does to the arithmetic, not to an accuracy.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from benchmarks.memory import measure
from benchmarks.models import MODELS, BenchmarkModel
from pt2e_quant import Report, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from pt2e_quant.ops import CONV, LINEAR
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.models.architectures import SMALL
from tests.nets import sqnr

pytest.importorskip("executorch")
pytest.importorskip("transformers")

WEIGHTED = frozenset((*CONV, *LINEAR))


@dataclass(frozen=True)
class Expectation:
    """What holds for a model.

    sqnr:    lower bound, in dB, of the converted output's signal over its error against the float model. Rounding a
             tensor of 8 bits over its range costs about 40 dB at one place; a chain of N such places loses up to
             10 log10(N) more, and the measured value lies in between. The bound is 3 dB below the measured one.
    ratio:   upper bound of the int8 .pte in units of the float .pte; None where it is not lowered a second time
    outside: ops left outside the delegate
    agreement: lower bound, in dB, of the file's output over its difference to the graph's, where it is float: sums in
             another order, until one moves a value across the border of two codes; twelve layers carry that on
    """

    build: functools.partial[BenchmarkModel]
    sqnr: float
    ratio: float | None
    outside: frozenset[str] = frozenset()
    agreement: float = 100.0


BERT_OUTSIDE = frozenset(("aten.embedding.default",))
"""Positions and masks are constants here; what is made from their integers is stored."""

QUICK = {
    "resnet": Expectation(SMALL["resnet"], sqnr=30.7, ratio=0.35),
    "mobilenet_v2": Expectation(SMALL["mobilenet_v2"], sqnr=37.2, ratio=None),
    "bert": Expectation(SMALL["bert"], sqnr=38.3, ratio=0.5, outside=BERT_OUTSIDE),
}
FULL = {
    "resnet18": Expectation(MODELS["resnet18"], sqnr=31.7, ratio=0.35),
    "mobilenet_v2": Expectation(MODELS["mobilenet_v2"], sqnr=35.0, ratio=0.35),
    "bert_base": Expectation(MODELS["bert_base"], sqnr=31.0, ratio=0.5, outside=BERT_OUTSIDE, agreement=33.0),
}
EXPECTATIONS = {f"quick {name}": value for name, value in QUICK.items()}
EXPECTATIONS |= {f"full {name}": value for name, value in FULL.items()}
SLOW = {"quick mobilenet_v2", "quick bert", *(f"full {name}" for name in FULL)}
MARKED = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXPECTATIONS]


@dataclass(frozen=True)
class Outcome:
    expectation: Expectation
    exported: ExportedProgram
    converted: GraphModule
    program: ExecutorchProgram
    float_bytes: int | None
    inputs: list[Tensor]
    of_model: Tensor
    of_graph: Tensor
    of_file: Tensor

    @property
    def report(self) -> Report:
        return explain(self.converted)


@pytest.fixture(scope="module", params=MARKED)
def outcome(request) -> Outcome:
    """One model after the other, all the way; a module-wide fixture keeps one of them in memory at a time."""
    expectation = EXPECTATIONS[request.param]
    model = expectation.build()
    exported = model.export()
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=model.dynamic)
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config))
    draw = torch.randn if not model.dynamic else functools.partial(torch.randint, 0, 100)
    torch.manual_seed(1)
    with torch.no_grad():
        if not model.dynamic:
            for _ in range(4):
                prepared(draw(model.inputs[0].shape))
        converted = convert_pt2e(prepared)
        program = lower_to_executorch(converted)
        inputs = [draw(model.inputs[0].shape) for _ in range(3)]
        return Outcome(
            expectation,
            exported,
            converted,
            program,
            len(lower_to_executorch(exported).buffer) if expectation.ratio is not None else None,
            inputs,
            torch.cat([model.module(x) for x in inputs]),
            torch.cat([converted(x) for x in inputs]),
            torch.cat([program.run(x)[0] for x in inputs]),
        )


def test_every_convolution_and_linear_is_quantized(outcome):
    targets = [node.target for node in outcome.exported.graph.nodes]
    expected = Counter(str(target) for target in targets if target in WEIGHTED)
    assert expected.total() > 10
    assert Counter(d.op for d in outcome.report.quantized if d.op in expected) == expected


def test_every_convolution_and_linear_becomes_an_integer_kernel(outcome):
    expected = {d.node for d in outcome.report.quantized if "conv" in d.op or "linear" in d.op}
    kernels = outcome.program.kernels
    assert {kernel.node for kernel in kernels if kernel.precision in ("int8", "dynamic")} >= expected


def test_the_converted_graph_stays_close_to_the_float_model(outcome):
    assert sqnr(outcome.of_model, outcome.of_graph) > outcome.expectation.sqnr


def test_outside_the_delegate_is_what_xnnpack_has_no_kernel_for(outcome):
    program, outside = outcome.program, outcome.expectation.outside
    assert {left.op for left in program.undelegated} == outside
    if not outside:
        assert program.delegates == 1
        assert {kernel.precision for kernel in program.kernels} == {"int8"}


def test_the_file_computes_what_the_converted_graph_computes(outcome):
    graph, file = outcome.of_graph, outcome.of_file
    value = outcome.converted.graph.output_node().all_input_nodes[0]
    if "dequantize_per_tensor" in str(value.target):
        others = outcome.program.verify(outcome.converted, [(x,) for x in outcome.inputs])
        assert others, others  # within twice the noise of rounding at random
        steps = (file - graph).abs() / value.args[1]
        assert steps.max() < 2.01  # a kernel may round the other way; a few such add up through twenty layers
    else:
        assert sqnr(graph, file) > outcome.expectation.agreement


def test_the_file_shrinks(outcome):
    record = outcome.report.record
    assert record.bytes_after < 0.5 * record.bytes_before
    if outcome.float_bytes is not None:
        assert len(outcome.program.buffer) <= outcome.expectation.ratio * outcome.float_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "recipe"), [("xnnpack", "dynamic"), ("x86", "static")])
def test_preparing_and_converting_bert_base_takes_little_memory(backend, recipe):
    """Without a second copy of the float weights: int8 ones are a quarter, and one weight at a time is on its way."""
    assert measure("bert_base", backend, recipe)["total"] < 1.6
