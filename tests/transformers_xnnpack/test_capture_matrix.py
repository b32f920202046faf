"""Transformers from export to a running program: architectures x attention x dynamic sizes x masks x recipes.

Every linear becomes an integer kernel, whatever is dynamic, and the program is run at sizes it was not exported with. A
few combinations are quick, all others slow.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.ops import LINEAR
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import sqnr
from tests.transformers_xnnpack.small_transformers import bert, llama, minilm, tokens, vit

pytest.importorskip("executorch")
pytest.importorskip("transformers")

# transformers collects outputs in a global, of which torch warns when it captures with Dynamo.
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")

Inputs = tuple[Tensor, ...]
MODELS = {"bert": bert, "minilm": minilm, "llama": llama, "vit": vit}
RECIPES = {
    "XNNPACK dynamic": lambda: XNNPACKQuantizer().set_global(xnnpack(is_dynamic=True)),
    "XNNPACK static": lambda: XNNPACKQuantizer().set_global(xnnpack()),
    "x86 dynamic": lambda: X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config(is_dynamic=True)
    ),
}
DELEGATES = {"": 1, "batch": 1, "length": 1, "batch length": 4}
"""Upper bound of the dynamic recipe for a model of one layer, by what is dynamic.

XNNPACK reshapes with one dynamic size. With two, heads are split and merged outside, which cuts a layer in two; rotary
embeddings, between the split and attention, make a third part.
"""


def xnnpack(**kwargs):
    return get_symmetric_quantization_config(is_per_channel=True, **kwargs)


@dataclass(frozen=True)
class Case:
    model: str
    attention: str
    free: str
    mask: bool
    strict: bool
    recipe: str

    def __str__(self) -> str:
        words = [self.model, self.attention, self.free or "fixed", "mask" if self.mask else "no mask"]
        return ", ".join([*words, *(["strict"] if self.strict else []), self.recipe])

    def inputs(self, batch: int, length: int) -> Inputs:
        generator = torch.Generator().manual_seed(100 * batch + length)
        if self.model == "vit":
            return (torch.randn(batch, 3, 16, 16, generator=generator),)
        ids, mask = tokens(length=length, batch=batch, padding=3, generator=generator)
        return (ids, mask) if self.mask else (ids,)

    @property
    def example(self) -> Inputs:
        return self.inputs(2 if "batch" in self.free else 1, 12)

    @property
    def others(self) -> list[Inputs]:
        """Other sizes than those of the example, where they are dynamic; one and the largest among them."""
        batches, lengths = [3, 1, 8] if "batch" in self.free else [1], [9, 20, 32] if "length" in self.free else [12]
        count = max(len(batches), len(lengths))
        return [self.inputs(batches[i % len(batches)], lengths[i % len(lengths)]) for i in range(count)]

    def export(self, model: nn.Module) -> ExportedProgram:
        sizes = {"batch": (0, Dim("batch", max=8)), "length": (1, Dim("length", min=2, max=32))}
        dims = dict(sizes[name] for name in self.free.split())
        shapes = tuple(dims for _ in self.example) if dims else None
        with torch.no_grad():
            return torch.export.export(model, self.example, dynamic_shapes=shapes, strict=self.strict)


def _cases() -> list[Case]:
    sizes = itertools.product(MODELS, ("sdpa", "eager"), DELEGATES, (True, False), (False, True), RECIPES)
    return [
        case
        for case in itertools.starmap(Case, sizes)
        if case.model != "vit" or not (case.mask or "length" in case.free)
    ]


QUICK = {
    Case("bert", "sdpa", "batch length", True, False, "XNNPACK dynamic"),
}
CASES = [pytest.param(case, id=str(case), marks=() if case in QUICK else pytest.mark.slow) for case in _cases()]


@pytest.mark.parametrize("case", CASES)
def test_every_linear_runs_in_integers_at_any_size(case):
    """Graph and program agree up to float sums in another order, after which a value on the edge of two codes may fall
    to the other side: in a chain of a layer one such step is 45 dB or more below the signal. The float model is 20 dB
    away for static scales with 8 bits on every operator, 35 dB for linears alone."""
    model = MODELS[case.model](case.attention)
    exported = case.export(model)
    linears = sum(node.target in LINEAR for node in exported.graph.nodes)
    prepared = prepare_pt2e(exported, RECIPES[case.recipe](), require=["linear"])
    with torch.no_grad():
        for inputs in case.others if "static" in case.recipe else ():
            prepared(*inputs)
    converted = convert_pt2e(prepared)
    program = (lower_to_inductor if "x86" in case.recipe else lower_to_executorch)(converted)
    integer = {k.node for k in program.kernels if k.precision in ("int8", "dynamic")}
    assert len(integer & {node.name for node in converted.graph.nodes if node.target in LINEAR}) == linears
    for inputs in case.others:
        with torch.no_grad():
            result = program(*inputs) if "x86" in case.recipe else program.run(*inputs)[0]
            graph, expected = converted(*inputs), model(*inputs)
        assert sqnr(graph, result) > 45
        assert sqnr(expected, graph) > (20 if "static" in case.recipe else 35)
    if case.recipe == "XNNPACK dynamic":
        assert program.delegates <= DELEGATES[case.free]
        assert all(left.reason for left in program.undelegated)
        if case.model == "vit" and not case.free:
            assert not program.undelegated
