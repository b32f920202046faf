"""Training that starts from a calibration rounds at once as the calibrated model would, converted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, enable_observer, explain, prepare_pt2e, prepare_qat_pt2e
from pt2e_quant.calibration import save_calibration
from pt2e_quant.errors import CalibrationError
from pt2e_quant.fake_quantize import FusedMovingAvgObsFakeQuantize
from pt2e_quant.observer import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from pt2e_quant.quantizer import QuantizationConfig, for_training, with_learned_scales
from pt2e_quant.specs import QuantizationSpec
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import ConvNet, export
from tests.pt2e.kit import PER_CHANNEL, STATIC, Toy
from tests.qat.kit import images, sgd

BATCHES = [images(seed, 4, 3, 16, 16) for seed in range(3)]
FOUR_BITS = get_symmetric_quantization_config(True, act_qmin=-8, act_qmax=7, weight_qmin=-7, weight_qmax=7)
FUSED = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver)


def quantizer(config: QuantizationConfig) -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(config)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return export(ConvNet(), BATCHES[0])


@pytest.fixture(scope="module")
def calibrated(program) -> GraphModule:
    return watched(program)


def watched(program: torch.export.ExportedProgram) -> GraphModule:
    prepared = prepare_pt2e(program, quantizer(FOUR_BITS))
    for x in BATCHES:
        prepared(x)
    return prepared


def ranges(graph: GraphModule) -> dict[str, Any]:
    """Scale and zero point of each group that has one for the whole tensor, after convert."""
    return {
        group.members: (pytest.approx(group.scale, rel=1e-6), group.zero_point)
        for group in explain(convert_pt2e(graph)).record.groups
        if isinstance(group.scale, float)
    }


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
@pytest.mark.parametrize("source", ["model", "batches"])
def test_the_first_forward_is_that_of_the_calibrated_model(program, calibrated, source, learned):
    """Scales within 1e-6: the ends of a grid are computed in float32, and a scale from them."""
    config = with_learned_scales(FOUR_BITS) if learned else for_training(FOUR_BITS)
    calibration = calibrated if source == "model" else BATCHES
    graph = prepare_qat_pt2e(program, quantizer(config), calibration=calibration).eval()
    assert ranges(graph) == ranges(calibrated)
    expected = convert_pt2e(calibrated)(BATCHES[1])
    torch.testing.assert_close(graph(BATCHES[1]), expected, rtol=0, atol=1e-5)
    assert ranges(graph) == ranges(calibrated)  # data moves nothing


def test_ranges_stay_in_training_until_observers_are_enabled(program, calibrated):
    graph = prepare_qat_pt2e(program, quantizer(for_training(FOUR_BITS)), calibration=calibrated).train()
    before = ranges(graph)
    sgd(graph, [x * 3 for x in BATCHES])
    assert ranges(graph) == before
    enable_observer(graph)
    graph(BATCHES[0] * 3)
    assert ranges(graph) != before


def test_a_model_exported_in_training_mode_starts_from_one_exported_in_evaluation(calibrated):
    graph = prepare_qat_pt2e(
        export(ConvNet(), BATCHES[0], train=True), quantizer(for_training(FOUR_BITS)), calibration=calibrated
    )
    assert graph.training
    assert ranges(graph) == ranges(calibrated)


def test_a_calibration_from_a_file_starts_training(program, calibrated, tmp_path):
    pytest.importorskip("safetensors")
    save_calibration(calibrated, tmp_path / "calibration")
    config = quantizer(for_training(FOUR_BITS))
    assert ranges(prepare_qat_pt2e(program, config, calibration=tmp_path / "calibration")) == ranges(calibrated)


@pytest.mark.parametrize("kind", [HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver])
def test_a_file_of_any_observer_starts_training(program, tmp_path, kind):
    pytest.importorskip("safetensors")
    act = QuantizationSpec(torch.int8, kind, -120, 115, torch.per_tensor_affine)
    config = QuantizationConfig(act, act, PER_CHANNEL)
    calibrated = prepare_pt2e(program, Toy().set_global(config))
    calibrated(BATCHES[0])
    save_calibration(calibrated, tmp_path / "calibration")
    graph = prepare_qat_pt2e(program, Toy().set_global(for_training(config)), calibration=str(tmp_path / "calibration"))
    assert ranges(graph) == ranges(calibrated)


def test_a_file_of_another_model_starts_nothing(program, tmp_path):
    pytest.importorskip("safetensors")
    other = prepare_pt2e(export(nn.Linear(3, 3), images(1, 2, 3)), Toy().set_global(STATIC))
    other(images(1, 2, 3))
    save_calibration(other, tmp_path / "calibration")
    with pytest.raises(
        CalibrationError, match=r"(?s)the calibration has nothing for MSEObserver on x:.*input x.*no observer there"
    ):
        prepare_qat_pt2e(program, quantizer(for_training(FOUR_BITS)), calibration=tmp_path / "calibration")


@pytest.mark.parametrize("symmetric", [False, True])
def test_fused_fake_quantizers_start_from_it_too(program, symmetric):
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    act = QuantizationSpec(torch.int8, FUSED, -120, 115, qscheme)
    graph = prepare_qat_pt2e(program, Toy().set_global(QuantizationConfig(act, act, PER_CHANNEL)), calibration=BATCHES)
    before = ranges(graph)
    sgd(graph.train(), BATCHES)
    assert ranges(graph) == before


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.yes, self.no, (x,))


def test_branches_start_from_it_and_one_that_no_data_reached_is_named():
    x = images(1, 5, 3).abs()
    program = export(Branches(), x)
    make = Toy().set_global(with_learned_scales(QuantizationConfig(*[TOY_ACT] * 2, PER_CHANNEL)))
    graph = prepare_qat_pt2e(program, make, calibration=[x, -x])
    torch.testing.assert_close(graph(x), convert_pt2e(graph)(x))
    with pytest.raises(CalibrationError, match=r"never reached this tensor(?s:.)*false_graph_0"):
        prepare_qat_pt2e(program, make, calibration=[x])


TOY_ACT = QuantizationSpec(torch.int8, MovingAverageMinMaxObserver, -120, 115, torch.per_tensor_affine)


def other_model() -> GraphModule:
    return prepare_pt2e(export(nn.Sequential(nn.Linear(8, 8)), images(1, 4, 8)), quantizer(FOUR_BITS))


def uncalibrated(program: torch.export.ExportedProgram) -> GraphModule:
    return prepare_pt2e(program, quantizer(FOUR_BITS))


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (lambda _: other_model(), "has no observer where this one has one fake quantizer"),
        (lambda program: prepare_pt2e(program, quantizer(get_symmetric_quantization_config())),
         "has int8 in (-128, 127), affine where this one has int8 in (-8, 7), affine"),
        (uncalibrated, "never reached this tensor"),
        (lambda program: convert_pt2e(watched(program)), "is converted, and has no observers left"),
        (lambda _: [], "no batch in the data"),
        (lambda _: BATCHES[0], "for a single batch, pass [batch]"),
        (lambda _: ConvNet(), "takes batches"),
    ],
    ids=["another model", "other integers", "no data", "converted", "no batches", "one tensor", "a module"],
)  # fmt: skip
def test_what_is_no_calibration_of_this_model_is_refused(program, calibration, says):
    with pytest.raises(CalibrationError, match=re.escape(says)):
        prepare_qat_pt2e(program, quantizer(for_training(FOUR_BITS)), calibration=calibration(program))
