"""Keep the dynamic dimensions of a graph when it is exported again, each with its range."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import Dim
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

__all__ = ["derive_dynamic_shapes", "span_of", "symbolic_sizes"]

_UNBOUNDED = 2**40


def derive_dynamic_shapes(
    gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any] | None, tuple[Any, ...], dict[str, Any]]:
    """(dynamic_shapes, args, kwargs) for torch.export, such that each dimension stays dynamic, with its range.

    Where an example has size 0 or 1 in a dynamic dimension it is repeated: torch.export would take it as constant.
    """
    leaves, tree = pytree.tree_flatten((args, kwargs))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    symbolic = [symbolic_sizes(node) for node in placeholders]
    if len(leaves) != len(placeholders) or not any(symbolic):
        return None, args, kwargs  # torch.export says what does not fit
    sizes = _sizes_of_symbols(symbolic, leaves)
    shapes: list[Any] = [{index: _dim(size) for index, size in dims.items()} if dims else None for dims in symbolic]
    leaves = [_resized(leaf, dims, sizes) for leaf, dims in zip(leaves, symbolic, strict=True)]
    shaped_args, shaped_kwargs = pytree.tree_unflatten(shapes, tree)
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    return [*shaped_args, *shaped_kwargs.values()], args, kwargs


def symbolic_sizes(node: Node) -> dict[int, SymInt]:
    """The sizes of a node's value that depend on the inputs, by dimension."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return {}
    sizes: list[Any] = list(value.shape)
    return {index: size for index, size in enumerate(sizes) if isinstance(size, SymInt)}


def span_of(size: SymInt) -> tuple[int, int | None]:
    """The smallest and the largest that a size can be; None for no bound."""
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return int(max(bounds.lower, 0)), int(bounds.upper) if bool(bounds.upper <= _UNBOUNDED) else None


def _dim(size: SymInt) -> Any:
    smallest, largest = span_of(size)
    return Dim.AUTO(min=smallest, max=largest)


def _sizes_of_symbols(symbolic: list[dict[int, SymInt]], leaves: list[Any]) -> dict[Any, int]:
    """A size for each symbol: that of the example, at least 2 where the symbol's range has it."""
    sizes: dict[Any, int] = {}
    for dims, leaf in zip(symbolic, leaves, strict=True):
        for index, size in dims.items():
            expression = size.node.expr
            if expression.is_Symbol and isinstance(leaf, Tensor) and index < leaf.dim():
                wanted = max(leaf.shape[index], 2, span_of(size)[0])
                sizes[expression] = max(sizes.get(expression, 0), wanted)
    return sizes


def _resized(leaf: Any, dims: dict[int, SymInt], sizes: dict[Any, int]) -> Any:
    for index, size in dims.items():
        wanted = size.node.expr.subs(sizes)
        if isinstance(leaf, Tensor) and index < leaf.dim() and wanted.is_Integer and int(wanted) != leaf.shape[index]:
            leaf = _repeated(leaf, index, int(wanted))
    return leaf


def _repeated(tensor: Tensor, dim: int, size: int) -> Tensor:
    if tensor.shape[dim] == 0:
        return tensor.new_zeros([size if index == dim else old for index, old in enumerate(tensor.shape)])
    times = -(-size // tensor.shape[dim])
    return torch.cat([tensor] * times, dim).narrow(dim, 0, size)
