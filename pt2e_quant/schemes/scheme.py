"""Which format may be combined with which granularity at which time: the one place that says so.

A *scheme* is what a grid is made of; a *spec* is a scheme and the observer that finds its scale. A scheme that makes no
sense raises when it is built, with the reason and the nearest one that does. docs/schemes.md is written from here.

Before this: `formats`. After it: `arithmetic` computes with a scheme, `modules` watch and round tensors with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from .. import observer
from ..checks import check_fields, checked
from ..errors import SpecError
from ..observer import get_block_size
from ..specs import DYNAMIC_PER_CHANNEL
from .formats import FORMATS, MX_BLOCK, Format, format_of

__all__ = ["GRANULARITIES", "TIMINGS", "Cell", "GranularityName", "Scheme", "Timing", "refusal"]

GranularityName = Literal["tensor", "axis", "row", "token", "group", "block"]
Timing = Literal["static", "dynamic", "weight_only"]

GRANULARITIES: dict[GranularityName, str] = {
    "tensor": "one scale in all",
    "axis": "one per index of a dimension",
    "row": "one per row of a weight: all of its last dimension",
    "token": "one per row of an activation: all of its last dimension",
    "group": "one per `group_size` neighbours in the last dimension",
    "block": "one per block of `block_size`, a tile of the trailing dimensions",
}
TIMINGS: dict[Timing, str] = {
    "static": "an activation, with qparams from calibration data or training",
    "dynamic": "an activation, with qparams from each tensor at run time",
    "weight_only": "a constant, whatever becomes of the activations beside it",
}


class Cell(NamedTuple):
    """One cell of the table."""

    dtype: str
    granularity: GranularityName
    timing: Timing

    def __str__(self) -> str:
        return f"{self.dtype} per {self.granularity}, {self.timing}"


class _Rule(NamedTuple):
    forbids: Callable[[Format, str, str], bool]
    reason: str
    nearest: tuple[GranularityName | None, Timing | None]


_RULES = [
    _Rule(
        lambda of, _, when: of.kind == "mx" and when == "static",
        "a shared exponent is part of the data: it is chosen for each block of numbers, not calibrated for a place",
        ("block", "dynamic"),
    ),
    _Rule(
        lambda of, at, _: of.kind == "mx" and at != "block",
        f"MX formats share one exponent among {MX_BLOCK} neighbours of the last dimension",
        ("block", None),
    ),
    _Rule(lambda _, at, when: at == "axis" and when == "dynamic", DYNAMIC_PER_CHANNEL, ("token", None)),
    _Rule(
        lambda _, at, when: at == "row" and when == "dynamic",
        "the rows of an activation are its tokens",
        ("token", None),
    ),
    _Rule(
        lambda _, at, when: at == "token" and when == "weight_only",
        "tokens are the rows of an activation; a weight has rows",
        ("row", None),
    ),
    _Rule(
        lambda _, at, when: at in ("row", "token") and when == "static",
        "the number of rows changes from batch to batch, so there is no range to calibrate for each",
        ("tensor", None),
    ),
    _Rule(
        lambda _, at, when: at in ("group", "block") and when == "static",
        "groups and blocks lie in rows, whose number changes from batch to batch, so there is no range to calibrate",
        ("axis", None),
    ),
]


@checked(SpecError)
def refusal(cell: Cell) -> tuple[str, Cell] | None:
    """Why this cell makes no sense and the nearest one that does; None for a legal cell. Training changes nothing.

    Raises:
        SpecError: one of the three words is unknown.
    """
    of = format_of(cell.dtype)
    for name, known in (("granularity", GRANULARITIES), ("timing", TIMINGS)):
        if getattr(cell, name) not in known:
            raise SpecError(f"{name} {getattr(cell, name)!r} is unknown; choose one of {', '.join(known)}")
    for rule in _RULES:
        if rule.forbids(of, cell.granularity, cell.timing):
            granularity, timing = rule.nearest
            return rule.reason, Cell(of.name, granularity or cell.granularity, timing or cell.timing)
    return None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one tensor is quantized, but for the way its range is found.

    Args:
        dtype: name of a format ("int4", "float8_e4m3fn", "mxfp8", ...) or a torch.dtype of that name.
        granularity: which values share a scale, a key of GRANULARITIES.
        timing: when qparams are chosen, a key of TIMINGS.
        symmetric: no zero point (unsigned: in the middle). None is False for integers of activations and unsigned
            integers, True for everything else. Floats have no zero point.
        axis: the dimension of granularity "axis".
        group_size: number of neighbours of granularity "group".
        block_size: extent of a block of granularity "block" in the trailing dimensions; () is one of 32 in a row.
        eps: smallest scale.

    Raises:
        SpecError: an illegal cell (with the nearest legal one), or a parameter that contradicts it.
    """

    dtype: str
    granularity: GranularityName = "tensor"
    timing: Timing = "static"
    symmetric: bool | None = None
    axis: int = 0
    group_size: int = 32
    block_size: tuple[int, ...] = ()
    eps: float = torch.finfo(torch.float32).eps

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", format_of(self.dtype).name)
        check_fields(self, SpecError)
        found = refusal(self.cell)
        if found:
            raise SpecError(f"{self.cell}: {found[0]}. The nearest that exists: {found[1]}.")
        by_default = self.format.kind != "integer" or (self.timing == "weight_only" and self.format.low < 0)
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", by_default)
        if not self.block_size:
            object.__setattr__(self, "block_size", (MX_BLOCK,))
        self._check_parameters()

    @property
    def cell(self) -> Cell:
        return Cell(self.dtype, self.granularity, self.timing)

    @property
    def format(self) -> Format:
        return FORMATS[self.dtype]

    @property
    def is_dynamic(self) -> bool:
        return self.timing == "dynamic"

    @property
    def scale_dtype(self) -> torch.dtype:
        """float32, or float8_e8m0fnu (a power of two) for shared exponents."""
        return torch.float8_e8m0fnu if self.format.kind == "mx" else torch.float32

    @property
    def op(self) -> str | None:
        """The quantize op of torch.ops.quantized_decomposed that `convert` writes; None where it has none."""
        if self.format.kind != "integer":
            return None  # the ops there round to integers before they cast
        if self.is_dynamic:
            per_token = self.granularity == "token" and self.dtype == "int8" and not self.symmetric
            return {"tensor": "quantize_per_tensor.tensor", "token": "quantize_per_token" if per_token else None}.get(
                self.granularity
            )
        centred = self.symmetric and self.format.low < 0  # the op rounds the sum of x / scale and zero point
        group = "quantize_per_channel_group" if centred else None
        ops = {"tensor": "quantize_per_tensor", "axis": "quantize_per_channel", "row": "quantize_per_channel"}
        return ops.get(self.granularity, group if self.granularity == "group" else None)

    @property
    def blocks(self) -> observer.Granularity:
        """The granularity as an observer takes it."""
        made: dict[str, observer.Granularity] = {
            "tensor": observer.PerTensor(),
            "axis": observer.PerAxis(self.axis),
            "row": observer.PerRow(),
            "token": observer.PerToken(),
            "group": observer.PerGroup(self.group_size),
            "block": observer.PerBlock(self.block_size),
        }
        return made[self.granularity]

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Extent in each dimension of the values of a tensor of this shape that share one scale.

        Raises:
            SpecError: the tensor does not have such blocks.
        """
        return get_block_size(tuple(shape), self.blocks)

    def qparams_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of scale and zero point for a tensor of this shape.

        (1,) per tensor, (n,) per axis; otherwise that of the tensor, each dimension divided by the extent of a block.
        """
        block = self.block(shape)
        if self.granularity == "tensor":
            return (1,)
        if self.granularity == "axis":
            return (shape[self.axis],)
        return tuple(size // part for size, part in zip(shape, block, strict=True))

    def __str__(self) -> str:
        size = {
            "axis": f" {self.axis}",
            "group": f" of {self.group_size}",
            "block": " of " + "x".join(map(str, self.block_size)),
        }.get(self.granularity, "")
        kind = " symmetric" if self.symmetric and self.format.kind == "integer" else ""
        return f"{self.dtype}{kind} per {self.granularity}{size}, {self.timing}"

    def _check_parameters(self) -> None:
        if not self.symmetric and self.format.kind != "integer":
            raise SpecError(f"{self.cell}: floating-point formats have no zero point; leave symmetric out")
        narrow = self.format.low == 0 and self.format.high < 255
        if self.symmetric and self.is_dynamic and narrow:
            raise SpecError(
                f"{self.cell}: the op that chooses symmetric qparams at run time puts the zero point of every unsigned "
                f"type at 128; use symmetric=False, or {replace(self, dtype='int8').cell}"
            )
        extents = (self.group_size, *self.block_size)
        if not all(isinstance(extent, int) and extent >= 1 for extent in extents) or math.prod(self.block_size) < 2:
            raise SpecError(f"{self.cell}: groups and blocks hold at least 2 values, got {extents}")
        if self.granularity == "group" and self.group_size < 2:
            raise SpecError(f"{self.cell}: group_size must be at least 2, got {self.group_size}")
        if self.format.kind == "mx" and self.block_size != (MX_BLOCK,):
            raise SpecError(
                f"{self.cell}: MX blocks are {MX_BLOCK} neighbours of the last dimension, not {extents[1:]}"
            )
        if not 0.0 < self.eps < math.inf:
            raise SpecError(f"{self.cell}: eps is the smallest scale and must be finite and > 0, got {self.eps}")
