"""How one tensor is quantized, as values that check themselves; and the annotation that hangs them on a graph node.

Field names and meanings are those of the reference API (torch.ao.quantization.quantizer), so a Quantizer written
against it builds these classes unchanged. The engine reads specs by their fields, never by their class: specs of
other packages with the same fields work as they are.

Comes before everything else; `qparams` does the arithmetic that a spec describes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .checks import check_fields, checked
from .errors import SpecError
from .reasons import because

__all__ = [
    "DYNAMIC_PER_CHANNEL",
    "FLOAT8",
    "FOUR_BITS",
    "PER_CHANNEL",
    "PER_TENSOR",
    "DerivedQuantizationSpec",
    "EdgeOrNode",
    "FixedQParamsQuantizationSpec",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "SharedQuantizationSpec",
    "integer_range",
    "is_per_channel",
    "is_symmetric",
    "range_of",
    "uneven_groups",
]

EdgeOrNode = tuple[Node, Node] | Node
"""Where a tensor is quantized: `node` is the output of a node, `(producer, consumer)` one use of it."""


DYNAMIC_PER_CHANNEL = "a dynamic spec cannot be per channel: run-time qparams exist per tensor or per token"
"""Why a dynamic spec with one scale per index of an axis is refused."""

PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric, torch.per_channel_affine_float_qparams)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FOUR_BITS = (-8, 7)
"""Bounds of signed integers of 4 bits, which torch stores as int8."""

_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_QUANTIZED_STORAGE = {
    torch.qint8: torch.int8,
    torch.quint8: torch.uint8,
    torch.qint32: torch.int32,
    torch.quint4x2: torch.uint4,  # type: ignore[attr-defined]  # torch.iinfo answers for the byte that holds two
    torch.quint2x4: torch.uint2,  # type: ignore[attr-defined]
}


@checked(SpecError)
def integer_range(dtype: torch.dtype) -> tuple[int, int] | None:
    """(smallest, largest) value of an integer dtype, None for a floating-point one. torch.qint8 counts as int8, etc."""
    storage = _QUANTIZED_STORAGE.get(dtype, dtype)
    if storage.is_floating_point or storage.is_complex or storage is torch.bool:
        return None
    try:
        limits = torch.iinfo(storage)
    except TypeError:  # sub-byte shells such as torch.int4 have no iinfo; their name tells the width
        return _sub_byte_range(storage)
    return int(limits.min), int(limits.max)


@checked(SpecError)
def range_of(dtype: torch.dtype, quant_min: int | None = None, quant_max: int | None = None) -> tuple[int, int]:
    """(smallest, largest) q: the bounds that were given, those of dtype where none was; (0, 0) for a float dtype."""
    low, high = integer_range(dtype) or (0, 0)
    return low if quant_min is None else quant_min, high if quant_max is None else quant_max


def _sub_byte_range(dtype: torch.dtype) -> tuple[int, int]:
    name = str(dtype).removeprefix("torch.")
    signed, bits = not name.startswith("u"), int("".join(filter(str.isdigit, name)))
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


@checked(SpecError)
def uneven_groups(width: int, group: int, what: str = "") -> str | None:
    """Why rows of so many values do not split into groups that share a scale; None where they do, or `group` is 0."""
    if not group or width % group == 0:
        return None
    return because("group_size", f"{what or f'rows of {width}'} do not split into groups of {group}")


@checked(SpecError)
def is_symmetric(qscheme: torch.qscheme | None) -> bool:
    """True for the schemes that hold the zero point at the middle of the range."""
    return qscheme in _SYMMETRIC


@checked(SpecError)
def is_per_channel(qscheme: torch.qscheme | None) -> bool:
    """True for the schemes with one scale per index of an axis."""
    return qscheme in PER_CHANNEL


class QuantizationSpecBase:
    """Common base of every spec; says nothing by itself."""


@dataclass(eq=True, frozen=True)
class QuantizationSpec(QuantizationSpecBase):
    """A tensor whose qparams come from watching it: q = clamp(round(x / scale) + zero_point, quant_min, quant_max).

    Args:
        dtype: type that stores q (torch.int8, torch.uint8, torch.int16, torch.int32, ...) or, for a cast without a
            scale, a floating-point type.
        observer_or_fake_quant_ctr: called with the other fields as keywords, it makes the module that watches
            (an observer) or rounds (a fake-quantizer) the tensor.
        quant_min, quant_max: bounds of q, both included, in quantized units; None means the whole range of dtype.
        qscheme: torch.per_tensor_affine, per_tensor_symmetric, per_channel_affine, per_channel_symmetric or
            per_channel_affine_float_qparams; None leaves it to the observer.
        ch_axis: dimension with one scale per index, for per-channel schemes.
        is_dynamic: qparams are computed from each tensor at run time instead of from calibration data.

    Raises:
        SpecError: a bound lies outside dtype, the bounds are in the wrong order, or scheme and axis contradict.
    """

    dtype: torch.dtype
    observer_or_fake_quant_ctr: Any
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        check_fields(self, SpecError)
        _check_range(self.dtype, self.quant_min, self.quant_max)
        if not callable(self.observer_or_fake_quant_ctr):
            raise SpecError(
                f"observer_or_fake_quant_ctr must make an observer when called, "
                f"got {self.observer_or_fake_quant_ctr!r}; pass an observer class or Class.with_args(...)"
            )
        if self.is_dynamic and is_per_channel(self.qscheme):
            raise SpecError(f"{DYNAMIC_PER_CHANNEL}; use torch.per_tensor_affine, or is_dynamic=False")
        if is_per_channel(self.qscheme) and self.ch_axis is None:
            raise SpecError(f"{self.qscheme} needs ch_axis, the dimension that has one scale per index")


@dataclass(eq=True, frozen=True)
class FixedQParamsQuantizationSpec(QuantizationSpecBase):
    """A tensor whose qparams are known beforehand, such as the output of a sigmoid.

    Args:
        dtype, quant_min, quant_max, qscheme, is_dynamic: as in QuantizationSpec.
        scale: size of one quantization step, in real units, > 0 and finite.
        zero_point: the q that stands for 0.0, inside [quant_min, quant_max].

    Raises:
        SpecError: a value lies outside what the fields above say.
    """

    dtype: torch.dtype
    scale: float
    zero_point: int
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        check_fields(self, SpecError)
        _check_range(self.dtype, self.quant_min, self.quant_max)
        if not 0.0 < self.scale < float("inf"):
            raise SpecError(f"scale must be finite and greater than 0, got {self.scale}")
        low, high = range_of(self.dtype, self.quant_min, self.quant_max)
        if integer_range(self.dtype) is not None and not low <= self.zero_point <= high:
            raise SpecError(f"zero_point {self.zero_point} lies outside [{low}, {high}], the range of q")


@dataclass(eq=True, frozen=True)
class SharedQuantizationSpec(QuantizationSpecBase):
    """A tensor that has the qparams of another one: `edge_or_node` names that other tensor."""

    edge_or_node: EdgeOrNode

    def __post_init__(self) -> None:
        check_fields(self, SpecError)


@dataclass(eq=True, frozen=True)
class DerivedQuantizationSpec(QuantizationSpecBase):
    """A tensor whose qparams are a function of those of others, such as a bias with scale[input] * scale[weight].

    Args:
        derived_from: the tensors that the qparams follow from.
        derive_qparams_fn: takes the list of their observers (or fake-quantizers), in the same order, and returns
            (scale, zero_point) as tensors.
        dtype, quant_min, quant_max, qscheme, ch_axis, is_dynamic: as in QuantizationSpec.

    Raises:
        SpecError: a bound lies outside dtype, or derived_from is empty.
    """

    derived_from: list[EdgeOrNode]
    derive_qparams_fn: Callable[[list[Any]], tuple[Tensor, Tensor]]
    dtype: torch.dtype
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        check_fields(self, SpecError)
        _check_range(self.dtype, self.quant_min, self.quant_max)
        if not self.derived_from:
            raise SpecError("derived_from is empty: a derived spec must name the tensors that its qparams follow from")

    def __hash__(self) -> int:
        return hash((tuple(self.derived_from), self.derive_qparams_fn, self.dtype, self.quant_min, self.quant_max))


@dataclass
class QuantizationAnnotation:
    """What a Quantizer says of one node; stored in node.meta["quantization_annotation"].

    Args:
        input_qspec_map: for each quantized input (a node that this node really uses) its spec.
        output_qspec: spec of the node's output.
        allow_implicit_sharing: this node's inputs may use the qparams of their producer where the specs are equal.
        rule: name of what made the annotation, for reports; the reference API has no such field.
        ties_inputs: this node's inputs have one scale, as those of a concatenation do. An input that others read with a
            scale of its own is then quantized again for this node, so that they do not pay for the range of its
            neighbours. The reference API has no such field.
    """

    input_qspec_map: dict[Node, QuantizationSpecBase | None] = field(default_factory=dict)
    output_qspec: QuantizationSpecBase | None = None
    allow_implicit_sharing: bool = True
    _annotated: bool = False
    rule: str | None = None
    ties_inputs: bool = False


def _check_range(dtype: torch.dtype, quant_min: int | None, quant_max: int | None) -> None:
    whole = integer_range(dtype)
    if whole is None:
        if quant_min is not None or quant_max is not None:
            raise SpecError(
                f"{dtype} is not an integer type, quant_min and quant_max have no meaning for it; leave them out"
            )
        return
    low, high = range_of(dtype, quant_min, quant_max)
    if not low < high:
        raise SpecError(f"quant_min={low} must be smaller than quant_max={high}")
    if low < whole[0] or high > whole[1]:
        raise SpecError(f"[{low}, {high}] is not a range of {dtype}, which holds [{whole[0]}, {whole[1]}]")
