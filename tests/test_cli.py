"""The command line works on saved reports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.cli import main
from pt2e_quant.errors import CaptureError, TargetingError
from pt2e_quant.quantizer import find_quantizers, load_quantizer
from pt2e_quant.report import Report
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import MLP, export


@pytest.fixture
def saved(tmp_path):
    prepared = prepare_pt2e(export(MLP(), torch.randn(3, 10)), XNNPACKQuantizer(get_symmetric_quantization_config()))
    prepared(torch.randn(3, 10))
    report = explain(convert_pt2e(prepared))
    report.save(tmp_path / "mlp")
    return report, tmp_path / "mlp.json"


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["pt2e-quant", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_a_saved_report_reads_back_as_it_was(saved):
    report, path = saved
    assert Report.load(path) == Report.from_json(report.to_json())
    assert Report.load(path).text() == report.text()


def test_show_prints_the_text_of_the_report(saved, monkeypatch, capsys):
    report, path = saved
    assert run(monkeypatch, capsys, "show", str(path)) == report.text() + "\n"


def test_why_answers_for_a_module(saved, monkeypatch, capsys):
    report, path = saved
    assert run(monkeypatch, capsys, "why", str(path), "down") == report.why("down") + "\n"


def test_a_wrong_name_ends_with_the_nearest_ones(saved, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pt2e-quant", "why", str(saved[1]), "dwon"])
    with pytest.raises(SystemExit, match=r"TargetingError.*down"):
        main()


def test_a_file_that_is_no_report_is_a_typed_error(tmp_path):
    (tmp_path / "other.json").write_text('{"decisions": 3}')
    with pytest.raises(CaptureError, match="not the JSON of a report"):
        Report.load(tmp_path / "other.json")


def test_quantizers_are_found_through_the_entry_point():
    assert find_quantizers()["xnnpack"].value == "quantizers.xnnpack:XNNPACKQuantizer"
    assert load_quantizer("xnnpack") is XNNPACKQuantizer
    with pytest.raises(TargetingError, match="xnnpack"):
        load_quantizer("xnpack")


def test_the_console_script_lists_quantizers():
    code = "import sys; sys.argv = ['pt2e-quant', 'quantizers']; from pt2e_quant.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "xnnpack\tquantizers.xnnpack:XNNPACKQuantizer" in done.stdout
