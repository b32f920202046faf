"""The situations of torchao's tests of fusion on x86: what each operator becomes, and what it computes.

Rebuilt small. The peer counts matches of Inductor's patterns; here the kernels are read from the program, and outputs
compared with the converted graph's, as in tests/x86. What differs on purpose stands in docs/differences.md.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.x86.x86_rows import BEYOND, Net, Outcome, Row, outcomes

IMAGE = (2, 3, 8, 8)


def conv(*sizes: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(*sizes, **options)  # type: ignore[arg-type]


def _sums_of_convolutions(in_place: bool):
    def forward(net: Net, x: Tensor) -> Tensor:
        y, z = net.first(x), net.second(x)
        y = F.relu(y.add_(z) if in_place else y + z)
        z, y = net.third(y), net.fourth(y)
        return F.relu(z.add_(y) if in_place else z + y)

    return lambda: Net(
        forward, first=conv(3, 6, 3), second=conv(3, 6, 3), third=conv(6, 6, 3, bias=False), fourth=conv(6, 6, 3)
    )


def _with_an_extra(swapped: bool, in_place: bool):
    def forward(net: Net, x: Tensor) -> Tensor:
        extra, y = torch.tanh(x), net.conv(x)
        if in_place:
            return net.head(extra.add_(y) if swapped else y.add_(extra))
        return net.head(extra + y if swapped else y + extra)

    return lambda: Net(forward, conv=conv(3, 3, 1), head=conv(3, 2, 1))


def _promoted(layer, *sizes: int):
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.first(x)
        return net.second(y) + net.third(y)

    return lambda: Net(forward, first=layer(*sizes), second=layer(*sizes), third=layer(*sizes))


def _pool_of_two_readers(net: Net, x: Tensor) -> Tensor:
    pooled = F.max_pool2d(x, 3, stride=1)
    return torch.cat((net.first(x) + pooled, net.second(pooled)), 1)


def _concatenated(net: Net, x: Tensor) -> Tensor:
    y = net.second(x)
    return net.last(torch.cat([net.first(x), y, net.third(y)], 1))


def _sums_of_linears(swapped: bool, in_place: bool):
    def add(x: Tensor, y: Tensor) -> Tensor:
        x, y = (y, x) if swapped else (x, y)
        return x.add_(y) if in_place else x + y

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(add(net.first(x), net.second(x)))
        return add(net.third(y), net.fourth(y))

    parts = ("first", "second", "third", "fourth")
    return lambda: Net(forward, **{name: nn.Linear(32, 32) for name in parts})


def _alone(net: Net, x: Tensor) -> Tensor:
    return torch.cat([F.adaptive_avg_pool2d(F.relu(net.conv(x)), 1).flatten(1)])


def _with_squares(net: Net, x: Tensor) -> Tensor:
    return torch.cat((net.first(x), net.second(x.pow(2))), 1)


def _permuted(net: Net, x: Tensor) -> Tensor:
    return net.second(net.first(x.permute(0, 2, 3, 1).flatten(1, 2)))


CONVOLUTIONS = {
    "three, the last in groups": (3, 0, lambda: nn.Sequential(conv(3, 8, 3), conv(8, 8, 3), conv(8, 8, 3, groups=4))),
    "sums": (4, 2, _sums_of_convolutions(False)),
    "sums, in place": (4, 2, _sums_of_convolutions(True)),
    "sum with another tensor": (2, 1, _with_an_extra(False, False)),
    "sum with another tensor, swapped": (2, 1, _with_an_extra(True, False)),
    "sum with another tensor, in place": (2, 1, _with_an_extra(False, True)),
    "sum into another tensor": (2, 1, _with_an_extra(True, True)),
    "sum that broadcasts": (
        1, 0, lambda: Net(lambda net, x: net.conv(x) + x.amax((2, 3), keepdim=True), conv=conv(3, 3, 3))
    ),
    "hardswish in place": (1, 0, lambda: nn.Sequential(conv(3, 6, 3), nn.Hardswish(inplace=True))),
    "hardsigmoid in place": (1, 0, lambda: nn.Sequential(conv(3, 6, 3), nn.Hardsigmoid(inplace=True))),
    "a pool of two readers": (2, 1, lambda: Net(_pool_of_two_readers, first=conv(3, 3, 3), second=conv(3, 3, 1))),
    "concatenated": (
        4, 0, lambda: Net(
            _concatenated, first=conv(3, 4, 1), second=conv(3, 4, 1), third=conv(4, 2, 1), last=conv(10, 4, 1)
        )
    ),
    "one input of two": (3, 1, _promoted(conv, 3, 3, 1)),
    "pool with padding": (
        1, 0, lambda: nn.Sequential(conv(3, 8, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
    ),
    "flattened, concatenated alone": (1, 0, lambda: Net(_alone, conv=conv(3, 8, 3))),
    "concatenated with one of squares": (2, 0, lambda: Net(_with_squares, first=conv(3, 4, 3), second=conv(3, 4, 3))),
}  # fmt: skip
LINEARS = {
    "of a permuted image": (2, 0, lambda: Net(_permuted, first=nn.Linear(3, 20), second=nn.Linear(20, 24)), IMAGE),
    "sums": (4, 2, _sums_of_linears(False, False), (4, 32)),
    "sums, swapped, 3-D": (4, 2, _sums_of_linears(True, False), (4, 3, 32)),
    "sums, in place": (4, 2, _sums_of_linears(False, True), (4, 32)),
    "sums, into the other": (4, 2, _sums_of_linears(True, True), (4, 32)),
    "times a tensor": (1, 0, lambda: Net(lambda net, x: net.first(x) * x.sin(), first=nn.Linear(32, 32)), (4, 32)),
    "one input of two": (3, 1, _promoted(nn.Linear, 32, 32), (4, 32)),
    "one input of two, 3-D": (3, 1, _promoted(nn.Linear, 32, 32), (4, 3, 32)),
}


def _with_norms(activation: type[nn.Module], *, sum_of_two: bool = False):
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.second_norm(net.second(x))
        return net.act(net.norm(net.first(x)) + y) if sum_of_two else net.act(net.norm(net.first(y)))

    return lambda: Net(
        forward, act=activation(), first=conv(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3),
        second=conv(3, 3, 3, padding=1), second_norm=nn.BatchNorm2d(3),
    )  # fmt: skip


TRAINED = {
    **{
        f"norms and {kind.__name__}": (2, 0, _with_norms(kind))
        for kind in (nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.Hardswish)
    },
    "sum of norms": (2, 1, _with_norms(nn.Identity, sum_of_two=True)),
    "sum of norms, relu": (2, 1, _with_norms(nn.ReLU, sum_of_two=True)),
    "a norm in front": (1, 0, lambda: nn.Sequential(nn.BatchNorm2d(3), conv(3, 3, 3), nn.BatchNorm2d(3))),
}
"""(integer products, sums among them that are fused, model, shape of its input). The counts are those of the peer."""


@functools.cache
def compiled(table: str, recipe: str) -> dict[str, Outcome]:
    rows = {"convolutions": CONVOLUTIONS, "linears": LINEARS, "trained": TRAINED}[table]
    return outcomes({name: Row(row[2], row[3] if len(row) > 3 else IMAGE) for name, row in rows.items()}, recipe)


def judge(outcome: Outcome, products: int, sums: int) -> None:
    """Within what rounding to the other side of one step changes, see tests/x86/test_x86_inductor_kernels.py."""
    found = [kernel for kernel in outcome.kernels if kernel.startswith("onednn.q")]
    assert (len(found), sum(".binary" in kernel for kernel in found)) == (products, sums)
    assert outcome.error <= 0.01 * max(outcome.largest, 1.0)
    assert outcome.changed <= 1 / BEYOND
    assert outcome.kept


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_become_the_kernels_that_the_peer_counts(name):
    judge(compiled("convolutions", "static")[name], *CONVOLUTIONS[name][:2])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_models_trained_with_norms_become_the_kernels_that_the_peer_counts(name):
    judge(compiled("trained", "trained")[name], *TRAINED[name][:2])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["static", "dynamic", "trained", "trained, dynamic"])
@pytest.mark.parametrize("name", LINEARS)
def test_linears_become_the_kernels_that_the_peer_counts(name, recipe):
    judge(compiled("linears", recipe)[name], *LINEARS[name][:2])
