"""Buffers that the model writes to, such as key-value caches, through prepare, convert and lowering (users' pain 6)."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import ConversionError
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.report import Report
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export, sqnr
from tests.pt2e.kit import ACT, ByHand, annotate, calls, dequantizes, the_call

aten = torch.ops.aten

LENGTH, WIDTH = 12, 8


class Decoder(nn.Module):
    """One head of attention over a cache of LENGTH steps; `write` puts the new key into the cache and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("cache", torch.zeros(1, LENGTH, WIDTH))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        cache = self.write(self.key(x), at)
        return self.out(torch.softmax(self.query(x) @ cache.transpose(1, 2), -1) @ cache)

    def write(self, key: Tensor, at: Tensor) -> Tensor:
        raise NotImplementedError


class IndexPut(Decoder):
    def write(self, key: Tensor, at: Tensor) -> Tensor:
        self.cache[:, at] = key
        return self.cache


class IndexCopy(Decoder):
    def write(self, key: Tensor, at: Tensor) -> Tensor:
        self.cache.index_copy_(1, at, key)
        return self.cache


class Shift(Decoder):
    def write(self, key: Tensor, at: Tensor) -> Tensor:
        self.cache.copy_(torch.cat([self.cache[:, 1:], key], 1))
        return self.cache


class SliceScatter(Decoder):
    def write(self, key: Tensor, at: Tensor) -> Tensor:
        cache = torch.slice_scatter(self.cache, key, 1, 2, 3)
        self.cache.copy_(cache)
        return cache


class Slice(Decoder):
    def write(self, key: Tensor, at: Tensor) -> Tensor:
        self.cache[:, 3:4] = key
        return self.cache


class Add(Decoder):
    def write(self, key: Tensor, at: Tensor) -> Tensor:
        self.cache.add_(key)
        return self.cache


MOVING = (IndexPut, IndexCopy, Shift, SliceScatter, Slice)
EVERY = pytest.mark.parametrize("kind", [*MOVING, Add], ids=lambda kind: kind.__name__)
EVERY_MOVING = pytest.mark.parametrize("kind", MOVING, ids=lambda kind: kind.__name__)


def steps() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(1, 1, WIDTH, generator=generator), torch.tensor([i])) for i in range(10)]


def decode(model) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(*step) for step in steps()])


def prepared(model: nn.Module, **kwargs: object):
    exported = torch.export.export(model.eval(), steps()[0], **kwargs)
    gm = prepare_pt2e(exported, XNNPACKQuantizer(get_symmetric_quantization_config()))
    decode(gm)
    return gm


def make(kind: type[Decoder]) -> Decoder:
    torch.manual_seed(0)
    return kind()


def written(model: nn.Module) -> set[str]:
    exported = torch.export.export(model, steps()[0]).run_decompositions({})
    return set(exported.graph_signature.buffers_to_mutate.values())


@EVERY
def test_the_same_buffers_are_written_to_before_and_after(kind):
    model = make(kind)
    before = written(model)
    assert before == {"cache"}
    assert written(convert_pt2e(prepared(model))) == before


def test_a_strict_export_keeps_its_written_buffers_too():
    assert written(convert_pt2e(prepared(make(IndexCopy), strict=True))) == {"cache"}


@EVERY
def test_ten_steps_of_a_decoder_track_the_float_model(kind):
    """Users ask for 30 dB; one int8 rounding on the way costs about 40 dB, the four here less than 6 dB more."""
    model = make(kind)
    assert sqnr(decode(copy.deepcopy(model)), decode(convert_pt2e(prepared(model)))) > 30


@EVERY
def test_a_buffer_that_is_written_to_stays_a_buffer_and_is_never_folded(kind):
    converted = convert_pt2e(prepared(make(kind)))
    assert dict(converted.named_buffers())["cache"].dtype is torch.float32
    frozen = [tuple(buffer.shape) for name, buffer in converted.named_buffers() if name.startswith("_frozen")]
    assert frozen == [(WIDTH, WIDTH)] * 3


def test_calibration_writes_to_buffers_of_its_own():
    """Otherwise the float model would go on from the last calibration sample."""
    model = make(IndexPut)
    prepared(model)
    assert not model.cache.any()


