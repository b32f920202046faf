"""Random models under random configurations: the whole way works, or a typed error says why not.

`make test` draws 25 models, `make test-all` 5,000 more, the same ones each time, or as many as FUZZ_GRAPHS says; each
goes through two recipes.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from pt2e_quant import QuantizationError, Report, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.graph.nested import bodies
from pt2e_quant.testing import Sketch, aten_graphs, broken_rules
from pt2e_quant.testing.running import state_kept
from tests.testing.recipes import STATIC_INT8, Recipe, recipes
from tests.testing.simulation import Simulation, sqnr

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")  # torch, of the weights of a GRU on each export

ENOUGH = 20.0  # dB
POOR = 15.0  # dB; below it the report names the tensors
GRAPHS = int(os.environ.get("FUZZ_GRAPHS", "5000"))
PARTS = 20  # of these, so that workers share them; the number of a part seeds it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(model: GraphModule, inputs: tuple[Tensor, ...]) -> list[Any]:
    """All outputs; on copies of inputs and buffers, since some models write to them."""
    with state_kept(model):
        return [leaf.clone() for leaf in tree_leaves(model(*tree_map(torch.clone, inputs)))]


def survive(sketch: Sketch, recipe: Recipe) -> GraphModule | None:
    """Prepare, calibrate, convert and run; None when a typed error says that it cannot be done."""
    batches = sketch.batches(3)
    try:
        prepared = prepare_pt2e(sketch.exported, recipe.make())
        for batch in batches:
            run(prepared, batch)
        before = run(prepared, batches[0])
        converted = convert_pt2e(prepared)
    except QuantizationError as error:
        event(type(error).__name__ if str(error).strip() else "an error without words")
        return None
    exact = run(sketch.exported.module(), batches[0])
    if not all(bool(value.isfinite().all()) for value in exact):
        event("not finite in float")
        return None
    # Observers change nothing. What differs is rounding, where a batch norm was folded. In half precision that is up to
    # 0.4 % of each term, any part of a difference of terms, so there the power is compared.
    for actual, expected in zip(before, exact, strict=True):
        if expected.dtype in (torch.float16, torch.bfloat16):
            assert sqnr([actual], [expected]) > 20
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    outputs = run(converted, batches[0])
    assert [output.shape for output in outputs] == [output.shape for output in before]
    assert [output.dtype for output in outputs] == [output.dtype for output in before]
    assert all(bool(output.isfinite().all()) for output in outputs)
    assert broken_rules(converted, batches[0]) == []
    report = explain(converted)
    assert Report.from_json(report.to_json()).text() == report.text()
    event("quantized")
    return converted


def agree_with_hand_arithmetic(sketch: Sketch, recipe: Recipe, converted: GraphModule) -> None:
    """A static int8 model is the float model on rounded values, and close to it; or the report names the reason."""
    if bodies(converted):
        return  # the hand arithmetic knows one graph
    batches = sketch.batches(3)
    simulation = Simulation(sketch, recipe.make(), batches)
    groups = explain(converted).groups
    assert len(groups) == len(simulation.qparams)
    for group, qparams in zip(groups, simulation.qparams, strict=True):
        torch.testing.assert_close(torch.tensor(group.scale).reshape(qparams.scale.shape), qparams.scale)
        assert torch.tensor(group.zero_point).flatten().tolist() == qparams.zero_point.flatten().tolist()
    actual, by_hand = run(converted, batches[0]), simulation.run(batches[0])
    assert sqnr(actual, by_hand) > 80.0  # the same ops on the same numbers; what is left is the order of float32 sums
    exact = run(sketch.exported.module(), batches[0])
    if sqnr(actual, exact) < ENOUGH:
        event("below 20 dB")
        say_so(sketch, recipe, sqnr(actual, exact))
        blame(sketch, simulation, explain(converted), batches[0], exact)


def say_so(sketch: Sketch, recipe: Recipe, decibels: float) -> None:
    """The report, given data, says of poor outputs which tensors cost them; outputs of static products alone count."""
    batches = sketch.batches(3)
    prepared = prepare_pt2e(sketch.exported, recipe.make())
    for batch in batches:
        run(prepared, batch)
    with state_kept(prepared):
        errors = explain(prepared, batches[:1]).record.output_errors
    if errors is not None and decibels < POOR - 1:  # the outputs of some models are of other batches than the first
        assert errors.alone, (sketch, decibels, errors)


def blame(sketch: Sketch, simulation: Simulation, report: Report, inputs: tuple[Tensor, ...], exact: list[Any]) -> None:
    """Fewer than 20 dB are no fault of the engine where rounding one group alone, by hand, costs about as much.

    Noise adds up: of n groups, the worst alone makes at least 1 / n of it.
    """
    total = sqnr(simulation.run(inputs), exact)
    alone = [sqnr(simulation.run(inputs, only=number), exact) for number in range(len(report.groups))]
    worst = min(range(len(alone)), key=alone.__getitem__)
    group, step = report.groups[worst], float(simulation.qparams[worst].scale.max())
    event(f"below {ENOUGH:g} dB: a step of {step / max(simulation.rms[worst], 1e-9):.2g} times the values")
    assert alone[worst] <= total + 10 * math.log10(len(alone)) + 1.0, (sketch, total, group.members, alone)


@settings(max_examples=25, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(aten_graphs(dtypes=DTYPES, dynamic=True, nested=True), recipes(), st.sampled_from(STATIC_INT8))
def test_a_random_model_is_quantized_or_refused_with_a_reason(sketch, recipe, static):
    """Users' item 39: random models under random configurations raise errors of this package only."""
    check(sketch, recipe, static)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_thousands_of_random_models_are_quantized_or_refused_with_a_reason(part):
    @seed(part)
    @settings(
        max_examples=max(GRAPHS // PARTS, 1),
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(aten_graphs(max_steps=12, dtypes=DTYPES, dynamic=True, nested=True), recipes(), st.sampled_from(STATIC_INT8))
    def drawn(sketch: Sketch, recipe: Recipe, static: Recipe) -> None:
        check(sketch, recipe, static)

    drawn()


def check(sketch: Sketch, recipe: Recipe, static: Recipe) -> None:
    survive(sketch, recipe)
    converted = survive(sketch, static)
    if converted is not None and sketch.dtype is torch.float32:
        agree_with_hand_arithmetic(sketch, static, converted)
