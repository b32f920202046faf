"""Which module gets which qconfig: by its path, by its class or the nearest class above it, or that of its parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..checks import checked
from ..errors import TargetingError, did_you_mean

__all__ = ["propagate_qconfig_", "unused_types"]


@checked(TargetingError)
def propagate_qconfig_(
    module: nn.Module,
    qconfig_dict: Mapping[Any, Any] | None = None,
    prepare_custom_config_dict: Mapping[str, Any] | None = None,
) -> None:
    """Set `qconfig` on every module of a model, in place.

    A module that has one keeps it. The others get that of their path, else of the nearest of their classes, else of
    their parent, else None.

    Args:
        qconfig_dict: paths of modules and classes -> QConfig, or None to leave what it names in float.
        prepare_custom_config_dict: 'non_traceable_module_name' and 'non_traceable_module_class' list children that
            get none, by name and by class.

    Raises:
        TargetingError: a key is neither a path of this model nor a class of modules, or a value is no qconfig.
    """
    given = qconfig_dict or {}
    _check(module, given)
    _propagate(module, "", given, None, prepare_custom_config_dict or {})


def unused_types(model: nn.Module, keys: Mapping[Any, Any]) -> list[type]:
    """Classes among the keys that no module of the model is of."""
    kinds = [key for key in keys if isinstance(key, type)]
    return [kind for kind in kinds if not any(isinstance(module, kind) for module in model.modules())]


def _check(model: nn.Module, given: Mapping[Any, Any]) -> None:
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for key, qconfig in given.items():
        if not (isinstance(key, str) or (isinstance(key, type) and issubclass(key, nn.Module))):
            raise TargetingError(f"a qconfig is given by the path of a module or by a class of modules, not by {key!r}")
        if isinstance(key, str) and key not in paths:
            raise TargetingError(f"{type(model).__name__} has no module {key!r}.{did_you_mean(key, paths)}")
        if qconfig is not None and not callable(getattr(qconfig, "weight", None)):
            raise TargetingError(f"{key!r} is given {qconfig!r}; give a QConfig, or None to leave it in float")


def _propagate(module: nn.Module, path: str, given: Mapping[Any, Any], parents: Any, custom: Mapping[str, Any]) -> None:
    of_class = next((given[kind] for kind in type(module).__mro__ if kind in given), parents)
    qconfig = getattr(module, "qconfig", given.get(path, of_class))
    module.qconfig = qconfig
    names = custom.get("non_traceable_module_name", ())
    kinds = tuple(custom.get("non_traceable_module_class", ()))
    for name, child in module.named_children():
        if name not in names and type(child) not in kinds:
            _propagate(child, f"{path}.{name}" if path else name, given, qconfig, custom)
