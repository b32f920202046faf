"""What may happen between prepare and convert, and what quantizers of others may do: the contract of the ecosystem."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import QuantizedIO, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import (
    AnnotationError,
    CalibrationError,
    CaptureError,
    ConversionError,
    QuantizationError,
    TargetingError,
)
from pt2e_quant.observer import MinMaxObserver
from pt2e_quant.quantizer import ComposableQuantizer, QuantizationConfig, Quantizer
from tests.nets import export
from tests.pt2e.kit import ACT, STATIC, ByHand, Toy, annotate, calls, the_call

aten = torch.ops.aten


def drop_dead(prepared: GraphModule) -> GraphModule:
    prepared.graph.eliminate_dead_code()
    prepared.recompile()
    return prepared


@pytest.mark.parametrize("hygiene", [drop_dead, lambda gm: copy.deepcopy(drop_dead(gm))], ids=["dead", "dead, copied"])
def test_dead_code_elimination_before_convert_changes_nothing(hygiene: Callable[[GraphModule], GraphModule]):
    torch.manual_seed(0)
    x = torch.randn(3, 5)
    prepared = prepare_pt2e(export(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), x), Toy(STATIC))
    prepared(x)
    expected = convert_pt2e(prepared)(x)
    assert torch.equal(convert_pt2e(hygiene(prepared))(x), expected)


def test_a_node_that_is_gone_at_convert_is_named():
    x = torch.randn(3, 5)
    prepared = prepare_pt2e(export(nn.Linear(5, 4), x), Toy(STATIC))
    prepared(x)
    linear = the_call(prepared, aten.linear.default)
    with prepared.graph.inserting_before(linear):
        linear.replace_all_uses_with(prepared.graph.call_function(aten.linear.default, linear.args))
    prepared.graph.erase_node(linear)
    with pytest.raises(ConversionError, match="are gone: linear"):
        convert_pt2e(prepared)


class Silent(Toy):
    """Annotates and returns nothing, as the contract of the reference allows."""

    def annotate(self, model: GraphModule) -> None:  # type: ignore[override]
        super().annotate(model)


@pytest.mark.parametrize("make", [lambda: Silent(STATIC), lambda: ComposableQuantizer([Silent(STATIC)])])
def test_annotate_may_return_nothing(make: Callable[[], Quantizer]):
    prepared = prepare_pt2e(export(nn.Linear(5, 4), torch.randn(3, 5)), make())
    assert [decision.node for decision in explain(prepared).quantized] == ["linear"]


@pytest.mark.parametrize("erase", [lambda meta: meta.update(quantization_annotation=None), lambda meta: meta.clear()])
def test_a_part_of_a_composition_that_clears_a_claim_is_named_with_the_node(erase: Callable[[dict], None]):
    eraser = ByHand(lambda gm: erase(the_call(gm, aten.linear.default).meta))
    with pytest.raises(AnnotationError, match=r"(?s)ByHand changed what Toy had annotated on\nnode linear"):
        prepare_pt2e(export(nn.Linear(5, 4), torch.randn(3, 5)), ComposableQuantizer([Toy(STATIC), eraser]))


# --- buffers ----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A buffer written through out=, by one op or by one of several outputs."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.seen, x)
        return torch.tanh(self.seen * 0.5)


def view_out(seen: Tensor, x: Tensor) -> None:
    torch.mul(seen[1:], 3.0, out=seen[1:])
    seen.add_(x)


@pytest.mark.parametrize("write", [lambda seen, x: torch.add(seen, x, out=seen), view_out], ids=["whole", "view"])
def test_calibration_leaves_a_buffer_written_through_out_as_it_was(write: Callable[[Tensor, Tensor], object]):
    """By hand: the first call of the converted model computes tanh of half of x."""
    x = torch.tensor([0.5, -1.0, 2.0])
    model = export(Counting(write), x)
    prepared = prepare_pt2e(model, Toy(STATIC), allow_empty=True)
    prepared(x)
    prepared(x)
    assert model.state_dict["seen"].tolist() == [0.0, 0.0, 0.0]
    assert torch.allclose(convert_pt2e(prepared)(x), torch.tanh(x * 0.5), atol=0.02)  # a few steps of 2 / 235


class WrittenLater(nn.Module):
    """A view of a view of the buffer is written after the buffer was read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hist", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2 + self.hist
        self.hist[1:].view(3, 1).add_(x.sum())
        return y


