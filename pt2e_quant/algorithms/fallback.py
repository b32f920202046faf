"""Which linears cost a static recipe most of its accuracy, so that they can be quantized dynamically or not at all.

Each linear is quantized alone: its input and its output per tensor with the range of the data, its weight per channel.
Then the outputs of the whole model are compared. Errors of different places are nearly independent: their powers add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..arguments import bind
from ..errors import CalibrationError
from ..graph import Constants, clone, finish
from ..qparams import affine_qparams, fake_quantize
from .calibrated import NO_BATCH, Batches, constant_linears, rounded_weight, run

__all__ = ["Sensitivity", "worst_linears"]


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one linear statically does to the outputs of the model.

    Args:
        node: name of the linear.
        sqnr: power of the model's outputs over that of the error, in dB.
    """

    node: str
    sqnr: float


def worst_linears(
    model: ExportedProgram | GraphModule, batches: Batches, *, target: float
) -> tuple[list[Sensitivity], list[Sensitivity]]:
    """Find the linears to keep away from static int8, so that the rest together reach a target.

    Args:
        model: an exported float model.
        batches: calibration data, tuples of positional arguments; a few are enough.
        target: wanted SQNR of the model's outputs, in dB.

    Returns:
        (fall back, keep), worst first. Give the first ones another configuration with set_node_name.

    Raises:
        CalibrationError: there is no batch.
    """
    gm = finish(clone(model.module() if isinstance(model, ExportedProgram) else model))
    linears = constant_linears(gm, Constants(gm))
    held = list(batches)
    if not held:
        raise CalibrationError(NO_BATCH)
    exact = [run(gm, batch) for batch in held]
    found = []
    for linear in linears:
        name = bind(linear)["input"].name
        grids = [_Grid([seen[value] for seen, _ in exact]) for value in (name, linear.name)]
        other = [run(gm, batch, {linear: _Static(*grids)})[1] for batch in held]
        found.append(Sensitivity(linear.name, _sqnr([output for _, output in exact], other)))
    found.sort(key=lambda one: one.sqnr)
    noise = [10 ** (-one.sqnr / 10) for one in found]
    count = next((n for n in range(len(found)) if sum(noise[n:]) <= 10 ** (-target / 10)), len(found))
    return found[:count], found[count:]


class _Grid:
    """256 values with equal steps over the range of some tensors."""

    def __init__(self, values: list[Tensor]) -> None:
        low = min(float(value.min()) for value in values)
        high = max(float(value.max()) for value in values)
        self._scale, self._zero_point = (float(one) for one in affine_qparams(low, high, -128, 127, dtype=torch.int8))

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self._scale, int(self._zero_point), -128, 127)


class _Static:
    """A linear on int8: input and output on one grid each, weights per output channel."""

    def __init__(self, before: _Grid, behind: _Grid) -> None:
        self._before, self._behind = before, behind

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._behind(torch.nn.functional.linear(self._before(x), rounded_weight(weight), bias))


def _sqnr(exact: list[object], other: list[object]) -> float:
    signal = noise = 0.0
    for one, two in zip(pytree.tree_leaves(exact), pytree.tree_leaves(other), strict=True):
        if isinstance(one, Tensor) and one.dtype.is_floating_point:
            signal += float(one.double().pow(2).sum())
            noise += float((one.double() - two.double()).pow(2).sum())
    return 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300))
