"""Each rewrite for XNNPACK keeps the values, up to float32 rounding, and leaves no trace of what it replaces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.graph.module import clone, finish, tidy
from pt2e_quant.lowering.executorch.passes.attention_on_merged_heads import attention_on_merged_heads
from pt2e_quant.lowering.executorch.passes.cats_of_few import cats_of_few
from pt2e_quant.lowering.executorch.passes.copies_to_concatenate import copies_to_concatenate
from pt2e_quant.lowering.executorch.passes.expands_to_products import expands_to_products
from pt2e_quant.lowering.executorch.passes.fold_constants import fold_constants
from pt2e_quant.lowering.executorch.passes.fold_factors_into_linears import fold_factors_into_linears
from pt2e_quant.lowering.executorch.passes.means_to_linears import means_to_linears
from pt2e_quant.lowering.executorch.passes.norms_to_linears import norms_to_linears
from pt2e_quant.lowering.executorch.passes.slices_to_linears import slices_to_linears
from pt2e_quant.lowering.executorch.passes.weighted_sums_to_products import weighted_sums_to_products
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.transformers_xnnpack.small_transformers import calls

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.linear = nn.Linear(6, 6)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


X = torch.randn(2, 3, 6) * 3 + 1
HEADS = torch.randn(2, 4, 5, 6)

CASES = {
    "layer_norm": (
        norms_to_linears,
        lambda n, x: F.layer_norm(x, (6,), n.scale, n.shift, 1e-3),
        aten.layer_norm.default,
    ),
    "layer_norm, bare": (norms_to_linears, lambda n, x: F.layer_norm(x, (6,)), aten.layer_norm.default),
    "rms_norm": (norms_to_linears, lambda n, x: F.rms_norm(x, (6,), n.scale, 1e-3), aten.rms_norm.default),
    "rms_norm, default eps": (norms_to_linears, lambda n, x: F.rms_norm(x, (6,)), aten.rms_norm.default),
    "mean": (means_to_linears, lambda n, x: x.mean(-1, keepdim=True), aten.mean.dim),
    "mean, dropped": (means_to_linears, lambda n, x: x.mean(2), aten.mean.dim),
    "weighted sum": (weighted_sums_to_products, lambda n, x: (x * x[..., :1]).sum(1), aten.sum.dim_IntList),
    "weighted sum, expanded": (
        weighted_sums_to_products,
        lambda n, x: (x[..., :1].expand(2, 3, 6) * x).sum(1, keepdim=True),
        aten.sum.dim_IntList,
    ),
    "expand": (expands_to_products, lambda n, x: (x * 2)[:, :, None].expand(2, 3, 4, 6), aten.expand.default),
    "factor": (fold_factors_into_linears, lambda n, x: n.linear(x).transpose(0, 1) * 0.3, aten.mul.Tensor),
    "stack": (cats_of_few, lambda n, x: torch.stack([x * k for k in range(7)], 1), aten.stack.default),
    "stack, last": (cats_of_few, lambda n, x: torch.stack([x * k for k in range(26)], -1), aten.stack.default),
    "quotient": (fold_factors_into_linears, lambda n, x: n.linear(x) / 4.0, aten.div.Tensor),
    "factor after a product": (
        fold_factors_into_linears,
        lambda n, x: (n.linear(x) @ x.transpose(1, 2)) * 0.3,
        aten.mul.Tensor,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_values_stay_and_the_operator_goes(name):
    step, function, gone = CASES[name]
    model = Net(function).eval()
    gm = clone(torch.export.export(model, (X,)).module())
    assert calls(gm, gone)
    step(gm)
    assert not calls(gm, gone)
    torch.testing.assert_close(finish(gm)(X), model(X), rtol=1e-5, atol=1e-5)


KEPT = {
    "norm over two dimensions": (norms_to_linears, lambda n, x: F.layer_norm(x, (3, 6))),
    "mean over another dimension": (means_to_linears, lambda n, x: x.mean(1)),
    "unweighted sum": (weighted_sums_to_products, lambda n, x: (x * x).sum(1)),
    "expand of integers": (expands_to_products, lambda n, x: (x > 0)[:, :, None].expand(2, 3, 4, 6)),
    "factor of a value read twice": (fold_factors_into_linears, lambda n, x: (lambda y: y * 0.3 + y)(n.linear(x))),
    "negative factor": (fold_factors_into_linears, lambda n, x: n.linear(x) * -0.3),
    "factor after gelu": (fold_factors_into_linears, lambda n, x: F.gelu(n.linear(x)) * 0.3),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_not_fit_is_left_alone(name):
    step, function = KEPT[name]
    gm = tidy(clone(torch.export.export(Net(function).eval(), (X,)).module()))
    before = [(str(node.target), node.name) for node in gm.graph.nodes]
    step(gm)
    assert [(str(node.target), node.name) for node in gm.graph.nodes] == before


@pytest.mark.parametrize("per_channel_batch", [1, 2])
def test_attention_runs_in_three_dimensions(per_channel_batch):
    def attend(n, q, mask):
        scores = (q @ q.transpose(-2, -1)) * 0.4 + mask
        return torch.softmax(scores, -1) @ q

    model, q = Net(attend).eval(), HEADS[:per_channel_batch]
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e30)
    gm = clone(torch.export.export(model, (q, mask)).module())
    attention_on_merged_heads(gm)
    assert not calls(gm, aten.matmul.default)
    assert {node.meta["val"].dim() for node in calls(gm, aten.softmax.int)} == {3}
    torch.testing.assert_close(finish(gm)(q, mask), model(q, mask), rtol=1e-5, atol=1e-6)


def test_a_cat_of_one_tensor_gets_a_second():
    model = Net(lambda n, x: torch.cat((x, x), -1)).eval()
    gm = clone(torch.export.export(model, (X,)).module())
    copies_to_concatenate(gm)
    (cat,) = calls(gm, aten.cat.default)
    assert len(cat.all_input_nodes) == 2
    assert torch.equal(finish(gm)(X), torch.cat((X, X), -1))


def test_a_factor_goes_into_the_scale_of_an_integer_weight():
    model = Net(lambda n, x: n.linear(x) * 0.3).eval()
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_operator_type(aten.linear.default, config)
    gm = convert_pt2e(prepare_pt2e(torch.export.export(model, (X,)), quantizer))
    expected, copy = gm(X), clone(gm)
    fold_factors_into_linears(copy)
    assert not calls(copy, aten.mul.Tensor)
    torch.testing.assert_close(finish(copy)(X), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(gm(X), expected)  # the graph that was given keeps its scales


BATCH, LENGTH = Dim("batch", max=8), Dim("length", max=9)


def dynamic(function, x: Tensor, dims):
    model = Net(function).eval()
    return model, clone(torch.export.export(model, (x,), dynamic_shapes=((dims,),)).module())


@pytest.mark.parametrize("part", [slice(0, 3), slice(3, None), slice(-4, -1), slice(1, 6, 2)])
def test_columns_of_a_tensor_of_dynamic_size_are_picked_exactly(part):
    model, gm = dynamic(lambda n, x: (x * 2)[..., part], X, {0: BATCH})
    slices_to_linears(gm)
    assert not calls(gm, aten.slice.Tensor)
    x = torch.randn(5, 3, 6) * 1e6
    assert torch.equal(finish(gm)(x), model(x))


KEPT_SLICES = {
    "of fixed shape": (lambda n, x: (x * 2)[..., :3], {}),
    "of rows": (lambda n, x: (x * 2)[:, 1:], {0: BATCH}),
    "of what is made from integers": (lambda n, x: (x > 0).float()[..., :3], {0: BATCH}),
}


@pytest.mark.parametrize("name", KEPT_SLICES)
def test_other_slices_stay(name):
    function, dims = KEPT_SLICES[name]
    _, gm = dynamic(function, X, dims or None)
    slices_to_linears(gm)
    assert len(calls(gm, aten.slice.Tensor)) >= 1


MASKS = {
    "for each of the batch": lambda x: torch.where(x[:, None, None, :, 0] > 0, 0.0, -1e30),
    "for all": lambda x: torch.full((x.shape[1], x.shape[1]), -1e30).triu(1),
    "none": lambda x: 0.5,
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_with_dynamic_batch_and_length_runs_in_three_dimensions(mask):
    def attend(n, x):
        q = x.view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2)
        scores = (q @ q.transpose(-2, -1)) * 0.4 + MASKS[mask](x)
        return (torch.softmax(scores, -1) @ q).transpose(1, 2).reshape(x.shape)

    model, gm = dynamic(attend, X, {0: BATCH, 1: LENGTH})
    attention_on_merged_heads(gm)
    assert not calls(gm, aten.matmul.default)
    assert {node.meta["val"].dim() for node in calls(gm, aten.softmax.int)} == {3}
    x = torch.randn(4, 5, 6).abs()
    torch.testing.assert_close(finish(gm)(x), model(x), rtol=1e-5, atol=1e-6)


def folded(function):
    model = Net(function).eval()
    gm = clone(torch.export.export(model, (X,)).module())
    fold_constants(gm)
    torch.testing.assert_close(finish(gm)(X), model(X))
    return gm


def test_positions_and_masks_of_fixed_size_are_stored():
    gm = folded(lambda n, x: x + torch.full((3, 3), -9.0).triu(1) @ torch.arange(18.0).view(3, 6))
    assert [str(node.target) for node in gm.graph.nodes if node.op == "call_function"] == ["aten.add.Tensor"]


def test_what_is_random_uninitialized_large_looked_up_or_written_to_is_not_stored():
    def random(n, x):
        return x + torch.rand(6) * 0

    def large(n, x):
        return x + torch.arange(2**16 + 2).sum() * 0

    def written(n, x):
        counts = torch.zeros(6)
        counts.add_(x.sum())
        return x + counts

    for function, kept in ((random, aten.rand.default), (large, aten.arange.default), (written, aten.zeros.default)):
        assert calls(folded(function), kept)


def test_no_cat_reads_more_tensors_than_xnnpack_takes():
    model = Net(lambda n, x: torch.cat([x * number for number in range(26)], 1)).eval()
    gm = cats_of_few(clone(torch.export.export(model, (X,)).module()))
    assert [len(cat.args[0]) for cat in calls(gm, aten.cat.default)] == [5, 5, 5, 5, 5, 5, 2]
    assert torch.equal(finish(gm)(X), model(X))
