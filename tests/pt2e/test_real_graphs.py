"""Graphs as real models have them: tied weights, free sizes, half precision, odd inputs.

Each part names the pain of users (item of the list that the project works from) that it covers.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import LoweringError, SharingError
from pt2e_quant.lowering.executorch import lower_to_executorch
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import MLP, ConvNet, export, randomize, sqnr
from tests.pt2e.kit import (
    ACT,
    PER_CHANNEL,
    STATIC,
    ByHand,
    Toy,
    annotate,
    calls,
    quantizes,
    relative_error,
    the_call,
)

aten = torch.ops.aten
XNNPACK = get_symmetric_quantization_config(is_per_channel=True)
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


# --- tied and shared parameters (items 7 and 31) ----------------------------------------------------------------------


class Tied(nn.Module):
    """A language model in small: the table of the embedding is the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.table(tokens)))


def tied_by_hand(table_spec, head_spec) -> ByHand:
    """Quantizes the table of the embedding and the weight of the head, as two quantizers would."""

    def function(gm: GraphModule) -> None:
        embedding, head = the_call(gm, aten.embedding.default), calls(gm, aten.linear.default)[-1]
        annotate(embedding, {embedding.args[0]: table_spec}, allow_implicit_sharing=True)
        annotate(head, {head.args[1]: head_spec})

    return ByHand(function)


TOKENS = torch.arange(10).reshape(2, 5)


def test_a_tied_weight_with_one_spec_is_stored_once_and_as_integers():
    """Users' item 7: a parameter of two layers stays one tensor. Users' item 31: and no float copy of it is left."""
    prepared = prepare_pt2e(export(Tied(), TOKENS), tied_by_hand(PER_CHANNEL, PER_CHANNEL))
    prepared(TOKENS)
    state = convert_pt2e(prepared).state_dict()
    of_table = {name: value.dtype for name, value in state.items() if value.shape == (20, 8)}
    assert of_table == {"_frozen_param0": torch.int8}


def test_a_tied_weight_with_two_specs_is_an_error_that_names_both_sites():
    """Users' item 7: two specs for one parameter are refused, with both sites and the way out."""
    asymmetric = replace(ACT, dtype=torch.uint8, quant_min=3, quant_max=250)
    with pytest.raises(SharingError, match=r"'head.weight' would be stored 2 times") as raised:
        prepare_pt2e(export(Tied(), TOKENS), tied_by_hand(asymmetric, PER_CHANNEL))
    text = str(raised.value)
    assert "uint8 [3, 250]" in text
    assert "int8 [-119, 119] per channel of dim 0" in text
    assert "node embedding" in text
    assert "node linear_1" in text
    assert "detach().clone()" in text


