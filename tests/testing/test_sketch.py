"""Sketches are values: legal whatever their steps are, the same model each time, and the strategy shrinks them."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from torch import nn
from torch.utils._pytree import tree_leaves

from pt2e_quant import QuantizationError
from pt2e_quant.testing import OPS, STARTS, MissingDependencyError, Sketch, Step, aten_graphs
from pt2e_quant.testing.draft import Draft
from pt2e_quant.testing.kinds import COMMON, OpKind
from pt2e_quant.testing.kinds.state import LOOKUPS

DTYPES = (torch.bfloat16, torch.float16)
LEADS = {"image": Step("conv", variant=1), "volume": Step("relu"), "sequence": Step("linear", variant=2)}


def forms(op: str) -> int:
    """How many forms the kind has; those that are no row take 12 variants at most, the numbers that are drawn."""
    return len(OPS[op].forms) if isinstance(OPS[op], OpKind) else 4


def with_leads(op: str, start: str, variant: int) -> Sketch:
    """The step after ones that give it operands: a second value of the same shape, a submodule to reuse."""
    return Sketch(start, (LEADS.get(start, Step("linear", variant=2)), Step("tanh"), Step(op, variant=variant)))


@pytest.mark.parametrize("op", OPS)
def test_every_form_of_every_kind_makes_a_model_that_computes_the_same_each_time(op):
    for variant in range(forms(op)):
        made = {start: with_leads(op, start, variant) for start in STARTS}
        fitting = [sketch for sketch in made.values() if len(sketch.module()._calls) > 3]
        assert fitting, f"form {variant} never did anything"
        sketch = fitting[variant % len(fitting)]
        first, second = (tree_leaves(sketch.module()(*sketch.inputs)) for _ in range(2))
        assert [value.shape for value in first] == [value.shape for value in second]
        assert all(map(torch.equal, first, second))
        half = replace(sketch, dtype=DTYPES[variant % 2])
        assert [value.shape for value in tree_leaves(half.module()(*half.inputs))] == [value.shape for value in first]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_form_of_every_kind_exports(op):
    for variant, start in itertools.product(range(forms(op)), STARTS):
        sketch = with_leads(op, start, variant)
        for actual, expected in zip(
            tree_leaves(sketch.exported.module()(*sketch.inputs)),
            tree_leaves(sketch.module()(*sketch.inputs)),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected)


def test_there_are_kinds_for_a_model_of_any_sort():
    assert len(OPS) >= 150
    assert set(COMMON) <= OPS.keys()


def test_a_step_without_operands_does_nothing():
    for op in OPS.keys() - LOOKUPS.keys():  # those read integers alone
        draft = Draft()
        draft.input(torch.zeros(2, dtype=torch.int64))
        OPS[op](draft, Step(op, at=3, other=3, variant=11))
        assert len(draft._calls) == 1, op


def test_an_empty_sketch_is_a_relu():
    sketch = Sketch("features", ())
    assert torch.equal(sketch.module()(*sketch.inputs), torch.relu(sketch.inputs[0]))


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # torch says so of the weights of a GRU on each export
@settings(max_examples=10, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(aten_graphs())
def test_export_computes_what_the_module_computes(sketch):
    expected = tree_leaves(sketch.module()(*(value.clone() for value in sketch.inputs)))
    actual = tree_leaves(sketch.exported.module()(*(value.clone() for value in sketch.inputs)))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_and_inputs_follow_from_the_seed():
    steps = (Step("conv"), Step("conv_norm"), Step("embedding"))
    one, again, other = (Sketch("image", steps, seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    state = one.module().state_dict()
    torch.manual_seed(6)
    assert all(torch.equal(value, state[name]) for name, value in again.module().state_dict().items())
    assert not torch.equal(next(iter(other.module().state_dict().values())), next(iter(state.values())))
    assert all(map(torch.equal, one.inputs, again.batches(3)[0]))
    assert [value.dtype for value in one.inputs] == [torch.float32, torch.int64]


def test_building_a_model_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    Sketch("image", (Step("conv"), Step("dropout"))).exported.module()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sketch_prints_as_the_code_that_makes_it():
    sketch = Sketch("image", (Step("conv", variant=3), Step("add", at=1, other=2)), seed=2)
    assert repr(sketch) == "Sketch('image', (Step('conv', variant=3), Step('add', at=1, other=2)), seed=2)"
    half = Sketch("features", (), dtype=torch.bfloat16, dynamic=True)
    assert repr(half) == "Sketch('features', (), dtype=torch.bfloat16, dynamic=True)"
    assert eval(repr(sketch)) == sketch
    assert eval(repr(half)) == half


def test_a_model_of_half_precision_computes_in_it():
    sketch = Sketch("features", (Step("linear"), Step("embedding")), dtype=torch.bfloat16)
    assert [value.dtype for value in sketch.inputs] == [torch.bfloat16, torch.int64]
    assert {value.dtype for value in tree_leaves(sketch.exported.module()(*sketch.inputs))} == {torch.bfloat16}


def test_a_dynamic_model_takes_batches_of_several_sizes():
    sketch = Sketch("image", (Step("conv"), Step("move"), Step("linear")), dynamic=True)
    sizes = [batch[0].shape[0] for batch in sketch.batches(3)]
    assert sizes == [2, 3, 2]
    for batch in sketch.batches(3):
        assert sketch.exported.module()(*batch).shape[0] == batch[0].shape[0]


def test_a_dynamic_model_that_needs_its_batch_size_keeps_it():
    """A linear after movedim has weights for a batch of two."""
    sketch = Sketch("image", (Step("slice", variant=5), Step("linear")), dynamic=True)
    assert [batch[0].shape[0] for batch in sketch.batches(3)] == [2, 2, 2]


def test_a_nested_model_takes_and_returns_dictionaries():
    sketch = Sketch("features", (Step("linear"), Step("side_input"), Step("relu", at=1)), nested=True)
    (batch,) = sketch.inputs
    assert [batch["x"].shape, *(value.shape for value in batch["rest"])] == [(2, 8), (2, 6)]
    found = sketch.exported.module()(*sketch.inputs)
    assert sorted(found) == ["last", "others"]
    plain = Sketch("features", sketch.steps)
    expected = plain.module()(batch["x"], *batch["rest"])
    assert torch.equal(found["last"], expected[-1])
    assert torch.equal(found["others"][0], expected[0])


@pytest.mark.parametrize(
    ("steps", "bound"),
    [
        ((Step("conv", variant=0), *[Step("cat", variant=1)] * 30), "numel"),
        ((Step("exp"), *[Step("power", variant=1)] * 6), "loud"),
    ],
)
def test_values_that_are_too_large_are_never_made(steps, bound):
    (value,) = tree_leaves(Sketch("image", steps).module()(torch.randn(2, 4, 6, 6).clamp(-3, 3)))
    assert value.numel() <= 4096
    assert len(steps) > 6 or value.abs().max() < 2e4  # e^3 to the power of 3; the draft saw other numbers


def test_a_write_never_meets_memory_that_overlaps():
    """x[0] + x.transpose's elements: torch refuses to add a view of a tensor to the tensor itself."""
    sketch = Sketch("features", (Step("linear", variant=2), Step("turn", variant=1), Step("add_in_place", other=1)))
    assert all(call.operands != (1, 2) for call in sketch.module()._calls)
    written = Draft()
    x = written.call(torch.relu, written.input(torch.randn(2, 8)))
    written.call(lambda x: x.as_strided((2, 2), (1, 1)), x)
    assert written.pick(0, fresh=True) == x


