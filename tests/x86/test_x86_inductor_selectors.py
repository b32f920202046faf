"""Which configuration wins in X86InductorQuantizer, beside torchao's: module name, module type, function, global.

Both get the same calls on the same export, which is strict, as torchao's quantizer reads sources.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import explain, prepare_pt2e
from pt2e_quant.errors import TargetingError
from quantizers.x86_inductor import X86InductorQuantizer
from tests.nets import export
from tests.x86.x86_rows import RECIPES

peer = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")


# torchao warns where it drops a configuration.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(Skip the quantization config|Mixed dynamic and static|Unable to customize)"
)


class Block(nn.Module):
    """A linear of a module, relu, and a linear that is a function only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.w = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.fc(x)), self.w)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False)
        self.block, self.head = Block(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.other(F.relu(self.conv(x)))))


NODES = ("conv2d", "conv2d_1", "linear", "linear_1", "linear_2")  # conv, other, block.fc, block's function, head
Call = tuple[str, Any, str]
ALL: Call = ("global", None, "static")


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    return export(Model(), torch.randn(2, 3, 5, 8), strict=True)


def quantized(exported: torch.export.ExportedProgram, calls: tuple[Call, ...], ours: bool) -> tuple[str, ...]:
    """The convolutions and linears that are quantized after these calls."""
    default = peer.get_default_x86_inductor_quantization_config
    configs = RECIPES if ours else {"static": default(), "dynamic": default(is_dynamic=True)}
    quantizer = X86InductorQuantizer() if ours else peer.X86InductorQuantizer()
    for kind, what, name in calls:
        config = configs.get(name)
        if kind == "global":
            quantizer.set_global(config)
        else:
            getattr(quantizer, f"set_{kind}_qconfig")(what, config)
    decisions = explain(prepare_pt2e(exported, quantizer, allow_empty=True)).record.decisions
    return tuple(d.node for d in decisions if d.quantized and d.node in NODES)


SAME: dict[str, tuple[tuple[Call, ...], tuple[str, ...]]] = {
    "all": ((ALL,), NODES),
    "a function, none": ((ALL, ("function_type", F.linear, "float")), NODES[:2]),
    "a function alone": ((("function_type", F.linear, "static"),), NODES[2:]),
    "a module type alone": ((("module_type", nn.Conv2d, "static"),), NODES[:2]),
    "a module name, none": ((ALL, ("module_name", "block", "float")), (*NODES[:2], "linear_2")),
    "a module name alone": ((("module_name", "block.fc", "static"),), ("linear",)),
    "name over function": (
        (ALL, ("function_type", F.conv2d, "float"), ("module_name", "conv", "static")), ("conv2d", *NODES[2:])
    ),
    "none by name over a function": (
        (("module_name", "block", "float"), ("function_type", F.linear, "static")), ("linear_2",)
    ),
    "name over module type": (
        (ALL, ("module_type", nn.Linear, "float"), ("module_name", "block", "static")), NODES[:4]
    ),
    "none in all but one": ((("global", None, "float"), ("module_name", "head", "static")), ("linear_2",)),
    "the later of the same kind": (
        (ALL, ("function_type", F.linear, "float"), ("function_type", F.linear, "static")), NODES
    ),
    "the deeper module, set first": (
        (("module_name", "block.fc", "float"), ("module_name", "block", "static")), ("linear_1",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_selector_wins(exported, name):
    calls, wanted = SAME[name]
    assert quantized(exported, calls, ours=True) == wanted
    assert quantized(exported, calls, ours=False) == wanted


OPS = "there, a module type is its operator, in modules and outside; here, it is what the modules of that class compute"
DIFFERENT: dict[str, tuple[tuple[Call, ...], tuple[str, ...], tuple[str, ...], str]] = {
    # the calls, what is quantized here, what there, and why
    "a module type leaves functions alone": (
        (ALL, ("module_type", nn.Linear, "float")), (*NODES[:2], "linear_1"), NODES[:2], OPS
    ),
    "a module type, then its function": (
        (("module_type", nn.Linear, "float"), ("function_type", F.linear, "static")), ("linear_1",), NODES[2:],
        "there, both are one entry, and the later wins; here, the type of a module is stronger",
    ),
    "a function, then its module type": (
        (("function_type", F.linear, "static"), ("module_type", nn.Linear, "float")), ("linear_1",), (), OPS
    ),
    "the type of a module of one's own": (
        (("module_type", Block, "static"),), ("linear", "linear_1"), (), "there, few types are known, and a warning"
    ),
    "the deeper module, set last": (
        (("module_name", "block", "static"), ("module_name", "block.fc", "float")), ("linear_1",),
        ("linear", "linear_1"), "there, the earlier wins; here, the deeper, whenever it is set",
    ),
    "static beside dynamic": (
        (("global", None, "dynamic"), ("module_name", "conv", "static")), ("conv2d", *NODES[2:]), NODES,
        "there, the second is dropped with a warning, and convolutions are dynamic; here, both hold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_on_purpose(exported, name):
    calls, ours, theirs, _ = DIFFERENT[name]
    assert quantized(exported, calls, ours=True) == ours
    assert quantized(exported, calls, ours=False) == theirs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("module_name", "blok", "float"), "module name 'blok' matches nothing. Did you mean 'block"),
        (("module_type", nn.Conv3d, "float"), "module type 'torch.nn.modules.conv.Conv3d' matches nothing"),
        (("function_type", F.conv3d, "float"), "operator 'aten.conv3d' matches nothing"),
    ],
    ids=["name", "type", "function"],
)
def test_a_selector_of_nothing_is_an_error_and_no_silence(exported, call, message):
    with pytest.raises(TargetingError, match=message):
        quantized(exported, (ALL, call), ours=True)
    assert quantized(exported, (ALL, call), ours=False) == NODES


def test_the_last_global_configuration_is_the_one_that_holds():
    quantizer = X86InductorQuantizer().set_global(RECIPES["dynamic"]).set_global(RECIPES["static"])
    assert quantizer.get_global_quantization_config() is RECIPES["static"]
    assert quantizer.set_global(None).get_global_quantization_config() is None
