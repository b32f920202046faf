"""Ops with several outputs, annotated through getitem (users' pain 22), and recurrent networks (users' pain 26)."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.quantizer import split_to_slices
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export
from tests.pt2e.kit import ACT, ByHand, annotate, calls, on_grid, relative_error

aten = torch.ops.aten
XNNPACK = get_symmetric_quantization_config(is_per_channel=True)
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


# --- ops with several outputs (item 22) -------------------------------------------------------------------------------


class Parts(nn.Module):
    """split, chunk, unbind and topk of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        (a, b), (c, d), (e, *_, f) = y.split(4, 1), y.chunk(2, 1), y.unbind(1)
        top, where = y.topk(2, 1)
        return torch.cat([a, d], 1), b + c, e + f, top + top, where


def float_parts(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.target is operator.getitem and node.meta["val"].dtype.is_floating_point:
            annotate(node, {}, ACT)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_parts_are_quantized_where_a_quantizer_annotates_the_getitem(strict):
    """By hand: each part on the grid of its own range; the indices of topk stay what they are."""
    torch.manual_seed(0)
    model, x = Parts(), torch.randn(2, 3, 5, 5)
    prepared = prepare_pt2e(export(model, x, strict=strict), ByHand(float_parts))
    prepared(x)
    converted = convert_pt2e(prepared)
    groups = {group.members[0]: group for group in explain(converted).groups}
    assert len(groups) == 7
    first, *_, top = (groups[name] for name in groups)
    a = on_grid(model.conv(x)[:, :4], first.scale, first.zero_point)
    result, expected = converted(x), model(x)
    torch.testing.assert_close(result[0][:, :4], a, rtol=0, atol=1e-6)  # x / scale and x * (1 / scale) in float32
    assert torch.equal(result[4], expected[4])
    assert top.scale > 0
    assert all(relative_error(one, other) < 0.02 for one, other in zip(result[:4], expected[:4], strict=True))


def test_xnnpack_takes_parts_as_integer_slices_that_share_a_scale():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    prepared = prepare_pt2e(export(Parts(), x), XNNPACKQuantizer(XNNPACK))
    prepared(x)
    converted = convert_pt2e(prepared)
    moved = calls(converted, aten.slice.Tensor, aten.select.int)
    assert [len(calls(converted, op)) for op in (aten.slice.Tensor, aten.select.int)] == [4, 2]
    for node in moved:
        (after,) = node.users
        assert after.args[1:] == node.args[0].args[1:]
    program = lower_to_executorch(converted)
    assert {left.op for left in program.undelegated} == {"aten.topk.default"}
    step = max(group.scale for group in explain(converted).groups if isinstance(group.scale, float))
    for one, other in zip(program.run(x)[:4], converted(x)[:4], strict=True):
        assert (one - other).abs().max() < 1.01 * step  # a kernel may round the other way


def test_parts_of_a_dimension_without_a_known_size_stay_as_they_are():
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = torch.relu(x).chunk(2, 0)
            return first + second

    exported = export(Model(), torch.randn(4, 3), dynamic_shapes=({0: 2 * Dim("half", min=1, max=9)},))
    gm = split_to_slices(exported.module())
    assert len(calls(gm, aten.chunk.default)) == 1
    assert torch.equal(gm(torch.ones(6, 3)), 2 * torch.ones(3, 3))


def test_a_write_to_a_part_reaches_the_whole_through_slices_too():
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1.0
            first, _ = y.split(1, 0)
            first.mul_(2.0)
            return y

    gm = split_to_slices(export(Model(), torch.zeros(2, 3)).module())
    assert torch.equal(gm(torch.zeros(2, 3)), torch.tensor([[2.0], [1.0]]).expand(2, 3))
