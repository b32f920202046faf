"""Budgets of size and latency: `mixed_precision` chooses a format for each operator with a weight.

Before this: the quantizer of the recipe. After it: the same with the choice, which the recipe that is saved names too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.export import ExportedProgram

from ..debug import Budget, MixedPrecision, mixed_precision
from ..errors import CalibrationError
from ..graph.run import Arguments
from ..progress import telling
from .targets import Lowering

__all__ = ["choose_formats"]


def choose_formats(
    exported: ExportedProgram,
    quantizer: Any,
    lowering: Lowering | None,
    batches: Sequence[Arguments],
    budget: Budget,
) -> MixedPrecision:
    """The formats that meet a budget, and what was tried beside them.

    Args:
        exported: the float model.
        quantizer: its global configuration stands for the first format that it declares.
        lowering: makes the programs that a budget of latency times.
        batches: calibration data.
        budget: of size or latency.

    Raises:
        CalibrationError: there is no batch.
        TargetingError: the quantizer declares no formats, or nothing tells the time of single operators.
        QuantizationError: no choice meets the budget.
    """
    if not batches:
        raise CalibrationError("formats are chosen on calibration data: pass data=[batch, ...]")
    lower: Any = None  # what every lowering returns has a profile of its own kind
    if budget.latency is not None and lowering is not None:
        lower = partial(lowering, verify=False)
    with telling("choosing formats"):
        return mixed_precision(exported, batches, quantizer, budget=budget, lower=lower)
