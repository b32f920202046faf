"""Replace modules that have a qconfig by their quantized forms, and note what stays float and why."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..checks import checked
from ..errors import ConversionError, QuantizationError
from ..nn.rows import dynamic_classes, quantized_classes
from .fast_paths import close_fast_paths, reader_of_child
from .report import Stayed, Swapped, SwapReport

__all__ = ["default_dynamic_mapping", "swap_all", "swap_module"]

_NO_QCONFIG = "it has no qconfig: nothing that was given names it, its class or a module around it"


def default_dynamic_mapping() -> dict[type[nn.Module], type[nn.Module]]:
    """Float class of torch.nn -> quantized class that takes and returns float tensors, from the table of rows."""
    weights_alone = {name: quantized_classes()[name] for name in ("Embedding", "EmbeddingBag")}
    forms = {**dynamic_classes(), **weights_alone}
    return {getattr(nn, name): kind for name, kind in forms.items() if "." not in name}


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
    if _why_float(mod, mapping, custom_module_class_mapping or {}) is not None:
        return mod
    return _swapped(mod, mapping, custom_module_class_mapping or {}, use_precomputed_fake_quant)


def swap_all(model: nn.Module, mapping: Mapping[Any, Any], *, inplace: bool) -> tuple[nn.Module, SwapReport]:
    """Swap every module of a model in place; the model itself, too, unless that must stay the same object."""
    walk = _Walk(mapping, model if inplace else None)
    made = walk.visit(model, "", None)
    close_fast_paths(made)
    return made, SwapReport(tuple(walk.swapped), tuple(walk.stayed))


class _Walk:
    """One pass over a model. A module that stands in several places is swapped once."""

    def __init__(self, mapping: Mapping[Any, Any], fixed: nn.Module | None) -> None:
        self.mapping, self.fixed = mapping, fixed
        self.swapped: list[Swapped] = []
        self.stayed: list[Stayed] = []
        self.done: dict[nn.Module, nn.Module] = {}

    def visit(self, module: nn.Module, path: str, reader: str | None) -> nn.Module:
        if module not in self.done:
            self.done[module] = self._visit(module, path, reader)
        return self.done[module]

    def _visit(self, module: nn.Module, path: str, reader: str | None) -> nn.Module:
        reason = reader or _why_float(module, self.mapping, {})
        if reason is None and module is self.fixed:
            reason = "the model itself cannot be replaced in place; take what the call returns, with inplace=False"
        if reason is None:
            return self._swap(module, path)
        if next(module.parameters(recurse=False), None) is not None:
            self.stayed.append(Stayed(path, type(module).__name__, reason))
        for name, child in list(module._modules.items()):
            if child is not None:
                where = f"{path}.{name}" if path else name
                module._modules[name] = self.visit(child, where, reader_of_child(module, name))
        return module

    def _swap(self, module: nn.Module, path: str) -> nn.Module:
        try:
            made = _swapped(module, self.mapping, {}, False)
        except QuantizationError as error:
            raise ConversionError(
                f"module {path or '(model)'!r}, {type(module).__name__}: {error}. To leave it in float, give its path "
                "the qconfig None"
            ) from error
        self.swapped.append(Swapped(path, type(module).__name__, made._get_name()))
        return made


def _form(module: nn.Module, mapping: Mapping[Any, Any]) -> Any:
    return next((kind for kind in type(module).__mro__ if kind in mapping), None)


def _why_float(module: nn.Module, mapping: Mapping[Any, Any], custom: Mapping[Any, Any]) -> str | None:
    if not hasattr(module, "qconfig"):
        return _NO_QCONFIG
    if module.qconfig is None:
        return f"{_NO_QCONFIG}, or they are given None"
    if type(module) in custom:
        return None
    kind = _form(module, mapping)
    if kind is None:
        return f"the mapping has no quantized form of {type(module).__name__}"
    if type(module).forward is not kind.forward:
        name = type(module).__name__
        return (
            f"{name} has a forward of its own, which the quantized form of {kind.__name__} would drop; name a form of "
            f"yours with mapping={{**default_dynamic_mapping(), {name}: ...}}"
        )
    return None


def _swapped(module: nn.Module, mapping: Mapping[Any, Any], custom: Mapping[Any, Any], precomputed: bool) -> nn.Module:
    if type(module) in custom:
        made = custom[type(module)].from_observed(module)
    else:
        make = mapping[_form(module, mapping)].from_float
        takes = "use_precomputed_fake_quant" in inspect.signature(make).parameters
        made = make(module, use_precomputed_fake_quant=precomputed) if takes else make(module)
    return _like(module, made)


def _like(module: nn.Module, made: nn.Module) -> nn.Module:
    for hook in module._forward_pre_hooks.values():
        made.register_forward_pre_hook(hook)
    for after in module._forward_hooks.values():
        made.register_forward_hook(after)
    parameter = next(module.parameters(), None)
    return made.train(module.training) if parameter is None else made.train(module.training).to(parameter.device)
