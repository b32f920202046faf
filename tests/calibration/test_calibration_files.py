"""Calibration as a file: stop and resume, parts, one pass for several configurations; coverage on held-back data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.calibration import calibration_report, load_calibration, save_calibration
from pt2e_quant.errors import CalibrationError
from pt2e_quant.observer import (
    EntropyObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    PercentileObserver,
)
from pt2e_quant.quantizer import QuantizationSpec, SharedQuantizationSpec
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.calibration.kit import EXPORTED, batches, calibrated, prepared
from tests.pt2e.kit import STATIC, ByHand, Toy, annotate

SPEC = QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=2**-13), -110, 99, torch.per_tensor_affine)


def qparams(model) -> list[tuple[object, object]]:
    return [(group.scale, group.zero_point) for group in explain(convert_pt2e(model)).groups]


@pytest.mark.parametrize("kind", [MSEObserver, MinMaxObserver, MovingAverageMinMaxObserver, HistogramObserver])
def test_a_resumed_calibration_is_byte_identical_to_an_uninterrupted_one(kind, tmp_path: Path):
    data = batches(5)
    save_calibration(calibrated(data, kind), tmp_path / "whole")
    save_calibration(calibrated(data[:2], kind), tmp_path / "begun")
    resumed = prepared(kind)
    load_calibration(resumed, tmp_path / "begun")
    for batch in data[2:]:
        resumed(*batch)
    save_calibration(resumed, tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "resumed").read_bytes() != (tmp_path / "begun").read_bytes()
    assert qparams(resumed) == qparams(calibrated(data, kind))


def test_another_process_writes_the_same_bytes(tmp_path: Path):
    save_calibration(calibrated(batches(2)), tmp_path / "here")
    script = (
        "import sys; from tests.calibration.kit import *; from pt2e_quant.calibration import *\n"
        "save_calibration(calibrated(batches(2)), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


@pytest.mark.parametrize("kind", [MSEObserver, MinMaxObserver])
def test_parts_in_any_order_give_the_qparams_of_one_pass(kind, tmp_path: Path):
    data = batches(6)
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"part {number}")
        save_calibration(calibrated(data[number::3], kind), paths[-1])
    expected = qparams(calibrated(data, kind))
    for order in (paths, paths[::-1]):
        model = prepared(kind)
        load_calibration(model, *order)
        assert qparams(model) == expected


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (MSEObserver, {"quant_min": -8, "quant_max": 7}),
        (MinMaxObserver, {}),
        (PercentileObserver, {"percentile": 99.0}),
        (EntropyObserver, {}),
    ],
)
def test_one_calibration_serves_several_configurations(kind, arguments, tmp_path: Path):
    data = batches(3)
    save_calibration(calibrated(data), tmp_path / "once")
    model = prepared(kind, **arguments)
    load_calibration(model, tmp_path / "once")
    assert qparams(model) == qparams(calibrated(data, kind, **arguments))


def test_loading_replaces_what_was_known(tmp_path: Path):
    save_calibration(calibrated(batches(1)), tmp_path / "small")
    model = calibrated(batches(5))
    load_calibration(model, tmp_path / "small")
    assert qparams(model) == qparams(calibrated(batches(1)))


def test_a_file_holds_little_more_than_what_was_seen(tmp_path: Path):
    save_calibration(calibrated(batches(2)), tmp_path / "file")
    dense = sum(value.nbytes for value in prepared().state_dict().values())
    assert (tmp_path / "file").stat().st_size < dense / 5


@pytest.mark.parametrize("kind", [MovingAverageMinMaxObserver, HistogramObserver, MSEObserver])
def test_facts_that_the_file_does_not_have_are_refused_and_nothing_changes(kind, tmp_path: Path):
    save_calibration(calibrated(batches(2), MinMaxObserver), tmp_path / "ranges")
    model = calibrated(batches(1), kind)
    before = qparams(model)
    with pytest.raises(
        CalibrationError, match=rf"nothing for {kind.__name__} on x:\n  input x.*\n.*It has MinMaxObs"
    ) as e:
        load_calibration(model, tmp_path / "ranges")
    assert "MinMaxObserver on x" in str(e.value)
    assert qparams(model) == before


def test_a_range_of_more_tensors_than_wanted_is_refused(tmp_path: Path):
    """The two inputs of a cat share one observer on XNNPACK; by hand, each has its own."""

    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y * 2.0], 1)

    def apart(gm):
        (cat,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
        annotate(cat, dict.fromkeys(cat.all_input_nodes, SPEC))

    def together(gm):
        (cat,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
        first, second = cat.all_input_nodes
        annotate(cat, {first: SPEC, second: SharedQuantizationSpec((first, cat))})

    x = torch.rand(1, 2), torch.rand(1, 2)
    both = torch.export.export(Both().eval(), x)
    shared, separate = prepare_pt2e(both, ByHand(together)), prepare_pt2e(both, ByHand(apart))
    shared(*x)
    save_calibration(shared, tmp_path / "shared")
    with pytest.raises(CalibrationError, match=r"(?s)has nothing for MinMaxObserver on x:.*It has MinMaxObserver on"):
        load_calibration(separate, tmp_path / "shared")
    load_calibration(shared, tmp_path / "shared")


def test_a_calibration_of_another_model_names_the_tensor_that_is_missing(tmp_path: Path):
    other = torch.export.export(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    model = prepare_pt2e(other, XNNPACKQuantizer().set_global(get_symmetric_quantization_config()))
    model(torch.randn(2, 4))
    save_calibration(model, tmp_path / "other")
    with pytest.raises(CalibrationError, match="has nothing for MSEObserver on x"):
        load_calibration(prepared(), tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", None])
def test_a_file_that_is_no_calibration_is_refused(content, tmp_path: Path):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match="is not a file of save_calibration"):
        load_calibration(prepared(), path)


def test_safetensors_of_something_else_are_refused(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(CalibrationError, match="its format is None"):
        load_calibration(prepared(), tmp_path / "weights")


def test_a_model_that_is_not_prepared_has_no_calibration(tmp_path: Path):
    for model in (EXPORTED.module(), convert_pt2e(calibrated(batches(1)))):
        with pytest.raises(CalibrationError, match="pass what prepare_pt2e returned"):
            save_calibration(model, tmp_path / "file")


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_held_back_data_inside_the_range_does_not_saturate():
    data = batches(3)
    report = calibration_report(calibrated(data, MinMaxObserver), data)
    assert len(report.sites) == 5  # both inputs, relu, the sum, the output
    assert all(site.saturated == 0 and site.calls in (3, 6) for site in report.sites)
    assert (report.never_calibrated, report.never_reached) == ((), ())


def test_values_outside_of_the_range_are_counted_where_they_are():
    model = calibrated(batches(1), MinMaxObserver)
    x, side = batches(1)[0]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    far = x.clone()
    far[0, 0, 0, :3] = 1000.0
    report = calibration_report(model, [(far, side), {"x": x, "side": side}])
    (site,) = [site for site in report.sites if site.location.startswith("input x")]
    assert (site.saturated, site.values, site.calls) == (3, 2 * x.numel(), 2)
    assert site.share == 3 / (2 * x.numel())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    shares = [site.share for site in report.sites]
    assert shares == sorted(shares, reverse=True)
    assert "input x" in report.text()
    assert f"{site.share:.4%}" in report.text()


def test_sites_without_calibration_data_or_held_back_data_are_named():
    report = calibration_report(prepared(), batches(1))
    assert len(report.never_calibrated) == len(report.sites) == 5
    assert all(site.saturated is None and site.calls >= 1 for site in report.sites)
    assert "5 without calibration data" in report.text()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch, while it captures cond
def test_a_branch_that_held_back_data_never_takes_is_named():
    class Sign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.left(x).relu(), lambda x: self.right(x), (x,))

    x = torch.rand(2, 4)
    model = prepare_pt2e(torch.export.export(Sign().eval(), (x,)), Toy(STATIC))
    for batch in (x, -x):
        model(batch)
    report = calibration_report(model, [x])
    names = {site.observer.partition(".")[0] for site in report.never_reached}
    assert names == {"false_graph_0"}
    assert f"{len(report.never_reached)} not reached by held-back data" in report.text()
    assert report.never_calibrated == ()


@pytest.mark.parametrize("data", [[], 3, torch.ones(2)], ids=["none", "number", "tensor"])
def test_held_back_data_that_is_none_is_typed(data):
    with pytest.raises(CalibrationError, match=r"calibration_report\(prepared, data\)"):
        calibration_report(calibrated(batches(1)), data)
