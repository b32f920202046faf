"""quantize_and_lower: export, prepare, calibrate, convert, explain and lower a model in one call.

Named after the two things that it does: `quantize` is the reference's eager function, which lowers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..algorithms import Advised, suggest
from ..debug import Budget as FormatBudget
from ..debug import MixedPrecision
from ..debug.precisions import FLOAT
from ..errors import CalibrationError, CaptureError, RecipeError
from ..graph.fingerprint import Fingerprint, of_graph, of_model
from ..graph.run import Arguments, batches_of
from ..progress import counted, telling
from ..pt2e import convert_pt2e, prepare_pt2e
from ..pt2e.record import OutputErrors
from ..quantizer.base import Quantizer
from ..report import Report, explain
from .budget import Budget, measured_sqnr, within_budget
from .configuring import leaving, quantizer_of
from .formats import choose_formats
from .graph_file import SUFFIX
from .manifest import Manifest
from .recipe import Recipe
from .result import Quantized
from .targets import LOWERINGS, Lowering, load_target

__all__ = ["Data", "convert_by", "quantize_and_lower"]

Data = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches, each as `graph.run.batches_of` takes it, or a function that gives them."""


def quantize_and_lower(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] | None = None,
    data: Data | None = None,
    *,
    target: str | Quantizer = "xnnpack",
    mode: str = "static",
    options: dict[str, Any] | None = None,
    observer: str | None = None,
    ignored: Iterable[str] = (),
    sqnr: float | None = None,
    size: int | None = None,
    latency: float | None = None,
    metric: Callable[[Any], float] | None = None,
    max_drop: float | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    verify: bool | Iterable[Any] = True,
) -> Quantized:
    """Quantize a model and lower it to what its target runs.

    Args:
        model: in eval mode, or exported.
        example_inputs, example_kwargs, dynamic_shapes: as torch.export takes them; an exported model has its own.
        data: calibration batches, as `graph.run.batches_of` takes them, or a function of them; needed by static modes.
        target: the name of a target, or a quantizer that is configured.
        mode, options, observer, ignored, sqnr, size, latency, seed: of the recipe, see Recipe.
        metric, max_drop: a budget instead of `sqnr`: a number of a model, the more the better; how far it may drop.
        recipe: in the place of target and all that is of the recipe.
        verify: as the lowerings take it.

    Raises:
        RecipeError: the arguments contradict each other, a name is unknown, or the budget is out of reach.
        CaptureError: the model is in training mode, or cannot be exported.
        CalibrationError: there is no data, and the mode needs it.
        TargetingError: a glob of `ignored` matches nothing.
        LoweringError: the target cannot run the graph.
    """
    if recipe is None and isinstance(target, str):
        recipe = Recipe(target=target, mode=mode, options=options or {}, observer=observer, ignored=tuple(ignored),
                        sqnr=sqnr, size=size, latency=latency, seed=seed)  # fmt: skip
    exported = _exported(model, example_inputs, example_kwargs, dynamic_shapes)
    wanted = _wanted(recipe or _Wanted(sqnr, None, None, size, latency), metric, max_drop)
    job = _of_target(exported, target, ignored, seed) if recipe is None else _of_recipe(exported, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return _carried_out(job, data, wanted, verify)


def convert_by(recipe: Recipe, exported: ExportedProgram, data: Data | None) -> GraphModule:
    """The converted graph that a recipe makes of an exported model, before its budget and its lowering.

    Raises:
        CalibrationError: there is no data, and the mode needs it.
        TargetingError: a glob of `ignored` matches nothing.
    """
    job = _of_recipe(exported, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return _converted(job, _batches(job, data, Fingerprint()), ())


@dataclass(frozen=True)
class _Wanted:
    """A budget as the caller says it."""

    sqnr: float | None
    metric: Callable[[Any], float] | None
    max_drop: float | None
    size: int | None
    latency: float | None

    def __post_init__(self) -> None:
        if self.of_formats and bool(self):
            raise RecipeError("there is one budget: sqnr=, metric= with max_drop=, size= or latency=; leave others out")

    def __bool__(self) -> bool:
        return self.sqnr is not None or self.metric is not None

    @property
    def of_formats(self) -> bool:
        return self.size is not None or self.latency is not None


@dataclass(frozen=True)
class _Job:
    exported: ExportedProgram
    quantizer: Any
    lowering: Lowering | None
    recipe: Recipe | None
    seed: int
    may_be_empty: bool = False
    """Whether the formats say float for all that has one, which is no mistake then."""


def _wanted(told: Recipe | _Wanted, metric: Callable[[Any], float] | None, max_drop: float | None) -> _Wanted:
    return _Wanted(told.sqnr, metric, max_drop, told.size, told.latency)


def _of_recipe(exported: ExportedProgram, recipe: Recipe) -> _Job:
    lowering = load_target(recipe.target).lowering
    return _Job(exported, quantizer_of(recipe), lowering, recipe, recipe.seed, _all_float(recipe.precisions))


def _of_target(exported: ExportedProgram, quantizer: Any, ignored: Iterable[str], seed: int) -> _Job:
    lowering = LOWERINGS.get(getattr(quantizer, "lowers_to", ""))
    return _Job(exported, leaving(quantizer, ignored, ()), lowering, None, seed)


def _carried_out(job: _Job, data: Data | None, wanted: _Wanted, verify: Any) -> Quantized:
    seen = Fingerprint()
    batches: Iterable[Arguments] = _batches(job, data, seen)
    search = errors = None
    if wanted.of_formats:
        batches = kept = list(batches)
        job, search = _with_formats(job, kept, FormatBudget(size=wanted.size, latency=wanted.latency))
    if wanted:
        kept = list(batches)
        quantize, improve = partial(_converted, job, kept), partial(_improved, job, kept, wanted)
        budget = _budget(job, kept, wanted)
        converted, accuracy, left, tried = within_budget(job.exported, kept, quantize, improve, budget)
    else:
        (converted, errors), accuracy, left, tried = _plain(job, batches), None, (), ()
    program = None
    if job.lowering is not None:
        with telling(f"lowering to {job.lowering.package}"):
            program = job.lowering(converted, verify=verify)
    manifest = Manifest(
        model=of_model(job.exported),
        data=None if data is None else str(seen),
        converted=of_graph(converted),
        suffix=SUFFIX if job.lowering is None else job.lowering.suffix,
        repeats=job.lowering is not None and job.lowering.repeats,
        seed=job.seed,
    )
    return Quantized(
        converted, program, _report(converted, errors), job.recipe, manifest, accuracy, left, tried, search
    )


def _with_formats(job: _Job, batches: list[Arguments], budget: FormatBudget) -> tuple[_Job, MixedPrecision]:
    """The choice in the place of the budget, so that the recipe can be carried out again, with the same result."""
    found = choose_formats(job.exported, job.quantizer, job.lowering, batches, budget)
    recipe = job.recipe
    if recipe is not None:
        recipe = replace(recipe, size=None, latency=None, precisions=dict(found.precisions.formats))
    quantizer, formats = found.precisions.apply(job.quantizer), found.precisions.formats
    return replace(job, quantizer=quantizer, recipe=recipe, may_be_empty=_all_float(formats)), found


def _all_float(formats: Mapping[str, str]) -> bool:
    return set(formats.values()) == {FLOAT}


def _exported(model: Any, args: Any, kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    if not isinstance(model, nn.Module):
        raise CaptureError(f"quantize_and_lower takes an nn.Module or an ExportedProgram, got {type(model).__name__}")
    if model.training:
        raise CaptureError("the model is in training mode, with dropout and changing statistics: call model.eval()")
    if args is None and not kwargs:
        raise CaptureError("a model is exported with example inputs: pass example_inputs=(x,)")
    if not isinstance(args, (tuple, list, type(None))):
        raise CaptureError(f"example_inputs are a tuple, such as (x,); got {type(args).__name__}")
    try:
        with torch.no_grad():
            return torch.export.export(model, tuple(args or ()), kwargs, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise CaptureError(f"torch.export cannot export the model: {type(error).__name__}: {error}") from error


def _batches(job: _Job, data: Data | None, seen: Fingerprint) -> Iterator[Arguments]:
    """The calibration data, each batch added to its fingerprint; nothing where no data is needed or given."""
    if data is None:
        if job.recipe is not None and job.recipe.mode == "static":
            raise CalibrationError("a static mode needs calibration data: pass data=[batch, ...], or mode='dynamic'")
        return
    for batch in batches_of(data() if callable(data) else data, "quantize_and_lower"):
        seen.add(list(batch))
        yield batch


def _budget(job: _Job, batches: list[Arguments], wanted: _Wanted) -> Budget:
    if not batches:
        raise CalibrationError("a budget is measured on calibration data: pass data=[batch, ...]")
    if wanted.metric is None:
        return Budget(measured_sqnr(job.exported, batches), wanted.sqnr or 0.0, "the SQNR of the outputs, in dB,")
    if wanted.sqnr is not None or wanted.max_drop is None:
        raise RecipeError("a budget is sqnr=, or metric= with max_drop=: how much less than the float model's will do")
    with torch.no_grad():
        exact = float(wanted.metric(job.exported.module()))
    return Budget(wanted.metric, exact - wanted.max_drop, "the metric")


def _improved(job: _Job, batches: list[Arguments], wanted: _Wanted) -> Advised:
    """What algorithms bring that need no training; with no limit of time, so that a recipe has one result."""
    with telling("trying algorithms"):
        advice = suggest(job.exported, leaving(job.quantizer, (), ()), batches, metric=wanted.metric)
        return advice.apply(seconds=math.inf, thorough=False)


def _converted(job: _Job, batches: Iterable[Arguments], left: tuple[str, ...]) -> GraphModule:
    prepared = _calibrated(job, batches, left)
    with telling("converting"):
        return convert_pt2e(prepared)


def _plain(job: _Job, batches: Iterable[Arguments]) -> tuple[GraphModule, OutputErrors | None]:
    """The converted graph with nothing left out, and what static activations cost the outputs of the first batch."""
    coming = iter(batches)
    first = list(islice(coming, 1))
    prepared = _calibrated(job, chain(first, coming), ())
    with telling("converting"):
        errors = explain(prepared, first).record.output_errors if first else None
        return convert_pt2e(prepared), errors


def _calibrated(job: _Job, batches: Iterable[Arguments], left: tuple[str, ...]) -> GraphModule:
    prepared = prepare_pt2e(job.exported, leaving(job.quantizer, (), left), allow_empty=job.may_be_empty)
    with torch.no_grad():
        for args, kwargs in counted(batches, "calibrating"):
            prepared(*args, **kwargs)
    return prepared


def _report(converted: GraphModule, errors: OutputErrors | None) -> Report:
    return Report(replace(explain(converted).record, output_errors=errors))
