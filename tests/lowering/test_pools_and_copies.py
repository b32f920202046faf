"""Adaptive max pooling and copies into fresh memory run in ExecuTorch, which has kernels for neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.graph.module import clone, finish
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.passes.adaptive_max_pools import adaptive_max_pools
from pt2e_quant.lowering.executorch.passes.copies_to_fresh_memory import copies_to_fresh_memory
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.xnnpack.rows import Net

IMAGE = torch.randn(2, 3, 10, 7)

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "windows of one size": lambda x: F.adaptive_max_pool2d(x, (5, 7)),
    "to one": lambda x: F.adaptive_max_pool2d(x, 1),
    "windows that overlap": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
    "more outputs than inputs": lambda x: F.adaptive_max_pool2d(x, (12, 7)),
    "one image": lambda x: F.adaptive_max_pool2d(x[0], (3, 7)),
    "in one dimension": lambda x: F.adaptive_max_pool1d(x[0], 3),
    "by default in one": lambda x: F.adaptive_max_pool2d(x, (None, 2)),
}
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "empty_like": lambda x: torch.empty_like(x).copy_(x) + 1,
    "zeros_like": lambda x: torch.zeros_like(x).copy_(x) + 1,
    "new_empty": lambda x: x.new_empty(x.shape).copy_(x) + 1,
    "broadcast": lambda x: torch.empty(2, 3, 10, 7).copy_(x[:, :1, :1]) + 1,
    "to another type": lambda x: torch.empty(x.shape, dtype=torch.int64).copy_(x) + 1,
}


def after(step, function: Callable[[Tensor], Tensor], x: Tensor):
    return finish(step(clone(torch.export.export(Net(lambda net, x: function(x)), (x,)).module())))


@pytest.mark.parametrize("name", POOLS)
def test_the_maxima_are_those_of_torch(name):
    gm = after(adaptive_max_pools, POOLS[name], IMAGE)
    assert not [node for node in gm.graph.nodes if "adaptive" in str(node.target)]
    assert torch.equal(gm(IMAGE), POOLS[name](IMAGE))


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_into_fresh_memory_is_a_clone(name):
    gm = after(copies_to_fresh_memory, COPIES[name], IMAGE)
    assert not [node for node in gm.graph.nodes if "copy_" in str(node.target) or "empty" in str(node.target)]
    assert torch.equal(gm(IMAGE), COPIES[name](IMAGE))


def test_a_clone_has_memory_of_its_own():
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x).copy_(x).add_(1), x * 1

    for result, expected in zip(after(copies_to_fresh_memory, function, IMAGE)(IMAGE), function(IMAGE), strict=True):
        assert torch.equal(result, expected)


def test_memory_that_is_read_elsewhere_stays():
    def function(x: Tensor) -> Tensor:
        memory = torch.zeros_like(x)
        before = memory + x
        return memory.copy_(x) + before

    gm = after(copies_to_fresh_memory, function, IMAGE)
    assert [node for node in gm.graph.nodes if "copy_" in str(node.target)]
    assert torch.equal(gm(IMAGE), function(IMAGE))


def test_pools_whose_indices_are_read_stay():
    gm = after(adaptive_max_pools, lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[1], IMAGE)
    assert [node for node in gm.graph.nodes if "adaptive" in str(node.target)]


@pytest.mark.slow
def test_both_run_after_a_convolution_in_integers():
    """verify compares each output with the converted graph's."""
    pytest.importorskip("executorch")

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.conv(x)
            pooled = F.adaptive_max_pool2d(y, (4, 5)), F.adaptive_max_pool2d(y, (3, 2)), F.lp_pool2d(y, 2, 2)
            return *pooled, F.adaptive_max_pool1d(y.flatten(2), 3), torch.empty_like(y).copy_(y) * 2

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(Branches().eval(), (IMAGE,)), quantizer)
    prepared(IMAGE)
    program = lower_to_executorch(convert_pt2e(prepared))
    assert {kernel.precision for kernel in program.kernels if "convolution" in kernel.op} == {"int8"}
