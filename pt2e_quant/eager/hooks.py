"""The hooks that `prepare` leaves, and how they are told from those of the user."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Watcher", "is_watching", "remove_hooks", "watch"]


class Watcher:
    """An object whose methods are hooks of `prepare`."""


def watch(module: nn.Module, observer: nn.Module) -> None:
    """Give a module the observer of its output, as `activation_post_process`.

    It comes first among the hooks, so that those of the user see what the quantized module returns.
    """
    module.add_module("activation_post_process", observer)
    if _sees_one_batch(observer):
        module.register_forward_pre_hook(_observe_input, prepend=True)
    else:
        module.register_forward_hook(_observe_output, prepend=True)


def _sees_one_batch(observer: Any) -> bool:
    """Whether the range is that of the last tensor alone: it stands for that of the input, chosen at run time."""
    inner = getattr(observer, "activation_post_process", observer)
    return getattr(inner, "averaging_constant", None) == 1


def _observe_output(module: Any, inputs: Any, output: Any) -> Any:
    """After forward."""
    return module.activation_post_process(output)


def _observe_input(module: Any, inputs: Any) -> Any:
    """Before forward."""
    return module.activation_post_process(inputs[0])


def is_watching(hook: Any) -> bool:
    """Whether a hook is of `prepare`."""
    return hook in (_observe_output, _observe_input) or isinstance(getattr(hook, "__self__", None), Watcher)


def remove_hooks(module: nn.Module) -> None:
    """Take these hooks from one module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if is_watching(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
