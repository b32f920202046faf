"""Every tutorial runs from top to bottom and leaves nothing behind."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

TUTORIALS = {path.stem: path for path in (Path(__file__).parents[1] / "tutorials").glob("[0-9]*.py")}
FIRST = "01_quantize_for_executorch"
TEXT = "08_generate_text"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a tutorial in an empty folder; gives its names and what it printed."""

    def run(stem):
        monkeypatch.chdir(tmp_path)
        names = runpy.run_path(str(TUTORIALS[stem]), run_name="__main__")
        assert list(tmp_path.iterdir()) == []
        return names, capsys.readouterr().out

    return run


@pytest.mark.parametrize("stem", sorted(TUTORIALS.keys() - {FIRST, TEXT}))
def test_a_tutorial_runs(run, stem):
    _, printed = run(stem)
    assert printed.strip()


def test_the_first_tutorial_quantizes_without_losing_accuracy(run):
    names, printed = run(FIRST)
    assert names["program"].delegates == 1
    assert list(names["program"].undelegated) == []
    accuracies = [float(percent) for percent in re.findall(r"^accuracy of .* ([\d.]+)%$", printed, re.MULTILINE)]
    assert len(accuracies) == 3
    assert min(accuracies) > 90
    assert max(accuracies) - min(accuracies) <= 1.0  # 6 of 597 images


def test_the_tutorial_on_text_recites_it_from_the_file_and_through_inductor(run):
    names, printed = run(TEXT)
    assert names["in_float"] == "Sparse is better than dense.\nReadability counts.\nSpec"
    assert names["of_file"] == names["of_inductor"] == names["in_float"]
    assert {"key_cache_0", "value_cache_0"} <= set(names["program"].shared)
    assert "methods prefill, decode" in printed
