"""Annotations follow from targets, arguments and meta["val"]; other metadata changes with torch and may be missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import MLP, ConvNet, Residual, export


class Branches(nn.Module):
    """Two convolutions with batch norm, concatenated, pooled and flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU6())
        self.two = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.one(x), self.two(x)], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


NETS = {
    "ConvNet": (ConvNet, (1, 3, 16, 16)),
    "Residual": (Residual, (1, 4, 6, 6)),
    "MLP": (MLP, (2, 10)),
    "Branches": (Branches, (1, 3, 8, 8)),
}


def decisions(gm: Any) -> list[tuple[Any, ...]]:
    return [(d.node, d.op, d.rule, d.inputs, d.output, d.reason) for d in explain(gm).record.decisions]


def quantizer(is_dynamic: bool) -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("is_dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("net", NETS)
def test_deleting_all_metadata_but_val_changes_no_annotation(net, is_dynamic, strict):
    """Users' item 14: annotation depends on op targets, arguments and meta['val'] alone."""
    kind, shape = NETS[net]
    exported = export(kind(), torch.randn(*shape), strict=strict)
    bare = exported.module()
    for node in bare.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    assert decisions(prepare_pt2e(bare, quantizer(is_dynamic))) == decisions(
        prepare_pt2e(exported, quantizer(is_dynamic))
    )


@pytest.mark.parametrize("net", NETS)
def test_a_graph_without_metadata_converts_to_the_same_values(net):
    kind, shape = NETS[net]
    x = torch.randn(*shape)
    exported = export(kind(), x)
    bare = exported.module()
    for node in bare.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    outputs = []
    for model in (exported, bare):
        prepared = prepare_pt2e(model, quantizer(is_dynamic=False))
        prepared(x)
        outputs.append(convert_pt2e(prepared)(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
