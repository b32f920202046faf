"""Models that ask for channels last themselves run on XNNPACK, and compute what the converted graph computes.

Lowering verifies that: it raises beyond what rounding explains.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from quantizers.xnnpack import XNNPACKQuantizer
from tests.nets import randomize
from tests.xnnpack.rows import RECIPES, Net

pytest.importorskip("executorch")

LAST = torch.channels_last
ROWS = {
    "cast, linear": lambda n, x: n.linear(x.double().to(torch.float32, memory_format=LAST)),
    "copy, linear": lambda n, x: n.linear(x.clone(memory_format=LAST)),
    "contiguous, linear": lambda n, x: n.linear(x.contiguous(memory_format=LAST)),
    "cast, convolution": lambda n, x: n.conv(x.double().to(torch.float32, memory_format=LAST)),
    "an output": lambda n, x: n.conv(x).to(memory_format=LAST),
    "new memory": lambda n, x: n.linear(torch.zeros_like(x, memory_format=LAST) + x),
    "viewed": lambda n, x: n.linear(x.contiguous(memory_format=LAST).permute(0, 2, 3, 1).view(-1, 3, 6)),
}


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = {"conv": nn.Conv2d(4, 6, 3), "linear": nn.Linear(6, 5)}
        self.branches = nn.ModuleList(Net(function, **parts) for function in ROWS.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]


@functools.cache
def lowered() -> ExecutorchProgram:
    x = torch.randn(1, 4, 9, 6)
    prepared = prepare_pt2e(
        torch.export.export(randomize(_Branches()).eval(), (x,)), XNNPACKQuantizer().set_global(RECIPES["per channel"])
    )
    prepared(x)
    return lower_to_executorch(convert_pt2e(prepared))


@pytest.mark.parametrize("name", ROWS)
def test_a_copy_to_channels_last_computes_the_same(name):
    found = lowered().verified.outputs[list(ROWS).index(name)]
    assert found.passed
    assert found.steps is not None
    assert found.steps <= 1.01  # XNNPACK requantizes with its own rounding of the scale product


class _Normalized(nn.Module):
    """Images plus and times constants of each form, as in front of a net."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.shift, self.gain = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(1, 4, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv((x - 0.5) * self.gain), x + self.shift


def test_images_in_channels_last_meet_constants():
    """XNNPACK's compiler gave the tensors layouts of their own: error 0x1 or 0x10 when it ran."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 8).to(memory_format=LAST)
    exported = torch.export.export(randomize(_Normalized()).eval(), (x,))
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(RECIPES["per channel"]))
    prepared(x)
    program = lower_to_executorch(convert_pt2e(prepared))
    assert "its inputs are contiguous" in program.remarks[-1].text
    assert all(found.steps is not None and found.steps <= 1.01 for found in program.verified.outputs)


def test_convolutions_that_read_one_image_at_run_time_compute_what_each_does_alone():
    """Lowering raised on the second: 7 dB."""
    model = Net(
        lambda n, x: (n.one(x), n.three(x), n.back(x)),
        one=nn.Conv2d(4, 6, 1), three=nn.Conv2d(4, 6, 3, padding=1), back=nn.ConvTranspose2d(4, 6, 2),
    )  # fmt: skip
    x = torch.randn(1, 4, 9, 6)
    quantizer = XNNPACKQuantizer().set_global(RECIPES["dynamic"])
    prepared = prepare_pt2e(torch.export.export(randomize(model).eval(), (x,)), quantizer)
    prepared(x)
    program = lower_to_executorch(convert_pt2e(prepared))
    assert all(output.passed for output in program.verified.outputs)
    assert program.count("dynamic") == 3
