"""mixed_precision: a format for each op with a weight, within a budget of accuracy or of size.

Each format is tried once on the whole model. What an op in that format does to the outputs is estimated by
`sensitivity`, its bytes are read from the converted graph, and `assignment` chooses. The choice is then made real and
measured; where it misses a budget of accuracy, the bound is tightened and the choice made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..checks import check_fields, checked
from ..errors import CaptureError, QuantizationError, TargetingError
from ..graph.run import Arguments, batches_of, run_batch
from ..meta import RECORD_KEY
from ..pt2e import convert_pt2e, prepare_pt2e
from ..quantizer import QuantizationConfig, RuleQuantizer
from ..sqnr import decibels
from .assignment import Option, greedy, integer_program
from .compare import copy_to_run
from .graft import Grafts
from .precisions import FLOAT, Precisions, configurations
from .sensitivity import layer_noise, sqnr_on, told
from .weights import float_bytes, stored_bytes

__all__ = ["Budget", "MixedPrecision", "Trial", "mixed_precision"]

_ROUNDS = 12
_STEP = 3.0
"""dB by which the bound is tightened where a metric says that, not by how much, it is missed."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a choice must meet; one of the three.

    sqnr: SQNR of the outputs in dB, at least
    drop: how far the metric may fall below that of the float model, at most
    size: bytes of the weights of all ops that have a choice, with their scales, at most

    Raises:
        TargetingError: none of them is given, or several are.
    """

    sqnr: float | None = None
    drop: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, TargetingError)
        if sum(one is not None for one in (self.sqnr, self.drop, self.size)) != 1:
            raise TargetingError(f"a budget is one of sqnr=, drop= and size=, got {self}")


@dataclass(frozen=True)
class Trial:
    """One choice of formats that was made real and measured.

    method:    'integer program', 'greedy', or 'all int8' and the like: this format wherever it is possible
    size:      bytes of the weights of the ops that have a choice
    predicted: SQNR of the outputs in dB, by the sum of the estimates
    value:     what was measured: SQNR in dB, or the metric
    meets:     whether it is within the budget
    """

    method: str
    precisions: Precisions
    size: int
    predicted: float
    value: float
    meets: bool

    def __str__(self) -> str:
        kept = "" if self.meets else "  (misses the budget)"
        return f"{self.method:16} {self.size:>12,} bytes  predicted {self.predicted:6.1f} dB  {self.value:9.4g}{kept}"


@dataclass(frozen=True)
class MixedPrecision:
    """precisions: the choice of the integer program. trials: it and others beside it. metric: what `value` is there."""

    precisions: Precisions
    trials: tuple[Trial, ...]
    metric: str

    def text(self) -> str:
        """A table of the trials, then the choice."""
        rows = [f"  {op}: {name}" for op, name in self.precisions.formats.items()]
        return "\n".join([f"last column: {self.metric}", *map(str, self.trials), "chosen:", *rows])

    def __str__(self) -> str:
        return self.text()


@checked(CaptureError)
def mixed_precision(
    model: ExportedProgram,
    data: Iterable[Any],
    quantizer: RuleQuantizer,
    *,
    budget: Budget,
    metric: Callable[[GraphModule], float] | None = None,
    precisions: Mapping[str, QuantizationConfig | None] | None = None,
) -> MixedPrecision:
    """Choose a format for each op with a weight: the smallest choice that is accurate enough, or the most accurate one.

    Args:
        model: the float model, exported.
        data: batches to calibrate and to measure on; they are kept, so a few are enough.
        quantizer: its global configuration is what ops without a weight get, and the format 'int8' where it has one.
            Ops that its other selectors keep in float stay there. It stays as it was.
        budget: of accuracy or size. A budget of size is met by the bytes of the weights, one of accuracy as measured.
        metric: for Budget(drop=...): from a model, called as the exported one, to a number, the higher the better.
        precisions: configurations to choose from, by name, instead of those that the quantizer declares.

    Returns:
        The choice, as a value to save, edit and apply; and what greedy search and single formats give beside it.

    Raises:
        TargetingError: the quantizer declares no formats, or no op can have one; a metric is missing, or not asked for.
        QuantizationError: no choice meets the budget; the message says how near they come. Or the metric failed, or
            scipy is missing.
    """
    if (metric is None) != (budget.drop is None):
        raise TargetingError("Budget(drop=...) needs a metric to measure, and the other budgets take none")
    search = _Search(model, list(batches_of(data, "mixed_precision(model, data, ...)")), quantizer, budget, precisions)
    search.measure_with(metric)
    best = search.within_budget("integer program", integer_program)
    if not best.meets:
        raise QuantizationError(
            f"no choice meets {budget}: at best, {best}. Ops without a weight stay quantized; keep them in float with "
            "set_operator_type(op, None), or give a wider budget."
        )
    trials = (best, search.within_budget("greedy", greedy), *map(search.uniform, search.formats))
    return MixedPrecision(best.precisions, trials, search.metric)


class _Search:
    def __init__(
        self,
        model: ExportedProgram,
        batches: list[Arguments],
        quantizer: RuleQuantizer,
        budget: Budget,
        precisions: Mapping[str, QuantizationConfig | None] | None,
    ) -> None:
        self._model, self._batches, self._budget = model, batches, budget
        self._known = configurations(quantizer, precisions)
        names = [name for name in self._known if name != FLOAT]
        if not names:
            raise TargetingError(f"{quantizer.name} declares no precisions to choose from; pass precisions={{...}}")
        self._quantizer = quantizer.copy().set_global(self._known[names[0]])
        self.formats, self._default = names, names[0]
        self._signal, self._rest = 0.0, 0.0
        self.options = self._find_options()

    def _find_options(self) -> list[Option]:
        """Every op in every format that it can have."""
        exact = copy_to_run(self._model)
        options: list[Option] = []
        for name in self.formats:
            made = self._made(self._quantizer.copy().set_global(self._known[name]))
            if not made.meta[RECORD_KEY].points:
                continue  # no op can have it: groups of 32 do not fit into narrower linears
            grafts = Grafts(exact, made, "mixed_precision")
            self._signal, noise = layer_noise(grafts, self._batches)
            sizes = {layer: stored_bytes(grafts.needed(layer), grafts.found) for layer in grafts.layers}
            options += [Option(layer.name, name, noise[layer], size) for layer, size in sizes.items() if size]
            if name == self._default:
                self._rest = sum(noise[layer] for layer, size in sizes.items() if not size)
        whole = float_bytes(exact, {one.op for one in options})
        if not whole:
            raise TargetingError("mixed_precision: no op of this model has a weight that the quantizer takes")
        return [*(one for one in options if one.op in whole), *(Option(op, FLOAT, 0.0, n) for op, n in whole.items())]

    def measure_with(self, metric: Callable[[GraphModule], float] | None) -> None:
        exact = copy_to_run(self._model)
        self._measure = sqnr_on(exact, self._batches) if metric is None else told(metric)
        self.metric = "SQNR in dB" if metric is None else getattr(metric, "__name__", "metric")
        drop, sqnr = self._budget.drop, self._budget.sqnr
        self._least = -math.inf
        if sqnr is not None:
            self._least = sqnr
        elif drop is not None:
            self._least = float(self._measure(exact)) - drop

    def within_budget(self, method: str, choose: Callable[..., list[Option]]) -> Trial:
        """What a method chooses; for a budget of accuracy, with a bound that is tightened until the choice meets it."""
        if self._budget.size is not None:
            chosen = choose(self.options, size=float(self._budget.size))
            return self._trial(method, chosen or self._smallest())
        allowed = self._first_bound()
        for _ in range(_ROUNDS):
            chosen = choose(self.options, noise=max(allowed - self._rest, 0.0))
            trial = self._trial(method, chosen)
            if trial.meets or all(one.format == FLOAT for one in chosen):
                break
            missing = self._least - trial.value if self._budget.sqnr is not None else _STEP
            allowed = min(allowed, self._noise(chosen)) * 10 ** (-max(missing, 0.5) / 10)
        return trial

    def _smallest(self) -> list[Option]:
        return [min((one for one in self.options if one.op == op), key=lambda one: one.size) for op in self._ops()]

    def _first_bound(self) -> float:
        """What the budget allows; for a metric, whatever the smallest choice makes."""
        if self._budget.sqnr is not None:
            return self._signal * 10 ** (-self._budget.sqnr / 10)
        return sum(one.noise for one in self.options) + self._rest

    def uniform(self, name: str) -> Trial:
        """One format wherever it is possible, the default one elsewhere."""
        by_op = {op: {one.format: one for one in self.options if one.op == op} for op in self._ops()}
        chosen = [found.get(name) or found.get(self._default) or found[FLOAT] for found in by_op.values()]
        return self._trial(f"all {name}", chosen)

    def _ops(self) -> list[str]:
        return list(dict.fromkeys(one.op for one in self.options))

    def _noise(self, chosen: list[Option]) -> float:
        return sum(one.noise for one in chosen) + self._rest

    def _trial(self, method: str, chosen: list[Option]) -> Trial:
        by_op = {one.op: one.format for one in chosen}
        precisions = Precisions({op: by_op[op] for op in self._ops()})
        value = float(self._measure(self._made(precisions.apply(self._quantizer, self._known))))
        size = round(sum(one.size for one in chosen))
        fits = size <= self._budget.size if self._budget.size is not None else value >= self._least
        noise = self._noise(chosen)
        predicted = decibels(self._signal, noise)
        return Trial(method, precisions, size, predicted, value, fits)

    def _made(self, quantizer: RuleQuantizer) -> GraphModule:
        prepared = prepare_pt2e(self._model, quantizer, allow_empty=True)
        for batch in self._batches:
            run_batch(prepared, batch)
        return convert_pt2e(prepared)
