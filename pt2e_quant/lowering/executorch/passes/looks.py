"""What passes ask of a node's value: its type and its sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

__all__ = ["comes_from_integers", "is_float32", "literal_sizes", "merged_batch", "names_of_sizes"]


def is_float32(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.dtype is torch.float32


def literal_sizes(node: Any) -> list[int]:
    """The sizes of the node's value, -1 for those that depend on the inputs."""
    return [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]


def names_of_sizes(node: Node) -> list[str]:
    """The sizes as text, so that dynamic ones compare without a guard."""
    return [str(size) for size in node.meta["val"].shape]


def merged_batch(sizes: list[int]) -> list[int] | None:
    """(all batch dimensions in one, rows, columns), -1 for the one that is dynamic; None when there are more."""
    batch = sizes[:-2]
    return None if sizes.count(-1) > 1 else [-1 if -1 in batch else math.prod(batch), *sizes[-2:]]


def comes_from_integers(node: Node) -> bool:
    """Made outside of any delegate, from integers or booleans: computing on it there costs nothing more."""
    values = (source.meta.get("val") for source in node.all_input_nodes)
    return not any(isinstance(value, Tensor) and value.dtype.is_floating_point for value in values)
