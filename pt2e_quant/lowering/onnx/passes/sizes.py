"""The sizes of a tensor as arguments of an operator: numbers, and nodes where they vary."""

from __future__ import annotations

from typing import Any

import torch

from ....graph.write import Symbol, call

__all__ = ["sizes_of"]


def sizes_of(x: Symbol) -> list[Any]:
    """Written where the sizes are not the same in every run."""
    sizes: list[Any] = list(x.shape)
    return [
        size if isinstance(size, int) else call(torch.ops.aten.sym_size.int, x, index)
        for index, size in enumerate(sizes)
    ]
