"""An accuracy budget: first algorithms, then float for the operators that cost most, until what is left is good enough.

`algorithms.suggest` applies what needs no training and helps. Where that is not enough, `algorithms.worst_ops` ranks
the linears and convolutions; how many of them are left out is found by bisection, each step by quantizing and
measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..algorithms import Advised, Tried, worst_ops
from ..errors import RecipeError
from ..graph.run import Arguments
from ..pt2e import convert_pt2e
from ..sqnr import decibels, differences, floating, power

__all__ = ["Budget", "measured_sqnr", "within_budget"]

_Reached = tuple[GraphModule, float, tuple[str, ...], tuple[Tried, ...]]


@dataclass(frozen=True)
class Budget:
    """What a quantized model has to reach.

    Args:
        measure: a number of a model; more is better.
        least: the smallest that will do.
        what: of the number, for messages: 'SQNR in dB'.
    """

    measure: Callable[[Any], float]
    least: float
    what: str

    def reached(self, model: Any) -> tuple[bool, float]:
        with torch.no_grad():
            found = float(self.measure(model))
        return found >= self.least, found


def measured_sqnr(exported: ExportedProgram, batches: Sequence[Arguments]) -> Callable[[Any], float]:
    """Of a model's outputs against the float model's, over all batches, in dB."""
    exact = exported.module()

    def measure(model: Any) -> float:
        signal = noise = 0.0
        for args, kwargs in batches:
            wanted = exact(*args, **kwargs)
            signal += power(floating(wanted))
            noise += power(differences(wanted, model(*args, **kwargs)))
        return decibels(signal, noise)

    return measure


def within_budget(
    exported: ExportedProgram,
    batches: Sequence[Arguments],
    quantize: Callable[[tuple[str, ...]], GraphModule],
    improve: Callable[[], Advised],
    budget: Budget,
) -> _Reached:
    """(converted, what it reaches, nodes left in float, algorithms tried), with as few nodes as bisection finds.

    Args:
        exported: the float model.
        batches: calibration data.
        quantize: makes the converted model with these nodes in float.
        improve: runs algorithms, all nodes quantized.
        budget: what to reach.

    Raises:
        RecipeError: not even with all linears and convolutions but one in float; says how far it got.
    """
    converted = quantize(())
    good, found = budget.reached(converted)
    if good:
        return converted, found, (), ()
    best: _Reached = converted, found, (), ()
    advised = improve()
    converted = convert_pt2e(advised.prepared)
    good, found = budget.reached(converted)
    best = max(best, (converted, found, (), advised.tried), key=lambda one: one[1])
    if good:
        return best
    worst = [one.node for group in worst_ops(exported, list(batches), target=inf) for one in group]
    reached: _Reached | None = None
    low, high = 1, len(worst) - 1
    while low <= high:
        middle = (low + high) // 2
        left = tuple(worst[:middle])
        converted = quantize(left)
        good, found = budget.reached(converted)
        best = max(best, (converted, found, left, ()), key=lambda one: one[1])
        reached = (converted, found, left, ()) if good else reached
        low, high = (low, middle - 1) if good else (middle + 1, high)
    if reached is None:
        raise RecipeError(
            f"{budget.what} is {best[1]:.4g} at best, with {len(best[2])} of {len(worst)} linears and convolutions in "
            f"float, and {budget.least:.4g} are wanted. Calibrate with more data, try another mode or observer, or ask "
            "for less."
        )
    return reached