def test_a_tied_weight_that_a_float_op_reads_too_is_stored_twice_and_the_reason_says_so():
    """XNNPACK has no integer embedding, and a table of integers would have to be made float in every run."""
    prepared = prepare_pt2e(export(Tied(), TOKENS), XNNPACKQuantizer(XNNPACK))
    assert "so head.weight is stored in float here and as integers for linear_1" in explain(prepared).why("embedding")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_two_modules_with_one_weight_store_it_once(strict):
    """Users' items 7 and 31: one parameter under two names is one tensor of the state dict."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    x = torch.randn(3, 8)
    prepared = prepare_pt2e(export(Model(), x, strict=strict), Toy(STATIC))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert [tuple(value.shape) for value in converted.state_dict().values() if value.dim() == 2] == [(8, 8)]
    assert explain(converted).record.bytes_before == 4 * (64 + 8)


def test_a_module_that_is_called_twice_stores_its_weight_once():
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8)
    prepared = prepare_pt2e(export(nn.Sequential(layer, nn.ReLU(), layer), x), Toy(STATIC))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert [value.dtype for value in converted.state_dict().values() if value.dim() == 2] == [torch.int8]


# --- free sizes (item 18) ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Tokens of any batch and length: embedding, layer norm, one head of attention, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16, eps=1e-3)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        y = self.norm(x)
        mixed = torch.softmax(self.q(y) @ self.k(y).transpose(1, 2) / 4, -1) @ self.v(y)
        return self.head(torch.relu(x + self.out(mixed)))


@pytest.fixture(
    scope="module",
    params=[pytest.param(XNNPACK, id="static", marks=pytest.mark.slow), pytest.param(DYNAMIC, id="dynamic")],
)
def free_sizes(request):
    """(float model, its export, converted), calibrated with batches of 4 x 10, 4 x 20 and a last one of 1 x 5."""
    torch.manual_seed(0)
    model = Attention().eval()
    shapes = ({0: Dim("batch", min=1, max=8), 1: Dim("length", min=2, max=32)},)
    exported = torch.export.export(model, (torch.randint(0, 30, (3, 6)),), dynamic_shapes=shapes)
    prepared = prepare_pt2e(exported, XNNPACKQuantizer(request.param))
    with torch.no_grad():
        for size in ((4, 10), (4, 20), (1, 5)):
            prepared(torch.randint(0, 30, size))
    return model, exported, convert_pt2e(prepared), shapes


def test_free_sizes_stay_free(free_sizes):
    """Users' item 18: dimensions and ranges of the export are those of the converted graph."""
    _, exported, converted, _ = free_sizes
    (placeholder,) = converted.graph.find_nodes(op="placeholder")
    sizes = placeholder.meta["val"].shape
    assert {str(size): exported.range_constraints[size.node.expr] for size in sizes} == {
        str(symbol): bounds for symbol, bounds in exported.range_constraints.items()
    }


def test_a_converted_graph_exports_again_with_the_same_ranges(free_sizes):
    _, exported, converted, shapes = free_sizes
    again = torch.export.export(converted, (torch.randint(0, 30, (3, 6)),), dynamic_shapes=shapes)
    assert list(again.range_constraints.values()) == list(exported.range_constraints.values())
    x = torch.randint(0, 30, (7, 31))
    assert torch.equal(again.module()(x), converted(x))


def test_a_size_beyond_the_range_is_refused_as_before(free_sizes):
    with pytest.raises(AssertionError, match="8"):
        free_sizes[2](torch.randint(0, 30, (9, 3)))


def test_the_pte_runs_at_sizes_that_nobody_saw(free_sizes):
    """20 dB is far above noise (0 dB) and below what 8 bits give; kernels round like the graph but for single steps."""
    model, _, converted, _ = free_sizes
    program = lower_to_executorch(converted)
    for size in ((2, 3), (8, 32), (7, 31)):
        x = torch.randint(0, 30, size, generator=torch.Generator().manual_seed(size[1]))
        assert sqnr(model(x), converted(x)) > 20
        assert sqnr(converted(x), program.run(x)[0]) > 40


# --- half precision (item 20) -----------------------------------------------------------------------------------------

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@HALF
@pytest.mark.parametrize("config", [XNNPACK, DYNAMIC], ids=["static", "dynamic"])
def test_a_half_precision_model_computes_in_its_dtype_and_its_statistics_are_float32(dtype, config):
    """Users' item 20: no op meets two dtypes, and observers accumulate in float32."""
    torch.manual_seed(0)
    model, tokens = Attention().to(dtype).eval(), torch.randint(0, 30, (3, 6))
    prepared = prepare_pt2e(export(model, tokens), XNNPACKQuantizer(config))
    assert prepared(tokens).dtype is dtype
    watching = {v.dtype for k, v in prepared.state_dict().items() if k.startswith("activation_post_process")}
    assert {kind for kind in watching if kind.is_floating_point} == {torch.float32}  # counts are integers
    converted = convert_pt2e(prepared)
    floats = {
        node.meta["val"].dtype
        for node in converted.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim()
    }
    assert {kind for kind in floats if kind.itemsize > 1 and kind.is_floating_point} <= {dtype, torch.float64}
    assert converted(tokens).dtype is dtype
    assert sqnr(model(tokens), converted(tokens)) > 30
    assert not [d for d in explain(converted).skipped if "float16 are quantized" in (d.reason or "")]


