"""What Inductor's patterns would fuse with an integer kernel, and would get wrong, runs as the converted graph says.

Of each row Inductor 2.13 alone drops a factor or a bound, reads memory of another dtype, writes into memory that is
read later, or ends in an assertion. Activations have 7 bits, so that processors without VNNI multiply exactly, too.
Tolerance: that of test_x86_inductor_kernels.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant.lowering.inductor import lower_to_inductor
from tests.x86.test_x86_inductor_kernels import is_right
from tests.x86.x86_rows import Net, Outcome, Row, converted, outcomes

IMAGE, ROWS, TOKENS = (2, 4, 6, 6), (4, 24), (2, 5, 24)


def convs(function) -> Row:
    parts = {name: nn.Conv2d(4, 4, 1) for name in "abc"}
    return Row(lambda: Net(function, **parts), IMAGE)


def linears(function, shape: tuple[int, ...] = ROWS, **options) -> Row:
    parts = {name: nn.Linear(24, 24) for name in "abc"}
    return Row(lambda: Net(function, **parts), shape, **options)


def twice(y: Tensor) -> Tensor:
    return y + y


def _viewed(n: Net, x: Tensor) -> Tensor:
    """h is read again, through a view, after the sum into its memory."""
    h = x * 2 + 1
    rows = h.view(-1, 24)
    return torch.cat([n.a(rows.view(-1, 5, 24)) + h, (rows * 3).view(-1, 5, 24)], 1)


STATIC = {
    "linear, alpha": linears(lambda n, x: torch.add(n.a(x), x, alpha=2)),
    "linear, written to itself, alpha": linears(lambda n, x: n.a(x).add_(x, alpha=-1)),
    "linear and itself, read by a linear": linears(lambda n, x: n.b(twice(n.a(x)))),
    "convolution and itself": convs(lambda n, x: twice(n.a(x))),
    "silu of a convolution and its input": convs(lambda n, x: n.c((lambda y: y + F.silu(n.b(y)))(F.silu(n.a(x))))),
    "linear and truth": linears(lambda n, x: n.b(n.a(x) + (x > 0))),
    "a view that is read later": linears(_viewed, TOKENS),
    "relu6": convs(lambda n, x: n.b(F.relu6(n.a(x * 9)))),
}
SIBLINGS = {
    "linear, alpha on the product": linears(lambda n, x: torch.add(x, n.a(x), alpha=0.5)),
    "convolution, alpha": convs(lambda n, x: n.c(torch.add(n.a(x), n.b(x), alpha=3))),
    "alpha in a written silu": convs(lambda n, x: (lambda y: y / torch.add(torch.exp(-y), 1, alpha=2))(n.a(x))),
    "a written silu and its input": convs(
        lambda n, x: n.c((lambda y: y + (lambda z: z / (1 + torch.exp(-z)))(n.b(y)))(F.relu(n.a(x))))
    ),
    "hardswish, rounded down": convs(
        lambda n, x: (lambda y: torch.div(y * (y + 3).clamp_min(0).clamp_max(6), 6, rounding_mode="trunc"))(n.a(x * 9))
    ),
    "bounds the wrong way round": convs(lambda n, x: n.a(x).clamp(0.5, -0.5)),
    "bounds that are tensors": convs(
        lambda n, x: torch.clamp_max(torch.clamp_min(n.a(x), torch.tensor(-0.1)), torch.tensor(0.2))
    ),
    "linear and itself": linears(lambda n, x: twice(n.a(x))),
    "relu in place and the same memory": convs(lambda n, x: (lambda y: y + y.relu_())(n.a(x))),
    "relu of a convolution and its input": convs(lambda n, x: n.c((lambda y: y + F.relu(n.b(y)))(F.relu(n.a(x))))),
    "gelu of a linear and its input": linears(lambda n, x: n.c((lambda y: y + F.gelu(n.b(y)))(F.gelu(n.a(x))))),
    "linear and integers": linears(lambda n, x: n.a(x) + (x * 4).long()),
    "linear and float64": linears(lambda n, x: n.a(x) + x.double()),
    "convolution and float64": convs(lambda n, x: n.b((n.a(x) + x.double()).float())),
    "a transposed view that is read later": linears(
        lambda n, x: (lambda h: torch.cat([n.a(h) + h, h.t().contiguous().t() * 3]))(x * 2 + 1)
    ),
    "silu on seven bits": convs(lambda n, x: n.b(F.silu(n.a(x)))),
    "linear on seven bits": linears(lambda n, x: n.b(n.a(x))),
    "sum on seven bits": convs(lambda n, x: (lambda y: n.c(n.b(y) + n.a(x)))(F.relu(n.a(x)))),
}
DYNAMIC = {
    "positive": linears(lambda n, x: n.a(x), inputs=lambda shape: torch.rand(shape) + 2),
    "negative": linears(lambda n, x: n.a(x), inputs=lambda shape: -torch.rand(shape) - 2),
    "around zero": linears(lambda n, x: n.a(x) * n.b(x), TOKENS),
    "alpha": linears(lambda n, x: torch.add(n.a(x), x, alpha=2)),
}


@functools.cache
def compiled(table: str) -> dict[str, Outcome]:
    rows, recipe = {
        "static": (STATIC, "reduced"), "siblings": (SIBLINGS, "reduced"), "dynamic": (DYNAMIC, "dynamic, reduced")
    }[table]  # fmt: skip
    return outcomes(rows, recipe)


@pytest.mark.parametrize("name", STATIC)
def test_what_a_kernel_cannot_do_is_kept_apart_from_it(name):
    outcome = compiled("static")[name]
    is_right(outcome)
    assert outcome.kernels


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_so_are_its_siblings(name):
    outcome = compiled("siblings")[name]
    is_right(outcome)
    assert outcome.kernels


@pytest.mark.parametrize("name", DYNAMIC)
def test_qparams_of_run_time_are_those_of_the_converted_graph(name):
    is_right(compiled("dynamic")[name])


def test_operators_in_place_are_in_the_account():
    def net(inplace: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.ReLU(inplace))

    found = outcomes({str(inplace): Row(lambda inplace=inplace: net(inplace), IMAGE) for inplace in (False, True)})
    assert found["False"].kernels == found["True"].kernels
    assert len(found["True"].kernels) == 2


def test_a_product_too_small_for_a_kernel_is_in_the_account():
    """One row by 16 x 16: Inductor writes the sums out."""
    x = (torch.randn(1, 16),)
    graph = converted(nn.Linear(16, 16), x, "reduced")
    program = lower_to_inductor(graph, x)
    assert [(k.node, k.kernel, k.precision) for k in program.kernels] == [("linear", "generated", "float")]
    torch.testing.assert_close(program(*x), graph(*x), atol=1e-5, rtol=1e-5)
