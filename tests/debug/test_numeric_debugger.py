"""The reference's numeric debugger: handles survive what happens to a model, and values are paired by them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import CaptureError, QuantizationError
from pt2e_quant.graph.handles import handle_of
from pt2e_quant.pt2e import (
    NodeAccuracySummary,
    QuantizationComparisonResult,
    compare_results,
    extract_results_from_loggers,
    generate_numeric_debug_handle,
    prepare_for_propagation_comparison,
)
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.debug.test_compare import Parts, saved_and_loaded
from tests.nets import export, sqnr


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exact(x: Tensor) -> ExportedProgram:
    torch.manual_seed(0)
    exported = export(Parts(), x)
    generate_numeric_debug_handle(exported)
    return exported


@pytest.fixture(scope="module")
def converted(exact: ExportedProgram, x: Tensor) -> GraphModule:
    config = get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(exact.module(), XNNPACKQuantizer(config))
    prepared(x)
    return convert_pt2e(prepared)


def logged(model: GraphModule, x: Tensor) -> dict[int, Any]:
    made = prepare_for_propagation_comparison(model)
    with torch.no_grad():
        made(x)
    return extract_results_from_loggers(made)


@pytest.fixture(scope="module")
def of_exact(exact: ExportedProgram, x: Tensor) -> dict[int, Any]:
    return logged(exact.module(), x)


def test_every_op_has_a_handle_of_its_own(exact):
    handles = [handle_of(node) for node in exact.graph.nodes if node.op == "call_function"]
    assert None not in handles
    assert len(set(handles)) == len(handles)


def test_handles_that_are_there_stay(exact):
    again = copy.deepcopy(exact)
    next(node for node in again.graph.nodes if node.name == "relu").meta["custom"] = {}
    generate_numeric_debug_handle(again)
    before, after = ({n.name: handle_of(n) for n in one.graph.nodes} for one in (exact, again))
    assert after.pop("relu") > max(filter(None, before.values()))
    before.pop("relu")
    assert before == after


def test_values_of_both_models_are_paired(exact, converted, x, of_exact):
    found = compare_results(of_exact, logged(converted, x))
    by_name = {summary.ref_node_name: summary for summary in found.values()}
    assert isinstance(by_name["linear"], NodeAccuracySummary)
    (result,) = by_name["linear_1"].results
    assert by_name["linear_1"].ref_module_stack == "head"
    assert float(result.mse_loss) == pytest.approx(float((result.actual - result.ref).square().mean()), rel=1e-6)
    assert float(result.sqnr) == pytest.approx(sqnr(result.ref, result.actual), abs=1e-3)
    assert float(result.sqnr) > 25
    assert float(by_name["batch_norm"].results[0].sqnr) > 30  # of the convolution that it was folded into


VERSIONS: dict[str, Callable[..., GraphModule]] = {
    "converted": lambda gm, x: gm,
    "deepcopy": lambda gm, x: copy.deepcopy(gm),
    "exported again": lambda gm, x: torch.export.export(gm, (x,)).module(),
    "file": saved_and_loaded,
    "decomposed": lambda gm, x: torch.export.export(gm, (x,)).run_decompositions().module(),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_at_least_95_percent_of_the_quantized_ops_are_joined(version, exact, converted, x, of_exact):
    found = logged(VERSIONS[version](converted, x), x)
    quantized = {handle_of(node) for node in converted.graph.nodes if node.op == "call_function"} - {None}
    joined = compare_results(of_exact, found)
    assert len(joined.keys() & quantized) >= 0.95 * len(quantized)
    assert {"getitem", "getitem_1", "cat"} <= {summary.ref_node_name for summary in joined.values()}


def test_a_float_program_that_was_decomposed_and_saved_is_joined_as_well(exact, converted, x):
    file = io.BytesIO()
    torch.export.save(exact.run_decompositions(), file)
    file.seek(0)
    of_file = logged(torch.export.load(file).module(), x)
    found = logged(converted, x)
    joined = compare_results({handle: of_file[handle] for handle in of_file if handle in found}, found)
    assert len(joined) >= 0.8 * len(of_file)  # parts of an op with two outputs have the handle of that op


def test_the_model_and_its_copy_keep_what_they_compute(converted, x):
    made = prepare_for_propagation_comparison(converted)
    assert torch.equal(made(x), converted(x))
    assert extract_results_from_loggers(converted) == {}


def test_structures_are_compared_tensor_by_tensor():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])
    result = QuantizationComparisonResult({"a": one, "b": [one, 3]}, {"a": two, "b": [one, 3]})
    assert result.mse_loss == {"a": torch.tensor(2.0), "b": [torch.tensor(0.0), None]}
    assert "sqnr" in repr(result)


def test_what_cannot_be_compared_is_refused(x):
    with pytest.raises(QuantizationError, match="different structure or shape"):
        QuantizationComparisonResult(torch.ones(2), torch.ones(3))
    with pytest.raises(QuantizationError, match="debug handle 4, conv and conv_1"):
        compare_results({4: ("conv", None, [torch.ones(2)])}, {4: ("conv_1", None, [torch.ones(3)])})
    with pytest.raises(CaptureError, match="no node of this model has a debug handle"):
        prepare_for_propagation_comparison(export(Parts(), x).module())
