"""fuse_modules: modules that run one after another become one, which has one grid at its end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..checks import checked
from ..errors import ConversionError, TargetingError, did_you_mean
from ..nn.intrinsic.containers import container_of
from .chains import find_chains

__all__ = ["FOLDED", "fuse_known_modules", "fuse_modules", "fuse_modules_qat", "is_known"]

_Fuser = Callable[..., Sequence[nn.Module]]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FOLDED = (
    *zip((nn.Conv1d, nn.Conv2d, nn.Conv3d), _NORMS, strict=True),
    *zip((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _NORMS, strict=True),
    (nn.Linear, nn.BatchNorm1d),
)
"""Pairs whose batch norm goes into the weight in evaluation."""


@checked(ConversionError)
def fuse_modules(
    model: nn.Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]] | None = None,
    inplace: bool = False,
    fuser_func: _Fuser | None = None,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
) -> nn.Module:
    """Fuse rows of modules of a model in evaluation mode. Batch norms go into the weights before them.

    Args:
        modules_to_fuse: a list of paths of modules in the order in which they run, or a list of such lists. None finds
            them: the model runs once on `example_inputs`; modules that hand a tensor to the next one alone are fused.
        inplace: change the model that was given.
        fuser_func: from modules to as many modules; None for `fuse_known_modules`.
        fuse_custom_config_dict: 'additional_fuser_method_mapping' is classes -> function of (is_qat, *modules).
        example_inputs: positional arguments of the model.

    Returns:
        The model; the first module of each row is the fused one, an Identity stands for the others.

    Raises:
        TargetingError: a path is not in the model.
        ConversionError: modules are not known to fuse, are in training mode, or nothing says which to fuse.
    """
    return _fuse(model, modules_to_fuse, False, inplace, fuser_func, fuse_custom_config_dict, example_inputs)


@checked(ConversionError)
def fuse_modules_qat(
    model: nn.Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]] | None = None,
    inplace: bool = False,
    fuser_func: _Fuser | None = None,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
) -> nn.Module:
    """`fuse_modules` for a model that is trained on: batch norms stay, in a container with the product before them."""
    return _fuse(model, modules_to_fuse, True, inplace, fuser_func, fuse_custom_config_dict, example_inputs)


def _fuse(
    model: nn.Module,
    rows: Sequence[str] | Sequence[Sequence[str]] | None,
    is_qat: bool,
    inplace: bool,
    fuser: _Fuser | None,
    custom: Mapping[str, Any] | None,
    example_inputs: tuple[Any, ...] | None,
) -> nn.Module:
    if not inplace:
        model = copy.deepcopy(model)
    if rows is None and example_inputs is None:
        raise ConversionError("fuse_modules: pass a list of paths, or example_inputs to find what can be fused")
    if rows is None:
        rows = find_chains(model, example_inputs or (), lambda modules: is_known(modules, is_qat))
    one_row = [path for path in rows if isinstance(path, str)]
    listed = [one_row] if one_row else [row for row in rows if not isinstance(row, str)]
    extra = (custom or {}).get("additional_fuser_method_mapping", {})
    for row in listed:
        modules = [_at(model, path) for path in row]
        for path, made in zip(row, (fuser or fuse_known_modules)(modules, is_qat, extra), strict=True):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made)
    return model


def _at(model: nn.Module, path: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if not path or path not in modules:
        raise TargetingError(f"{type(model).__name__} has no module {path!r}.{did_you_mean(path, modules)}")
    return model.get_submodule(path)


@checked(ConversionError)
def fuse_known_modules(
    mod_list: Sequence[nn.Module], is_qat: bool, additional_fuser_method_mapping: Mapping[Any, Any] | None = None
) -> list[nn.Module]:
    """As many modules: the fused one, then Identity. Hooks before the first and after the last go along.

    Raises:
        ConversionError: these modules do not fuse, or they are not in one mode.
    """
    kinds = tuple(type(module) for module in mod_list)
    custom = (additional_fuser_method_mapping or {}).get(kinds)
    if custom is None and not is_known(mod_list, is_qat):
        names = [kind.__name__ for kind in kinds]
        raise ConversionError(
            f"{names} are not known to fuse. Give them in the order in which they run: a convolution or linear, its "
            "batch norm, ReLU; or a batch norm and ReLU"
        )
    if len({module.training for module in mod_list}) > 1 or (not is_qat and mod_list[0].training):
        raise ConversionError(
            "modules are fused in evaluation, all in one mode; call model.eval() first, or fuse_modules_qat to train on"
        )
    hooks = _taken(mod_list[0]._forward_pre_hooks), _taken(mod_list[-1]._forward_hooks)  # folding copies what it finds
    made: nn.Module = custom(is_qat, *mod_list) if custom is not None else _made(list(mod_list), is_qat)
    for before in hooks[0]:
        made.register_forward_pre_hook(before)
    for after in hooks[1]:
        made.register_forward_hook(after)
    rest: list[nn.Module] = [nn.Identity().train(mod_list[0].training) for _ in mod_list[1:]]
    return [made, *rest]


def is_known(modules: Sequence[nn.Module], is_qat: bool) -> bool:
    """Whether `fuse_known_modules` fuses these, in this order."""
    if not is_qat and _folds(modules):
        return len(modules) == 2 or container_of([modules[0], *modules[2:]]) is not None
    found = container_of(modules)
    return found is not None and (is_qat or not any(issubclass(part, _NORMS) for part in found.parts[1:]))


def _folds(modules: Sequence[nn.Module]) -> bool:
    return len(modules) > 1 and any(
        isinstance(modules[0], product) and isinstance(modules[1], norm) for product, norm in FOLDED
    )


def _made(modules: list[Any], is_qat: bool) -> Any:
    if not is_qat and _folds(modules):
        modules = [_folded(*modules[:2]), *modules[2:]]
    return modules[0] if len(modules) == 1 else container_of(modules)(*modules).train(modules[0].training)


def _folded(product: Any, norm: Any) -> Any:
    if isinstance(product, nn.Linear):
        return nn.utils.fusion.fuse_linear_bn_eval(product, norm)
    transposed = isinstance(product, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return nn.utils.fusion.fuse_conv_bn_eval(product, norm, transpose=transposed)


def _taken(hooks: Any) -> list[Any]:
    taken = list(hooks.values())
    hooks.clear()
    return taken
