"""Delegates of plain operators skip passes of XNNPACK's compiler that would find nothing in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch, runtime
from pt2e_quant.lowering.executorch.xnnpack.limits import POINTWISE
from pt2e_quant.lowering.executorch.xnnpack.short_cuts import decomposes_once, delegation_of
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.xnnpack.rows import Net

aten = torch.ops.aten

SHORT = b"dqlinear_partitioner"

_SECOND = {aten.maximum.default: (torch.rand(2, 3, 8),), aten.minimum.default: (torch.rand(2, 3, 8),)}


class Plain(nn.Module):
    """Every plain operator, in float and, where XNNPACK has integers for it, in integers. x: (2, 3, 8), positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        hidden = self.first(x)
        attention = F.softmax(hidden @ y.transpose(1, 2) / 3.0, -1) @ y
        moved = torch.cat((hidden, hidden - y, hidden * y), 2)[..., 4:12].reshape(3, 2, 8).permute(1, 0, 2)
        rows = self.second((attention + moved).unsqueeze(1).squeeze(1)) @ torch.ones(8, 2)
        joined = torch.cat([hidden * number for number in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)], 1)
        stacked = torch.stack([x * number for number in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)], 1)
        pointwise = (op(y, *_SECOND.get(op, ())) for op in POINTWISE)
        return rows, joined, stacked, *pointwise


def plain() -> Any:
    inputs = torch.rand(2, 3, 8), torch.rand(2, 3, 8) + 0.1
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(Plain().eval(), inputs), quantizer)
    prepared(*inputs)
    return convert_pt2e(prepared)


def of_all_passes(nodes: Any) -> Any:
    from executorch.exir.backend.partitioner import DelegationSpec

    return DelegationSpec("XnnpackBackend", [])


@pytest.mark.slow
def test_a_delegate_of_plain_operators_has_the_bytes_that_all_passes_make(monkeypatch):
    from executorch.exir.backend.backend_details import PreprocessResult

    made: list[bytes] = []
    initialize = PreprocessResult.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        made.append(self.processed_bytes)

    monkeypatch.setattr(PreprocessResult, "__init__", watched)
    converted = plain()
    short = lower_to_executorch(converted)
    assert not short.undelegated
    assert short.buffer.count(SHORT) == len(made) == 1
    monkeypatch.setattr(runtime, "delegation_of", of_all_passes)
    monkeypatch.setattr(runtime, "decomposes_once", lambda *arguments: False)
    long = lower_to_executorch(converted, verify=False)
    assert SHORT not in long.buffer
    assert made[0] == made[1]


NOT_PLAIN = {
    "relu": (lambda x: (x + x).relu(), torch.zeros(2, 3, 4, 5)),
    "cat of six": (lambda x: torch.cat([x + number for number in range(6)]), torch.zeros(2, 3)),
    "channels last": (torch.tanh, torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    "pool": (lambda x: F.max_pool2d(x, 2), torch.zeros(2, 3, 4, 5)),
    "to": (lambda x: x.to(torch.float64), torch.zeros(2, 3)),
    "getitem": (lambda x: x.topk(2)[0], torch.zeros(2, 3)),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_a_pass_may_change_goes_through_all_passes(name):
    function, x = NOT_PLAIN[name]
    nodes = torch.export.export(Net(lambda net, x: function(x)), (x,)).graph.nodes
    assert delegation_of(nodes).compile_specs == []


def test_a_layout_of_dynamic_sizes_is_not_known_before():
    exported = torch.export.export(nn.Tanh(), (torch.zeros(2, 3, 4, 5),), dynamic_shapes=({0: Dim.AUTO},))
    assert delegation_of(exported.graph.nodes).compile_specs == []


def test_one_decomposition_does_where_the_backend_takes_all_that_it_wants_whole():
    nodes = torch.export.export(nn.Linear(3, 3), (torch.zeros(2, 3),)).graph.nodes
    assert decomposes_once(nodes, [aten.linear.default], lambda node: True)
    assert not decomposes_once(nodes, [aten.linear.default], lambda node: False)