def test_a_converted_model_starts_from_what_the_buffers_held_before_calibration():
    model = make(IndexPut)
    model.cache.fill_(0.25)
    gm = prepared(model)
    first, second = convert_pt2e(gm), convert_pt2e(gm)
    decode(first)
    assert torch.equal(second.cache, torch.full((1, LENGTH, WIDTH), 0.25))
    assert gm.cache.data_ptr() != second.cache.data_ptr()


def test_a_buffer_keeps_its_place_outside_of_the_state_dict():
    model = make(IndexPut)
    model.register_buffer("cache", torch.zeros(1, LENGTH, WIDTH), persistent=False)
    converted = convert_pt2e(prepared(model))
    assert "cache" not in converted.state_dict()
    assert "cache" in dict(converted.named_buffers())


@pytest.mark.parametrize(
    ("kind", "stored"), [(Shift, ()), (IndexPut, ("cache",))], ids=["float shifted", "integer index_put"]
)
def test_the_pte_keeps_its_state_from_step_to_step(kind, stored):
    gm = prepared(make(kind))
    program = lower_to_executorch(convert_pt2e(gm, integer_buffers=stored))
    outputs = torch.cat([program.run(*step)[0] for step in steps()])
    step = explain(convert_pt2e(gm)).groups[-1].scale
    # Kernels may round the other way where a value lies in the middle between two integers.
    assert (outputs - decode(convert_pt2e(gm))).abs().max() < 1.01 * step


def test_the_pte_starts_with_what_a_buffer_holds():
    """ExecuTorch would leave it zero."""
    model = make(IndexPut)
    model.cache.normal_(generator=torch.Generator().manual_seed(1))
    converted = convert_pt2e(prepared(model))
    program = lower_to_executorch(converted)
    (first,) = program.run(*steps()[0])
    with torch.no_grad():
        assert (first - converted(*steps()[0])).abs().max() < 1.01 * explain(converted).groups[-1].scale


def test_a_cache_that_values_with_gradients_were_written_to_can_be_lowered():
    """What a dynamic linear computes has gradients, and outside of no_grad so has the cache."""
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    converted = convert_pt2e(prepare_pt2e(export(make(IndexPut), *steps()[0]), XNNPACKQuantizer(config)))
    converted(*steps()[0])
    assert converted.cache.requires_grad
    assert lower_to_executorch(converted).run(*steps()[0])[0].shape == (1, 1, WIDTH)


# --- integer storage --------------------------------------------------------------------------------------------------


@EVERY_MOVING
def test_an_integer_cache_computes_what_the_float_cache_computes(kind):
    gm = prepared(make(kind))
    expected = decode(convert_pt2e(gm))
    torch.testing.assert_close(decode(convert_pt2e(gm, integer_buffers=["cache"])), expected, rtol=0, atol=0)


@EVERY_MOVING
def test_an_integer_cache_has_a_quarter_of_the_size_and_is_written_to(kind):
    gm = prepared(make(kind))
    integer = convert_pt2e(gm, integer_buffers="ca*")
    assert integer.cache.dtype is torch.int8
    assert 4 * integer.cache.nbytes == gm.cache.nbytes
    assert written(integer) == {"cache"}
    assert all(node.meta["val"].dtype is torch.int8 for node in integer.graph.find_nodes(op="get_attr", target="cache"))


def test_an_integer_cache_of_a_half_precision_model_has_half_the_size():
    model = make(IndexPut).half()
    example = (steps()[0][0].half(), steps()[0][1])
    gm = prepare_pt2e(torch.export.export(model.eval(), example), XNNPACKQuantizer(get_symmetric_quantization_config()))
    with torch.no_grad():
        gm(*example)
        integer, plain = convert_pt2e(gm, integer_buffers=["cache"]), convert_pt2e(gm)
        assert 2 * integer.cache.nbytes == plain.cache.nbytes
        assert torch.equal(integer(*example), plain(*example))
    assert {node.kwargs["out_dtype"] for node in dequantizes(integer)} == {torch.float16}


