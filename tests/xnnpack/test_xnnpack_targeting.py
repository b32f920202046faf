"""Every way of choosing what XNNPACKQuantizer quantizes, for conv and for linear, in strict and non-strict exports."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import explain, prepare_pt2e
from quantizers.xnnpack import XNNPACKQuantizer
from tests.xnnpack.rows import RECIPES

aten = torch.ops.aten
CONFIG = RECIPES["per channel"]


class OwnLinear(nn.Linear):
    """A subclass, as models have them."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = OwnLinear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Model(nn.Module):
    """Modules, modules in modules, a subclass and functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.matrix = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.conv2d(x, self.kernel)
        return F.linear(self.head(x.mean((2, 3))), self.matrix)


CONVS = {"stem", "blocks.0.conv", "blocks.1.conv", "F.conv2d"}
LINEARS = {"blocks.0.fc", "blocks.1.fc", "head", "F.linear"}
FUNCTIONAL = {"aten.conv2d.default": "F.conv2d", "aten.linear.default": "F.linear"}


@functools.cache
def exported(strict: bool) -> torch.export.ExportedProgram:
    return torch.export.export(Model().eval(), (torch.randn(1, 3, 6, 6),), strict=strict)


@pytest.fixture(params=[False, True], ids=["non-strict", "strict"])
def quantized(request):
    """A function from a quantizer to the names of the convolutions and linears that it quantizes."""

    def names(quantizer: XNNPACKQuantizer) -> set[str]:
        report = explain(prepare_pt2e(exported(request.param), quantizer))
        return {d.module or FUNCTIONAL[d.op] for d in report.quantized if d.op in FUNCTIONAL}

    return names


def test_globally(quantized):
    assert quantized(XNNPACKQuantizer().set_global(CONFIG)) == CONVS | LINEARS


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (aten.conv2d, CONVS),
        (aten.conv2d.default, CONVS),
        (aten.linear, LINEARS),
        (aten.linear.default, LINEARS),
    ],
    ids=["packet conv2d", "conv2d.default", "packet linear", "linear.default"],
)
def test_by_operator(quantized, operator, expected):
    assert quantized(XNNPACKQuantizer().set_operator_type(operator, CONFIG)) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (nn.Conv2d, CONVS - {"F.conv2d"}),
        (nn.Linear, LINEARS - {"F.linear"}),  # subclasses included
        (OwnLinear, {"blocks.0.fc", "blocks.1.fc"}),
        (Block, {"blocks.0.conv", "blocks.0.fc", "blocks.1.conv", "blocks.1.fc"}),
        ("torch.nn.modules.conv.Conv2d", CONVS - {"F.conv2d"}),
    ],
)
def test_by_module_type(quantized, kind, expected):
    assert quantized(XNNPACKQuantizer().set_module_type(kind, CONFIG)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stem", {"stem"}),
        ("head", {"head"}),
        ("blocks.1", {"blocks.1.conv", "blocks.1.fc"}),
        ("blocks.*.conv", {"blocks.0.conv", "blocks.1.conv"}),
        ("*.fc", {"blocks.0.fc", "blocks.1.fc"}),
        ("", CONVS | LINEARS),
    ],
)
def test_by_module_name(quantized, name, expected):
    assert quantized(XNNPACKQuantizer().set_module_name(name, CONFIG)) == expected


@pytest.mark.parametrize(("name", "expected"), [("conv2d", {"stem"}), ("linear_?", LINEARS - {"blocks.0.fc"})])
def test_by_node_name(quantized, name, expected):
    assert quantized(XNNPACKQuantizer().set_node_name(name, CONFIG)) == expected


@pytest.mark.parametrize(
    ("target", "expected"), [(aten.conv2d.default, LINEARS), (aten.linear.default, CONVS)], ids=["conv2d", "linear"]
)
def test_a_filter_takes_away(quantized, target, expected):
    quantizer = XNNPACKQuantizer().set_global(CONFIG).set_filter_function(lambda node: node.target is not target)
    assert quantized(quantizer) == expected


def test_none_keeps_a_module_in_float(quantized):
    quantizer = XNNPACKQuantizer().set_global(CONFIG).set_module_name("blocks.0", None).set_module_type(OwnLinear, None)
    assert quantized(quantizer) == (CONVS | LINEARS) - {"blocks.0.conv", "blocks.0.fc", "blocks.1.fc"}


def test_the_more_specific_choice_wins_for_conv_and_linear(quantized):
    quantizer = XNNPACKQuantizer().set_global(None)
    quantizer.set_operator_type(aten.conv2d, CONFIG).set_module_type(Block, None)
    quantizer.set_module_name("blocks.1.fc", CONFIG).set_module_name("blocks.0.conv", CONFIG)
    assert quantized(quantizer) == {"stem", "F.conv2d", "blocks.1.fc", "blocks.0.conv"}
