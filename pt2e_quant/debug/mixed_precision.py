"""mixed_precision: a format for each op with a weight, within a budget of accuracy, size or latency.

Each format is tried once on the whole model. What an op in that format does to the outputs is estimated by
`sensitivity`, its bytes are read from the converted graph, and `assignment` chooses. The choice is then made real and
measured; where it misses a budget of accuracy or latency, the bound is tightened and the choice made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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
from .timing import Lower, check_times, time_ops
from .weights import float_bytes, stored_bytes

__all__ = ["Budget", "MixedPrecision", "Trial", "mixed_precision"]

_ROUNDS = 12
_LEAST_STEP = 0.02
"""Of a budget of latency: by how much the bound is tightened where a choice misses it by less, which may be noise."""
_STEP = 3.0
"""dB by which the bound is tightened where a metric says that, not by how much, it is missed."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a choice must meet; one of the four.

    sqnr: SQNR of the outputs in dB, at least
    drop: how far the metric may fall below that of the float model, at most
    size: bytes of the weights of all ops that have a choice, with their scales, at most
    latency: microseconds of a run of the lowered program under its profiler, at most

    Raises:
        TargetingError: none of them is given, or several are.
    """

    sqnr: float | None = None
    drop: float | None = None
    size: int | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, TargetingError)
        if sum(one is not None for one in vars(self).values()) != 1:
            raise TargetingError(f"a budget is one of sqnr=, drop=, size= and latency=, got {self}")


@dataclass(frozen=True)
class Trial:
    """One choice of formats that was made real and measured.

    method:    'integer program', 'greedy', or 'all int8' and the like: this format wherever it is possible
    size:      bytes of the weights of the ops that have a choice
    predicted: SQNR of the outputs in dB, by the sum of the estimates
    value:     what was measured: SQNR in dB, or the metric
    meets:     whether it is within the budget
    latency:   microseconds of a run of its program; None unless the budget is one of latency
    """

    method: str
    precisions: Precisions
    size: int
    predicted: float
    value: float
    meets: bool
    latency: float | None = None

    def __str__(self) -> str:
        time = "" if self.latency is None else f"  {self.latency:9.0f} us"
        kept = "" if self.meets else "  (misses the budget)"
        predicted = f"predicted {self.predicted:6.1f} dB"
        return f"{self.method:16} {self.size:>12,} bytes{time}  {predicted}  {self.value:9.4g}{kept}"


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
    lower: Lower | None = None,
) -> MixedPrecision:
    """Choose a format for each op with a weight: the smallest choice that is accurate enough, or the most accurate one.

    Args:
        model: the float model, exported.
        data: batches to calibrate and to measure on; they are kept, so a few are enough.
        quantizer: its global configuration is what ops without a weight get, and the format 'int8' where it has one.
            Ops that its other selectors keep in float stay there. It stays as it was.
        budget: of accuracy, size or latency. A budget of size is met by the bytes of the weights, others as measured.
        metric: for Budget(drop=...): from a model, called as the exported one, to a number, the higher the better.
        precisions: configurations to choose from, by name, instead of those that the quantizer declares.
        lower: for Budget(latency=...): from a converted graph to a program whose `profile` joins kernels with nodes,
            such as `lower_to_onnx`. It is called for each format and each trial; programs run on the first batch.

    Returns:
        The choice, as a value to save, edit and apply; and what greedy search and single formats give beside it.

    Raises:
        TargetingError: the quantizer declares no formats, or no op can have one; a metric or `lower` is missing, or not
            asked for; the profile of a program does not tell the time of an op.
        QuantizationError: no choice meets the budget; the message says how near they come. Or the metric failed, or
            scipy is missing.
    """
    if (metric is None) != (budget.drop is None):
        raise TargetingError("Budget(drop=...) needs a metric to measure, and the other budgets take none")
    if (lower is None) != (budget.latency is None):
        raise TargetingError(
            "Budget(latency=...) needs lower=, which makes the program to time; other budgets take none"
        )
    batches = list(batches_of(data, "mixed_precision(model, data, ...)"))
    search = _Search(model, batches, quantizer, budget, precisions, lower)
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
        lower: Lower | None,
    ) -> None:
        self._model, self._batches, self._budget, self._lower = model, batches, budget, lower
        self._known = configurations(quantizer, precisions)
        names = [name for name in self._known if name != FLOAT]
        if not names:
            raise TargetingError(f"{quantizer.name} declares no precisions to choose from; pass precisions={{...}}")
        self._quantizer = quantizer.copy().set_global(self._known[names[0]])
        self.formats, self._default = names, names[0]
        self._signal, self._rest = 0.0, 0.0
        self.options = self._find_options()
        self._times = {} if lower is None else self._find_times(lower)

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

    def _find_times(self, lower: Lower) -> dict[tuple[str, str], float]:
        """Microseconds of each op in each format, all ops in it that can be."""
        found: dict[tuple[str, str], float] = {}
        for name in (FLOAT, *reversed(self.formats)):  # the default last: it says what lies outside of the ops
            here = [op for op in self._ops() if name in self._formats_of(op)]
            if here:
                times = time_ops(self._made_of(self._everywhere(name)), lower, self._batches[0])
                check_times(times, here, name)
                found |= {(op, name): times.of[op] for op in here}
                self._outside = times.rest(here)
        return found

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
        if self._budget.latency is not None:
            return self._within_latency(method, choose, self._budget.latency)
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

    def _within_latency(self, method: str, choose: Callable[..., list[Option]], wanted: float) -> Trial:
        """The integer program with microseconds in the place of bytes."""
        known = {(one.op, one.format): one for one in self.options}
        timed = [replace(one, size=self._times[key]) for key, one in known.items()]
        allowed = wanted - self._outside
        for _ in range(_ROUNDS):
            chosen = choose(timed, size=allowed) if allowed > 0 else []
            fastest = not chosen
            chosen = chosen or [
                min((one for one in timed if one.op == op), key=lambda one: one.size) for op in self._ops()
            ]
            trial = self._trial(method, [known[one.op, one.format] for one in chosen])
            if trial.meets or fastest or trial.latency is None:
                break
            allowed -= max(trial.latency - wanted, _LEAST_STEP * wanted)
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
        return self._trial(f"all {name}", self._everywhere(name))

    def _everywhere(self, name: str) -> list[Option]:
        by_op = [self._formats_of(op) for op in self._ops()]
        return [found.get(name) or found.get(self._default) or found[FLOAT] for found in by_op]

    def _formats_of(self, op: str) -> dict[str, Option]:
        return {one.format: one for one in self.options if one.op == op}

    def _ops(self) -> list[str]:
        return list(dict.fromkeys(one.op for one in self.options))

    def _noise(self, chosen: list[Option]) -> float:
        return sum(one.noise for one in chosen) + self._rest

    def _trial(self, method: str, chosen: list[Option]) -> Trial:
        made = self._made_of(chosen)
        value, size = float(self._measure(made)), round(sum(one.size for one in chosen))
        latency = None if self._lower is None else time_ops(made, self._lower, self._batches[0]).whole
        predicted = decibels(self._signal, self._noise(chosen))
        return Trial(
            method, self._precisions(chosen), size, predicted, value, self._fits(size, latency, value), latency
        )

    def _fits(self, size: int, latency: float | None, value: float) -> bool:
        if latency is not None and self._budget.latency is not None:
            return latency <= self._budget.latency
        return size <= self._budget.size if self._budget.size is not None else value >= self._least

    def _precisions(self, chosen: list[Option]) -> Precisions:
        by_op = {one.op: one.format for one in chosen}
        return Precisions({op: by_op[op] for op in self._ops()})

    def _made_of(self, chosen: list[Option]) -> GraphModule:
        return self._made(self._precisions(chosen).apply(self._quantizer, self._known))

    def _made(self, quantizer: RuleQuantizer) -> GraphModule:
        prepared = prepare_pt2e(self._model, quantizer, allow_empty=True)
        for batch in self._batches:
            run_batch(prepared, batch)
        return convert_pt2e(prepared)
