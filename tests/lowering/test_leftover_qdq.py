"""Quantize and dequantize that no backend takes run in ExecuTorch's portable kernels, without a word from the user."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.quantizer import OUTPUT, WEIGHT, RuleQuantizer, op, rule
from quantizers.xnnpack import get_symmetric_quantization_config
from tests.nets import MLP, ConvNet, export
from tests.pt2e.kit import Toy
from tests.quick import quick

pytest.importorskip("executorch")

rows_of = op(torch.ops.aten.embedding.default)


@rule(w=WEIGHT, output=OUTPUT)
def embedding(w, ids):
    return rows_of(w, ids)


class Embeddings(RuleQuantizer):
    rules = (embedding, *Toy.rules)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.table(ids)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "cnn": (ConvNet, lambda: torch.randn(2, 3, 16, 16)),
    "mlp": (MLP, lambda: torch.randn(3, 10)),
    "embedding": (Tokens, lambda: torch.randint(0, 11, (2, 5))),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    quick(itertools.product(MODELS, ("xnnpack", None)), lambda _, case: case in (("cnn", "xnnpack"), ("mlp", None))),
)
def test_a_model_runs_with_and_without_a_backend(name: str, backend: Literal["xnnpack"] | None) -> None:
    """Users' item 24: lowering itself loads what is needed; q/dq outside of delegates become portable kernels."""
    make, inputs = MODELS[name]
    x = inputs()
    prepared = prepare_pt2e(export(make(), x), Embeddings(get_symmetric_quantization_config(is_per_channel=True)))
    prepared(x)
    converted = convert_pt2e(prepared)
    program = lower_to_executorch(converted, backend=backend)
    step = max(group.scale for group in explain(converted).groups if isinstance(group.scale, float))
    # One step of the coarsest grid: two kernels that round alike may differ where a value lies between two integers.
    torch.testing.assert_close(program.run(x)[0], converted(x), rtol=0, atol=1.01 * step)
    assert (program.delegates > 0) == (backend is not None)
