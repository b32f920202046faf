"""How many qparams a tensor has, as values: one in all, one per index of a dimension, one per block of neighbours.

Names and fields are those of torchao, whose own objects `own_granularity` reads. A *block* is the part of a tensor that
shares one scale: `get_block_size` says its shape, `blocked` lays a tensor out for reducing each block to one value,
`block_rows` as a matrix with one row per block.

Before this: nothing. After it: `affine` keeps one range per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass

from torch import Tensor

from ..checks import check_fields, checked
from ..errors import SpecError

__all__ = [
    "Granularity",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "block_rows",
    "blocked",
    "from_block_rows",
    "get_block_size",
    "own_granularity",
]


@dataclass(frozen=True)
class Granularity:
    """Base of the granularities; says nothing by itself."""

    def __post_init__(self) -> None:
        check_fields(self, SpecError)


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerAxis(Granularity):
    """One scale per index of dimension `axis`: of a weight (out, in, kh, kw) with axis=0, one per output channel."""

    axis: int


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale for each run along dimension `dim`: of (out, in) with dim=-1, one per row."""

    dim: int = -1


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale per index of all dimensions but the last, usually computed at run time."""


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per `group_size` neighbours in the last dimension."""

    group_size: int


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale per block of this shape in the last dimensions; leading dimensions have blocks of 1."""

    block_size: tuple[int, ...]


_KINDS = {kind.__name__: kind for kind in (PerTensor, PerAxis, PerRow, PerToken, PerGroup, PerBlock)}


def own_granularity(value: object) -> Granularity | None:
    """A granularity of this package, or of another with classes of these names and fields; None for anything else."""
    if isinstance(value, Granularity):
        return value
    kind = _KINDS.get(type(value).__name__) if is_dataclass(value) else None
    if kind is None or not all(hasattr(value, field.name) for field in fields(kind)):
        return None
    made: Granularity = kind(**{field.name: getattr(value, field.name) for field in fields(kind)})
    return made


@checked(SpecError, but=("granularity",))
def get_block_size(input_shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of the part of a tensor that shares one scale; as many dimensions as the tensor.

    Raises:
        SpecError: the granularity does not fit a tensor of this shape.
    """
    shape = tuple(input_shape)
    if isinstance(granularity, PerTensor):
        return shape
    if isinstance(granularity, PerAxis):
        axis = _dimension(shape, granularity.axis, granularity)
        return (*shape[:axis], 1, *shape[axis + 1 :])
    if isinstance(granularity, (PerRow, PerToken)):
        dim = _dimension(shape, granularity.dim if isinstance(granularity, PerRow) else -1, granularity)
        return (*(1,) * dim, shape[dim], *(1,) * (len(shape) - dim - 1))
    if isinstance(granularity, PerGroup):
        block: tuple[int, ...] = (granularity.group_size,)
    elif isinstance(granularity, PerBlock):
        block = tuple(granularity.block_size)
    else:
        raise SpecError(f"{granularity!r} is not a granularity; pass an object such as PerTensor() or PerGroup(32)")
    missing = len(shape) - len(block)
    block = (*(1,) * missing, *block)
    if missing < 0 or any(size < 1 or whole % size for size, whole in zip(block, shape, strict=False)):
        raise SpecError(f"{granularity} does not divide a tensor of shape {shape} into whole blocks; choose a divisor")
    return block


def blocked(x: Tensor, granularity: Granularity) -> tuple[Tensor, list[int]]:
    """x with a dimension of its own for what lies inside a block, and the dimensions to reduce for one value per block.

    As in torchao, a dimension that a block spans as a whole is gone afterwards: one value per row has shape (rows,).
    Per tensor and per axis that goes for dimensions of size 1 too, so that a batch of one is like any other.
    """
    block_size = get_block_size(tuple(x.shape), granularity)
    if isinstance(granularity, (PerTensor, PerAxis)):
        axis = granularity.axis % x.dim() if isinstance(granularity, PerAxis) else None
        return x, [dim for dim in range(x.dim()) if dim != axis]
    sizes: list[int] = []
    within: list[int] = []
    for whole, size in zip(x.shape, block_size, strict=True):
        if 1 < size < whole:
            sizes.append(whole // size)
        if size > 1:
            within.append(len(sizes))
        sizes.append(whole if size in (1, whole) else size)
    return x.reshape(sizes), within


def block_rows(x: Tensor, granularity: Granularity) -> Tensor:
    """x as a matrix with one row per block, in the order that `blocked` has them.

    Raises:
        SpecError: the granularity does not fit x, or blocks hold no values.
    """
    block = get_block_size(tuple(x.shape), granularity)
    if not math.prod(block):
        raise SpecError(f"blocks of {list(block)} hold no values; skip empty tensors")
    split = [part for size, extent in zip(x.shape, block, strict=True) for part in (size // extent, extent)]
    return x.reshape(split).permute(_counts_first(x.dim())).reshape(-1, math.prod(block))


def from_block_rows(rows: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """The tensor of this shape that `block_rows` made these rows of."""
    block, order = get_block_size(shape, granularity), _counts_first(len(shape))
    counts = [size // extent for size, extent in zip(shape, block, strict=True)]
    back = sorted(range(2 * len(shape)), key=order.__getitem__)
    return rows.reshape([*counts, *block]).permute(back).reshape(shape)


def _counts_first(dims: int) -> list[int]:
    """From (count, extent) of each dimension in turn to all counts, then all extents."""
    return [*range(0, 2 * dims, 2), *range(1, 2 * dims, 2)]


def _dimension(shape: tuple[int, ...], dim: int, granularity: Granularity) -> int:
    if not -len(shape) <= dim < len(shape):
        raise SpecError(f"{granularity} names a dimension that a tensor of shape {shape} does not have")
    return dim % len(shape)