# The strategy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Conv2d, pytest.param(nn.Embedding, marks=pytest.mark.slow)])
def test_a_failing_model_shrinks_to_one_step(kind):
    smallest = find(
        aten_graphs(max_steps=4, ops=["relu", "linear", "conv", "cat", "mean", "embedding"]),
        lambda sketch: any(isinstance(module, kind) for module in sketch.module().modules()),
        settings=settings(max_examples=300, database=None, deadline=None, suppress_health_check=list(HealthCheck)),
    )
    (step,) = smallest.steps
    assert (step.at, step.other, smallest.seed) == (0, 0, 0)


def test_the_steps_and_starts_to_draw_from_can_be_chosen():
    @settings(max_examples=30, database=None, deadline=None)
    @given(aten_graphs(max_steps=3, ops=["relu", "conv", "linear"], without=["conv"], starts=["features"]))
    def drawn(sketch: Sketch) -> None:
        assert {step.op for step in sketch.steps} <= {"relu", "linear"}
        assert len(sketch.steps) <= 3
        assert sketch.start == "features"

    drawn()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": ["convolution"]}, "unknown: convolution; there is relu, linear"),
        ({"without": ["convolution"]}, "unknown: convolution"),
        ({"starts": ["video"]}, "unknown: video; there is features, sequence, image, volume"),
        ({"ops": ["relu"], "without": ["relu"]}, "nothing is left to draw from"),
    ],
)
def test_names_that_do_not_exist_are_errors(options, message):
    with pytest.raises(QuantizationError, match=message):
        aten_graphs(**options)


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (Sketch("video", ()), "a sketch starts with one of features, sequence, image, volume"),
        (Sketch("image", (Step("convolution"),)), "there is no step 'convolution'"),
    ],
)
def test_a_sketch_of_unknown_parts_is_an_error(sketch, message):
    with pytest.raises(QuantizationError, match=message):
        sketch.module()


def test_without_hypothesis_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pt2e-quant\[testing\]'"):
        aten_graphs()
    assert issubclass(MissingDependencyError, QuantizationError)
