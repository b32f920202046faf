"""Sketches are values: legal whatever their steps are, the same model each time, and the strategy shrinks them."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from torch import nn
from torch.utils._pytree import tree_leaves

from pt2e_quant import QuantizationError
from pt2e_quant.testing import OPS, STARTS, MissingDependencyError, Sketch, Step, aten_graphs

VARIANTS = 12  # the strategy draws from as many


def with_leads(op: str, start: str, variant: int) -> Sketch:
    """The step after ones that give it operands: a second value of the same shape, a submodule to reuse."""
    return Sketch(start, (Step("linear", variant=2), Step("relu"), Step(op, variant=variant)))


@pytest.mark.parametrize("op", OPS)
def test_every_step_makes_a_model_that_exports_and_computes_the_same(op):
    made = set()
    for start in STARTS:
        for variant in range(VARIANTS if start == "image" else 4):
            sketch = with_leads(op, start, variant)
            module = sketch.module()
            made.add(len(module._calls))
            for actual, expected in zip(
                tree_leaves(module(*sketch.inputs)), tree_leaves(sketch.module()(*sketch.inputs)), strict=True
            ):
                assert torch.equal(actual, expected)
    assert max(made) > 3, "the step never did anything"


@pytest.mark.parametrize("op", OPS)
def test_a_step_without_operands_does_nothing(op):
    for start in STARTS:
        Sketch(start, (Step(op, at=3, other=3, variant=11),)).module()


def test_an_empty_sketch_is_a_relu():
    sketch = Sketch("features", ())
    assert torch.equal(sketch.module()(*sketch.inputs), torch.relu(sketch.inputs[0]))


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


def test_a_large_value_is_never_made():
    steps = (Step("conv", variant=0), *[Step("cat", variant=1)] * 30)
    sizes = [value.numel() for value in tree_leaves(Sketch("image", steps).module()(torch.randn(2, 4, 6, 6)))]
    assert max(sizes) <= 4096


# The strategy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm1d, nn.Embedding])
def test_a_failing_model_shrinks_to_one_step(kind):
    smallest = find(
        aten_graphs(),
        lambda sketch: any(isinstance(module, kind) for module in sketch.module().modules()),
        settings=settings(max_examples=1000, database=None, deadline=None, suppress_health_check=list(HealthCheck)),
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
        ({"starts": ["video"]}, "unknown: video; there is features, sequence, image"),
        ({"ops": ["relu"], "without": ["relu"]}, "nothing is left to draw from"),
    ],
)
def test_names_that_do_not_exist_are_errors(options, message):
    with pytest.raises(QuantizationError, match=message):
        aten_graphs(**options)


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (Sketch("video", ()), "a sketch starts with one of features, sequence, image"),
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
