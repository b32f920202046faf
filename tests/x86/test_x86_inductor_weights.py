"""Weights alone in 8 and 4 bits, tables, and models in half precision: through Inductor, in both modes.

One model holds an embedding, bags, linears with 3-d inputs with and without bias, and a head of 5 outputs. It is
compiled for a batch of 1 to 64 and runs with another batch than it was compiled with.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.inductor import InductorProgram, lower_to_inductor
from pt2e_quant.quantizer import ComposableQuantizer
from quantizers.embedding import EmbeddingQuantizer, get_embedding_config
from quantizers.x86_inductor import X86InductorQuantizer
from tests.x86.x86_rows import RECIPES

BAG = "quantized.embedding_bag_byte_rowwise_offsets"
LOOK_UP, LOOP, UNBIASED = (f"{op} + dequantize" for op in ("generated", "aten.addmm.default", "aten.mm.default"))
INT8, INT4 = "aten._weight_int8pack_mm", "aten._weight_int4pack_mm_for_cpu"


class Ranker(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.history = nn.Embedding(50, width), nn.EmbeddingBag(40, width, mode="mean")
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width, bias=False)
        self.head = nn.Linear(width, 5)

    def forward(self, items: Tensor, history: Tensor) -> Tensor:
        x = self.items(items) + self.history(history).unsqueeze(1)
        return self.head(x + self.down(F.gelu(self.up(x))))


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 50, (batch, 7), generator=generator), torch.randint(0, 40, (batch, 6), generator=generator)


def quantized(model: nn.Module, *quantizers) -> GraphModule:
    batch = Dim("batch", min=1, max=64)
    exported = torch.export.export(model.eval(), inputs(3), dynamic_shapes=({0: batch}, {0: batch}))
    prepared = prepare_pt2e(exported, ComposableQuantizer(quantizers))
    with torch.no_grad():
        prepared(*inputs(3))
    return convert_pt2e(prepared)


def x86(recipe: str) -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(RECIPES[recipe])


def sqnr(found: Tensor, wanted: Tensor) -> float:
    noise = (found.double() - wanted.double()).square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(wanted.double().square().sum() / noise))


@dataclass(frozen=True)
class Ran:
    program: InductorProgram
    to_graph: float
    to_float: float

    @property
    def kernels(self) -> list[str]:
        return [" + ".join((kernel.kernel, *kernel.fused)) for kernel in self.program.kernels]


def ran(mode: str, dtype: torch.dtype, *quantizers) -> Ran:
    """Distances in dB of a program from its graph, and from the model in float32, whose numbers `dtype` rounds too."""
    model = Ranker().to(dtype)
    graph = quantized(model, *quantizers)
    program = lower_to_inductor(graph, mode=mode)
    with torch.no_grad():
        found, wanted = program(*inputs(9)), graph(*inputs(9))
        real = Ranker().float()
        real.load_state_dict(model.state_dict())
        return Ran(program, sqnr(found, wanted), sqnr(found, real(*inputs(9))))


@pytest.mark.slow
def test_a_package_holds_weights_of_four_bits():
    """float32 rounds to 2**-24, 144 dB; 4 bits of normal numbers in groups of 32 are 20 dB, bags stay in float."""
    result = ran("aoti", torch.float32, x86("int4"))
    assert result.kernels == [LOOK_UP, LOOP, UNBIASED, LOOP]
    assert result.to_graph > 120
    assert result.to_float > 17
    assert len(result.program.remarks) == 3
    assert all("saves memory and no time" in remark.text for remark in result.program.remarks)


def test_eight_bits_in_bfloat16_become_kernels():
    """bfloat16 rounds to 2**-9, at most 54 dB for each operator in a row; the graph rounds its weights, too."""
    result = ran("compile", torch.bfloat16, x86("weight only"))
    assert result.kernels == [LOOK_UP, BAG, INT8, INT8, INT8]
    assert result.to_graph > 40
    assert result.to_float > 38


SLOW = {
    "8 bits in a package": ("aoti", torch.float32, "weight only", [LOOK_UP, BAG, LOOP, UNBIASED, LOOP], 120),
    "4 bits": ("compile", torch.float32, "int4", [LOOK_UP, LOOP, UNBIASED, LOOP], 120),
    "4 bits in bfloat16": ("compile", torch.bfloat16, "int4", [LOOK_UP, INT4, INT4, INT4], 40),
    "4 bits in bfloat16, in a package": ("aoti", torch.bfloat16, "int4", [LOOK_UP, INT4, INT4, INT4], 40),
    "8 bits in bfloat16, in a package": ("aoti", torch.bfloat16, "weight only", [LOOK_UP, BAG, INT8, INT8, INT8], 40),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_other_scheme_of_weights_alone(name):
    mode, dtype, recipe, kernels, decibel = SLOW[name]
    result = ran(mode, dtype, x86(recipe))
    assert result.kernels == kernels
    assert result.to_graph > decibel


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_tables_of_the_embedding_quantizer_lower_beside_dynamic_linears(bits, group):
    embeddings = EmbeddingQuantizer(get_embedding_config(bits, group))
    result = ran("aoti", torch.float32, embeddings, x86("dynamic"))
    assert result.kernels[0] == LOOK_UP
    assert result.program.count("dynamic") == 3
    assert result.to_graph > 120
    assert result.to_float > (30 if bits == 8 else 17)


class Large(nn.Module):
    """A table, bags and a linear of a million numbers each."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.history = nn.Embedding(4096, 256), nn.EmbeddingBag(4096, 256, mode="sum")
        self.linear = nn.Linear(256, 4096, bias=False)

    def forward(self, items: Tensor, history: Tensor) -> Tensor:
        return self.linear(self.items(items) + self.history(history).unsqueeze(1))


@functools.cache
def size(recipe: str | None) -> int:
    graph = (
        torch.export.export(Large().eval(), inputs(3)).module() if recipe is None else quantized(Large(), x86(recipe))
    )
    return len(lower_to_inductor(graph, inputs(3), mode="aoti").package)


@pytest.mark.slow
def test_packages_shrink_by_the_bits_of_their_weights():
    """Bytes of a million numbers each: 4 in float; 1 in 8 bits; 1/2 and 4 for 32 in 4 bits, with bags in float."""
    million = 2**20
    assert size(None) - size("weight only") == pytest.approx(3 * 3 * million, rel=0.02)
    assert size(None) - size("int4") == pytest.approx(2 * (4 - 0.5 - 4 / 32) * million, rel=0.02)
