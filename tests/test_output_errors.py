"""explain(prepared, data) measures the outputs with static and with dynamic activations, and says which to take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import Report, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.sqnr import sqnr
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

ADVICE = "quantize dynamically (is_dynamic=True"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()


def row(scale: float) -> Tensor:
    """One: a scale for each row, as XNNPACK chooses it, is then one for the tensor."""
    return scale * torch.randn(1, 256, generator=torch.Generator().manual_seed(1))


def calibrated(dynamic: bool = False) -> torch.fx.GraphModule:
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    prepared = prepare_pt2e(torch.export.export(net(), (row(1.0),)), XNNPACKQuantizer().set_global(config))
    prepared(row(1.0))
    return prepared


@pytest.fixture(scope="module")
def clipped() -> Report:
    """Of data that reaches 20 times as far as what calibration saw."""
    return explain(calibrated(), [row(20.0)])


def error_of(prepared: torch.fx.GraphModule, x: Tensor) -> float:
    return sqnr(net()(x), convert_pt2e(prepared)(x))


def test_the_static_error_is_that_of_the_converted_graph(clipped):
    assert clipped.record.output_errors.static == pytest.approx(error_of(calibrated(), row(20.0)), abs=0.01)


def test_the_dynamic_error_is_that_of_a_graph_converted_from_a_dynamic_configuration(clipped):
    dynamic = error_of(calibrated(dynamic=True), row(20.0))
    assert clipped.record.output_errors.dynamic == pytest.approx(dynamic, abs=0.01)


def test_dynamic_activations_are_recommended_where_they_gain_a_bit_on_poor_outputs(clipped):
    errors = clipped.record.output_errors
    assert f"{errors.static:.1f} dB with static activations" in clipped.text()
    assert f"{errors.dynamic:.1f} dB with the inputs of linears and convolutions" in clipped.text()
    assert ADVICE in clipped.text()


def test_outputs_without_fault_get_the_numbers_and_no_advice():
    text = explain(calibrated(), [row(1.0)]).text()
    assert "dB with static activations" in text
    assert ADVICE not in text


def test_a_dynamic_model_has_nothing_to_compare():
    assert explain(calibrated(dynamic=True), [row(1.0)]).record.output_errors is None


def test_a_saved_report_keeps_the_numbers(clipped):
    assert Report.from_json(clipped.to_json()).record.output_errors == clipped.record.output_errors


def test_poor_outputs_name_the_tensors_that_cost_them(clipped):
    """The input was clipped at a twentieth of its range, and so was all that follows; the output costs most."""
    alone = clipped.record.output_errors.alone
    by_tensor = {group.observer: ", ".join(group.members) for group in clipped.groups}
    assert [by_tensor[name] for name in alone] == ["linear_1", "input_1 -> linear", "linear"]
    assert list(alone.values()) == sorted(alone.values())
    for observer, decibels in alone.items():
        assert f"{decibels:.1f} dB with {by_tensor[observer]} rounded alone ({observer})" in clipped.text()


def test_good_outputs_name_none():
    assert explain(calibrated(), [row(1.0)]).record.output_errors.alone == {}


def test_the_numbers_of_one_observer_are_those_of_a_model_with_it_alone():
    prepared, x = calibrated(), row(20.0)
    alone = explain(prepared, [x]).record.output_errors.alone

    def rounded(observer: str, values: Tensor) -> Tensor:
        scale, zero_point = prepared.get_submodule(observer).calculate_qparams()
        return torch.fake_quantize_per_tensor_affine(values, float(scale), int(zero_point), -128, 127)

    output, first, _ = alone
    assert alone[output] == pytest.approx(sqnr(net()(x), rounded(output, net()(x))), abs=0.01)
    assert alone[first] == pytest.approx(sqnr(net()(x), net()(rounded(first, x))), abs=0.01)
