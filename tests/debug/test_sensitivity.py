"""Sensitivity: by hand on a linear model, the estimate beside the measurement, metrics, resuming, plots."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.debug import Effects, LayerEffect, exact_sensitivity, sensitivity
from pt2e_quant.debug.graft import Grafts
from pt2e_quant.errors import CalibrationError, CaptureError, FileError, QuantizationError
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.debug.test_compare import Parts
from tests.nets import export, sqnr

PER_CHANNEL = get_symmetric_quantization_config(is_per_channel=True)


def quantized(exact: ExportedProgram, *inputs: Tensor, quantizer: Any = None) -> GraphModule:
    prepared = prepare_pt2e(exact, quantizer or XNNPACKQuantizer(PER_CHANNEL))
    prepared(*inputs)
    return convert_pt2e(prepared)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exact(x: Tensor) -> ExportedProgram:
    torch.manual_seed(0)
    return export(Parts(), x)


@pytest.fixture(scope="module")
def converted(exact: ExportedProgram, x: Tensor) -> GraphModule:
    return quantized(exact, x)


@pytest.fixture(scope="module")
def measured(exact: ExportedProgram, converted: GraphModule, x: Tensor) -> Effects:
    return exact_sensitivity(exact, converted, [x])


def ranks(values: list[float]) -> Tensor:
    order = torch.tensor(values, dtype=torch.float64).argsort().argsort()
    return order.double()


def spearman(one: dict[str, float], other: dict[str, float]) -> float:
    assert one.keys() == other.keys()
    stacked = torch.stack([ranks([values[name] for name in one]) for values in (one, other)])
    return float(torch.corrcoef(stacked)[0, 1])


# --- grafts -----------------------------------------------------------------------------------------------------------


def test_a_layer_is_an_op_with_what_is_rounded_together_with_it(exact, converted):
    layers = {layer.name: [node.name for node in layer.nodes] for layer in Grafts(exact, converted, "test").layers}
    assert layers["conv2d"] == ["batch_norm", "relu"]  # as selectors know it; the batch norm is folded
    assert layers["conv2d_1"] == ["conv2d_1"]  # rounded before it is added
    assert layers["add"] == ["add", "relu_1"]


def test_all_layers_together_are_the_converted_graph_and_none_is_the_float_one(exact, converted, x):
    grafts = Grafts(exact, converted, "test")
    assert torch.equal(grafts.put(grafts.layers)(x), converted(x))
    assert torch.equal(grafts.put([])(x), exact.module()(x))


def test_an_op_that_writes_to_its_input_can_be_quantized_alone():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    exact = export(InPlace(), x)
    converted = quantized(exact, x)
    grafts = Grafts(exact, converted, "test")
    assert torch.equal(grafts.put(grafts.layers)(x), converted(x))
    assert sensitivity(exact, converted, [x], probes=8).values().keys() == {layer.name for layer in grafts.layers}


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.add_(1.0) + y


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_estimate_is_exact_where_the_rest_of_the_model_is_linear():
    """v^T J e has the signs of v alone to average out, and one output for each row leaves none."""
    x = torch.randn(5, 6)
    exact = export(nn.Sequential(nn.Linear(6, 1), nn.Flatten()), x)
    converted = quantized(exact, x, quantizer=XNNPACKQuantizer().set_module_name("0", PER_CHANNEL))
    wanted = exact_sensitivity(exact, converted, [x]).values()
    found = sensitivity(exact, converted, [x]).values()
    assert found.keys() == wanted.keys() >= {"linear"}
    assert all(found[name] == pytest.approx(wanted[name], abs=1e-2) for name in found)


def test_the_estimate_ranks_as_the_measurement_does(exact, converted, x, measured):
    estimate = sensitivity(exact, converted, [x])
    assert estimate.layers[0].layer == measured.layers[0].layer == "linear_1"
    assert spearman(estimate.values(), measured.values()) >= 0.8
    assert all(abs(value - measured.values()[name]) < 3 for name, value in estimate.values().items())  # dB


def test_one_layer_alone_and_all_but_one(exact, converted, x, measured):
    grafts = Grafts(exact, converted, "test")
    head = next(layer for layer in grafts.layers if layer.name == "linear_1")
    wanted = exact.module()(x)
    assert measured.values()["linear_1"] == pytest.approx(sqnr(wanted, grafts.put([head])(x)), abs=1e-6)
    without = exact_sensitivity(exact, converted, [x], mode="without")
    rest = [layer for layer in grafts.layers if layer is not head]
    assert without.baseline == pytest.approx(sqnr(wanted, converted(x)), abs=1e-6)
    assert without.values()["linear_1"] == pytest.approx(sqnr(wanted, grafts.put(rest)(x)), abs=1e-6)
    assert without.layers[0].value == max(without.values().values()) > without.baseline


def test_a_metric_of_the_user_is_measured(exact, converted, x):
    wanted = exact.module()(x).argmax(1)

    def agreement(model: GraphModule) -> float:
        return float((model(x).argmax(1) == wanted).float().mean())

    found = exact_sensitivity(exact, converted, metric=agreement)
    assert (found.metric, found.baseline) == ("agreement", 1.0)
    assert all(0.8 <= row.value <= 1 for row in found.layers)
    assert [row.value for row in found.layers] == sorted(row.value for row in found.layers)


# --- a measurement that goes on ---------------------------------------------------------------------------------------


def test_a_measurement_goes_on_where_it_stopped(exact, converted, x, measured, tmp_path):
    calls = []

    def sqnr_of_outputs(model: GraphModule) -> float:
        calls.append(model)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sqnr(exact.module()(x), model(x))

    file = tmp_path / "measured.json"
    with pytest.raises(KeyboardInterrupt):
        exact_sensitivity(exact, converted, metric=sqnr_of_outputs, resume=file)
    found = exact_sensitivity(exact, converted, metric=sqnr_of_outputs, resume=file)
    assert len(calls) == 1 + 1 + len(found.layers)  # the float model, the one that was interrupted, one a layer
    assert found.values() == pytest.approx(measured.values(), abs=1e-6)
    with pytest.raises(FileError, match="another measurement"):
        exact_sensitivity(exact, converted, [x], mode="without", resume=file)
    file.write_text("{}")
    with pytest.raises(FileError, match="holds no measurements"):
        exact_sensitivity(exact, converted, [x], resume=file)


# --- tables and plots -------------------------------------------------------------------------------------------------


def test_a_table_says_where_each_layer_is(measured):
    first = measured.text(1).splitlines()[1]
    assert first.split()[0] == "linear_1"
    assert "in 'head', test_compare.py:" in first
    plain = json.loads(measured.to_json())
    assert plain["baseline"] is None  # infinite: the float model itself
    assert plain["layers"][0]["nodes"] == ["linear_1"]


def test_a_plot_has_a_bar_for_each_layer(measured, tmp_path):
    pytest.importorskip("matplotlib")
    axes = measured.plot()
    assert len(axes.patches) == len(measured.layers)
    axes.figure.savefig(tmp_path / "layers.png")
    assert measured.plot(axes) is axes


def test_rows_are_ranked_by_what_they_cost(measured):
    values = [row.value for row in measured.layers]
    assert values == sorted(values)
    failed = LayerEffect("n", ("n",), "", None, None, math.nan)
    nan = Effects.ranked("alone", "m", 1.0, [*measured.layers, failed])
    assert nan.layers[0].layer == "n"


def test_what_cannot_be_measured_is_refused(exact, converted, x):
    with pytest.raises(CaptureError, match="the graph that convert_pt2e returned"):
        sensitivity(exact, exact.module(), [x])
    with pytest.raises(CaptureError, match="no quantized layer of the converted graph stems"):
        sensitivity(export(nn.Tanh(), x), converted, [x])
    with pytest.raises(CaptureError, match="probes must be at least 1"):
        sensitivity(exact, converted, [x], probes=0)
    with pytest.raises(CaptureError, match="needs data to measure"):
        exact_sensitivity(exact, converted)
    with pytest.raises(QuantizationError, match="the metric 'len' failed: TypeError"):
        exact_sensitivity(exact, converted, metric=len)
    with pytest.raises(QuantizationError, match="is NaN for a model"):
        exact_sensitivity(exact, converted, metric=lambda _: math.nan)
    with pytest.raises(CalibrationError, match="no batch"):
        sensitivity(exact, converted, [])


class Skip(nn.Module):
    """A tensor that one reader takes on its own grid, and a concatenation on that of another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.down(x))
        return self.head(torch.cat([x, 5 * self.up(nn.functional.max_pool2d(x, 2, 1, 1)[..., 1:, 1:])], 1))


def test_a_tensor_that_is_rounded_in_two_ways_keeps_both():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = export(Skip(), x)
    converted = quantized(exact, x)
    grafts = Grafts(exact, converted, "test")
    assert torch.equal(grafts.put(grafts.layers)(x), converted(x))
