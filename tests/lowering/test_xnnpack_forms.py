"""Operators that ExecuTorch or XNNPACK computes wrongly, or not at all, in one of their forms: lowered in another one.

Each row is a branch of one program, run in ExecuTorch's runtime against the float model, but for rounding of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from tests.lowering.handmade import Body, Branches

pytest.importorskip("executorch")

IMAGE, IDS = (2, 4, 6, 8), (11,)
Function = Callable[[Tensor], Tensor]


class Image(nn.Module):
    """A convolution, whose result XNNPACK keeps channels last, then the function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


SLOPES = torch.linspace(0.1, 0.5, 8)
IMAGES: dict[str, Function] = {
    "softmax over the last dimension": lambda y: F.softmax(y, -1),
    "softmin, of what an operator made of the image": lambda y: F.softmin(torch.sigmoid(y) * 3, 3),
    "softmax over the last dimension, then a convolution": lambda y: F.max_pool2d(F.softmax(F.relu(y), -1), 2),
    "softmax of a decomposed model": lambda y: torch.ops.aten._softmax.default(y, 3, False),
    "softmax of a pooled image": lambda y: F.softmax(F.avg_pool2d(y, 2), -1),
    "softmax over rows": lambda y: F.softmax(y, 2),
    "softmax of what was reshaped": lambda y: F.softmax(y.reshape(2, 2, 12, 8), -1),
    "rrelu": lambda y: F.rrelu(y, 0.1, 0.4, training=False),
    "max along the last dimension": lambda y: y.max(-1)[0],
    "max along channels": lambda y: y.max(1, keepdim=True)[0],
    "max along rows, kept": lambda y: y.max(-2, keepdim=True).values,
    "largest of rows": lambda y: y.amax(2),
    "cropped": lambda y: F.pad(y, (-1, -2, 0, -1)),
    "cropped and padded": lambda y: F.pad(y, (-1, 2, 1, -2, -1, 0), value=0.5),
    "every second column": lambda y: y[..., ::2],
    "every third, from the second on": lambda y: y[:, :, 1::3, 2:7:4],
    "max pooling of one image": lambda y: F.max_pool2d(y[1], 2),
    "average pooling of one image": lambda y: F.avg_pool2d(y[1], 2),
    "prelu of a matrix": lambda y: F.prelu(y[0, 0], SLOPES),
    "prelu of a sequence": lambda y: F.prelu(y.flatten(2), SLOPES[:4]),
    "prelu of a vector": lambda y: F.prelu(y[0, 0, 0], SLOPES[:1]),
    "prelu of a volume": lambda y: F.prelu(y.unsqueeze(-1), SLOPES[:4]),
    "times one of its values": lambda y: y * y[0, 1, 2, 3],
    "plus the mean of all": lambda y: y + y.mean(),
    "minus the largest of all": lambda y: y - y.max(),
    "divided by a sum over all, from the left": lambda y: y.sum() / (y.abs() + 1.0),
}
VECTORS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "addmm, beta": (lambda m, x: torch.addmm(m.bias, x, m.weight, beta=0.5), (5, 8)),
    "addmm, alpha": (lambda m, x: torch.addmm(m.bias, x, m.weight, alpha=2), (5, 8)),
    "addmm, both, of computed tensors": (
        lambda m, x: torch.addmm(x[:, :3], x, m.weight * x[0].unsqueeze(1), beta=-1.5, alpha=0.25),
        (5, 8),
    ),
    "addmm without its sum": (lambda m, x: torch.addmm(m.bias, x, m.weight, beta=0, alpha=-3), (5, 8)),
    "baddbmm": (lambda m, x: torch.baddbmm(x[:, :, :5], x, x.transpose(1, 2), beta=0.5, alpha=2), (2, 5, 8)),
    "times a mean": (lambda m, x: x * x.mean(), (5, 8)),
}
OFFSETS = torch.tensor([0, 3, 3, 7])
BAGS: dict[str, Callable[..., Tensor]] = {
    "sum": lambda m, i: F.embedding_bag(i, m.table, OFFSETS, mode="sum"),
    "mean, an empty bag": lambda m, i: F.embedding_bag(i, m.table, OFFSETS, mode="mean"),
    "max": lambda m, i: F.embedding_bag(i, m.table, OFFSETS, mode="max"),
    "weighted": lambda m, i: F.embedding_bag(i, m.table, OFFSETS, mode="sum", per_sample_weights=m.weights),
    "last offset": lambda m, i: F.embedding_bag(
        i, m.table, torch.tensor([0, 4, 11]), mode="mean", include_last_offset=True
    ),
    "padding, mean": lambda m, i: F.embedding_bag(i, m.table, OFFSETS, mode="mean", padding_idx=2),
    "padding, max": lambda m, i: F.embedding_bag(i, m.table, OFFSETS, mode="max", padding_idx=2),
    "equal bags, sum": lambda m, i: F.embedding_bag(i[:9].reshape(3, 3), m.table, mode="sum"),
    "equal bags, mean": lambda m, i: F.embedding_bag(i[1:].reshape(2, 5), m.table, mode="mean"),
    "equal bags, mean with padding": lambda m, i: F.embedding_bag(
        i[1:].reshape(5, 2), m.table, mode="mean", padding_idx=2
    ),
    "equal bags, max": lambda m, i: F.embedding_bag(i[1:].reshape(5, 2), m.table, mode="max"),
    "equal bags, weighted": lambda m, i: F.embedding_bag(
        i[:9].reshape(3, 3), m.table, mode="sum", per_sample_weights=m.weights[:9].reshape(3, 3)
    ),
}  # fmt: skip


