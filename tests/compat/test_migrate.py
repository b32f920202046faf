"""pt2e-quant migrate: old imports become ours, layout stays, and what cannot be rewritten is named with its line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pt2e_quant.cli import main
from pt2e_quant.compat.migrate import migrate_source

pytestmark = pytest.mark.filterwarnings("ignore")  # torch announces the end of its quantized types

CASES = {
    "from": (
        "from torch.ao.quantization.observer import (\n    MinMaxObserver,  # good\n)",
        "from pt2e_quant.observer import (\n    MinMaxObserver,  # good\n)",
    ),
    "several homes": (
        "from torch.quantization import (  # both\n    MinMaxObserver as M, QuantStub)",
        "# both\nfrom pt2e_quant.observer import MinMaxObserver as M\nfrom pt2e_quant.eager import QuantStub",
    ),
    "module as": ("import torch.ao.quantization as tq, os", "import pt2e_quant.quantization as tq, os"),
    "module from": ("from torch.nn import quantized as nnq", "from pt2e_quant.nn import quantized as nnq"),
    "module of another name": (
        "from torch.ao.nn.intrinsic import modules",
        "from pt2e_quant.nn import intrinsic as modules",
    ),
    "star": ("from torch.quantization import *", "from pt2e_quant.quantization import *"),
    "attribute": (
        "import torch\nx = torch.nn.quantized.Linear",
        "import torch\nimport pt2e_quant.nn.quantized\n\nx = pt2e_quant.nn.quantized.Linear",
    ),
    "attribute of an alias": (
        "from torch import nn\nx = nn.quantized.Linear",
        "from torch import nn\nimport pt2e_quant.nn.quantized\n\nx = pt2e_quant.nn.quantized.Linear",
    ),
    "function with a file of its name": (
        "import torch\nimport torch.quantization\nf = torch.quantization.fuse_modules",
        "import torch\nimport pt2e_quant.quantization\n\nf = pt2e_quant.quantization.fuse_modules",
    ),
    "torch's own function": (
        "import torch\nq = torch.dequantize(torch.relu(x))",
        "import torch\nimport pt2e_quant\n\nq = pt2e_quant.dequantize(torch.relu(x))",
    ),
    "in a block": (
        "try:\n    import torch.quantization\nexcept ImportError:\n    pass",
        "try:\n    import torch\nexcept ImportError:\n    pass",
    ),
    "nothing": ("import torch.nn as nn\nfrom . import quantization\nx = nn.Linear", None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_program_imports_from_here_afterwards(name):
    before, after = CASES[name]
    made = migrate_source(before)
    assert made.source == (before if after is None else after)
    assert made.left == ()


def test_a_migrated_program_runs(capsys):
    source = (Path(__file__).parent / "program.py").read_text()
    made = migrate_source(source)
    assert made.left == ()
    assert not re.search(r"torch\.(ao|quantization|nn\.quantized)", made.source.partition('"""\n')[2])
    exec(compile(made.source.replace("*sys.argv[1:]", "'ours'"), "program.py", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "done ours\n"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            "from torch.ao.quantization import fuse_module",
            r"place of torch.ao.quantization.fuse_module. Did .*'fuse_modules'",
        ),
        ("import torch.ao.pruning", "torch.ao.pruning"),
        ("import torch.quantization as tq\n\ny = tq.fuse_module", "torch.quantization.fuse_module"),
        ("patch('torch.quantization.prepare')", "text 'torch.quantization.prepare' names an old module"),
    ],
)
def test_what_cannot_be_rewritten_is_named_with_its_line(line, why):
    (left,) = migrate_source(f"\n{line}\n").left
    assert left.line == 2 + line.count("\n")
    assert re.search(why, left.why)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with a file to change, one to leave and one that is not Python."""
    (tmp_path / "old.py").write_text("import torch.quantization as tq\r\ntq.prepared\r\n", newline="")
    (tmp_path / "other.py").write_text("import torch\n")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "lib.py").write_text("import torch.quantization\n")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["pt2e-quant", "migrate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    return call


def test_the_command_shows_the_changes_and_writes_nothing(run, tmp_path):
    code, out = run(".")
    assert code == 1
    assert "-import torch.quantization as tq" in out
    assert "+import pt2e_quant.quantization as tq" in out
    assert "old.py:2: pt2e_quant has nothing in the place of torch.quantization.prepared" in out
    assert "1 file(s) would change; add --write" in out
    assert (tmp_path / "old.py").read_bytes().startswith(b"import torch.quantization")


def test_the_command_writes_when_it_is_told_to(run, tmp_path):
    run(".", "--write")
    assert (tmp_path / "old.py").read_bytes() == b"import pt2e_quant.quantization as tq\r\ntq.prepared\r\n"
    assert (tmp_path / ".venv" / "lib.py").read_text() == "import torch.quantization\n"


def test_a_file_that_is_no_python_is_named_and_the_others_are_written(run, tmp_path):
    (tmp_path / "broken.py").write_text("import torch.quantization\nprint 'x'\n")
    code, out = run(".", "--write")
    assert code == 1
    assert "broken.py:2: not Python" in out
    assert (tmp_path / "old.py").read_bytes().startswith(b"import pt2e_quant")


def test_nothing_to_do_by_hand_ends_with_0(run, tmp_path):
    code, out = run("other.py", "--json")
    assert code == 0
    assert out == '{\n "changed": {},\n "left": [],\n "written": false\n}\n'
