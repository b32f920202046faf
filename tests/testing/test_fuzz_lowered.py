"""Random models on the two runtimes: what lowers computes what the graph computes, what does not says why.

All lowerings here verify what they made, so a program that computes something else raises, and fails the test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from torch.fx import GraphModule

from pt2e_quant.errors import LoweringError
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.quantizer import Quantizer
from pt2e_quant.testing import Sketch, aten_graphs
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.testing.recipes import Recipe
from tests.testing.test_fuzz import survive

pytest.importorskip("executorch")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The tensor attribute")]

Lower = Callable[[GraphModule], Any]


def xnnpack(**options: Any) -> Quantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **options))


def x86(**options: Any) -> Quantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(**options))


WAYS: dict[str, tuple[Callable[[], Quantizer], Lower]] = {
    "xnnpack static": (xnnpack, lower_to_executorch),
    "xnnpack dynamic": (lambda: xnnpack(is_dynamic=True), lower_to_executorch),
    "x86 static": (x86, lambda graph: lower_to_inductor(graph, allow_float=True)),
    "x86 dynamic": (lambda: x86(is_dynamic=True), lambda graph: lower_to_inductor(graph, allow_float=True)),
}
EACH = int(os.environ.get("FUZZ_LOWERED", "40"))
"""Models for each way: one takes seconds."""


@pytest.mark.parametrize("way", WAYS)
def test_a_random_model_runs_as_its_graph_does_or_is_refused(way):
    make, lower = WAYS[way]

    @seed(len(way))
    @settings(max_examples=EACH, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(aten_graphs(max_steps=6))
    def drawn(sketch: Sketch) -> None:
        check(sketch, Recipe(way, make, static=way.endswith("static")), lower)

    drawn()


def check(sketch: Sketch, recipe: Recipe, lower: Lower) -> None:
    converted = survive(sketch, recipe)
    refusal = None if converted is None else refused(converted, lower)
    assert refusal is None or not any(fault in refusal for fault in FAULTS), (sketch, refusal)


FAULTS = ("computes something else", "Inductor cannot compile", "ExecuTorch cannot")
"""What errors say that blame nothing that the model or the quantizer could have been told before."""


def refused(converted: GraphModule, lower: Lower) -> str | None:
    """Why it was not lowered; None when it was, and ran."""
    try:
        with torch.no_grad():
            program = lower(converted)
    except LoweringError as error:
        event(f"refused: {str(error).splitlines()[0][:60]}")
        return str(error)
    assert program.verified or program.verified.reason, program
    event("runs")
    return None
