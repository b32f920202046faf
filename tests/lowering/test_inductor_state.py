"""Inductor programs that write to buffers keep them between calls, and reset them; tied tables of integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tiny_llama import int8_quantizers
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import LoweringError
from pt2e_quant.lowering.inductor import lower_to_inductor


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.full((3,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return self.total * 2


@pytest.mark.parametrize("mode", ["compile", pytest.param("aoti", marks=pytest.mark.slow)])
def test_state_is_kept_between_calls_until_it_is_reset(mode):
    program = lower_to_inductor(torch.export.export(Sum(), (torch.ones(3),)), mode=mode)
    for _ in range(2):
        assert program(torch.ones(3)).tolist() == [2.5] * 3
        assert program(torch.ones(3)).tolist() == [4.5] * 3
        program.reset()


class Tied(nn.Module):
    """A table that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


def test_a_tied_table_leaves_the_linear_its_integer_kernel():
    """Inductor merges the dequantize ops of table and linear, after which the linear would compute in float."""
    ids = torch.tensor([[3, 0, 47, 3]])
    graph = convert_pt2e(prepare_pt2e(torch.export.export(Tied(), (ids,)), int8_quantizers()["inductor"]))
    program = lower_to_inductor(graph)
    assert [(kernel.node, kernel.precision) for kernel in program.kernels] == [
        ("embedding", "weight only"),
        ("linear", "dynamic"),
    ]
    with torch.no_grad():
        torch.testing.assert_close(program(ids), graph(ids), rtol=1e-5, atol=1e-5)


class Counter(nn.Module):
    """Reads a written buffer in a way that depends on no input: `read(n)`, before or after a count."""

    def __init__(self, read, first: bool) -> None:
        super().__init__()
        self.read, self.first = read, first
        self.register_buffer("n", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            y = x + self.read(self.n)
            self.n.add_(x.sum())
            return y
        self.n.add_(1)
        return x + self.read(self.n)


@pytest.mark.parametrize(("read", "first"), [(lambda n: n, False), (lambda n: n * 2, True), (lambda n: n[2:3], True)])
def test_a_package_that_would_freeze_what_it_counts_is_refused(read, first):
    """Inductor 2.13 folds it: the second call would answer as the first, and with verify=False nobody would know."""
    exported = torch.export.export(Counter(read, first), (torch.ones(4),))
    with pytest.raises(LoweringError, match=r"(?s)reads n, which the model writes to, and no input.*in Counter"):
        lower_to_inductor(exported, mode="aoti", verify=False)
    model, program = Counter(read, first), lower_to_inductor(exported)
    for _ in range(3):
        torch.testing.assert_close(program(torch.ones(4)), model(torch.ones(4)))
