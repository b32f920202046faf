"""What a model can be quantized for: installed quantizers that say by which modes, and the lowering of each.

A target is the name of an entry point in the group `pt2e_quant.quantizers`, or a short name for one of ours. Its class
has `modes`, what makes the configuration of each, and `lowers_to`, the lowering that runs its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from torch.fx import GraphModule

from ..debug.timing import JOINED
from ..errors import RecipeError, TargetingError, did_you_mean
from ..lowering.common.program import LoweredProgram
from ..quantizer.registry import find_quantizers, load_quantizer

__all__ = ["LOWERINGS", "Lowering", "Target", "find_targets", "load_target"]

_SHORT = MappingProxyType({"x86": "x86_inductor", "onnx": "onnx_runtime"})


@dataclass(frozen=True)
class Lowering:
    """A function of this package that makes a program.

    Args:
        package, function: where it stands; imported when it is used, since each needs packages of its own.
        suffix: of the file.
        arguments: what it is called with besides the graph.
        repeats: whether the same graph gives the same bytes.
        untimed: why its profile is no base for a budget of latency; '' where it is one.
    """

    package: str
    function: str
    suffix: str
    arguments: Mapping[str, Any]
    repeats: bool
    untimed: str = ""

    def __call__(self, converted: GraphModule, **more: Any) -> LoweredProgram:
        lower = getattr(import_module(f"..lowering.{self.package}", __package__), self.function)
        return lower(converted, **self.arguments, **more)  # type: ignore[no-any-return]


LOWERINGS: Mapping[str, Lowering] = MappingProxyType(
    {
        "executorch": Lowering("executorch", "lower_to_executorch", ".pte", {}, repeats=True),
        "inductor": Lowering("inductor", "lower_to_inductor", ".pt2", {"mode": "aoti"}, repeats=False, untimed=JOINED),
        "onnx": Lowering("onnx", "lower_to_onnx", ".onnx", {}, repeats=True),
    }
)


@dataclass(frozen=True)
class Target:
    """A quantizer by name.

    Args:
        name: as in a recipe.
        quantizer: the class.
        modes: makes the configuration of each mode, from the options of the recipe.
        lowering: what makes a program of its graphs; None where this package has no such lowering.
    """

    name: str
    quantizer: Any
    modes: Mapping[str, Callable[..., Any]]
    lowering: Lowering | None


def find_targets() -> dict[str, str]:
    """The name of each target, and the entry point of its quantizer; nothing is imported."""
    points = {name: point.value for name, point in find_quantizers().items()}
    short = {name: points[long] for name, long in _SHORT.items() if long in points}
    others = {name: value for name, value in points.items() if name not in _SHORT.values()}
    return dict(sorted((others | short).items()))


def load_target(name: str) -> Target:
    """The target of this name.

    Raises:
        RecipeError: nothing installed has the name, it cannot be imported, or it does not say what its modes are.
    """
    known = find_targets()
    long = _SHORT.get(name, name)
    if name not in known and long not in find_quantizers():
        raise RecipeError(f"unknown target {name!r}.{did_you_mean(name, known)}")
    try:
        quantizer: Any = load_quantizer(long)
    except TargetingError as error:
        raise RecipeError(str(error)) from error
    modes = getattr(quantizer, "modes", {})
    if not modes:
        raise RecipeError(
            f"the quantizer of target {name!r} has no modes to choose by name; pass one that is configured: "
            f"target={quantizer.__name__}()..."
        )
    return Target(name, quantizer, modes, LOWERINGS.get(getattr(quantizer, "lowers_to", "")))
