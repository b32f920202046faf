"""Models in float16 on XNNPACK: integers laid out channels last between values of half precision.

ExecuTorch's change of layout returns float32 where the model has float16: without `float32_between_integers`, these
programs write beyond their tensors and end the process.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from quantizers.xnnpack import XNNPACKQuantizer
from tests.nets import randomize
from tests.xnnpack.rows import RECIPES, Net

pytest.importorskip("executorch")

ROWS = {
    "convolution": lambda: nn.Conv2d(4, 6, 3),
    "without a bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "in one dimension": lambda: Net(lambda n, x: n.conv(x.flatten(2)), conv=nn.Conv1d(4, 6, 3)),
    "two with relu": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)),
    "a float op between": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, 1)),
    "residual, pool, linear": lambda: Net(
        lambda n, x: n.linear(F.adaptive_avg_pool2d(F.max_pool2d(x + n.conv(x), 2), 1).flatten(1)),
        conv=nn.Conv2d(4, 4, 3, padding=1), linear=nn.Linear(4, 5),
    ),
    "mean": lambda: Net(lambda n, x: (x + x * 2).mean((2, 3), keepdim=True)),
}  # fmt: skip


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(make() for make in ROWS.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]


@functools.cache
def lowered() -> tuple[ExecutorchProgram, Any, Tensor]:
    model, x = randomize(_Branches()).to(torch.float16).eval(), torch.randn(1, 4, 8, 8).half()
    exported = torch.export.export(model, (x,))
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(RECIPES["per channel"]))
    prepared(x)
    converted = convert_pt2e(prepared)
    return lower_to_executorch(converted), converted, x


@pytest.mark.parametrize("name", ROWS)
def test_a_program_in_float16_computes_what_its_graph_computes(name):
    """Within two steps of the output's grid: the graph rounds sums to float16, the kernels do not."""
    program, converted, x = lowered()
    place = list(ROWS).index(name)
    got, expected = program.run(x)[place], converted(x)[place]
    grid = max(g.scale for g in explain(converted).groups if isinstance(g.scale, float))
    assert got.dtype is torch.float16
    assert expected.unique().numel() > 1
    assert (got.float() - expected.float()).abs().max() <= 2 * grid


def test_its_products_compute_in_integers():
    program, _, _ = lowered()
    assert {kernel.precision for kernel in program.kernels if "convolution" in kernel.op} == {"int8"}