def test_zero_is_stored_as_the_zero_point_and_the_report_has_the_qparams():
    converted = convert_pt2e(prepared(make(IndexPut)), integer_buffers=["cache"])
    report = explain(converted)
    qparams = report.buffers["cache"]
    (group,) = (group for group in report.groups if "linear" in group.members)
    assert (qparams.scale, qparams.zero_point) == (group.scale, group.zero_point)
    assert converted.cache.unique().tolist() == [qparams.zero_point]
    assert f"cache: torch.int8, scale {qparams.scale:.6g}" in report.text()
    assert Report.from_json(report.to_json()).buffers == report.buffers


def test_every_reader_of_an_integer_cache_has_a_dequantize_of_its_own():
    converted = convert_pt2e(prepared(make(IndexPut)), integer_buffers=["cache"])
    assert all(len(node.users) == 1 for node in dequantizes(converted))


def test_a_cache_that_is_computed_with_in_place_cannot_be_integers():
    with pytest.raises(ConversionError, match=r"(?s)buffer 'cache' cannot hold integers.*add_.*with copy_"):
        convert_pt2e(prepared(make(Add)), integer_buffers=["cache"])


def test_a_cache_of_float_values_cannot_be_integers_and_the_op_is_named():
    class Tanh(IndexPut):
        def write(self, key: Tensor, at: Tensor) -> Tensor:
            return super().write(torch.tanh(key), at)

    with pytest.raises(ConversionError, match=r"(?s)computed in floating point:\nnode tanh.*output spec"):
        convert_pt2e(prepared(make(Tanh)), integer_buffers=["cache"])


def test_writes_with_two_grids_are_an_error_that_shows_both():
    class Twice(IndexPut):
        def write(self, key: Tensor, at: Tensor) -> Tensor:
            super().write(key, at)
            return super().write(self.query(key), at + 1)

    with pytest.raises(ConversionError, match=r"(?s)2 different qparams.*scale .*scale .*SharedQuantizationSpec"):
        convert_pt2e(prepared(make(Twice)), integer_buffers=["cache"])


def test_initial_values_beyond_the_calibrated_range_are_an_error():
    model = make(IndexPut)
    model.cache[0, 0, 0] = 1000.0
    with pytest.raises(ConversionError, match="starts with values from 0 to 1000, outside the range"):
        convert_pt2e(prepared(model), integer_buffers=["cache"])


@pytest.mark.parametrize(("steps_beyond", "refused"), [(0.25, False), (2.0, True)])
def test_an_initial_value_may_lie_half_a_step_beyond_the_range(steps_beyond, refused):
    model = make(IndexPut)
    grid = convert_pt2e(prepared(model), integer_buffers=["cache"])
    qparams = explain(grid).buffers["cache"]
    top = (qparams.quant_max - qparams.zero_point) * qparams.scale
    model.cache[0, 0, 0] = top + steps_beyond * qparams.scale
    with pytest.raises(ConversionError, match="outside the range") if refused else contextlib.nullcontext():
        convert_pt2e(prepared(model), integer_buffers=["cache"])


@pytest.mark.parametrize("name", ["key.weight", "cash*"])
def test_a_name_that_is_no_such_buffer_is_an_error_with_those_that_there_are(name):
    with pytest.raises(ConversionError, match=rf"names '{re.escape(name)}', but .*cache"):
        convert_pt2e(prepared(make(IndexPut)), integer_buffers=[name])


def test_a_requantized_read_of_an_integer_cache_rounds_as_before():
    """By hand: a quantizer that quantizes what is read from the cache on a grid of its own."""

    def function(gm: torch.fx.GraphModule) -> None:
        for node in calls(gm, aten.linear.default):
            annotate(node, {}, ACT)
        read = the_call(gm, aten.transpose.int)
        annotate(read, {read.args[0]: ACT}, None)

    gm = prepare_pt2e(export(make(IndexPut), *steps()[0]), ByHand(function))
    decode(gm)
    expected = decode(convert_pt2e(gm))
    torch.testing.assert_close(decode(convert_pt2e(gm, integer_buffers=["cache"])), expected, rtol=0, atol=0)
