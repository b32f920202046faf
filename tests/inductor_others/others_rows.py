"""Recipes of Inductor on Arm and on Intel GPUs, and small models, for the tests beside this file.

No machine here has either device, so these tests look at graphs and compute them eagerly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pt2e_quant import Report, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.quantizer import Quantizer, RuleQuantizer
from quantizers.arm_inductor import ArmInductorQuantizer, get_default_arm_inductor_quantization_config
from quantizers.xpu_inductor import (
    XPUInductorQuantizer,
    get_default_xpu_inductor_quantization_config,
    get_xpu_inductor_symm_quantization_config,
)
from tests.nets import export

__all__ = ["MODELS", "RECIPES", "Attention", "Branches", "converted", "quantizer", "readers", "report"]

RECIPES = {
    "arm": (ArmInductorQuantizer, get_default_arm_inductor_quantization_config()),
    "arm, dynamic": (ArmInductorQuantizer, get_default_arm_inductor_quantization_config(is_dynamic=True)),
    "xpu": (XPUInductorQuantizer, get_default_xpu_inductor_quantization_config()),
    "xpu, symmetric": (XPUInductorQuantizer, get_xpu_inductor_symm_quantization_config()),
}


class Branches(nn.Module):
    """conv, bn and relu; pooled for a grouped convolution, as it is for another; their sum through relu to a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.left(F.max_pool2d(x, 3, 1, 1)) + self.right(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Three linears, two products of activations, softmax, gelu and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)
        return F.gelu(self.out(weights @ x)) + x


class Chain(nn.Module):
    """Convolutions in a row: depthwise, strided, with hardtanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.hardtanh(self.a(x), -0.3, 0.9))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attention, (6, 5, 12)),
    "branches": (Branches, (8, 3, 12, 12)),
    "chain": (Chain, (4, 4, 12, 12)),
    "mlp": (lambda: nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 6, bias=False)), (32, 10)),
}


def quantizer(recipe: str) -> RuleQuantizer:
    kind, config = RECIPES[recipe]
    return kind().set_global(config)


def report(model: nn.Module, shape: tuple[int, ...], by: Quantizer) -> Report:
    """The report after prepare."""
    return explain(prepare_pt2e(export(model, torch.randn(shape)), by, allow_empty=True))


def converted(name: str, by: Quantizer) -> tuple[GraphModule, Tensor, Tensor]:
    """A converted model, the batch that calibrated it, and what the float model makes of that batch."""
    torch.manual_seed(5)
    make, shape = MODELS[name]
    exported, x = export(make(), torch.zeros(shape), strict=True), torch.randn(shape)
    prepared = prepare_pt2e(exported, by)
    prepared(x)
    return convert_pt2e(prepared), x, exported.module()(x)


def readers(graph: GraphModule, target: object) -> list[Node]:
    """Who reads the results of an operator, in the order of the graph."""
    return [user for node in graph.graph.find_nodes(op="call_function", target=target) for user in node.users]
