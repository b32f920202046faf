"""Ops that only move values have one scale at their input and output for XNNPACK, or stay in float with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.graph.values import is_float_tensor
from pt2e_quant.ops import is_value_preserving
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, :, 1:4],
    "slice with steps": lambda x: x[:, :, ::2],
    "select": lambda x: x[:, :, 2],
    "transpose": lambda x: x.transpose(2, 3),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "t": lambda x: x.flatten(1).t(),
    "view": lambda x: x.view(2, 4, 36),
    "reshape": lambda x: x.reshape(2, 2, 12, 6),
    "flatten": lambda x: x.flatten(1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split": lambda x: x.split([1, 3], 1)[1],
    "pad": lambda x: F.pad(x, (1, 1)),
    "cat": lambda x: torch.cat([x, x], 1),
    "flip": lambda x: x.flip(2),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "expand": lambda x: x[:, :1].expand(2, 4, 6, 6),
    "dropout": lambda x: F.dropout(x, 0.3, training=False),
}


class Net(nn.Module):
    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.move = nn.Conv2d(3, 4, 1), move

    def forward(self, x: Tensor) -> Tensor:
        return self.move(self.conv(x)) * 3.0


@pytest.mark.parametrize("name", MOVES)
def test_what_only_moves_values_shares_the_scale_of_its_input_or_stays_in_float(name):
    """Users' item 23: one table of value-preserving ops is always shared; two scales would be refused at load time."""
    x = torch.randn(2, 3, 6, 6)
    prepared = prepare_pt2e(export(Net(MOVES[name]), x), XNNPACKQuantizer(get_symmetric_quantization_config()))
    prepared(x)
    report = explain(convert_pt2e(prepared))
    observer = {member: group.observer for group in report.groups for member in group.members}
    moves = [node for node in prepared.graph.nodes if node.op == "call_function" and is_value_preserving(node)]
    found = {decision.node: decision for decision in report.record.decisions}
    assert moves
    for node in filter(is_float_tensor, moves):
        decision = found[node.name]
        if decision.quantized:
            inputs = {observer[f"{source} -> {node.name}"] for source in decision.inputs}
            assert inputs == {observer[node.name]}, report.why(node.name)
        else:
            assert decision.reason
