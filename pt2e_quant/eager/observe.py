"""prepare: modules that will be quantized get an observer of their output, `activation_post_process`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import checked
from ..errors import ConversionError, CoverageError
from ..fake_quantize import default_fixed_qparams_range_0to1_fake_quant, default_fixed_qparams_range_neg1to1_fake_quant
from .custom import check_keys
from .fast_paths import close_fast_paths
from .hooks import is_watching, remove_hooks, watch
from .mappings import FUNCTIONALS, default_custom_config, default_static_mapping, observable_classes
from .propagate import propagate_qconfig_
from .rehearsal import Rehearsal
from .stubs import DeQuantStub
from .swap import OBSERVERS, form_of, is_unit

__all__ = ["DEFAULT_MODULE_TO_ACT_POST_PROCESS", "prepare", "remove_observers"]

DEFAULT_MODULE_TO_ACT_POST_PROCESS = {
    nn.Hardsigmoid: default_fixed_qparams_range_0to1_fake_quant,
    nn.Sigmoid: default_fixed_qparams_range_0to1_fake_quant,
    nn.Softmax: default_fixed_qparams_range_0to1_fake_quant,
    nn.Tanh: default_fixed_qparams_range_neg1to1_fake_quant,
}
"""Activations whose range is known: in training they are rounded to the grid that they will have."""


@checked(ConversionError)
def prepare(
    model: nn.Module,
    inplace: bool = False,
    allow_list: Collection[Any] | None = None,
    observer_non_leaf_module_list: Collection[Any] | None = None,
    prepare_custom_config_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Give a float model observers, to be run on calibration data before `convert`.

    Modules get the `qconfig` of the nearest module around them that has one; None leaves them in float.

    Args:
        inplace: change the model that was given.
        allow_list: classes of modules without children that are observed; None for those that `convert` can swap.
            Subclasses that keep `forward` count.
        observer_non_leaf_module_list: classes with children that are observed as a whole.
        prepare_custom_config_dict: 'float_to_observed_custom_module_class' is class -> class with `from_float`;
            'non_traceable_module_name' and 'non_traceable_module_class' list what gets no qconfig. None replaces LSTM
            and MultiheadAttention by forms with observers inside.

    Returns:
        The model with a child `activation_post_process` in each module that is observed.

    Raises:
        CoverageError: no module has a qconfig.
        ConversionError: the model is prepared already, or a key of the custom configuration is unknown.
    """
    custom = default_custom_config() if prepare_custom_config_dict is None else prepare_custom_config_dict
    check_keys(custom, "prepare_custom_config_dict")
    _check_fresh(model)
    if not inplace:
        model = copy.deepcopy(model)
    propagate_qconfig_(model, None, custom)
    _check_any(model)
    classes = observable_classes() if allow_list is None else frozenset(allow_list)
    wholes = frozenset(() if observer_non_leaf_module_list is None else observer_non_leaf_module_list)
    observed = custom.get("float_to_observed_custom_module_class", {})
    made = _Walk(classes, wholes, observed, _device(model)).visit(model, "")
    close_fast_paths(made)
    Rehearsal(default_static_mapping(), frozenset(observed.values())).attach(made)
    return made


def remove_observers(module: nn.Module) -> None:
    """Take what `prepare` added, and qconfigs, from a module and all below it."""
    for one in module.modules():
        one.__dict__.pop("qconfig", None)
        remove_hooks(one)
        if isinstance(one, FUNCTIONALS):
            one.activation_post_process = nn.Identity()
        else:
            one._modules.pop("activation_post_process", None)


class _Walk:
    """One pass over a model. A module that stands in several places is observed once."""

    def __init__(
        self,
        classes: frozenset[Any],
        wholes: frozenset[Any],
        custom: Mapping[Any, Any],
        device: torch.device | None,
    ) -> None:
        self.classes, self.wholes, self.custom, self.device = classes, wholes, custom, device
        self.done: dict[nn.Module, nn.Module] = {}

    def visit(self, module: nn.Module, path: str) -> nn.Module:
        if module not in self.done:
            self.done[module] = self._visit(module, path)
        return self.done[module]

    def _visit(self, module: nn.Module, path: str) -> nn.Module:
        if type(module) is nn.Dropout:
            return module
        if type(module) in self.custom and _has_qconfig(module):
            return self._observed_form(module, path)
        fixed = DEFAULT_MODULE_TO_ACT_POST_PROCESS.get(type(module)) if module.training else None
        if isinstance(module, FUNCTIONALS):
            if _has_qconfig(module):
                module.activation_post_process = self._observer(module, path)
        elif is_unit(module) or type(module) in self.wholes or fixed is not None:
            self._attach(module, path, fixed)
        else:
            self._visit_children(module, path)
            if self._is_observed(module):
                self._attach(module, path)
        return module

    def _visit_children(self, module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if name not in OBSERVERS:
                module._modules[name] = self.visit(child, f"{path}.{name}" if path else name)

    def _observed_form(self, module: nn.Module, path: str) -> nn.Module:
        made = self.custom[type(module)].from_float(module)
        if not hasattr(made, "qconfig"):
            made.qconfig = module.qconfig
        if not getattr(made, "_observes_inside", False):
            self._attach(made, path)
        return made  # type: ignore[no-any-return]

    def _is_observed(self, module: nn.Module) -> bool:
        parts = {name for name, _ in module.named_children()} - {*OBSERVERS, "parametrizations"}
        trains = hasattr(module, "weight_fake_quant")  # AdaRound gives its layers one
        return (trains or not parts) and form_of(module, self.classes) is not None

    def _attach(self, module: nn.Module, path: str, make: Any = None) -> None:
        if _has_qconfig(module) and not isinstance(module, DeQuantStub):
            watch(module, self._observer(module, path, make))

    def _observer(self, module: nn.Module, path: str, make: Any = None) -> nn.Module:
        made: Any = (make or module.qconfig.activation)()  # type: ignore[union-attr,operator]
        if hasattr(made, "site"):
            made.site = f"the output of module {path or '(model)'!r}, {type(module).__name__}"
        device = _device(module) or self.device
        return made if device is None else made.to(device)  # type: ignore[no-any-return]


def _has_qconfig(module: nn.Module) -> bool:
    return getattr(module, "qconfig", None) is not None


def _device(module: nn.Module) -> torch.device | None:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)


def _check_fresh(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(map(is_watching, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
            raise ConversionError(
                f"prepare: module {name or '(model)'!r} is observed already; prepare the float model, once"
            )


def _check_any(model: nn.Module) -> None:
    if not any(map(_has_qconfig, model.modules())):
        raise CoverageError(
            f"prepare: no module of {type(model).__name__} has a qconfig, so nothing would be quantized; set "
            "model.qconfig = get_default_qconfig('x86'), or that of the modules in question"
        )
