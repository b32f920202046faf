"""Integer weights beside float values: the graph for Inductor computes the same, and holds integers where it stores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant.graph.attributes import state_bytes
from pt2e_quant.graph.module import clone, finish
from pt2e_quant.lowering.inductor.passes.integer_weights import integer_weights
from tests.lowering.handmade import Body, Groups, Weight
from tests.pt2e.kit import calls

aten = torch.ops.aten
INT8, INT4 = aten._weight_int8pack_mm.default, aten._weight_int4pack_mm_for_cpu.default
BAG = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default


def passed(function, *inputs: Tensor, rounding: float = 2.0**-21, **parts) -> GraphModule:
    """The graph after the pass; what it computes is asserted to be what it was, within `rounding` of the largest."""
    before = torch.export.export(Body(function, **parts), inputs).module()
    after = finish(integer_weights(clone(before)))
    with torch.no_grad():
        wanted, found = before(*inputs), after(*inputs)
    assert found.dtype is wanted.dtype
    assert float((found.double() - wanted.double()).abs().max()) <= rounding * float(wanted.abs().max())
    return after


def linear(n: Body, x: Tensor) -> Tensor:
    return F.linear(x, n.w(), n.b)


WEIGHTS = {
    "8 bits per row": lambda rows: Weight((rows, 64)),
    "8 bits per row with zero points": lambda rows: Weight((rows, 64), zero_point=3),
    "4 bits per row": lambda rows: Weight((rows, 64), bounds=(-8, 7)),
    "4 bits in groups": lambda rows: Groups((rows, 64), 16),
    "8 bits in groups": lambda rows: Groups((rows, 64), 16, bounds=(-127, 127)),
}


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64)], ids=str)
def test_a_linear_in_float32_dequantizes_in_front_of_its_product(shape):
    gm = passed(linear, torch.randn(shape), w=Groups((12, 64), 16), b=nn.Parameter(torch.randn(12)))
    assert len(calls(gm, aten.linear.default)) == 1


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_scheme_is_stored_as_integers(name):
    gm = passed(linear, torch.randn(3, 64), w=WEIGHTS[name](24), b=None)
    stored = sorted(str(buffer.dtype) for buffer in gm.buffers())
    assert stored[-1] == ("torch.uint8" if name.startswith("4") else "torch.int8")
    codes = next(buffer for buffer in gm.buffers() if not buffer.is_floating_point())
    assert codes.numel() == 24 * 64 // (2 if name.startswith("4") else 1)


def test_a_chain_of_linears_is_rewritten_whole():
    """What one rewrite makes is the input of the next."""
    gm = passed(
        lambda n, x: F.linear(F.linear(x, n.w()), n.v()), torch.randn(3, 64), w=Weight((64, 64)), v=Weight((9, 64))
    )
    assert not [node for node in gm.graph.nodes if "dequantize_per_channel" in str(node.target)]


class InBfloat16(nn.Module):
    """What convert_pt2e writes for a bfloat16 model: out_dtype per channel, the last argument in groups."""

    def __init__(self, weight: Weight | Groups) -> None:
        super().__init__()
        self.weight = weight
        weight.scale = weight.scale.bfloat16().float()  # the kernels read scales of bfloat16

    def forward(self) -> Tensor:
        w, q = self.weight, torch.ops.quantized_decomposed
        if isinstance(w, Groups):
            return q.dequantize_per_channel_group.default(
                w.values, w.scale, w.zero_point, *w.bounds, torch.int8, w.size, torch.bfloat16
            )
        return q.dequantize_per_channel.default(
            w.values, w.scale, w.zero_point, 0, *w.bounds, torch.int8, out_dtype=torch.bfloat16
        )


IN_BFLOAT16 = {
    "8 bits": (lambda: Weight((24, 64)), INT8, 24),
    "8 bits, as few outputs as Inductor cannot pass": (lambda: Weight((5, 64)), INT8, 16),
    "4 bits in groups of 32": (lambda: Groups((32, 64), 32), INT4, 32),
    "4 bits, outputs that fill no block": (lambda: Groups((20, 64), 32), INT4, 32),
    "4 bits per row of 64": (lambda: Weight((16, 64), bounds=(-8, 7)), INT4, 16),
}


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_a_linear_in_bfloat16_becomes_the_kernel_for_it(name, shape):
    """Both round to bfloat16, 2**-9 of a number: the graph its weights and its output, the kernel its output."""
    make, kernel, rows = IN_BFLOAT16[name]
    outputs = len(make().values)
    bias = nn.Parameter(torch.randn(outputs, dtype=torch.bfloat16))
    gm = passed(linear, torch.randn(shape, dtype=torch.bfloat16), w=InBfloat16(make()), b=bias, rounding=2.0**-6)
    (call,) = calls(gm, kernel)
    assert len(getattr(gm, str(call.args[1].target))) == rows


def test_scales_are_as_exact_as_in_the_graph_where_a_kernel_reads_bfloat16():
    """bfloat16 would make every number smaller by 0.0026. The results are rounded twice, which leaves 0.0007."""
    weight = InBfloat16(Weight((24, 64)))
    weight.weight.scale = torch.full((24,), 2.0**-8 * (1.5 + 2.0**-8 - 2.0**-20))
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    gm = passed(linear, x, w=weight, b=None, rounding=2.0**-6)
    wanted = x.double() @ (weight.weight.values.double() * weight.weight.scale.double().unsqueeze(1)).T
    gain = (gm(x).double() * wanted).sum() / wanted.square().sum()
    assert abs(float(gain) - 1) < 2.0**-10


NO_KERNEL = {
    "groups of 16": lambda: Groups((32, 64), 16),
    "zero points": lambda: Weight((24, 64), zero_point=3),
    "20 inputs, which torch's kernel multiplies wrongly": lambda: Weight((24, 20)),
}


@pytest.mark.parametrize("name", NO_KERNEL)
def test_what_no_kernel_takes_is_dequantized_in_bfloat16_too(name):
    weight = NO_KERNEL[name]()
    x = torch.randn(3, weight.values.shape[1], dtype=torch.bfloat16)
    gm = passed(linear, x, w=InBfloat16(weight), b=None, rounding=2.0**-6)
    assert len(calls(gm, aten.linear.default)) == 1


TABLES = {
    "8 bits": lambda: Weight((9, 8)),
    "8 bits with zero points": lambda: Weight((9, 8), zero_point=-5),
    "4 bits": lambda: Weight((9, 8), bounds=(-8, 7)),
    "4 bits, odd": lambda: Weight((9, 7), bounds=(-8, 7)),
    "groups of 4 bits": lambda: Groups((9, 8), 4),
}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_rows_are_looked_up_as_integers(name, shape):
    gm = passed(lambda n, i: F.embedding(i, n.w(), padding_idx=0), torch.randint(0, 9, shape), w=TABLES[name]())
    looked_up = {node.meta["val"].dtype for node in calls(gm, aten.embedding.default)}
    assert torch.int8 in looked_up or torch.uint8 in looked_up
    assert all(node.meta["val"].shape[: len(shape)] == shape for node in calls(gm, aten.embedding.default))


def test_a_table_and_the_layer_tied_to_it_are_stored_once():
    def function(n: Body, i: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.embedding(i, n.w())), n.w())

    before = Groups((32, 64), 16)
    gm = passed(function, torch.randint(0, 32, (2, 3)), w=before)
    assert state_bytes(gm) == 32 * 64 // 2 + 4 * before.scale.numel()


INDICES, OFFSETS = torch.tensor([1, 4, 8, 8, 0, 3, 2]), torch.tensor([0, 3, 3, 4])  # the second bag is empty
BAGS = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "sum with weights": {"mode": "sum", "per_sample_weights": torch.randn(7)},
    "sum without a row": {"mode": "sum", "padding_idx": 8},
    "sum without the last row, counted from the end": {"mode": "sum", "padding_idx": -1},
    "sum up to the last offset": {"mode": "sum", "include_last_offset": True},
    "mean up to the last offset": {"mode": "mean", "include_last_offset": True},
}


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("name", BAGS)
def test_bags_become_the_kernel_for_them(name, zero_point):
    options = BAGS[name]
    offsets = torch.cat([OFFSETS, torch.tensor([7])]) if "include_last_offset" in options else OFFSETS
    gm = passed(
        lambda n, i, o: F.embedding_bag(i, n.w(), o, **options),
        INDICES,
        offsets,
        w=Weight((9, 8), zero_point=zero_point),
    )
    assert len(calls(gm, BAG)) == 1


def test_bags_of_one_size_need_no_offsets():
    gm = passed(lambda n, i: F.embedding_bag(i, n.w(), mode="mean"), torch.randint(0, 9, (2, 3)), w=Weight((9, 8)))
    assert len(calls(gm, BAG)) == 1


OTHER_BAGS = {
    "max": (lambda: Weight((9, 8)), {"mode": "max"}),
    "mean without a row": (lambda: Weight((9, 8)), {"mode": "mean", "padding_idx": 8}),
    "groups": (lambda: Groups((9, 8), 4), {"mode": "sum"}),
}


@pytest.mark.parametrize("name", OTHER_BAGS)
def test_other_bags_stay_as_they_are(name):
    make, options = OTHER_BAGS[name]
    gm = passed(lambda n, i, o: F.embedding_bag(i, n.w(), o, **options), INDICES, OFFSETS, w=make())
    assert calls(gm, BAG) == []