def test_a_float16_convnet_runs_in_the_pte():
    """Users' item 20: from export to the runtime."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16).half()
    prepared = prepare_pt2e(export(randomize(ConvNet()).half(), x), XNNPACKQuantizer(XNNPACK))
    prepared(x)
    converted = convert_pt2e(prepared)
    (result,) = lower_to_executorch(converted).run(x)
    assert result.dtype is torch.float16
    assert sqnr(converted(x), result) > 40


@pytest.mark.parametrize("backend", ["xnnpack", None])
def test_bfloat16_is_refused_by_name_where_executorch_would_end_the_process(backend):
    x = torch.randn(3, 10, dtype=torch.bfloat16)
    prepared = prepare_pt2e(export(MLP().bfloat16(), x), XNNPACKQuantizer(XNNPACK))
    prepared(x)
    with pytest.raises(LoweringError, match=r"(?s)compute in bfloat16.*node .*float32 or float16"):
        lower_to_executorch(convert_pt2e(prepared), backend=backend)


# --- signatures (items 22 and 30) -------------------------------------------------------------------------------------


@dataclass
class Options:
    mask: Tensor
    factor: Tensor


@dataclass
class Answer:
    logits: Tensor
    count: Tensor
    nothing: None = None


torch.export.register_dataclass(Options, serialized_type_name="tests.pt2e.Options")
torch.export.register_dataclass(Answer, serialized_type_name="tests.pt2e.Answer")


class Odd(nn.Module):
    """Tensors of integers and of booleans, a number, keywords, a flag, None, dataclasses and a dict; all of it out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, tokens, times, *, options, flag=True, extra=None):
        x = self.table(tokens + 1).masked_fill(options.mask.unsqueeze(-1), 0.0) * options.factor
        x = x * times if flag else x
        rest = {"tokens": tokens + 1, "mask": ~options.mask, "none": None, "three": 3}
        return Answer(self.head(x), options.mask.sum()), rest, [x, (extra,)]


def odd_inputs():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 10, (2, 4), generator=generator)
    mask = torch.rand(2, 4, generator=generator) > 0.5
    return (tokens, 2), {"options": Options(mask, torch.tensor(1.5)), "flag": True, "extra": None}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("quantizer", [Toy(STATIC), XNNPACKQuantizer(XNNPACK)], ids=["toy", "xnnpack"])
def test_odd_signatures_stay_through_prepare_convert_save_and_load(quantizer, strict):
    args, kwargs = odd_inputs()
    model = Odd().eval()
    expected = model(*args, **kwargs)
    prepared = prepare_pt2e(torch.export.export(model, args, kwargs, strict=strict), quantizer)
    assert pytree.tree_structure(prepared(*args, **kwargs)) == pytree.tree_structure(expected)
    converted = convert_pt2e(prepared)
    file = io.BytesIO()
    torch.export.save(torch.export.export(converted, args, kwargs), file)
    file.seek(0)
    with torch.serialization.safe_globals([Options]):
        loaded = torch.export.load(file).module()
    for stage in (converted, loaded):
        result = stage(*args, **kwargs)
        assert pytree.tree_structure(result) == pytree.tree_structure(expected)
        for name in ("tokens", "mask"):
            assert torch.equal(result[1][name], expected[1][name])
        assert torch.equal(result[0].count, expected[0].count)
        assert relative_error(result[0].logits, expected[0].logits) < 0.05  # a few of the 235 steps of 8 bits
    assert torch.equal(loaded(*args, **kwargs)[0].logits, converted(*args, **kwargs)[0].logits)


def test_integers_and_booleans_are_never_observed():
    """By a quantizer that asks for everything."""

    def function(gm: GraphModule) -> None:
        for node in gm.graph.nodes:
            tensors = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                annotate(node, dict.fromkeys(tensors, ACT), ACT)

    args, kwargs = odd_inputs()
    prepared = prepare_pt2e(torch.export.export(Odd().eval(), args, kwargs), ByHand(function))
    watched = {point.producer for point in explain(prepared).record.points}
    dtypes = {node.meta["val"].dtype for node in prepared.graph.nodes if node.name in watched}
    assert dtypes == {torch.float32}
    prepared(*args, **kwargs)
    assert len(quantizes(convert_pt2e(prepared))) > 5
