"""`make demo` does what it promises, and says so by its exit status when it does not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from demo import digits
from demo.digits import PROMISES, Measured, broken_promises, main

GOOD = Measured(
    images=597,
    accuracy_fp32=0.99,
    accuracy_fp32_pte=0.99,
    accuracy_converted=0.985,
    accuracy_pte=0.985,
    bytes_fp32_pte=1000,
    bytes_int8_pte=350,
    microseconds_fp32_pte=40.0,
    microseconds_int8_pte=20.0,
    outputs_within_1_lsb=0.999,
    largest_difference_lsb=2,
    delegates=1,
    undelegated=0,
)


def test_numbers_at_the_limits_keep_every_promise():
    assert broken_promises(GOOD) == []


@pytest.mark.parametrize(
    ("worse", "words"),
    [
        ({"accuracy_pte": 0.9849}, "accuracy"),
        ({"bytes_int8_pte": 351}, "0.35"),
        ({"delegates": 2}, "one delegate"),
        ({"delegates": 0}, "one delegate"),
        ({"undelegated": 1}, "one delegate"),
        ({"outputs_within_1_lsb": 0.9989}, "1 LSB"),
    ],
)
def test_each_promise_can_be_broken(worse, words):
    (broken,) = broken_promises(replace(GOOD, **worse))
    assert words in broken


def test_the_demo_keeps_its_promises_and_leaves_its_files(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("kept   ") == len(PROMISES)
    numbers = json.loads((tmp_path / "measured.json").read_text())
    assert numbers["accuracy_fp32"] > 0.95, "a net that has not learned proves nothing about quantization"
    assert numbers["bytes_int8_pte"] == (tmp_path / "digits_int8.pte").stat().st_size
    assert numbers["bytes_fp32_pte"] == (tmp_path / "digits_fp32.pte").stat().st_size
    assert (tmp_path / "report.txt").read_text().strip()
    assert json.loads((tmp_path / "report.json").read_text())
    page = (tmp_path / "report.html").read_text()
    assert all(f'id="{section}"' in page for section in ("errors", "histograms", "artefact"))


def test_a_broken_promise_is_a_non_zero_exit(tmp_path, monkeypatch, capsys):
    class NoReport:
        text = staticmethod(lambda *_: "")

    monkeypatch.setattr(digits, "train", lambda *_, **__: None)
    monkeypatch.setattr(digits, "quantize_and_measure", lambda *_: (None, replace(GOOD, delegates=2)))
    monkeypatch.setattr(digits, "explain", lambda _: NoReport())
    assert main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("BROKEN") == 1
