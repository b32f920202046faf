"""What X86InductorQuantizer claims becomes an integer kernel in Inductor, and computes what the converted graph says.

A relu, relu6 or hardtanh before a quantize is none of a kernel's steps where the quantize saturates there anyway.

Tolerance: float rounding, a few 1e-7 of numbers around 1. Where it puts a value on the other side of the border between
two integers, what reads that integer changes by one step of its grid, under a hundredth of the largest output. A value
lies that near to a border once in 100,000 (see test_x86_inductor_rounding), so of the images of a batch one may change.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant.lowering.inductor import lower_to_inductor
from tests.x86.x86_rows import BEYOND, Net, Outcome, Row, converted, outcomes

CONV, SUM, LINEAR, ADDED, POOL = (
    "onednn.qconv_pointwise",
    "onednn.qconv2d_pointwise.binary",
    "onednn.qlinear_pointwise",
    "onednn.qlinear_pointwise.binary",
    "quantized.max_pool2d",
)
Q = " + quantize"
IMAGE = (2, 3, 8, 8)


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def _residual(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.stem(x))
    return net.head(F.relu(net.second(F.hardswish(net.first(y))) + y))


def residual() -> nn.Module:
    return Net(
        _residual,
        stem=nn.Conv2d(3, 4, 1, bias=False),
        first=nn.Conv2d(4, 4, 3, padding="same"),
        second=nn.Conv2d(4, 4, 3, padding=1, groups=2),
        head=nn.Conv2d(4, 2, 1),
    )


def _attention(net: Net, x: Tensor) -> Tensor:
    def heads(y: Tensor) -> Tensor:
        return y.view(y.shape[0], y.shape[1], 2, 8).transpose(1, 2)

    y = F.scaled_dot_product_attention(heads(net.query(x)), heads(net.key(x)), heads(net.value(x)))
    x = x + net.out(y.transpose(1, 2).reshape(x.shape))
    return x + net.down(F.gelu(net.up(net.norm(x))))


def attention() -> nn.Module:
    return Net(
        _attention,
        query=nn.Linear(16, 16), key=nn.Linear(16, 16, bias=False), value=nn.Linear(16, 16), out=nn.Linear(16, 16),
        norm=nn.LayerNorm(16, eps=1e-3), up=nn.Linear(16, 32), down=nn.Linear(32, 16),
    )  # fmt: skip


QUICK = {
    "conv bn relu, max pool, relu6, flatten, linear": Row(
        lambda: chain(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 8, 3, groups=2), nn.ReLU6(), nn.Flatten(), nn.Linear(32, 5, bias=False),
        ),
        IMAGE,
        (CONV + Q, POOL, CONV + Q, "generated", LINEAR),
    ),
    "residual add": Row(
        residual, IMAGE, (CONV + Q, CONV + " + hardswish" + Q, SUM + " + sum" + Q, CONV)
    ),
    "linear gelu, residual": Row(
        lambda: Net(
            lambda n, x: F.relu(n.c(n.d(x) + n.b(F.gelu(n.a(x))))), a=nn.Linear(10, 16), b=nn.Linear(16, 16),
            c=nn.Linear(16, 9), d=nn.Linear(10, 16),
        ),
        (2, 3, 10),
        (ADDED + " + add" + Q, LINEAR + " + gelu" + Q, LINEAR, LINEAR + " + relu"),
    ),
}  # fmt: skip
SLOW = {
    "hardswish, silu, hardtanh": Row(
        lambda: chain(
            nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3, bias=False), nn.SiLU(), nn.Conv2d(8, 4, 1),
            nn.Hardtanh(-0.2, 0.3), nn.Conv2d(4, 4, 1), nn.Hardswish(),
        ),
        IMAGE,
        (CONV + " + hardswish" + Q, CONV + " + swish" + Q, CONV + Q, CONV + " + hardswish"),
    ),
    "one channel": Row(
        lambda: chain(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3), nn.Conv2d(1, 2, 3, bias=False)),
        (2, 1, 8, 8),
        (CONV + Q, CONV + Q, CONV),
    ),
    "one channel in one dimension": Row(
        lambda: chain(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten()), (2, 1, 8), (CONV + " + relu",)
    ),
    "conv1d relu": Row(
        lambda: chain(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 3, dilation=2)),
        (2, 3, 12),
        (CONV + Q, CONV),
    ),
    "add of two convolutions": Row(
        lambda: Net(
            lambda n, x: n.c(n.a(x) + n.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(4, 2, 1)
        ),
        IMAGE,
        (SUM + " + sum" + Q, CONV + Q, CONV),
    ),
    "add that ends in float": Row(
        lambda: Net(lambda n, x: F.relu(n.a(x) + n.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)),
        IMAGE,
        (SUM + " + sum + relu", CONV + Q),
    ),
    "add of its own input": Row(
        lambda: Net(lambda n, x: n.b(x + n.a(x)), a=nn.Conv2d(3, 3, 3, padding=1), b=nn.Conv2d(3, 3, 1)),
        IMAGE,
        (CONV, CONV),
    ),
    "a transposed convolution and one in three dimensions, in float": Row(
        lambda: chain(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Unflatten(1, (2, 2)),
            nn.Conv3d(2, 3, 2), nn.Flatten(2), nn.Linear(49, 5),
        ),
        IMAGE,
        (CONV + " + relu", LINEAR),
    ),
    "cat": Row(
        lambda: Net(
            lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1),
            c=nn.Conv2d(8, 4, 3, padding="same", groups=2),
        ),
        IMAGE,
        (CONV + Q, CONV + Q, "generated", CONV),
    ),
    "channel shuffle": Row(
        lambda: Net(
            lambda n, x: n.b(n.a(x).view(x.shape[0], 2, 2, 8, 8).transpose(1, 2).reshape(x.shape[0], 4, 8, 8)),
            a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 3, padding=1),
        ),
        IMAGE,
        (CONV + Q, "generated", "generated", "generated", CONV),
    ),
    "even and uneven padding": Row(
        lambda: Net(
            lambda n, x: n.b(F.pad(F.relu(n.a(F.pad(x, (1, 1, 2, 2)))), (0, 1, 0, 1))),
            a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3, stride=2),
        ),
        IMAGE,
        (CONV + Q, "generated", CONV),
    ),
    "squeeze and excite": Row(
        lambda: Net(
            lambda n, x: (lambda y: n.c(y * torch.sigmoid(n.b(F.adaptive_avg_pool2d(y, 1)))))(F.hardswish(n.a(x))),
            a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1),
        ),
        IMAGE,
        (CONV + " + hardswish" + Q, CONV, CONV),
    ),
    "linear relu, gelu tanh": Row(
        lambda: chain(nn.Linear(10, 16), nn.GELU("tanh"), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)),
        (4, 10),
        (LINEAR + " + gelu" + Q, LINEAR + Q, LINEAR),
    ),
    "linear out of order": Row(
        lambda: Net(lambda n, x: n.a(x.transpose(1, 2)), a=nn.Linear(6, 7)), (2, 6, 10), (LINEAR,)
    ),
    "linear in four dimensions": Row(lambda: nn.Linear(6, 7, bias=False), (2, 3, 4, 6), (LINEAR,)),
    "attention": Row(
        attention,
        (2, 5, 16),
        (LINEAR, LINEAR, LINEAR, ADDED + " + add", LINEAR + " + gelu" + Q, ADDED + " + sum"),
    ),
}  # fmt: skip
LINEARS = {name: SLOW[name] for name in ("linear relu, gelu tanh", "linear out of order", "attention")}
FLOAT_RUN = {
    "linear relu": Row(lambda: chain(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12, bias=False)), (4, 10)),
    "attention": Row(attention, (2, 5, 16)),
}


def judge(outcome: Outcome, row: Row) -> None:
    assert outcome.kernels == row.kernels
    is_right(outcome)


def is_right(outcome: Outcome) -> None:
    assert outcome.largest > 0
    assert outcome.error <= 0.01 * max(outcome.largest, 1.0)
    assert outcome.changed <= 1 / BEYOND
    assert outcome.kept


@functools.cache
def compiled(table: str, mode: str) -> dict[str, Outcome]:
    return outcomes({"quick": QUICK, "slow": SLOW}[table], mode=mode)


@pytest.mark.parametrize("name", QUICK)
def test_a_claim_becomes_the_integer_kernel_with_a_dynamic_batch(name):
    judge(compiled("quick", "compile")[name], QUICK[name])


def test_a_sum_is_not_written_into_the_input_of_the_caller():
    """Inductor 2.13 alone leaves relu(x + linear(x)) in x: its in-place sum asks for other readers only."""
    x = torch.randn(3, 10)
    graph = converted(Net(lambda n, x: F.relu(x + n.a(x)), a=nn.Linear(10, 10)), (x,))
    program = lower_to_inductor(graph)
    kept = x.clone()
    torch.testing.assert_close(program(x), graph(x))
    assert torch.equal(x, kept)
    assert [(kernel.kernel, kernel.fused) for kernel in program.kernels] == [(ADDED, ("add", "relu"))]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compile", "aoti"])
@pytest.mark.parametrize("name", SLOW)
def test_every_other_claim_becomes_the_integer_kernel(name, mode):
    judge(compiled("slow", mode)[name], SLOW[name])


@pytest.mark.slow
def test_linears_with_run_time_qparams_become_integer_kernels():
    found = outcomes(LINEARS, "dynamic")
    for outcome in found.values():
        assert all(kernel.startswith(LINEAR) for kernel in outcome.kernels)
        assert not any("quantize" in kernel for kernel in outcome.kernels)
        is_right(outcome)
    assert [len(outcome.kernels) for outcome in found.values()] == [3, 1, 6]


@pytest.mark.slow
def test_linears_with_weights_in_float16_have_kernels():
    for outcome in outcomes(FLOAT_RUN, "fp16").values():
        assert outcome.kernels
        assert all(found.startswith("onednn.linear") for found in outcome.kernels)
        is_right(outcome)
        assert outcome.changed == 0  # nothing is rounded to integers
