"""Recipe: everything that says how a model is quantized, as one value; checked when it is made."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .. import observer as observers
from ..checks import check_fields
from ..debug.precisions import FLOAT
from ..errors import QuantizationError, RecipeError, did_you_mean
from ..plain import to_plain
from .images import Images
from .targets import Target, load_target

__all__ = ["OBSERVERS", "VERSION", "Recipe", "problems_of"]

VERSION = 1
"""Of the form of recipes; a file of a later version is refused."""

OBSERVERS = MappingProxyType(
    {
        "entropy": observers.EntropyObserver,
        "histogram": observers.HistogramObserver,
        "lp_norm": observers.LpNormObserver,
        "minmax": observers.MinMaxObserver,
        "moving_average": observers.MovingAverageMinMaxObserver,
        "mse": observers.MSEObserver,
        "percentile": observers.PercentileObserver,
    }
)
"""What can watch the activations of a static mode."""

_CHOSEN = ("is_qat", "is_dynamic")  # by the mode


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized.

    Args:
        target: what for: 'xnnpack', 'x86', 'onnx', or another that `find_targets` lists.
        mode: 'static' (ranges from calibration), 'dynamic' (ranges at run time), 'weight_only', or another of the
            target's.
        options: arguments of the function that makes the target's configuration, such as reduce_range or group_size.
        observer: what watches activations in a static mode, by its name in OBSERVERS; None is the target's own.
        ignored: modules to leave in float: dotted paths or globs, each of which must match.
        sqnr: wanted of the model's outputs, in dB, on the calibration data. Where plain quantization misses it, what
            `algorithms.suggest` finds is applied; if that is not enough, the linears and convolutions that cost most
            stay in float until it is reached.
        size: bytes of the weights of all operators that have a choice of formats, at most; instead of `sqnr`.
        latency: microseconds of a run of the program under its profiler, on this machine and the first batch, at most;
            instead of `sqnr`. For either, `debug.mixed_precision` chooses the formats, and the recipe that is saved has
            the choice as its `precisions`, in the place of the budget, since times do not repeat.
        precisions: formats of single operators, by their names in the exported program, as `debug.mixed_precision`
            chooses them: 'float', or a name of the quantizer's `precisions`. Each must match.
        images: how the command line makes inputs of a folder of images; None for the defaults of Images.
        seed: of torch's random numbers while the recipe is carried out.
        version: of the form of the recipe.

    Raises:
        RecipeError: a value is of another kind, or no target, mode, option or observer has such a name.
    """

    target: str
    mode: str = "static"
    options: dict[str, Any] = field(default_factory=dict)
    observer: str | None = None
    ignored: tuple[str, ...] = ()
    sqnr: float | None = None
    size: int | None = None
    latency: float | None = None
    precisions: dict[str, str] = field(default_factory=dict)
    images: Images | None = None
    seed: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        check_fields(self, RecipeError)
        problem = next(problems_of(vars(self)), None)
        if problem is not None:
            raise RecipeError(problem[1])

    def configuration(self) -> Any:
        """What the target's quantizer takes as its global configuration.

        Raises:
            RecipeError: the target cannot be configured so.
        """
        from .configuring import observed_by

        try:
            config = load_target(self.target).modes[self.mode](**self.options)
        except QuantizationError as error:
            raise RecipeError(f"target {self.target!r}, mode {self.mode!r}: {error}") from error
        return config if self.observer is None else observed_by(config, OBSERVERS[self.observer])

    def to_yaml(self) -> str:
        """The recipe as a file that `read_recipe` takes; what has its default is left out, but for the version."""
        standard = {name: one.default for name, one in type(self).__dataclass_fields__.items()}
        lines = [
            f"{name}: {json.dumps(to_plain(value))}"
            for name, value in vars(self).items()
            if name in ("version", "mode") or value not in (standard[name], {})
        ]
        return "\n".join([lines[-1], *lines[:-1]]) + "\n"  # the version first


def problems_of(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, or 'options.name', message) of every name in the fields of a recipe that nothing bears."""
    version, mode, observer = values.get("version", VERSION), values.get("mode", Recipe.mode), values.get("observer")
    if version != VERSION:
        yield "version", f"this recipe has version {version}, and this package reads version {VERSION}"
    try:
        target = load_target(values["target"])
    except RecipeError as error:
        yield "target", str(error)
        return
    if mode not in target.modes:
        yield "mode", _unknown_mode(mode, target)
        return
    yield from _option_problems(values.get("options", {}), target.modes[mode])
    yield from _precision_problems(values.get("precisions", {}), target)
    yield from _budget_problems(values, target)
    if observer is not None and observer not in OBSERVERS:
        yield "observer", f"unknown observer {observer!r}.{did_you_mean(observer, OBSERVERS)}"
    elif observer is not None and mode != "static":
        yield "observer", f"mode {mode!r} observes no activations; leave the observer out"


def _unknown_mode(mode: str, target: Target) -> str:
    if mode == "qat":
        return (
            "mode 'qat' needs a training loop, which no recipe holds: call prepare_qat_pt2e, train, convert_pt2e "
            "(docs/qat.md), or take mode 'static'"
        )
    return f"target {target.name!r} has no mode {mode!r}.{did_you_mean(mode, target.modes)}"


def _option_problems(options: Mapping[str, Any], makes: Any) -> Iterator[tuple[str, str]]:
    known = [name for name in inspect.signature(makes).parameters if name not in _CHOSEN]
    for name in options:
        if name not in known:
            yield f"options.{name}", f"unknown option {name!r}.{did_you_mean(name, known)}"


def _precision_problems(precisions: Mapping[str, Any], target: Target) -> Iterator[tuple[str, str]]:
    known = {FLOAT, *getattr(target.quantizer, "precisions", ())}
    for name, one in precisions.items():
        if one not in known:
            yield f"precisions.{name}", f"{name!r} is to be in unknown format {one!r}.{did_you_mean(str(one), known)}"


def _budget_problems(values: Mapping[str, Any], target: Target) -> Iterator[tuple[str, str]]:
    given = [name for name in ("sqnr", "size", "latency") if values.get(name) is not None]
    if len(given) > 1:
        yield given[1], f"a recipe has one budget, and this one has {' and '.join(given)}"
    for name in (one for one in given if one != "sqnr"):
        if values.get("precisions"):
            yield name, f"a budget of {name} chooses the formats, and `precisions` says them already; leave one out"
        if not getattr(target.quantizer, "precisions", ()):
            yield name, f"a budget of {name} chooses among formats, and the quantizer of {target.name!r} declares none"
    if values.get("latency") is not None and (reason := _untimed(target)):
        yield "latency", f"nothing tells the time of single operators on target {target.name!r}: {reason}"


def _untimed(target: Target) -> str:
    return "its programs are made elsewhere" if target.lowering is None else target.lowering.untimed
