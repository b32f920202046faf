"""Every tutorial runs from top to bottom, prints what it says that it prints, and leaves no file."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest

TUTORIALS = {int(path.name[:2]): path for path in (Path(__file__).parents[1] / "tutorials").glob("[0-9]*.py")}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a tutorial, by its number, in an empty folder; gives its names and what it printed."""

    def run(number):
        monkeypatch.chdir(tmp_path)
        names = runpy.run_path(str(TUTORIALS[number]), run_name="__main__")
        assert list(tmp_path.iterdir()) == []
        return names, capsys.readouterr().out

    return run


def accuracies(printed):
    return [float(percent) for percent in re.findall(r"^accuracy of .* ([\d.]+)%$", printed, re.MULTILINE)]


def test_every_tutorial_has_a_test_of_what_it_prints():
    tests = [name for name in globals() if re.match(r"test_tutorial_\d", name)]
    assert sorted(int(name.split("_")[2]) for name in tests) == sorted(TUTORIALS)


def test_tutorial_1_quantizes_without_losing_accuracy(run):
    names, printed = run(1)
    assert names["program"].delegates == 1
    assert list(names["program"].undelegated) == []
    assert "1 delegate, 0 operators outside" in printed
    found = accuracies(printed)
    assert len(found) == 3
    assert min(found) > 90
    assert max(found) - min(found) <= 1.0  # 6 of 597 images


def test_tutorial_2_writes_a_quantizer_that_conforms_and_one_that_does_not(run):
    _, printed = run(2)
    assert "converted by ChipQuantizer: 7 of 9 float ops quantized" in printed
    assert "groups=4, the chip convolves one group only" in printed
    assert "the chip cannot compare" in printed
    assert float(re.search(r"^SQNR: (\d+) dB$", printed, re.MULTILINE)[1]) >= 30  # what the tutorial calls good
    assert "conformance: no problems found" in printed
    assert re.search(r"^and without `computed`:\nconstant-weights: ", printed, re.MULTILINE)


def test_tutorial_3_explains_every_op_left_in_float(run):
    _, printed = run(3)
    quantized, left = map(int, re.match(r"(\d+) ops quantized, (\d+) left in float\n", printed).groups())
    assert quantized == left == 7
    assert sum(map(int, re.findall(r"^  (\d+) x \w+$", printed, re.MULTILINE))) == left
    assert re.findall(r"^why '(.*)'\?$", printed, re.MULTILINE) == ["sin", "mul_", "up", "stem.1", "cat"]
    assert "TargetingError: the selector module name 'stem.1' matches nothing. The batch norm" in printed
    assert "CoverageError: 1 of the 2 ops that must be quantized" in printed
    assert float(re.search(r"([\d.]+) bits lost", printed)[1]) == pytest.approx(math.log2(20), abs=1)  # loud is x 20
    assert "1 costs of cat in the file" in printed
    assert "sin: {'value': 'float: unsupported_op'" in printed


@pytest.mark.slow
def test_tutorial_4_compiles_to_integer_kernels_that_keep_the_accuracy(run):
    names, printed = run(4)
    assert "quantized operators 6 int8; 0 fell back to float" in printed
    found = accuracies(printed)
    assert len(found) == 4
    assert min(found) > 90
    assert max(found) - min(found) <= 1.0  # 6 of 597 images
    program, graph = names["answers"]["program"], names["answers"]["converted graph"]
    assert (program.argmax(1) != graph.argmax(1)).sum() <= 6
    assert "mistakes its weight for that of an ordinary convolution" in printed
    assert printed.count("converted by X86InductorQuantizer: 3 of 3 float ops quantized") == 2


@pytest.mark.slow
def test_tutorial_5_encodes_sentences_in_fewer_bits(run):
    """8 bits leave some 50 dB of a layer with values spread evenly; 30 is what the tutorials call good."""
    _, printed = run(5)
    assert "operators in 1 delegate (6 dynamic" in printed
    sqnr = {name: float(found) for name, found in re.findall(r"^(.*): SQNR ([\d.]+) dB", printed, re.MULTILINE)}
    assert sqnr.keys() == {"dynamic .pte", "smoothed, in float", "static graph", "dynamic, x86"}
    assert sqnr.pop("smoothed, in float") > 100  # float32 rounds at 2 ** -24, 144 dB
    assert min(sqnr.values()) > 30
    assert "stay dynamic:\n  none" in printed


@pytest.mark.slow
def test_tutorial_6_recites_the_text_from_the_file_and_through_inductor(run):
    names, printed = run(6)
    assert names["in_float"] == "Sparse is better than dense.\nReadability counts.\nSpec"
    assert names["of_file"] == names["of_inductor"] == names["in_float"]
    assert {"key_cache_0", "value_cache_0"} <= set(names["program"].shared)
    assert "methods prefill, decode" in printed
    assert printed.count(repr(names["in_float"])) == 3


@pytest.mark.slow
def test_tutorial_7_finds_the_bad_layer(run):
    _, printed = run(7)
    assert "look at module 'blocks.1.pointwise_norm'" in printed
    in_float, in_int8, mended, mixed = accuracies(printed)
    assert in_float - 1 <= min(mended, mixed)  # 6 of 597 images
    assert in_int8 < 50
    estimated, measured = (table.split()[0] for table in re.findall(r"baseline .*\):\n(.*)", printed))
    assert estimated == measured == "conv2d_5"
    assert "mixed precision keeps conv2d_5 in float" in printed


@pytest.mark.slow
def test_tutorial_8_wins_back_by_training_what_4_bits_lost(run, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("plots")))
    names, printed = run(8)
    in_float, eight, four, trained_eight, trained_four = accuracies(printed)
    assert four < in_float - 1  # there is something to win back
    assert trained_four - four >= 0.8 * (in_float - four)  # the bound of docs/qat.md
    assert trained_eight >= eight - 0.2
    starts = {bits: curve[0] for bits, curve in names["curves"].items()}
    assert starts == pytest.approx({8: eight, 4: four}, abs=0.17)  # an image: float sums round otherwise
    assert printed.count("steps of the output's grid") == 2
    plots = re.findall(r"^plot: (.*)$", printed, re.MULTILINE)
    assert [Path(plot).stat().st_size > 10_000 for plot in plots] == [True] or "no plot: matplotlib" in printed


@pytest.mark.slow
def test_tutorial_9_wins_back_without_training_what_4_bits_lost(run, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("plots")))
    names, printed = run(9)
    in_float, calibrated, *improved = accuracies(printed)
    assert calibrated < in_float - 1  # there is something to win back: 6 of 597 images
    assert in_float - min(improved) < (in_float - calibrated) / 2
    sqnr = names["sqnr"]
    assert sqnr["correct_bias"] > sqnr["calibration alone"] + 3  # half a bit
    assert min(sqnr["adaround"], sqnr["the advisor"]) > sqnr["correct_bias"]
    assert names["advised"].value >= names["advice"].plain
    plots = re.findall(r"^plot: (.*)$", printed, re.MULTILINE)
    assert [Path(plot).stat().st_size > 10_000 for plot in plots] == [True] or "no plot: matplotlib" in printed
