"""Which linears cost a static recipe most of its accuracy, so that they can be quantized dynamically or not at all.

Each linear is quantized alone: its input and its output per tensor with the range of the data, its weight per channel.
Then the outputs of the whole model are compared. Errors of different places are nearly independent: their powers add.
Of a model with n linears this takes, for each batch, two runs and n times what comes after a linear: about 2 + n / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..arguments import bind
from ..checks import checked
from ..errors import CaptureError
from ..graph.constants import Constants
from ..graph.module import finish
from ..graph.run import Arguments, batches_of
from ..qparams import affine_qparams, fake_quantize
from ..where import module_path
from .calibrated import Batches, constant_linears, private_copy, rounded_weight, run_again, run_all

__all__ = ["Sensitivity", "worst_linears"]


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one linear statically does to the outputs of the model.

    Args:
        node: name of the linear.
        sqnr: power of the model's outputs over that of the error, in dB.
        share: of the power of all linears' errors, the part that is this one's.
        module: path of the module that it is in; None where export recorded none.
    """

    node: str
    sqnr: float
    share: float
    module: str | None

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.node}{where}: {self.sqnr:.1f} dB when quantized alone, {self.share:.0%} of all error"


@checked(CaptureError)
def worst_linears(
    model: ExportedProgram | GraphModule, batches: Batches, *, target: float, outputs: bool = True
) -> tuple[list[Sensitivity], list[Sensitivity]]:
    """Find the linears to keep away from static int8, so that the rest together reach a target.

    Args:
        model: an exported float model.
        batches: calibration data, as `graph.run.batches_of` takes it; a few batches are enough.
        target: wanted SQNR of the model's outputs, in dB.
        outputs: round what linears return, as XNNPACK does. False for Inductor, which returns it in float.

    Returns:
        (fall back, keep), worst first. Give the first ones another configuration with `set_node_name` of the
        quantizer, before its linears are configured in general or after.

    Raises:
        CalibrationError: there is no batch.
    """
    gm = finish(private_copy(model))
    linears = constant_linears(gm, Constants(gm))
    held = list(batches_of(batches, "worst_linears"))
    instead = _quantized_linears(gm, linears, held, outputs)
    signal, noise = 0.0, dict.fromkeys(linears, 0.0)
    for batch in held:
        values = run_all(gm, batch)
        exact = values[gm.graph.output_node()]
        signal += _power(exact)
        for linear in linears:
            noise[linear] += _power(exact, run_again(gm, values, linear, instead[linear]))
    found = [
        Sensitivity(linear.name, _sqnr(signal, power), power / max(sum(noise.values()), 1e-300), module_path(linear))
        for linear, power in sorted(noise.items(), key=lambda item: -item[1])
    ]
    powers = sorted(noise.values(), reverse=True)
    allowed = signal * 10 ** (-target / 10)
    count = next((n for n in range(len(found)) if sum(powers[n:]) <= allowed), len(found))
    return found[:count], found[count:]


def _quantized_linears(
    gm: GraphModule, linears: list[Node], batches: list[Arguments], outputs: bool
) -> dict[Node, _Static]:
    ranges: dict[Node, _Codes] = {}
    watched = {*linears, *(bind(linear)["input"] for linear in linears)}
    for batch in batches:
        values = run_all(gm, batch)
        for node in watched:
            ranges.setdefault(node, _Codes()).include(values[node])
    return {linear: _Static(ranges[bind(linear)["input"]], ranges[linear] if outputs else None) for linear in linears}


class _Codes:
    """256 values with equal steps over the range of some tensors."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def include(self, value: Tensor) -> None:
        self._low, self._high = min(self._low, float(value.min())), max(self._high, float(value.max()))

    def __call__(self, x: Tensor) -> Tensor:
        scale, zero_point = affine_qparams(self._low, self._high, -128, 127, dtype=torch.int8)
        return fake_quantize(x, float(scale), int(zero_point), -128, 127)


class _Static:
    """A linear on int8: input and, where it is rounded, output on one grid each, weights per output channel."""

    def __init__(self, before: _Codes, after: _Codes | None) -> None:
        self._before, self._after = before, after

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        value = torch.nn.functional.linear(self._before(x), rounded_weight(weight), bias)
        return value if self._after is None else self._after(value)


def _power(exact: object, other: object = None) -> float:
    """Sum of squares of all floating-point outputs, or of their differences to others."""
    total = 0.0
    leaves = pytree.tree_leaves(exact)
    for one, two in zip(leaves, [0.0] * len(leaves) if other is None else pytree.tree_leaves(other), strict=True):
        if isinstance(one, Tensor) and one.dtype.is_floating_point:
            total += float((one.double() - two).pow(2).sum())
    return total


def _sqnr(signal: float, noise: float) -> float:
    return 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300))
