"""How a lowered program is called: like the model, with each tensor in the layout that the program was compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import LoweringError

__all__ = ["CallingConvention"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class CallingConvention:
    """How the arguments of the model become the flat inputs of a program.

    Compilers fix the strides of inputs. So the example inputs are brought into a plain layout before the program is
    compiled with them, and the arguments of each call into the same one.

    Args:
        tree: the structure of (args, kwargs).
        layouts: of each flat input: channels last where the example had it, else contiguous.
    """

    tree: pytree.TreeSpec
    layouts: tuple[torch.memory_format, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallingConvention:
        """That of a program compiled with these example inputs."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        return cls(tree, tuple(map(_layout, leaves)))

    def contiguous(self) -> CallingConvention:
        """That of a program which takes no input channels last."""
        return CallingConvention(self.tree, (torch.contiguous_format,) * len(self.layouts))

    def plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example inputs in their layouts: no views of other strides, nothing expanded."""
        laid: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(self.flatten(args, kwargs), self.tree)
        return laid

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments of a call as the flat inputs of the program, in their layouts.

        Raises:
            LoweringError: they do not fit the calling convention.
        """
        expected = self.tree.child(1).context if self.tree.child(1).type is dict else []
        if set(expected) == set(kwargs):
            kwargs = {name: kwargs[name] for name in expected}  # keywords may come in any order
        leaves, given = pytree.tree_flatten((args, kwargs))
        if given != self.tree:
            raise LoweringError(
                f"the program takes {_describe(self.tree)}, got {_describe(given)}; "
                "pass positional arguments, keywords and containers as the model takes them"
            )
        return [_laid_out(leaf, layout) for leaf, layout in zip(leaves, self.layouts, strict=True)]


def _layout(value: Any) -> torch.memory_format:
    if isinstance(value, Tensor) and value.dim() in _CHANNELS_LAST and not value.is_contiguous():
        channels_last = _CHANNELS_LAST[value.dim()]
        if value.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


def _laid_out(value: Any, layout: torch.memory_format) -> Any:
    if not isinstance(value, Tensor):
        return value
    if layout not in (torch.contiguous_format, _CHANNELS_LAST.get(value.dim())):
        return value  # of other dimensions than the example: the program says so
    laid = value.contiguous(memory_format=layout)
    usual = torch.empty(laid.shape, device="meta").stride()
    is_usual = layout is not torch.contiguous_format or laid.stride() == usual
    return laid if is_usual else laid.reshape(-1).view(laid.shape)  # a dimension of size 1 may have any stride


def _describe(tree: pytree.TreeSpec) -> str:
    positional = tree.child(0).num_leaves
    keywords = list(tree.child(1).context or [])
    return f"{positional} positional tensors" + (f" and keywords {', '.join(map(str, keywords))}" if keywords else "")
