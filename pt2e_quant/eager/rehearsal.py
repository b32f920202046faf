"""The first run of a prepared model shows where float and quantized tensors will meet, before anything is converted.

Every tensor that will be quantized has a shadow, a QTensor without data. What the model's code does to the tensor is
done to the shadow too: an operator that quantized tensors do not have then says so itself, with the line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import QuantizedTensorError
from ..nn.quantized import DeQuantize, Dropout, Embedding, FXFloatFunctional, Quantize
from ..qtensor import QTensor
from ..qtensor.operators import calling_line
from ..qtensor.tensor import wrap
from .hooks import Watcher
from .mappings import FUNCTIONALS
from .report import Meeting
from .swap import form_of

__all__ = ["Rehearsal", "rehearsal_of"]

_UNFUSED = "; or fuse this batch norm with the product before it (fuse_modules)"
_METHODS = [name for name in vars(FXFloatFunctional) if not name.startswith("_") and name != "forward"]
_WITHOUT_STUB = (
    "takes a quantized tensor, and gets a float one. Put a QuantStub in front of it, or give it the qconfig None"
)


class Rehearsal(Watcher):
    """Hooks of a prepared model that look at its first run.

    Args:
        mapping: what modules become.
        opaque: classes of observed modules that take care of their own insides.

    meetings: what was found; None before the first run that ends.
    """

    def __init__(self, mapping: Mapping[Any, Any], opaque: frozenset[Any]) -> None:
        self.mapping, self.opaque = mapping, opaque
        self.meetings: tuple[Meeting, ...] | None = None
        self._watch: _Watch | None = None

    def attach(self, model: nn.Module) -> None:
        """Look at the next run of a model."""
        model.register_forward_pre_hook(self.start)
        model.register_forward_hook(self.finish, always_call=True)

    def start(self, model: nn.Module, inputs: Any) -> None:
        """Before forward."""
        if self.meetings is None and self._watch is None and not torch.compiler.is_compiling():
            self._watch = _Watch(model, self.mapping, self.opaque)
            self._watch.look()
            self._watch.begin(inputs)

    def finish(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """After forward; one that failed leaves no output, and the next run is looked at."""
        watch = self._watch
        if watch is None or watch.model is not model:
            return
        self._watch = None
        watch.look_away()
        watch.remove()
        if output is not None:
            self.meetings = tuple(watch.found.values())


def rehearsal_of(model: nn.Module) -> Rehearsal | None:
    """What looked at the first run of a prepared model."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Rehearsal)), None)