QUICK_BAGS = {name: BAGS[name] for name in ("mean, an empty bag", "padding, max", "equal bags, mean")}


def bag(function: Callable[..., Tensor]) -> Body:
    return Body(function, table=torch.randn(7, 3), weights=torch.rand(11))


def test_images_of_one_channel_may_be_channels_last() -> None:
    """XNNPACK takes such an image for contiguous, ExecuTorch for channels last; outside, one channel after four."""
    model = Branches([nn.Sequential(nn.Conv2d(1, 5, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 1, 1), nn.Sigmoid())])  # type: ignore[list-item]
    shapes = ((1, 1, 7, 5), (1, 4, 7, 5))
    images = tuple(torch.randn(shape).to(memory_format=torch.channels_last) for shape in shapes)
    program = lower_to_executorch(torch.export.export(model.eval(), images))
    assert "its inputs are contiguous" in program.remarks[-1].text
    for got, expected in zip(program.run(*images), model(*images), strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)


@functools.cache
def lowered(table: str) -> tuple[ExecutorchProgram, dict[str, tuple[Tensor, Tensor]]]:
    """The program of all rows, and for each (what it computes, what the model computes)."""
    torch.manual_seed(5)
    if table == "images":
        names, bodies = list(IMAGES), [Image(function) for function in IMAGES.values()]
        inputs = [torch.randn(IMAGE) for _ in bodies]
    elif table == "vectors":
        names = list(VECTORS)
        bodies = [Body(f, bias=torch.randn(3), weight=torch.randn(8, 3)) for f, _ in VECTORS.values()]
        inputs = [torch.randn(shape) for _, shape in VECTORS.values()]
    else:
        rows = QUICK_BAGS if table == "quick bags" else {n: f for n, f in BAGS.items() if n not in QUICK_BAGS}
        names, bodies = list(rows), [bag(function) for function in rows.values()]
        inputs = [torch.tensor([1, 2, 6, 2, 0, 5, 2, 3, 4, 2, 2]) for _ in bodies]
    model: Any = Branches(bodies).eval()  # type: ignore[arg-type]
    program = lower_to_executorch(torch.export.export(model, tuple(inputs)), verify=False)
    with torch.no_grad():
        return program, dict(zip(names, zip(program.run(*inputs), model(*inputs), strict=True), strict=True))


ROWS = [
    pytest.param(table, name, marks=[pytest.mark.slow] if table == "bags" else [])
    for table, rows in (("images", IMAGES), ("vectors", VECTORS), ("bags", BAGS), ("quick bags", QUICK_BAGS))
    for name in rows
    if table != "bags" or name not in QUICK_BAGS
]


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_the_program_computes_what_the_model_computes(table: str, name: str) -> None:
    got, expected = lowered(table)[1][name]
    assert expected.unique().numel() > 1, "a constant proves nothing"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
