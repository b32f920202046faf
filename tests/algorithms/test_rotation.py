"""Rotation: which matrices, where they go, or why they go nowhere; whatever it does, the function stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from benchmarks.tiny_llama import Config, TinyLlama
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import rotate
from pt2e_quant.algorithms.hadamard import hadamard, rotation_matrix
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.sqnr import sqnr
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config, get_symmetric_quantization_config

WIDTH, HEADS, WORDS = 24, 4, 50
TOKENS = torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(0))
EXACT = 100.0
"""dB between float32 graphs that differ in the order of sums alone: 2^-24 is 144 dB, some ten layers of them less."""


# --- matrices ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 512))
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_size(size):
    found = hadamard(size)
    if found is None:
        return
    assert found.shape == (size, size)
    assert found.abs().eq(1).all()
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [2, 12, 20, 28, 36, 64, 384, 576, 768, 896])
def test_sizes_of_real_decoders_have_one(size):
    assert hadamard(size) is not None


@pytest.mark.parametrize(("size", "kind"), [(1, "hadamard"), (24, "hadamard"), (22, "random"), (7, "random")])
def test_rotation_matrices_are_orthogonal_and_follow_the_seed(size, kind):
    found, name = rotation_matrix(size, torch.Generator().manual_seed(3))
    assert name == kind
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(found, rotation_matrix(size, torch.Generator().manual_seed(3))[0])
    other = rotation_matrix(size, torch.Generator().manual_seed(4))[0]
    assert size == 1 or not torch.equal(found, other)


# --- streams ----------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A block with the parts of decoders, put together by a function that gets the residual stream."""

    def __init__(self, function: Callable[[Decoder, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.table, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(7, WIDTH))
        self.first, self.last = nn.LayerNorm(WIDTH, eps=1e-3), nn.LayerNorm(WIDTH, eps=1e-3)
        self.rms, self.final = nn.RMSNorm(WIDTH, eps=1e-3), nn.RMSNorm(WIDTH, eps=1e-3)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.out = nn.Linear(WIDTH, 9, bias=False)
        self.columns, self.narrow = nn.Parameter(torch.randn(WIDTH, 9)), nn.Linear(WIDTH, 1)
        for norm in (self.first, self.last, self.rms, self.final):
            nn.init.uniform_(norm.weight, -2, 2)
        for norm in (self.first, self.last):
            nn.init.normal_(norm.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.function(self, self.table(tokens))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


def written_rms(net: Decoder, x: Tensor) -> Tensor:
    return net.rms.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


def gemma_rms(net: Decoder, x: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt((x * x).mean(-1, True) + 1e-3) * (1.0 + net.rms.weight)).type_as(x)


ROTATED: dict[str, Callable[[Decoder, Tensor], Tensor]] = {
    "rms_norm": lambda n, x: n.out(n.final(x + n.mlp(n.rms(x)))),
    "rms_norm, written out": lambda n, x: n.out(n.final(x + n.mlp(written_rms(n, x)))),
    "rms_norm, with a weight that is computed": lambda n, x: n.out(n.final(x + n.mlp(gemma_rms(n, x)))),
    "rms_norm without a weight": lambda n, x: n.out(F.rms_norm(x + n.mlp(n.rms(x)), (WIDTH,))),
    "layer_norm": lambda n, x: n.out(n.last(x + n.mlp(n.first(x)))),
    "layer_norm before products without a bias": lambda n, x: n.last(x + n.mlp(n.first(x))) @ n.columns,
    "layer_norm before addmm": lambda n, x: torch.addmm(
        n.out.weight[:, 0], n.last(x + n.mlp(n.first(x))).view(-1, WIDTH), n.columns
    ),
    "two norms of one tensor": lambda n, x: n.out(n.final(x + n.mlp(n.rms(x)) + n.down(n.up(n.final(x))))),
    "a scale for all": lambda n, x: n.out(n.final(x * WIDTH**0.5 + n.mlp(n.rms(x * WIDTH**0.5)) / 3)),
    "a scale for each token": lambda n, x: n.out(n.final(x + n.mlp(n.rms(x)) * n.narrow(n.rms(x)).sigmoid())),
    "places": lambda n, x: n.out(n.final(x + n.places[: x.shape[1]] + n.mlp(n.rms(x)))),
    "tokens put together": lambda n, x: n.out(n.final(torch.cat([x[:, :1] - x[:, 1:2], x], 1))),
    "a linear that reads the stream itself": lambda n, x: n.out(n.final(x + n.down(n.up(x)))),
    "dropout, moves, casts": lambda n, x: n.out(
        n.final(F.dropout(x.flatten(0, 1), 0.3, n.training)[:, None].to(torch.float32) + 0 * x[:1, :1])
    ),
}


@pytest.mark.parametrize("function", ROTATED.values(), ids=ROTATED)
def test_a_rotated_stream_has_the_same_outputs(function):
    net = Decoder(function).eval()
    exported = torch.export.export(net, (TOKENS,))
    before = copy.deepcopy(exported.state_dict)
    rotated, (done, *_) = rotate(exported)
    assert (done.size, done.kind, done.reason) == (WIDTH, "hadamard", None)
    assert done.tensor == "embedding"
    assert sqnr(net(TOKENS), rotated(TOKENS)) > EXACT
    assert not torch.equal(rotated.get_parameter("table.weight"), net.table.weight)
    assert all(torch.equal(value, exported.state_dict[name]) for name, value in before.items())


REFUSED: dict[str, tuple[Callable[[Decoder, Tensor], Tensor], str]] = {
    "returned": (lambda n, x: n.final(x), "output (output) reads what rms_norm scales"),
    "added behind the norm": (
        lambda n, x: n.out(n.last(n.first(x) + n.mlp(n.first(x)))),
        "add (aten.add.Tensor) reads",
    ),
    "read by something else": (lambda n, x: n.out(n.final(x + n.mlp(n.rms(x)).relu())), "relu, which makes a part"),
    "activated": (lambda n, x: n.out(n.final(x)) + x.tanh().sum(-1, True), "tanh (aten.tanh.default) reads it"),
    "with and without its mean": (lambda n, x: n.out(n.final(x + n.mlp(n.first(x)))), "without taking the mean out"),
    "one value in all channels": (
        lambda n, x: n.out(n.final(x + n.narrow(n.rms(x)))),
        "adds one value to all channels",
    ),
    "a scale for each channel": (lambda n, x: n.out(n.final(x * x.sigmoid())), "makes a part of it"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_commute_is_left_alone_with_the_reason(function, reason):
    net = Decoder(function).eval()
    rotated, (done, *_) = rotate(torch.export.export(net, (TOKENS,)))
    assert reason in done.reason
    assert "left alone" in str(done)
    assert torch.equal(net(TOKENS), rotated(TOKENS))


def test_a_stream_that_comes_from_outside_is_left_alone():
    norm = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)).eval()
    _, (done,) = rotate(torch.export.export(norm, (torch.randn(2, 8),)))
    assert done.reason == "input_1, which makes a part of it, is an input of the model"


# --- decoders ---------------------------------------------------------------------------------------------------------


def llama(**changes) -> TinyLlama:
    torch.manual_seed(0)
    model = TinyLlama(Config(**{"width": 48, "layers": 2, "hidden": 64, **changes})).eval()
    for norm in (one for one in model.modules() if isinstance(one, nn.RMSNorm)):
        nn.init.uniform_(norm.weight, -2, 2)
    return model


BYTES = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> TinyLlama:
    return llama()


@pytest.fixture(scope="module")
def exported(model):
    return torch.export.export(model, (BYTES,), dynamic_shapes=({1: Dim("length", max=64)},))


def test_a_decoder_with_grouped_heads_and_a_tied_table(model, exported):
    rotated, done = rotate(exported, online=True)
    assert [one.size for one in done] == [48, 12, 64, 12, 64]
    assert all(one.reason is None for one in done)
    assert sqnr(model(BYTES), rotated(BYTES)) > EXACT
    longer = BYTES.repeat(1, 3)
    assert sqnr(model(longer), rotated(longer)) > EXACT
    tables = [value for value in rotated.state_dict().values() if value.shape == model.embedding.weight.shape]
    assert len(tables) == 2  # the norm's weight is in the output layer alone


def test_the_seed_decides(exported):
    first, again, other = (rotate(exported, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_values_are_left_out_on_request(exported):
    assert [one.size for one in rotate(exported, values=False)[1]] == [48]


def test_bfloat16_stays_bfloat16():
    model = llama().to(torch.bfloat16)
    rotated, _ = rotate(torch.export.export(model, (BYTES,)))
    assert {value.dtype for value in rotated.parameters()} == {torch.bfloat16}
    noise = sqnr(llama()(BYTES), model(BYTES).float())
    assert sqnr(llama()(BYTES), rotated(BYTES).float()) > noise - 3.0  # weights are rounded to 8 bits once more


def test_heads_that_do_not_stay_together_are_left_alone():
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net, x = Fused().eval(), torch.randn(2, 5, WIDTH)
    rotated, (done,) = rotate(torch.export.export(net, (x,)))
    assert "getitem" in done.reason
    assert torch.equal(net(x), rotated(x))


def with_outliers(model: TinyLlama, factor: float = 30.0) -> TinyLlama:
    """Three channels of each norm are large, and small in what reads them: the function is the same."""
    readers = [
        ((block.attention.query, block.attention.key, block.attention.value), block.before_attention)
        for block in model.blocks
    ]
    readers += [((block.gate, block.up), block.before_mlp) for block in model.blocks]
    with torch.no_grad():
        for linears, norm in readers:
            norm.weight[[1, 7, 20]] *= factor
            for linear in linears:
                linear.weight[:, [1, 7, 20]] /= factor
    return model


def test_outliers_are_spread():
    """Rounded to 8 bits with one scale a tensor, channels 30 times as large as others leave them 5 bits less."""
    model = with_outliers(llama())
    exported = torch.export.export(model, (BYTES,))
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    found = []
    for graph in (exported, rotate(exported)[0]):
        prepared = prepare_pt2e(graph, XNNPACKQuantizer().set_global(config))
        prepared(BYTES)
        found.append(sqnr(model(BYTES), convert_pt2e(prepared)(BYTES)))
    assert found[1] > found[0] + 6.0


@pytest.mark.slow
def test_a_rotated_decoder_runs_on_xnnpack():
    graph = rotate(torch.export.export(llama(width=64), (BYTES,)))[0]
    prepared = prepare_pt2e(graph, XNNPACKQuantizer().set_global(get_8da4w_config(32)), require=["linear"])
    prepared(BYTES)
    converted = convert_pt2e(prepared)
    program = lower_to_executorch(converted, (BYTES,))  # verifies it
    assert program.delegates
    assert sqnr(converted(BYTES), program(BYTES)) > 40.0  # sums in another order turn single codes of 8 bits (50 dB)
