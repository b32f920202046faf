"""The advisor: what would help a model that lost too much, site by site, and as much of it as measurably helps.

`suggest` calibrates plainly, measures the own error of every site (what it adds with exact inputs), runs what is cheap
and says what it saw there. `Advice.apply` tries one algorithm after the other, the cheap ones first, each behind what
was kept before, and keeps what brings held-back data nearer to the float model: the result is never worse there than
plain quantization.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..checks import checked
from ..debug.compare import compare
from ..debug.sensitivity import sqnr_on, told
from ..errors import CaptureError, QuantizationError
from ..graph.attributes import attribute
from ..graph.run import Arguments, batches_of, run_batch
from ..pt2e import convert_pt2e, prepare_pt2e, record_of
from ..pt2e.observed import QParams
from ..quantizer.base import Quantizer
from ..where import exported_name, module_path
from .awq import awq
from .bias_correction import correct_bias
from .clipping import clip_weights
from .equalization import equalize
from .gptq import gptq
from .ranges import choose_ranges
from .reconstruction import adaround, reconstruct_blocks
from .rotation import rotate
from .sites import Site, grid_of, sites_of
from .smooth_quant import smooth_quant

__all__ = ["Advice", "Advised", "Suggestion", "Tried", "suggest"]

_EVERY = 4
"""One of so many batches is held back."""
_FEW_STEPS = 32
"""A grid of a weight with no more steps than this: rounding up or down matters."""
_SPREAD = 8.0
"""Channel ranges that differ by this cost 3 bits in one scale."""
_MEANS = 0.1
"""Part of an error from which on taking its means away is worth a line."""
_ENDS = 1.1
"""Gain from which on another range is worth a line."""


class Step(NamedTuple):
    """An algorithm to try: its name, and from the best prepared graph to another one.

    rounds: it rounds weights for good, so another one that does begins with what was best before the first of them
    """

    name: str
    run: Callable[[GraphModule], GraphModule]
    rounds: bool = False


@dataclass(frozen=True)
class Suggestion:
    """What would help at one site.

    Args:
        node: name of the op in the exported program.
        module: path of its module; None where export recorded none.
        own: SQNR of its result with exact inputs, in dB.
        algorithm: name of the function to call.
        seen: what was measured.
    """

    node: str
    module: str | None
    own: float
    algorithm: str
    seen: str

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.node}{where} (own error {self.own:.1f} dB): {self.seen}: {self.algorithm}"


@dataclass(frozen=True)
class Tried:
    """One step of `Advice.apply`: what the held-back data gave with it, whether it was kept, or why it did not run."""

    algorithm: str
    value: float
    kept: bool
    seconds: float
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.algorithm}: did not run ({self.reason})"
        return f"{self.algorithm}: {self.value:.4g}, {'kept' if self.kept else 'dropped'} ({self.seconds:.1f} s)"


@dataclass(frozen=True)
class Advised:
    """prepared: to be converted. value: of the held-back data. tried: all steps, the first is plain quantization."""

    prepared: GraphModule
    value: float
    tried: tuple[Tried, ...]


class Advice:
    """What `suggest` found out.

    plain: value of plain quantization on held-back data: SQNR of the outputs in dB, or the metric.
    """

    def __init__(self, job: _Job) -> None:
        self.plain = job.plain
        self._job = job

    @cached_property
    def suggestions(self) -> tuple[Suggestion, ...]:
        """What would help, the site with the largest own error first; measured when somebody asks."""
        return tuple(self._job.suggestions())

    def text(self) -> str:
        """The list, one line a suggestion."""
        return "\n".join([f"plain quantization: {self.plain:.4g}", *map(str, self.suggestions)])

    def __str__(self) -> str:
        return self.text()

    @checked(CaptureError)
    def apply(self, *, seconds: float = 60.0, thorough: bool = True) -> Advised:
        """Carry out what helps.

        Args:
            seconds: no step begins after this time.
            thorough: try AdaRound and BRECQ too, which take most of the time.

        Returns:
            The best prepared graph, which on the held-back data is at least as good as plain quantization.
        """
        return self._job.apply(seconds, thorough)


@checked(CaptureError, but=("quantizer",))
def suggest(
    model: ExportedProgram,
    quantizer: Quantizer,
    data: Iterable[Any],
    *,
    metric: Callable[[GraphModule], float] | None = None,
) -> Advice:
    """Find out what would make a quantized model more accurate.

    Args:
        model: the float model, exported; it stays as it was.
        quantizer: as `prepare_pt2e` takes it.
        data: batches, as `graph.run.batches_of` takes them; every fourth is held back to measure on,
            and the last one of two or three. A single batch is measured on too, which finds too much of a gain.
        metric: what to measure instead of the SQNR of the outputs: from a model, called as the exported one, to a
            number, the higher the better. Its data is its own.

    Raises:
        CalibrationError: there is no batch, or the model fails on one.
        QuantizationError: `prepare_pt2e` or the metric fails.
    """
    job = _Job(model, quantizer, list(batches_of(data, "suggest(model, quantizer, data)")), metric)
    return Advice(job)


class _Job:
    def __init__(
        self,
        model: ExportedProgram,
        quantizer: Quantizer,
        batches: list[Arguments],
        metric: Callable[[GraphModule], float] | None,
    ) -> None:
        self._model, self._quantizer = model, quantizer
        self._data, self._held = _split(batches)
        self._measure = told(metric) if metric else sqnr_on(model.module(), self._held)
        self._prepared = self._calibrated(model)
        self._converted = convert_pt2e(self._prepared)
        self.plain = self._measure(self._converted)

    def _calibrated(self, model: ExportedProgram | GraphModule) -> GraphModule:
        prepared = prepare_pt2e(model, self._quantizer)
        record = record_of(prepared)
        if record is not None:
            record.example_inputs = self._model.example_inputs  # lowering asks for them; a changed graph has none
        for batch in self._data:
            run_batch(prepared, batch)
        return prepared

    def suggestions(self) -> list[Suggestion]:
        """All that was seen, the site with the largest own error first."""
        own = {row.node: row.own for row in compare(self._model, self._converted, self._data).nodes}
        sites = {site.node.name: site for site in sites_of(self._prepared)[0]}
        found = []
        for name, algorithm, seen in (*self._rows(sites), *self._means(), *self._outliers()):
            site = sites.get(name)
            if site is not None:
                where = exported_name(site.node), module_path(site.node)
                found.append(Suggestion(*where, own.get(where[0], math.nan), algorithm, seen))
        return sorted(found, key=lambda one: (math.isnan(one.own), one.own))

    def _rows(self, sites: dict[str, Site]) -> Iterator[tuple[str, str, str]]:
        for name, site in sites.items():
            weight = attribute(self._prepared, str(site.weight.target)).detach()
            grid = grid_of(self._prepared, site.observer, weight)
            if grid is None:
                continue
            ranges = weight.abs().movedim(site.rows, 0).flatten(1).amax(1)
            low, high = float(ranges.amin()), float(ranges.amax())
            if grid.axis is None and grid.group_size is None and high > _SPREAD * low:
                yield name, "equalize", f"channel ranges {low:.2g} to {high:.2g} in one scale"
            if _is_coarse(grid):
                yield name, "gptq", f"a weight with {grid.quant_max - grid.quant_min + 1} integers"

    def _means(self) -> Iterator[tuple[str, str, str]]:
        for one in correct_bias(self._prepared, self._data)[1]:
            if one.share > _MEANS:
                yield one.node, "correct_bias", f"means of channels are {one.share:.0%} of the error"

    def _outliers(self) -> Iterator[tuple[str, str, str]]:
        for one in choose_ranges(self._prepared, self._data[:2])[1]:
            if one.gain > _ENDS:
                yield one.tensor, "choose_ranges", f"{one.choice} divides the error behind it by {one.gain:.2f}"

    def apply(self, seconds: float, thorough: bool) -> Advised:
        """As `Advice.apply`."""
        begin = time.monotonic()
        best = unrounded = self._prepared
        value = self.plain
        tried = [Tried("plain", value, True, 0.0)]
        for step in self._steps(thorough):
            start = time.monotonic()
            if start - begin > seconds:
                break
            try:
                made = step.run(unrounded if step.rounds else best)
                found = self._measure(convert_pt2e(made))
            except Exception as error:  # noqa: BLE001 - whatever a foreign quantizer, its observers or a metric raise
                tried.append(Tried(step.name, math.nan, False, time.monotonic() - start, _told(error)))
                continue
            kept = found > value
            tried.append(Tried(step.name, found, kept, time.monotonic() - start))
            best, value = (made, found) if kept else (best, value)
            unrounded = best if not step.rounds else unrounded
        return Advised(best, value, tuple(tried))

    def _steps(self, thorough: bool) -> Iterator[Step]:
        """From the cheapest to the dearest; those on float graphs begin anew, so they come first."""
        coarse = self._has_coarse_weights()
        yield Step("equalize", lambda _: self._calibrated(equalize(self._model)[0]))
        yield Step("smooth_quant", lambda _: self._calibrated(smooth_quant(self._model, self._data)[0]))
        rotated, streams = rotate(self._model)
        if any(stream.kind for stream in streams):
            yield Step("rotate", lambda _: self._calibrated(rotated))
        if coarse:
            yield Step("awq", lambda _: self._calibrated(awq(self._model, self._quantizer, self._data)[0]))
        yield Step("choose_ranges", lambda best: choose_ranges(best, self._data)[0])
        if coarse:
            yield Step("clip_weights", lambda best: clip_weights(best, self._data)[0])
            yield Step("gptq", lambda best: gptq(best, self._data)[0], rounds=True)
        if thorough:
            yield Step("adaround", lambda best: adaround(best, self._data)[0], rounds=True)
            yield Step(
                "reconstruct_blocks", lambda best: reconstruct_blocks(best, self._data, drop=0.0)[0], rounds=True
            )
        yield Step("correct_bias", lambda best: correct_bias(best, self._data)[0])

    def _has_coarse_weights(self) -> bool:
        sites = sites_of(self._prepared)[0]
        weights = ((site, attribute(self._prepared, str(site.weight.target)).detach()) for site in sites)
        grids = (grid_of(self._prepared, site.observer, weight) for site, weight in weights)
        return any(grid is not None and _is_coarse(grid) for grid in grids)


def _is_coarse(grid: QParams) -> bool:
    return grid.quant_max - grid.quant_min < _FEW_STEPS


def _told(error: Exception) -> str:
    """The first line of an error, with the name of its class where we did not write it."""
    first = str(error).partition("\n")[0]
    return first if isinstance(error, QuantizationError) else f"{type(error).__name__}: {first}"


def _split(batches: list[Arguments]) -> tuple[list[Arguments], list[Arguments]]:
    """(those to work on, those to measure on); of a single one, both are that."""
    last = len(batches) - 1
    held = set(range(_EVERY - 1, len(batches), _EVERY)) or {last}
    return [batch for at, batch in enumerate(batches) if at not in held or last == 0], [
        batches[at] for at in sorted(held)
    ]
