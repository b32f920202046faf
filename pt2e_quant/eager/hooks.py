"""The hooks that `prepare` leaves, and how they are told from those of the user."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Watcher", "is_watching", "observe_input", "observe_output", "remove_hooks"]


class Watcher:
    """An object whose methods are hooks of `prepare`."""


def observe_output(module: Any, inputs: Any, output: Any) -> Any:
    """After forward."""
    return module.activation_post_process(output)


def observe_input(module: Any, inputs: Any) -> Any:
    """Before forward."""
    return module.activation_post_process(inputs[0])


def is_watching(hook: Any) -> bool:
    """Whether a hook is of `prepare`."""
    return hook in (observe_output, observe_input) or isinstance(getattr(hook, "__self__", None), Watcher)


def remove_hooks(module: nn.Module) -> None:
    """Take these hooks from one module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if is_watching(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
