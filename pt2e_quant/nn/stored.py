"""What the reference's modules left in files: script objects, read without their C++ classes.

After this: each module whose state has one reads it, in a state dict and in a pickle of the whole module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..qtensor import from_torch

__all__ = ["StoredScript", "cell_of", "is_script", "linear_of", "table_of"]


class StoredScript:
    """Stands for a torch.ScriptObject in files that are loaded with weights_only=True: its fields, without methods."""

    def __setstate__(self, state: tuple[Any, str]) -> None:
        self.state = state

    def __getstate__(self) -> tuple[Any, str]:
        return self.state


torch.serialization.add_safe_globals([(StoredScript, "torch.ScriptObject")])


def is_script(stored: object) -> bool:
    """Whether a file has a script object here."""
    return isinstance(stored, (StoredScript, torch.ScriptObject))


def linear_of(stored: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, as a file holds them: a pair, or a script object."""
    weight, bias = _fields(stored)[:2] if is_script(stored) else stored
    return from_torch(weight), bias


def cell_of(stored: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Weights and biases of one layer of an RNN in one direction: pairs, or a script object."""
    return [linear_of(one) for one in (_fields(stored)[4] if is_script(stored) else stored)]


def table_of(stored: Any) -> Tensor:
    """The table of an embedding, from a script object."""
    return from_torch(_fields(stored)[1][0])  # type: ignore[no-any-return]


def _fields(script_object: Any) -> Any:
    return script_object.__getstate__()[0]
