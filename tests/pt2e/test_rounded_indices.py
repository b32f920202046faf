"""A look-up whose indices are decided by quantized values says so in the report."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import explain, prepare_pt2e
from tests.nets import export
from tests.pt2e.kit import STATIC, Toy

X = torch.randn(2, 4)


class LookUp(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.linear, self.second, self.table = nn.Linear(4, 5), nn.Linear(5, 5), nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.function(self, y, self.second(y))


DECIDED = {
    "argmax, gather": (lambda m, y, z: z.gather(1, y.argmax(1, keepdim=True)), "gather", "argmax"),
    "argmax, embedding": (lambda m, y, z: m.table(y.argmax(1)), "embedding", "argmax"),
    "topk, index": (lambda m, y, z: z[:, y[0].topk(2)[1]], "index", "topk"),
    "cast, arithmetic, embedding": (lambda m, y, z: m.table((y.long() + 7) % 5), "embedding", "to"),
}


def reason(function, op: str) -> str:
    report = explain(prepare_pt2e(export(LookUp(function), X), Toy(STATIC)))
    (decision,) = (decision for decision in report.skipped if f"aten.{op}." in decision.op)
    return decision.reason


@pytest.mark.parametrize("name", DECIDED)
def test_the_reason_names_what_decides_the_indices_and_what_is_quantized(name):
    function, op, decides = DECIDED[name]
    said = reason(function, op)
    assert f"; its indices come from {decides}" in said
    assert "which reads quantized values of linear: those within a step" in said


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y, z: m.table(y.sin().argmax(1)),
        lambda m, y, z: m.table(torch.arange(3)) + y[0, :3],
    ],
    ids=["of floats", "of no values"],
)
def test_other_indices_are_not_mentioned(function):
    assert "indices" not in reason(function, "embedding")
