"""Ops with several outputs, annotated through getitem (users' pain 22), and recurrent networks (users' pain 26)."""

from __future__ import annotations

import operator
import re

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CoverageError
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.quantizer import split_to_slices
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export, sqnr
from tests.pt2e.kit import ACT, STATIC, ByHand, Toy, annotate, calls, on_grid, relative_error

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


# --- recurrent networks (item 26, capture) ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **kwargs: object) -> None:
        super().__init__()
        self.rnn = kind(10, 12, **kwargs)

    def forward(self, x: Tensor, state=None):
        return self.rnn(x, state)


# nn.RNNBase sets attributes while it is exported, which torch warns of.
EXPORTS_AN_RNN = pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")

LINEARS = XNNPACKQuantizer().set_operator_type(aten.linear.default, XNNPACK)
CASES = {
    "LSTM, two layers": (nn.LSTM, {"num_layers": 2}),
    "LSTM, both ways, no bias": (nn.LSTM, {"bidirectional": True, "bias": False, "batch_first": True}),
    "GRU, both ways": (nn.GRU, {"bidirectional": True}),
    "RNN": (nn.RNN, {"nonlinearity": "tanh"}),
}


def unrolled(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """With the very words of the report."""
    with pytest.raises(CoverageError) as raised:
        prepare_pt2e(exported, XNNPACKQuantizer(XNNPACK))
    call = re.search(r"exported\.(run_decompositions\(.*\))", str(raised.value)).group(0)
    return eval(call, {"exported": exported, "torch": torch})


@EXPORTS_AN_RNN
@pytest.mark.parametrize("quantizer", [LINEARS, XNNPACKQuantizer(DYNAMIC)], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES)
def test_an_unrolled_rnn_has_integer_weights_and_stays_close(case, quantizer):
    """Users ask for 30 dB."""
    torch.manual_seed(0)
    kind, options = CASES[case]
    model, x = Recurrent(kind, **options).eval(), torch.randn(5, 3, 10)
    prepared = prepare_pt2e(unrolled(torch.export.export(model, (x,))), quantizer)
    for _ in range(4):
        prepared(torch.randn(5, 3, 10))
    prepared(x)
    converted = convert_pt2e(prepared)
    weights = [value.dtype for value in converted.state_dict().values() if value.dim() == 2]
    assert weights == [torch.int8] * len([p for p in model.parameters() if p.dim() == 2])
    result, expected = converted(x), model(x)
    assert pytree.tree_structure(result) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True):
        assert sqnr(other, one) > 30


@EXPORTS_AN_RNN
def test_the_state_of_an_lstm_goes_in_and_out():
    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM).eval(), torch.randn(4, 2, 10)
    state = (torch.randn(1, 2, 12), torch.randn(1, 2, 12))
    prepared = prepare_pt2e(unrolled(torch.export.export(model, (x, state))), XNNPACKQuantizer(DYNAMIC))
    converted = convert_pt2e(prepared)
    y, state = converted(x, state)
    again, _ = converted(x, state)
    expected = model(x, state)[0]
    assert not torch.equal(y, again)
    assert sqnr(expected, again) > 30


@EXPORTS_AN_RNN
def test_an_unrolled_gru_runs_in_the_pte():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10)
    prepared = prepare_pt2e(unrolled(torch.export.export(Recurrent(nn.GRU).eval(), (x,))), XNNPACKQuantizer(DYNAMIC))
    converted = convert_pt2e(prepared)
    for one, other in zip(lower_to_executorch(converted).run(x), pytree.tree_leaves(converted(x)), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)  # one float sum in another order


@EXPORTS_AN_RNN
def test_an_rnn_that_was_captured_whole_is_reported_with_the_way_out():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(10, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    report = explain(prepare_pt2e(export(Model(), torch.randn(4, 2, 10)), Toy(STATIC)))
    (rnn,) = (decision for decision in report.skipped if decision.op == "aten.gru.input")
    assert "get_decompositions([torch.ops.aten.gru.input])" in rnn.reason
    assert rnn.code == "composite_op"
    assert not [decision for decision in report.skipped if decision.node.startswith("getitem")]