class _Watch(TorchFunctionMode):
    """One run. Functions that modules of the mapping call are not looked at: those modules become others."""

    def __init__(self, model: nn.Module, mapping: Mapping[Any, Any], opaque: frozenset[Any]) -> None:
        super().__init__()
        self.model, self.mapping, self.opaque = model, mapping, opaque
        self.found: dict[str, Meeting] = {}
        self.shadows: Any = WeakTensorKeyDictionary()
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.inside: nn.Module | None = None
        self.looks = False
        self.known: dict[Any, Any] = {}
        self.handles: list[Any] = []
        self.functionals: list[nn.Module] = []
        for module in self.names:
            self._look_at(module)

    def look(self) -> None:
        """Functions come here first."""
        if not self.looks:
            self.__enter__()  # type: ignore[no-untyped-call]
        self.looks = True

    def look_away(self) -> None:
        """Functions do not, as those of an observer are many; a mode that the model has entered since must stay."""
        if self.looks and _get_current_function_mode() is self:
            self.__exit__(None, None, None)
            self.looks = False

    def begin(self, inputs: Any) -> None:
        """The model itself runs already, too late for hooks."""
        self._enter(self.model, inputs, form=self._form(self.model))

    def remove(self) -> None:
        """Leave the modules as they were."""
        for handle in self.handles:
            handle.remove()
        for module in self.functionals:
            for name in _METHODS:
                module.__dict__.pop(name, None)

    def _look_at(self, module: nn.Module) -> None:
        form = self._form(module)
        if isinstance(module, FUNCTIONALS):
            if form is not None:
                self.functionals.append(module)
                for name in _METHODS:
                    module.__dict__[name] = self._functional(module, getattr(module, name))
        elif module is not self.model:
            self._hook(module, form)

    def _hook(self, module: nn.Module, form: Any) -> None:
        self.handles.append(module.register_forward_pre_hook(functools.partial(self._enter, form=form)))
        self.handles.append(module.register_forward_hook(functools.partial(self._leave, form=form)))

    def _form(self, module: nn.Module) -> Any:
        """What a module becomes; None where it stays."""
        if getattr(module, "qconfig", None) is None:
            return None
        return nn.Module if type(module) in self.opaque else self.mapping.get(form_of(module, self.mapping))

    # --- modules that become others -----------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, inputs: Any, *, form: Any) -> None:
        self.running.append(module)
        if self.inside is not None or form is None:
            return
        self.inside = module
        if _needs_quantized(form) and not self._is_shadowed(inputs[:1]):
            self._report_call(f"{type(module).__name__} {_WITHOUT_STUB}")
        self.look_away()

    def _leave(self, module: nn.Module, inputs: Any, output: Any, *, form: Any) -> Any:
        self.running.pop()
        if self.inside is not module:
            return output
        if form in (Quantize, DeQuantize):
            output = output.view_as(output)  # stubs return what they get, which may be read elsewhere
        self.inside = None
        if form is Dropout:
            self._take(output, self._shadowed(inputs))
        elif form is not DeQuantize and not issubclass(form, Embedding):
            self._shade(output)
        self.look()
        return output

    def _functional(self, module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.inside is not None:  # a layer that takes care of its own insides
                return method(*args, **kwargs)
            self.running.append(module)
            if not all(self._is_shadowed([one]) for one in _floats((args, kwargs))):
                self._report_call(f"FloatFunctional.{method.__name__} {_WITHOUT_STUB}")
            self.inside = module
            self.look_away()
            result = method(*args, **kwargs)
            self.inside = None
            self.running.pop()
            self._shade(result)
            self.look()
            return result

        return watched

    # --- functions ----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = None if self.inside is not None else self._shadowed((args, kwargs))
        result = func(*args, **kwargs)
        if before is not None:
            self._follow(func, before, result)
        return result

    def _shadowed(self, arguments: Any) -> Any:
        """The arguments with shadows in the place of tensors; None where none has one."""
        if not self._is_shadowed(arguments):
            return None
        return pytree.tree_map_only(Tensor, self._shadow_or_meta, arguments)

    def _shadow_or_meta(self, x: Tensor) -> Tensor:
        return self.shadows[x] if x in self.shadows else torch.empty_like(x, device="meta")

    def _follow(self, func: Any, arguments: Any, result: Any) -> None:
        alike = func, repr(pytree.tree_map_only(Tensor, _shown, arguments))
        try:
            if alike not in self.known:
                self.known[alike] = func(*arguments[0], **arguments[1])
        except QuantizedTensorError as error:
            norm = bool(self.running) and isinstance(self.running[-1], nn.modules.batchnorm._BatchNorm)
            self._report(f"{error}{_UNFUSED if norm else ''}")
        except Exception:  # noqa: BLE001  # it needs data, which shadows have not: what comes out may be quantized
            pass
        else:
            self._take(result, self.known[alike])
            return
        self._shade(result)

    def _take(self, result: Any, made: Any) -> None:
        """Shadows of what a function returned."""
        for one, shadow in zip(pytree.tree_leaves(result), pytree.tree_leaves(made), strict=False):
            if isinstance(one, Tensor) and isinstance(shadow, QTensor):
                self.shadows[one] = shadow

    # --- shadows ------------------------------------------------------------------------------------------------------

    def _is_shadowed(self, values: Any) -> bool:
        return any(isinstance(one, Tensor) and one in self.shadows for one in pytree.tree_leaves(values))

    def _shade(self, values: Any) -> None:
        for one in _floats(values):
            codes = torch.empty_like(one, dtype=torch.uint8, device="meta", requires_grad=False)
            self.shadows[one] = wrap(codes, 1.0, 0, None, torch.quint8)

    def _report_call(self, what: str) -> None:
        self._report(f"{what}\n  {calling_line()}")

    def _report(self, what: str) -> None:
        name = self.names[self.running[-1]] if self.running else ""
        self.found.setdefault(f"{name} {what}", Meeting(name, what))


def _needs_quantized(form: Any) -> bool:
    return form not in (Quantize, DeQuantize, Dropout, nn.Module) and not issubclass(form, Embedding)


def _shown(x: Tensor) -> Any:
    """All that a tensor without data is."""
    return type(x), x.shape, x.stride(), x.dtype


def _floats(values: Any) -> list[Tensor]:
    return [one for one in pytree.tree_leaves(values) if isinstance(one, Tensor) and one.is_floating_point()]