def test_a_spec_on_the_way_to_a_view_that_is_written_later_takes_no_write_away():
    def function(gm: GraphModule) -> None:
        (sliced,) = calls(gm, aten.slice.Tensor)
        annotate(sliced, {sliced.args[0]: ACT})
        add = the_call(gm, aten.add.Tensor)
        annotate(add, {add.args[0]: ACT, add.args[1]: ACT})

    x = torch.tensor([1.0, -0.5, 0.25, 2.0])
    prepared = prepare_pt2e(export(WrittenLater(), x), ByHand(function))
    for _ in range(3):
        prepared(x)  # the buffer grows
    report, converted, float_model = explain(prepared), convert_pt2e(prepared), WrittenLater()
    for _ in range(3):
        assert torch.allclose(converted(x), float_model(x), atol=0.05)  # two roundings, to steps of at most 9.5 / 235
    assert "hist: int8" in report.why("add")  # which reads before the write
    assert "add_ writes to the memory of hist, which a quantized copy would miss" in report.why("slice_1")


# --- code of authors, and what users hand in --------------------------------------------------------------------------


def boom(*_: object, **__: object) -> None:
    raise RuntimeError("boom")


def prepared_linear(quantizer: Quantizer) -> GraphModule:
    return prepare_pt2e(export(nn.Sequential(nn.Linear(5, 4), nn.ReLU()), torch.randn(3, 5)), quantizer)


def observing(**methods: object) -> Quantizer:
    spec = replace(ACT, observer_or_fake_quant_ctr=type("Own", (MinMaxObserver,), methods))
    return Toy(QuantizationConfig(spec, spec, None))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"calculate_qparams": boom}, "calculate_qparams of Own does not give .* RuntimeError: boom"),
        ({"calculate_qparams": lambda _: None}, "calculate_qparams of Own does not give a scale"),
        ({"calculate_qparams": lambda _: (torch.tensor([float("nan")]), torch.zeros(1))}, "Own answers with scale nan"),
        ({"calculate_qparams": lambda _: (torch.tensor([-0.5]), torch.zeros(1))}, "Own answers with scale -0.5"),
        ({"has_data": property(boom)}, "has_data of Own"),
    ],
)
def test_an_observer_that_fails_at_convert_is_named_with_its_place(methods: dict[str, object], message: str):
    prepared = prepared_linear(observing(**methods))
    prepared(torch.randn(3, 5))
    with pytest.raises(ConversionError, match=f"(?s){message}") as caught:
        convert_pt2e(prepared)
    assert "input input_1" in str(caught.value)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"validate": boom}, r"validate\(\) of Q failed: RuntimeError: boom"),
        ({"prepare_obs_or_fq_callback": boom}, "prepare_obs_or_fq_callback of Q failed"),
        ({"prepare_obs_or_fq_callback": lambda _, __, table: table.clear()}, "of Q took out input_1 -> linear"),
        (
            {"prepare_obs_or_fq_callback": lambda _, __, table: table.update(dict.fromkeys(table))},
            "of Q gave None to input_1 -> linear",
        ),
    ],
)
def test_a_quantizer_that_fails_is_named_with_its_method(methods: dict[str, object], message: str):
    with pytest.raises(QuantizationError, match=message):
        prepared_linear(type("Q", (Toy,), methods)(STATIC))


@pytest.mark.parametrize(
    "batch",
    [
        (torch.randn(3, 6),),
        (torch.randn(2, 5),),
        (torch.randn(3, 5), torch.zeros(3)),
        (torch.zeros(3, 5, dtype=torch.uint8),),
        ("x",),
    ],
    ids=["width", "batch size", "with labels", "uint8", "text"],
)
def test_a_batch_that_does_not_fit_says_what_the_model_takes(batch: tuple[object, ...]):
    prepared = prepared_linear(Toy(STATIC))
    with pytest.raises(
        CalibrationError, match=r"exported for input_1: float32 \[3, 5\].*without labels.*dynamic_shapes"
    ):
        prepared(*batch)


def test_an_observer_that_fails_while_calibrating_is_an_error_at_its_node():
    with pytest.raises(CalibrationError, match=r"(?s)RuntimeError: boom\n  at node activation_post_process_0"):
        prepared_linear(observing(forward=boom))(torch.randn(3, 5))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda p: prepare_pt2e(p, Toy(STATIC), require=None), CaptureError),
        (lambda p: prepare_pt2e(p, Toy(STATIC), decompose=1), CaptureError),
        (lambda p: convert_pt2e(p, quantized_io=True), ConversionError),
        (lambda p: convert_pt2e(p, integer_buffers=None), ConversionError),
        (lambda p: convert_pt2e(p, quantized_io=QuantizedIO(inputs=["x"])), ConversionError),
        (lambda _: QuantizedIO(inputs=0), ConversionError),
        (lambda _: ComposableQuantizer(None), AnnotationError),
        (lambda _: Toy().set_global("int8"), TargetingError),
        (lambda _: Toy().set_node_name("linear", 0), TargetingError),
    ],
)
def test_an_argument_of_a_wrong_kind_is_a_typed_error(call: Callable[[GraphModule], object], error: type[Exception]):
    prepared = prepared_linear(Toy(STATIC))
    prepared(torch.randn(3, 5))
    with pytest.raises(error):
        call(prepared)
