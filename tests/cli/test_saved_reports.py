"""`pt2e-quant explain` on saved reports, and `pt2e-quant list`."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.cli import main
from pt2e_quant.errors import TargetingError
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


def test_explain_prints_the_text_of_the_report(saved, monkeypatch, capsys):
    report, path = saved
    assert run(monkeypatch, capsys, "explain", str(path)) == report.text() + "\n"


def test_explain_answers_for_a_module(saved, monkeypatch, capsys):
    report, path = saved
    assert run(monkeypatch, capsys, "explain", str(path), "down") == report.why("down") + "\n"


def failed(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["pt2e-quant", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


def test_a_wrong_name_ends_with_the_nearest_ones(saved, monkeypatch, capsys):
    told = failed(monkeypatch, capsys, "explain", str(saved[1]), "dwon")
    assert re.fullmatch(r"TargetingError: .*'dwon'.* Did you mean .*down.*\n", told)


@pytest.mark.parametrize("command", [("explain",), ("explain", "down")], ids=["all", "one"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read .*No such file or directory"),
        ("folder", "cannot read .*Is a directory"),
        (b"", "this is not the JSON of a report"),
        (b"\xff\xfe", "this is not the JSON of a report"),
        (b'{"decisions": 3}', "this is not the JSON of a report: Record misses"),
        (b"[" * 100_000, "this is not the JSON of a report: RecursionError"),
    ],
)
def test_a_file_that_is_no_report_ends_with_one_line(command, content, reason, tmp_path, monkeypatch, capsys):
    path = tmp_path / "report.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    told = failed(monkeypatch, capsys, command[0], str(path), *command[1:])
    assert re.fullmatch("CaptureError: .*report.json.*\n", told)
    assert re.search(reason, told)


def test_a_report_cut_short_ends_with_one_line(saved, monkeypatch, capsys):
    path = saved[1]
    path.write_bytes(path.read_bytes()[:-9])
    assert re.fullmatch(
        r"CaptureError: .*mlp\.json: this is not the JSON of a report: .*\n",
        failed(monkeypatch, capsys, "explain", str(path)),
    )


def test_quantizers_are_found_through_the_entry_point():
    assert find_quantizers()["xnnpack"].value == "quantizers.xnnpack:XNNPACKQuantizer"
    assert load_quantizer("xnnpack") is XNNPACKQuantizer
    with pytest.raises(TargetingError, match="xnnpack"):
        load_quantizer("xnpack")


def test_the_console_script_lists_targets():
    code = "import sys; sys.argv = ['pt2e-quant', 'list']; from pt2e_quant.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "xnnpack\tstatic, dynamic, dynamic_4bit\tquantizers.xnnpack:XNNPACKQuantizer" in done.stdout
