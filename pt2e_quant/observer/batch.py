"""A batch of calibration counts as a whole or not at all.

A run of a prepared model can fail half-way: NaN in the middle, a wrong shape, Ctrl-C. By then the observers before that
place have taken the batch in. `whole_batch` surrounds the run; observers tell it how to take back what they are about
to do, and when the run fails, all of it is taken back.

Before this: nothing. After it: every observer and fake quantizer; the engine hangs `whole_batch` on what it prepares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["remember", "take_back", "whole_batch"]

_steps: ContextVar[list[Callable[[], object]] | None] = ContextVar("steps", default=None)
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_PACKAGE = __name__.partition(".")[0]


@contextmanager
def whole_batch(model: nn.Module) -> Iterator[None]:
    """Around a run of a prepared model: if it fails, every observer in it is as before."""
    if _steps.get() is not None:  # a model inside another one
        yield
        return
    steps: list[Callable[[], object]] = []
    token = _steps.set(steps)
    try:
        for observer in filter(_is_foreign, model.modules()):
            steps += [partial(_give_back_all, part, _state(part)) for part in observer.modules()]
        yield
    except BaseException:
        for step in reversed(steps):
            step()
        raise
    finally:
        _steps.reset(token)


def take_back(step: Callable[[], object]) -> None:
    """Have `step` called if the run that is under way fails later on."""
    steps = None if torch.compiler.is_compiling() else _steps.get()
    if steps is not None:
        steps.append(step)


def remember(module: nn.Module, *names: str) -> None:
    """Have these attributes hold what they hold now, if the run that is under way fails later on."""
    if not torch.compiler.is_compiling() and _steps.get() is not None:
        take_back(partial(_give_back, module, {name: _copy(getattr(module, name)) for name in names}))


def _is_foreign(module: nn.Module) -> bool:
    """Observers of others know nothing of this file: what they hold is copied before every run."""
    return hasattr(module, "calculate_qparams") and type(module).__module__.partition(".")[0] != _PACKAGE


def _state(module: nn.Module) -> dict[str, Any]:
    held = {**vars(module), **module._buffers, **module._parameters}
    return {name: _copy(value) for name, value in held.items() if name not in _OF_ANY_MODULE}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


def _give_back_all(module: nn.Module, held: dict[str, Any]) -> None:
    for name in _state(module).keys() - held.keys():
        delattr(module, name)
    _give_back(module, held)


def _give_back(module: nn.Module, held: dict[str, Any]) -> None:
    for name, value in held.items():
        now = getattr(module, name)
        if isinstance(now, Tensor) and isinstance(value, Tensor):
            now.data = value  # the object stays: an optimizer, or another module, may hold it
        else:
            setattr(module, name, value)
