"""By how much one integer kernel of oneDNN differs from the converted graph, and where: measured kernel by kernel.

Both add up in int32, exactly, and multiply by scales in float32, in another order: a few units in the last place of
numbers up to 255, 2**-24 * 255 = 1.5e-5 steps each. So an output may be another integer only where the real value lies
within 1e-4 steps of the border between two, and then the one next to it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant.lowering.inductor import lower_to_inductor, recipe
from pt2e_quant.lowering.inductor.passes.drop_unread_rounding import drop_unread_rounding
from tests.lowering.handmade import Body, Branches, Grid, Weight

NEAR = 1e-4
INPUT, OTHER = Grid(0.02, 120, 0, 255, torch.uint8), Grid(0.11, 128, 0, 255, torch.uint8)


def conv(n: Body, x: Tensor) -> Tensor:
    return F.conv2d(INPUT(x), n.w(), n.b, padding=1)


def linear(n: Body, x: Tensor) -> Tensor:
    return F.linear(INPUT(x), n.w(), n.b)


# name: (what the kernel computes before it rounds, scale and zero point of its output)
KERNELS = {
    "conv": (conv, 0.1, 128),
    "conv relu": (lambda n, x: F.relu(conv(n, x)), 0.04, 0),
    "conv hardtanh": (lambda n, x: F.hardtanh(conv(n, x), -0.3, 5.0), 0.021, 14),
    "conv hardswish": (lambda n, x: F.hardswish(conv(n, x)), 0.04, 10),
    "conv silu": (lambda n, x: F.silu(conv(n, x)), 0.04, 7),
    "conv sum": (lambda n, x: conv(n, x) + OTHER(torch.tanh(x) * 9), 0.12, 128),
    "conv sum relu": (lambda n, x: F.relu(conv(n, x) + OTHER(torch.tanh(x) * 9)), 0.06, 3),
    "linear": (linear, 0.1, 128),
    "linear relu": (lambda n, x: F.relu(linear(n, x)), 0.04, 2),
    "linear gelu": (lambda n, x: F.gelu(linear(n, x)), 0.04, 5),
    "linear gelu tanh": (lambda n, x: F.gelu(linear(n, x), approximate="tanh"), 0.04, 5),
}


def _grid(name: str) -> Grid:
    _, scale, zero_point = KERNELS[name]
    return Grid(scale, zero_point, 0, 255, torch.uint8)


def _body(name: str) -> Body:
    function, grid, convolves = KERNELS[name][0], _grid(name), name.startswith("conv")
    weight = Weight((16, 16, 3, 3) if convolves else (48, 64), spread=0.002)
    return Body(lambda n, x: grid(function(n, x)), w=weight, b=nn.Parameter(torch.randn(16 if convolves else 48)))


@pytest.mark.slow
def test_a_kernel_differs_by_one_step_and_only_next_to_a_border(monkeypatch):
    passes = tuple(one for one in recipe.ALWAYS if one is not drop_unread_rounding)
    monkeypatch.setattr(recipe, "ALWAYS", passes)  # here the rounded numbers are the result
    torch.manual_seed(0)
    bodies = {name: _body(name) for name in KERNELS}
    inputs = tuple(torch.randn((64, 16, 12, 12) if name.startswith("conv") else (4096, 64)) for name in KERNELS)
    graph = torch.export.export(Branches(list(bodies.values())), inputs).module()
    program = lower_to_inductor(graph, inputs)
    assert program.count("int8") == len(KERNELS)
    with torch.no_grad():
        for (name, body), x, found, wanted in zip(
            bodies.items(), inputs, program(*inputs), graph(*inputs), strict=True
        ):
            _, scale, zero_point = KERNELS[name]
            steps = ((found - wanted) / scale).round().abs()
            real = KERNELS[name][0](body, x).double() / scale + zero_point
            to_border = (real - real.floor() - 0.5).abs()
            assert steps.max() <= 1, name
            assert (to_border[steps > 0] <= NEAR).all(), name
            assert (steps > 0).double().mean() <= 2 * NEAR, name  # as many as lie that near, were they spread evenly
