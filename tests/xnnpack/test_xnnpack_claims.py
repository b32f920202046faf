"""Every rule of XNNPACKQuantizer takes what it should, and XNNPACK runs in integers what a rule took.

Tolerance: XNNPACK rounds the product of scales in its own way, so an output may be one step of its grid (1 LSB) off the
converted graph. Dynamic kernels return floats and differ by float rounding only.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantizers.xnnpack import RULES
from tests.xnnpack.rows import Net, Outcome, Row, after_conv, chain, outcomes, report

pytest.importorskip("executorch")

IMAGE, VECTOR, PAIR = ((2, 3, 6, 6),), ((2, 6),), ((2, 6), (2, 6))


def conv(**options: object) -> nn.Module:
    return nn.Conv2d(3, 4, 3, **options)


def _pad_conv(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.conv(F.pad(x, (1, 2, 0, 1)))


def _two_branches(net: Net, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    return torch.relu(y) + y


def _attention_free_qkv(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.query(x) + net.key(x) * net.value(x)


def linears(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(6, 4) for name in names}


# (row, rule of each float op in graph order)
CLAIMS: dict[str, tuple[Row, tuple[str, ...]]] = {
    "conv": (Row(conv, IMAGE), ("conv_only",)),
    "conv, no bias, same": (Row(lambda: conv(bias=False, padding="same"), IMAGE), ("conv_only",)),
    "conv bn relu": (Row(chain(conv, lambda: nn.BatchNorm2d(4), nn.ReLU), IMAGE), ("conv_relu",) * 2),
    "conv relu6": (Row(chain(conv, nn.ReLU6), IMAGE), ("conv_relu",) * 2),
    "conv hardtanh": (Row(chain(conv, lambda: nn.Hardtanh(-0.3, 0.4)), IMAGE), ("conv_relu",) * 2),
    "conv clamp": (Row(lambda: Net(lambda n, x: n.c(x).clamp(-0.3, 0.4), c=conv()), IMAGE), ("conv_relu",) * 2),
    "depthwise": (Row(lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), ((2, 4, 6, 6),)), ("conv_only",)),
    "conv1d bn relu": (
        Row(chain(lambda: nn.Conv1d(3, 4, 3, padding=1), lambda: nn.BatchNorm1d(4), nn.ReLU), ((2, 3, 9),)),
        ("conv_relu",) * 2,
    ),
    "pad conv": (Row(lambda: Net(_pad_conv, conv=conv()), IMAGE), ("pad_conv",) * 2),
    "pad conv bn relu": (
        Row(chain(lambda: nn.ZeroPad2d((1, 2, 0, 1)), conv, lambda: nn.BatchNorm2d(4), nn.ReLU6), IMAGE),
        ("pad_conv_relu",) * 3,
    ),
    "conv, relu aside": (Row(lambda: Net(_two_branches, conv=conv()), IMAGE), ("conv_only", "clamp", "add")),
    "conv called twice": (
        Row(lambda: Net(lambda n, x: n.c(n.c(x)), c=nn.Conv2d(3, 3, 3, padding=1)), IMAGE), ("conv_only",) * 2
    ),
    "transposed": (
        Row(lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), IMAGE), ("conv_transpose_only",)
    ),
    "transposed bn relu": (
        Row(chain(lambda: nn.ConvTranspose2d(3, 4, 3, bias=False), lambda: nn.BatchNorm2d(4), nn.ReLU), IMAGE),
        ("conv_transpose_relu",) * 2,
    ),
    "transposed 1-d": (Row(lambda: nn.ConvTranspose1d(3, 4, 3, dilation=2), ((2, 3, 9),)), ("conv_transpose_only",)),
    "linear": (Row(lambda: nn.Linear(6, 4), VECTOR), ("linear_only",)),
    "linear, 4-d": (Row(lambda: nn.Linear(6, 4, bias=False), ((2, 3, 2, 6),)), ("linear_only",)),
    "linear bn relu": (
        Row(chain(lambda: nn.Linear(6, 4), lambda: nn.BatchNorm1d(4), nn.ReLU), VECTOR), ("linear_relu",) * 2
    ),
    "linear, weight norm": (
        Row(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), VECTOR), ("float", "linear_only")
    ),
    "linear called twice": (Row(lambda: Net(lambda n, x, y: n.f(x) + n.f(3 * y), f=nn.Linear(6, 4)), PAIR),
                            ("linear_only", "mul", "linear_only", "add")),
    "matmul, 3-d": (Row(lambda: Net(lambda n, x: x @ n.w, w=torch.randn(6, 4)), ((2, 5, 6),)), ("linear_only",)),
    "add": (Row(lambda: Net(lambda n, x, y: x + y), PAIR), ("add",)),
    "add x to x": (Row(lambda: Net(lambda n, x: x + x), VECTOR), ("add",)),
    "add a number": (Row(lambda: Net(lambda n, x: x + 1), VECTOR), ("add",)),
    "add relu": (Row(lambda: Net(lambda n, x, y: torch.relu(x + y)), PAIR), ("add_relu",) * 2),
    "add relu6": (Row(lambda: Net(lambda n, x, y: F.relu6(x + y)), PAIR), ("add", "clamp")),
    "sub": (Row(lambda: Net(lambda n, x, y: x - y), PAIR), ("sub",)),
    "sub a number": (Row(lambda: Net(lambda n, x: x - 0.5), VECTOR), ("sub",)),
    "mul": (Row(lambda: Net(lambda n, x, y: x * y), PAIR), ("mul",)),
    "mul by a number": (Row(lambda: Net(lambda n, x: 2 * x), VECTOR), ("mul",)),
    "mul relu": (Row(lambda: Net(lambda n, x, y: torch.relu(x * y)), PAIR), ("mul", "clamp")),
    "cat": (Row(lambda: Net(lambda n, x, y: torch.cat([x, y], 1)), PAIR), ("cat",)),
    "cat after conv": (after_conv(lambda y: torch.cat([y, torch.relu(y)], 1)), ("conv_only", "clamp", "cat")),
    "mean": (after_conv(lambda y: y.mean((2, 3), keepdim=True)), ("conv_only", "mean")),
    "mean, dims dropped": (after_conv(lambda y: y.mean((-1, -2))), ("conv_only", "mean", "reshape")),
    "average pool": (after_conv(lambda y: F.adaptive_avg_pool2d(y, 1)), ("conv_only", "adaptive_avg_pool2d")),
    "max pool": (after_conv(lambda y: F.max_pool2d(y, 2)), ("conv_only", "max_pool2d")),
    "max pool, overlapping": (
        after_conv(lambda y: F.max_pool2d(y, 3, 2, padding=1, ceil_mode=True)), ("conv_only", "max_pool2d")
    ),
    "relu": (after_conv(lambda y: torch.relu(y * 0.5)), ("conv_only", "mul", "clamp")),
    "clamp from above": (after_conv(lambda y: y.clamp(max=0.3)), ("conv_only", "clamp")),
    "view": (after_conv(lambda y: y.view(2, 2, -1)), ("conv_only", "reshape")),
    "reshape": (after_conv(lambda y: y.reshape(8, 36)), ("conv_only", "reshape")),
    "permute": (after_conv(lambda y: y.permute(0, 2, 3, 1)), ("conv_only", "reshape")),
    "t": (Row(lambda: Net(lambda n, x: n.f(x).t(), f=nn.Linear(6, 4)), VECTOR), ("linear_only", "reshape")),
    "dropout": (after_conv(lambda y: F.dropout(y, 0.3, training=False)), ("conv_only", "copy")),
    "clone": (after_conv(lambda y: y.clone()), ("conv_only", "copy")),
    "slice": (after_conv(lambda y: y[:, 1:3, :, -2:]), ("conv_only", "slice_", "slice_")),
    "select": (after_conv(lambda y: y[:, 2]), ("conv_only", "slice_")),
    "squeeze": (
        after_conv(lambda y: y.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)),
        ("conv_only", "mean", "squeeze", "squeeze"),
    ),
    "unsqueeze": (after_conv(lambda y: y.unsqueeze(1)), ("conv_only", "squeeze")),
}  # fmt: skip

# Other spellings of the same kernels
MORE: dict[str, tuple[Row, tuple[str, ...]]] = {
    "conv, strided, dilated": (Row(lambda: conv(stride=2, padding=(2, 1), dilation=(2, 1)), IMAGE), ("conv_only",)),
    "conv bn": (Row(chain(conv, lambda: nn.BatchNorm2d(4, eps=1e-2)), IMAGE), ("conv_only",)),
    "conv clip": (Row(lambda: Net(lambda n, x: n.c(x).clip(0.0, 0.4), c=conv()), IMAGE), ("conv_relu",) * 2),
    "conv clamp from 0": (Row(lambda: Net(lambda n, x: n.c(x).clamp(min=0), c=conv()), IMAGE), ("conv_relu",) * 2),
    "grouped relu": (Row(chain(lambda: nn.Conv2d(4, 6, 3, groups=2), nn.ReLU), ((2, 4, 6, 6),)), ("conv_relu",) * 2),
    "conv1d, depthwise": (Row(lambda: nn.Conv1d(3, 3, 3, groups=3, padding="same"), ((2, 3, 9),)), ("conv_only",)),
    "linear, 1-d": (Row(lambda: nn.Linear(6, 4), ((6,),)), ("linear_only",)),
    "linear relu6": (Row(chain(lambda: nn.Linear(6, 4), nn.ReLU6), VECTOR), ("linear_relu",) * 2),
    "mm": (Row(lambda: Net(lambda n, x: x @ n.w, w=torch.randn(6, 4)), VECTOR), ("linear_only",)),
    "addmm relu": (
        Row(lambda: Net(lambda n, x: torch.addmm(n.b, x, n.w).relu(), w=torch.randn(6, 4), b=torch.randn(4)), VECTOR),
        ("linear_relu",) * 2,
    ),
    "qkv": (Row(lambda: Net(_attention_free_qkv, **linears("query", "key", "value")), VECTOR),
            ("linear_only", "linear_only", "linear_only", "mul", "add")),
    "add, broadcast": (Row(lambda: Net(lambda n, x, y: x + y), ((2, 3, 4, 5), (4, 1))), ("add",)),
    "add a parameter": (Row(lambda: Net(lambda n, x: n.p + x, p=torch.randn(6)), VECTOR), ("add",)),
    "subtract, multiply": (Row(lambda: Net(lambda n, x, y: x.subtract(y).multiply(y)), PAIR), ("sub", "mul")),
    "concat": (Row(lambda: Net(lambda n, x, y: torch.concat([y, x])), PAIR), ("cat",)),
    "square": (Row(lambda: Net(lambda n, x: x * x), VECTOR), ("mul",)),
    "cat of 3, one twice": (Row(lambda: Net(lambda n, x, y: torch.cat([x, y, x], -1)), PAIR), ("cat",)),
    "average pool, flatten": (
        after_conv(lambda y: F.adaptive_avg_pool2d(y, (1, 1)).flatten(1)),
        ("conv_only", "adaptive_avg_pool2d", "reshape"),
    ),
    "hardtanh": (after_conv(lambda y: F.hardtanh(y * 2.0, -0.5, 0.25)), ("conv_only", "mul", "clamp")),
    "clamp from below": (after_conv(lambda y: y.clamp(min=-0.3)), ("conv_only", "clamp")),
    "flatten": (after_conv(lambda y: y.flatten(1)), ("conv_only", "reshape")),
    "unflatten": (after_conv(lambda y: y.unflatten(1, (2, 2))), ("conv_only", "reshape")),
    "transpose": (after_conv(lambda y: y.transpose(1, -1)), ("conv_only", "reshape")),
    "swapaxes": (after_conv(lambda y: y.swapaxes(1, 2)), ("conv_only", "reshape")),
    "movedim": (after_conv(lambda y: y.movedim(1, -1)), ("conv_only", "reshape")),
    "movedim, two": (after_conv(lambda y: y.movedim((0, 1), (1, 0))), ("conv_only", "reshape")),
    "mT": (after_conv(lambda y: y.mT), ("conv_only", "reshape")),
    "T": (Row(lambda: Net(lambda n, x: n.f(x).T, f=nn.Linear(6, 4)), VECTOR), ("linear_only", "reshape")),
    "ravel": (after_conv(lambda y: y.ravel()), ("conv_only", "reshape")),
    "dropout of channels, relu": (
        after_conv(lambda y: torch.relu(F.dropout2d(y, 0.3, training=False))), ("conv_only", "copy", "clamp")
    ),
    "detach": (after_conv(lambda y: y.detach()), ("conv_only", "copy")),
    "narrow": (after_conv(lambda y: y.narrow(2, 1, 3)), ("conv_only", "slice_")),
}  # fmt: skip

PER_TENSOR: dict[str, tuple[Row, tuple[str, ...]]] = {
    "conv bn relu": (Row(chain(conv, lambda: nn.BatchNorm2d(4), nn.ReLU), IMAGE, "per tensor"), ("conv_relu",) * 2),
    "conv relu in place": (
        Row(chain(conv, lambda: nn.ReLU(inplace=True)), IMAGE, "per tensor"), ("conv_relu",) * 2
    ),
    "transposed, grouped": (
        Row(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), ((2, 4, 5, 5),), "per tensor"), ("conv_transpose_only",)
    ),
    "linear": (Row(lambda: nn.Linear(6, 4), VECTOR, "per tensor"), ("linear_only",)),
    "add and relu in place": (
        Row(lambda: Net(lambda n, x, y: n.f(x).add_(y).relu_(), f=nn.Linear(6, 6)), PAIR, "per tensor"),
        ("linear_only", "add_relu", "add_relu"),
    ),
    "matmul": (Row(lambda: Net(lambda n, x: x @ n.w, w=torch.randn(6, 4)), VECTOR, "per tensor"), ("linear_only",)),
}  # fmt: skip

DYNAMIC: dict[str, tuple[Row, tuple[str, ...]]] = {
    "linear": (Row(lambda: nn.Linear(6, 4), ((5, 6),), "dynamic"), ("linear_only",)),
    "linear, 1-d": (Row(lambda: nn.Linear(6, 4, bias=False), ((6,),), "dynamic"), ("linear_only",)),
    "linear, 4-d": (Row(lambda: nn.Linear(6, 4), ((2, 3, 2, 6),), "dynamic"), ("linear_only",)),
    "linear relu linear": (
        Row(chain(lambda: nn.Linear(6, 4), nn.ReLU, lambda: nn.Linear(4, 3)), VECTOR, "dynamic"),
        ("linear_only", "float", "linear_only"),
    ),
    "linear called twice": (
        Row(lambda: Net(lambda n, x, y: n.f(x) - n.f(y), f=nn.Linear(6, 4)), PAIR, "dynamic"),
        ("linear_only", "linear_only", "float"),
    ),
    "matmul, 3-d": (
        Row(lambda: Net(lambda n, x: x @ n.w, w=torch.randn(6, 4)), ((2, 5, 6),), "dynamic"), ("linear_only",)
    ),
    "addmm": (
        Row(lambda: Net(lambda n, x: torch.addmm(n.b, x, n.w), w=torch.randn(6, 4), b=torch.randn(4)), VECTOR,
            "dynamic"),
        ("linear_only",),
    ),
    "conv": (Row(lambda: conv(padding="same"), ((1, 3, 6, 6),), "dynamic"), ("conv_only",)),
    "grouped conv relu": (
        Row(chain(lambda: nn.Conv2d(4, 6, 3, groups=2), nn.ReLU), ((1, 4, 6, 6),), "dynamic"), ("conv_only", "float")
    ),
    "transposed": (
        Row(chain(lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, bias=False), nn.ReLU), ((1, 3, 6, 6),), "dynamic"),
        ("conv_transpose_only", "float"),
    ),
    "transposed to one channel": (
        Row(lambda: nn.ConvTranspose2d(3, 1, 3, bias=False), ((1, 3, 6, 6),), "dynamic"), ("conv_transpose_only",)
    ),
    "two convs": (Row(chain(conv, lambda: nn.Conv2d(4, 5, 3)), ((1, 3, 6, 6),), "dynamic"), ("conv_only",) * 2),
    "conv, then linear": (
        Row(lambda: Net(lambda n, x: n.f(n.c(x).permute(0, 2, 3, 1)), c=conv(), f=nn.Linear(4, 5)), ((1, 3, 6, 6),),
            "dynamic"),
        ("conv_only", "float", "linear_only"),
    ),
    "grouped conv, gelu, linear": (
        Row(lambda: Net(lambda n, x: n.f(F.gelu(n.c(x)).permute(0, 2, 3, 1)), c=nn.Conv2d(4, 4, 3, groups=2),
                        f=nn.Linear(4, 5)), ((1, 4, 6, 6),), "dynamic"),
        ("conv_only", "float", "float", "linear_only"),
    ),
    "depthwise conv between linears": (
        Row(lambda: Net(lambda n, x: n.g(n.c(n.f(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), f=nn.Linear(3, 4),
                        c=nn.Conv2d(4, 4, 3, groups=4), g=nn.Linear(4, 5)), ((1, 6, 6, 3),), "dynamic"),
        ("linear_only", "float", "float", "float", "linear_only"),
    ),
    "conv behind a linear": (
        Row(lambda: Net(lambda n, x: n.c(n.f(x).permute(0, 3, 1, 2)), f=nn.Linear(3, 4), c=nn.Conv2d(4, 5, 3)),
            ((1, 6, 6, 3),), "dynamic"),
        ("linear_only", "float", "conv_only"),
    ),
    "conv1d, then linear": (
        Row(lambda: Net(lambda n, x: n.f(n.c(x).transpose(1, 2)), c=nn.Conv1d(3, 4, 3), f=nn.Linear(4, 5)),
            ((1, 3, 9),), "dynamic"),
        ("float", "float", "linear_only"),
    ),
    "one image for a conv and a linear": (
        Row(lambda: Net(lambda n, x: n.c(x) + n.f(x), c=nn.Conv2d(3, 3, 3, padding=1), f=nn.Linear(6, 6)),
            ((1, 3, 6, 6),), "dynamic"),
        ("conv_only", "linear_only", "float"),
    ),
}  # fmt: skip

TABLES = {"per channel": CLAIMS, "more": MORE, "per tensor": PER_TENSOR, "dynamic": DYNAMIC}
CASES = [(table, name) for table, rows in TABLES.items() for name in rows]
RUN = [pytest.param(*case, marks=pytest.mark.slow if case[0] == "more" else ()) for case in CASES]


@functools.cache
def in_the_runtime(table: str) -> dict[str, Outcome]:
    return outcomes({name: row for name, (row, _) in TABLES[table].items()})


@pytest.mark.parametrize(("table", "name"), CASES)
def test_the_rule_that_fits_takes_the_model(table, name):
    row, rules = TABLES[table][name]
    assert tuple(decision.rule or "float" for decision in report(row).record.decisions) == rules


def test_every_rule_takes_some_row():
    assert {rule for rows in TABLES.values() for _, rules in rows.values() for rule in rules} - {"float"} == {
        rule.name for rule in RULES
    }


@pytest.mark.parametrize(("table", "name"), RUN)
def test_xnnpack_runs_in_integers_what_a_rule_took(table, name):
    outcome = in_the_runtime(table)[name]
    assert outcome.undelegated == []
    if table == "dynamic":
        expected = ["dynamic" if rule != "float" else "float" for rule in TABLES[table][name][1]]
        assert [precision for op, precision in outcome.kernels] == expected
        assert outcome.error < 1e-5  # of values around 1
    else:
        assert {precision for op, precision in outcome.kernels} == {"int8"}
        assert outcome.steps < 1.01
    assert outcome.varies
