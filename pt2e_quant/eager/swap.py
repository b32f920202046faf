"""Replace modules that have a qconfig by their quantized forms, and note what stays float and why."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checks import checked
from ..errors import ConversionError, QuantizationError
from ..nn.intrinsic.containers import FusedModule
from ..nn.observed import weight_grid, weight_observer
from .fast_paths import close_fast_paths, reader_of_child
from .hooks import is_watching
from .report import Stayed, Swapped, SwapReport

__all__ = ["OBSERVERS", "Forms", "form_of", "is_unit", "never_ran", "swap_all", "swap_module"]

OBSERVERS = ("activation_post_process", "weight_fake_quant")
"""Children that are no layers of the model."""

_NO_QCONFIG = "it has no qconfig: nothing that was given names it, its class or a module around it"


NEVER_RAN = "it never ran in calibration, so its output has no range"


@dataclass(frozen=True)
class Forms:
    """What modules become.

    mapping:     class -> class with `from_float`
    custom:      class of an observed module -> class with `from_observed`
    precomputed: weights are not shown to their observers again
    """

    mapping: Mapping[Any, Any]
    custom: Mapping[Any, Any]
    precomputed: bool = False


@checked(ConversionError)
def swap_module(
    mod: nn.Module,
    mapping: Mapping[Any, Any],
    custom_module_class_mapping: Mapping[Any, Any] | None = None,
    use_precomputed_fake_quant: bool = False,
) -> nn.Module:
    """The quantized form of one module; the module itself where it has no qconfig, or nothing to become.

    Args:
        mapping: float class -> quantized class with `from_float`. Subclasses that keep `forward` count.
        custom_module_class_mapping: class -> class with `from_observed`.
        use_precomputed_fake_quant: do not show the weight to its observer again.

    Hooks, the device and the training mode are kept.

    Raises:
        QuantizationError: `from_float` refuses the module.
    """
    forms = Forms(mapping, custom_module_class_mapping or {}, use_precomputed_fake_quant)
    return mod if _why_float(mod, forms) is not None else _swapped(mod, forms)


def swap_all(model: nn.Module, forms: Forms, *, inplace: bool) -> tuple[nn.Module, SwapReport]:
    """Swap every module of a model in place; the model itself, too, unless that must stay the same object."""
    walk = _Walk(forms, model if inplace else None)
    made = walk.visit(model, "", None)
    close_fast_paths(made)
    return made, SwapReport(tuple(walk.swapped), tuple(walk.stayed))


class _Walk:
    """One pass over a model. A module that stands in several places is swapped once."""

    def __init__(self, forms: Forms, fixed: nn.Module | None) -> None:
        self.forms, self.fixed = forms, fixed
        self.swapped: list[Swapped] = []
        self.stayed: list[Stayed] = []
        self.done: dict[nn.Module, nn.Module] = {}

    def visit(self, module: nn.Module, path: str, reader: str | None) -> nn.Module:
        if module not in self.done:
            self.done[module] = self._visit(module, path, reader)
        return self.done[module]

    def _visit(self, module: nn.Module, path: str, reader: str | None) -> nn.Module:
        reason = reader or _why_float(module, self.forms) or (NEVER_RAN if never_ran(module) else None)
        if reason is None and module is self.fixed:
            reason = "the model itself cannot be replaced in place; take what the call returns, with inplace=False"
        if reason is NEVER_RAN or (reason and next(module.parameters(recurse=is_unit(module)), None) is not None):
            self.stayed.append(Stayed(path, type(module).__name__, reason))
        if not (is_unit(module) or type(module) in self.forms.custom):
            self._visit_children(module, path)
        return self._swap(module, path) if reason is None else module

    def _visit_children(self, module: nn.Module, path: str) -> None:
        for name, child in list(module._modules.items()):
            if child is not None and name not in OBSERVERS:
                where = f"{path}.{name}" if path else name
                module._modules[name] = self.visit(child, where, reader_of_child(module, name))

    def _swap(self, module: nn.Module, path: str) -> nn.Module:
        try:
            made = _swapped(module, self.forms)
        except QuantizationError as error:
            raise ConversionError(
                f"module {path or '(model)'!r}, {type(module).__name__}: {error}. To leave it in float, give its path "
                "the qconfig None"
            ) from error
        self.swapped.append(Swapped(path, type(module).__name__, made._get_name()))
        return made


def never_ran(module: nn.Module) -> bool:
    """Whether a module has an observer that waits for its first tensor.

    A functional that was called with numbers alone ran, and its observer saw nothing: results keep the tensor's grid.
    """
    if getattr(module, "_takes_numbers", False):
        return False
    observer = getattr(module, "activation_post_process", None)
    inner = getattr(observer, "activation_post_process", observer)
    return getattr(inner, "has_data", True) is False


def is_unit(module: nn.Module) -> bool:
    """Whether a module is swapped and observed as a whole: one that fuses others."""
    return isinstance(module, FusedModule)


def form_of(module: nn.Module, kinds: Any) -> Any:
    """The class among `kinds` that a module is of; None where it is of none, or has a `forward` of its own."""
    kind = _nearest(module, kinds)
    return kind if kind is not None and type(module).forward is kind.forward else None


def _nearest(module: nn.Module, kinds: Any) -> Any:
    return next((kind for kind in type(module).__mro__ if kind in kinds), None)


def _why_float(module: nn.Module, forms: Forms) -> str | None:
    if not hasattr(module, "qconfig"):
        return _NO_QCONFIG
    if module.qconfig is None:
        return f"{_NO_QCONFIG}, or they are given None"
    if type(module) in forms.custom or form_of(module, forms.mapping) is not None:
        return None
    kind, name = _nearest(module, forms.mapping), type(module).__name__
    if kind is None:
        return f"the mapping has no quantized form of {name}"
    return (
        f"{name} has a forward of its own, which the quantized form of {kind.__name__} would drop; name a form of "
        f"yours with mapping={{**default_dynamic_mapping(), {name}: ...}}, or default_static_mapping()"
    )


def _swapped(module: nn.Module, forms: Forms) -> nn.Module:
    if type(module) in forms.custom:
        return _like(module, forms.custom[type(module)].from_observed(module))
    kind = forms.mapping[form_of(module, forms.mapping)]
    if getattr(kind, "_IS_REFERENCE", False):
        return _like(module, kind.from_float(module, _weight_grids(module)))
    takes = "use_precomputed_fake_quant" in inspect.signature(kind.from_float).parameters
    options = {"use_precomputed_fake_quant": forms.precomputed} if takes else {}
    return _like(module, kind.from_float(module, **options))


def _weight_grids(module: nn.Module) -> dict[str, Any]:
    """What a reference module is told: of its weight, or by name of each of several."""
    names = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight")]
    grids = {name: weight_grid(getattr(module, name), weight_observer(module, module)) for name in names}
    return grids["weight"] if names == ["weight"] else grids


def _like(module: nn.Module, made: nn.Module) -> nn.Module:
    for hook in module._forward_pre_hooks.values():
        if not is_watching(hook):
            made.register_forward_pre_hook(hook)
    for after in module._forward_hooks.values():
        if not is_watching(after):
            made.register_forward_hook(after)
    parameter = next(module.parameters(), None)
    return made.train(module.training) if parameter is None else made.train(module.training).to(parameter.device)
