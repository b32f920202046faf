"""What ExecuTorch prints on every machine that is not an Arm phone is left out, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pt2e_quant.lowering.executorch.startup import standard_error_without

RUNS = """
import torch
from pt2e_quant.lowering.executorch import lower_to_executorch
model = torch.export.export(torch.nn.Linear(4, 3).eval(), (torch.ones(1, 4),))
lower_to_executorch(model).run(torch.ones(1, 4))
print("ran")
"""


def test_known_lines_are_left_out_and_all_others_stay(capfd):
    with standard_error_without(re.compile(rb"\[known\] \w+ file")):
        os.write(2, b"[known] no file\nan error\n[known] another thing\n[known] a file\nends without a line break")
    os.write(2, b", afterwards")
    assert capfd.readouterr().err == "an error\n[known] another thing\nends without a line break, afterwards"


def test_other_lines_stay_when_an_error_is_raised(capfd):
    def fails():
        with standard_error_without(re.compile(rb"known")):
            os.write(2, b"known\nwhy\n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert capfd.readouterr().err == "why\n"


@pytest.mark.slow
def test_a_program_runs_without_a_line_on_standard_error():
    """Torch and ExecuTorch as they are installed, in a process of their own: the thread pool starts once."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", RUNS], cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("ran\n", "")
