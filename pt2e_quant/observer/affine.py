"""Observers with one range per block of a tensor, whatever the block: torchao's AffineQuantized observers.

AffineQuantizedMinMaxObserver                 the range of everything seen
AffineQuantizedMovingAverageMinMaxObserver    an average of the range over batches
AffineQuantizedPlaceholderObserver            a configuration, for run-time qparams

Before this: `granularity` says what a block is. After it: the engine reads dtype, bounds, scheme, axis and granularity.
"""

from __future__ import annotations

import math
from enum import Enum, auto
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from ..checks import checked
from ..errors import CalibrationError, SpecError
from ..qparams import FLOAT32_EPS, affine_qparams
from .base import RangeObserverBase, checked_constant, is_unset, move_range, widen
from .batch import remember
from .granularity import Granularity, PerAxis, PerTensor, blocked, get_block_size, own_granularity

__all__ = [
    "AffineQuantizedMinMaxObserver",
    "AffineQuantizedMovingAverageMinMaxObserver",
    "AffineQuantizedObserverBase",
    "AffineQuantizedPlaceholderObserver",
    "MappingType",
    "ZeroPointDomain",
]


class MappingType(Enum):
    """How a range becomes integers.

    SYMMETRIC: [-b, b] with b the largest magnitude, onto all integers; ASYMMETRIC: [min, max] onto all integers.
    SYMMETRIC_NO_CLIPPING_ERR: as SYMMETRIC, but the smallest scale that clips neither end of an uneven integer range.
    """

    SYMMETRIC = auto()
    SYMMETRIC_NO_CLIPPING_ERR = auto()
    ASYMMETRIC = auto()


class ZeroPointDomain(Enum):
    """Where the zero point lives. Only INT, an integer q that stands for 0.0, is supported here."""

    INT = auto()
    FLOAT = auto()
    NONE = auto()


_STATE = ("min_val", "max_val", "block_size", "original_dtype")
_Member = TypeVar("_Member", bound=Enum)


def _own_member(kind: type[_Member], value: object) -> _Member | None:
    """A member of this enum, or of another package's enum of that name, by its name; None for anything else."""
    if isinstance(value, kind):
        return value
    named_alike = isinstance(value, Enum) and type(value).__name__ == kind.__name__
    return kind.__members__.get(value.name) if named_alike else None  # type: ignore[attr-defined]


class AffineQuantizedObserverBase(RangeObserverBase):
    """Common part of the observers of blocks. torchao's own enums and granularities are taken as well.

    Args:
        mapping_type: see MappingType.
        target_dtype: integer type that stores q, or an 8-bit float, which has no zero point.
        granularity: which part of the tensor shares a scale, as an object: PerTensor(), PerAxis(0), PerGroup(32), ...
        quant_min, quant_max: bounds of q, both included; None is the bound of target_dtype.
        eps: smallest scale; None is the epsilon of float32.
        scale_dtype, zero_point_dtype: types of the results; None is float32 and int64.
        is_dynamic: qparams are computed at run time.
        preserve_zero, zero_point_domain: only True and ZeroPointDomain.INT.
        spec: the remaining fields of a QuantizationSpec, which must not contradict the above.

    State: `min_val` and `max_val`, float32, one element per block.

    Raises:
        SpecError: an argument is illegal, or two contradict each other.
    """

    min_val: Tensor
    max_val: Tensor

    @checked(SpecError, but=("mapping_type", "granularity", "zero_point_domain"))
    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
        is_dynamic: bool = False,
        **spec: Any,
    ) -> None:
        super().__init__(target_dtype, is_dynamic)
        name, mapping, blocks = (
            type(self).__name__,
            _own_member(MappingType, mapping_type),
            own_granularity(granularity),
        )
        if mapping is None or blocks is None:
            raise SpecError(
                f"{name} needs a MappingType and a granularity object such as PerGroup(32), got {mapping_type!r} and "
                f"{granularity!r}"
            )
        if not preserve_zero or _own_member(ZeroPointDomain, zero_point_domain) is not ZeroPointDomain.INT:
            raise SpecError(f"{name}: only preserve_zero=True with ZeroPointDomain.INT exists here; zero must be exact")
        if spec.get("dtype", target_dtype) is not target_dtype:
            raise SpecError(f"{name}: target_dtype={target_dtype} contradicts dtype={spec['dtype']} of its spec")
        self.mapping_type = mapping
        self.target_dtype = target_dtype
        self.granularity = blocks
        self.quant_min, self.quant_max = self._integer_bounds(quant_min, quant_max)
        self.eps = FLOAT32_EPS if eps is None else eps
        if not 0.0 < self.eps < math.inf:
            raise SpecError(f"{name}: eps is the smallest scale and must be finite and > 0, got {eps}")
        self.scale_dtype = scale_dtype
        self.zero_point_dtype = zero_point_dtype
        self.preserve_zero = preserve_zero
        self.zero_point_domain = ZeroPointDomain.INT

    @property
    def qscheme(self) -> torch.qscheme:
        """The torch scheme that says the same; blocks that are neither a tensor nor a channel count as channels."""
        symmetric = self.mapping_type is not MappingType.ASYMMETRIC or self.dtype.is_floating_point
        if isinstance(self.granularity, PerTensor):
            return torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
        return torch.per_channel_symmetric if symmetric else torch.per_channel_affine

    @property
    def ch_axis(self) -> int | None:
        """Dimension with one scale per index, where blocks are channels."""
        return self.granularity.axis if isinstance(self.granularity, PerAxis) else None

    def reset_min_max_vals(self) -> None:
        """Forget everything that was seen."""

    def extra_repr(self) -> str:
        return f"{self.mapping_type.name}, {self.target_dtype}, {self.granularity}"


class AffineQuantizedMinMaxObserver(AffineQuantizedObserverBase):
    """Keep the range of each block. Arguments as in AffineQuantizedObserverBase; every batch has the same blocks."""

    block_size: tuple[int, ...] | None = None
    """Shape of a block, known after the first batch."""
    original_dtype: torch.dtype | None = None
    """Type of the tensors seen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("min_val", torch.tensor([]))
        self.register_buffer("max_val", torch.tensor([]))

    def forward(self, x: Tensor) -> Tensor:
        """Take in the range of each block of x."""
        if x.numel() and not x.is_meta and (ranges := self._block_ranges(x.detach())) is not None:
            low, high = ranges
            remember(self, *_STATE)
            if not self.has_data:
                self.min_val, self.max_val = (end.to(self.min_val, copy=True) for end in (low, high))
            elif low.shape == self.min_val.shape:
                self._take_in(low.to(self.min_val), high.to(self.max_val))
            else:
                raise CalibrationError(
                    f"{self._where}: saw blocks of shape {tuple(self.min_val.shape)} before, and now "
                    f"{tuple(low.shape)} with {self.granularity}, in a tensor of shape {tuple(x.shape)}.\n"
                    "  One range per block needs tensors of one shape: observe per tensor, or quantize dynamically."
                )
            self.block_size, self.original_dtype = get_block_size(tuple(x.shape), self.granularity), x.dtype
        return x

    @property
    def has_data(self) -> bool:
        return not is_unset(self.min_val, self.max_val)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point), one element per block; of shape () per tensor."""
        if not self.has_data:
            raise CalibrationError(self._no_data())
        low, high, bounds = self.min_val, self.max_val, (self.quant_min, self.quant_max)
        middle = 0 if self.dtype.is_floating_point else int((self.quant_min + self.quant_max + 1) / 2)
        if self.mapping_type is MappingType.SYMMETRIC_NO_CLIPPING_ERR:
            below = low.clamp(max=0.0) / self.quant_min if self.quant_min else torch.zeros_like(low)
            scale = torch.maximum(below, high.clamp(min=0.0) / self.quant_max).clamp(min=self.eps)
            zero_point = torch.full_like(scale, middle, dtype=torch.int64)
        else:
            symmetric = self.mapping_type is MappingType.SYMMETRIC
            scale, zero_point = affine_qparams(
                low, high, *bounds, dtype=self.dtype, symmetric=symmetric, eps=self.eps, zero_point=middle
            )
        return scale.to(self.scale_dtype or torch.float32), zero_point.to(self.zero_point_dtype or torch.int64)

    def reset_min_max_vals(self) -> None:
        """Forget everything that was seen."""
        remember(self, *_STATE)
        self.min_val, self.max_val = (end.new_empty(0) for end in (self.min_val, self.max_val))
        self.block_size = self.original_dtype = None

    def _take_in(self, low: Tensor, high: Tensor) -> None:
        widen(self.min_val, self.max_val, low, high)

    def _block_ranges(self, values: Tensor) -> tuple[Tensor, Tensor] | None:
        laid_out, within = blocked(values, self.granularity)
        low, high = _ends(laid_out, laid_out, within)
        if self._within(low.amin().item(), high.amax().item(), values):
            return low, high
        masked = self._masked(laid_out)
        if bool(masked.all()):
            return None
        low, high = _ends(laid_out.masked_fill(masked, math.inf), laid_out.masked_fill(masked, -math.inf), within)
        return low.where(low <= high, 0.0), high.where(low <= high, 0.0)

    def _absorb(self, batch: Any) -> None:
        if self.has_data and batch.has_data and self.min_val.shape == batch.min_val.shape:
            self._take_in(batch.min_val, batch.max_val)
        else:
            self._merge(batch)

    def _merge(self, other: Any) -> None:
        if not other.has_data:
            return
        if not self.has_data:
            self.min_val, self.max_val = other.min_val.clone(), other.max_val.clone()
            self.block_size, self.original_dtype = other.block_size, other.original_dtype
        elif self.min_val.shape != other.min_val.shape:
            raise CalibrationError(
                f"{self._where}: {tuple(self.min_val.shape)} and {tuple(other.min_val.shape)} blocks cannot be "
                "merged; both observers must watch the same tensor"
            )
        else:
            widen(self.min_val, self.max_val, other.min_val, other.max_val)

    def _signature(self) -> dict[str, Any]:
        return {k: v for k, v in super()._signature().items() if k not in ("block_size", "original_dtype")}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("min_val", "max_val"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class AffineQuantizedMovingAverageMinMaxObserver(AffineQuantizedMinMaxObserver):
    """Keep a moving average of the range of each block.

    Args:
        averaging_constant: weight of a new batch, in (0, 1]; 1 keeps the last batch alone, as is_dynamic requires.
        others: as in AffineQuantizedObserverBase. Merging is that of MovingAverageMinMaxObserver.
    """

    @checked(SpecError, but=("mapping_type", "granularity"))
    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity,
        averaging_constant: float = 0.01,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(
            mapping_type, target_dtype, granularity, quant_min, quant_max, eps, is_dynamic=is_dynamic, **arguments
        )
        self.averaging_constant = checked_constant(averaging_constant)
        if is_dynamic and averaging_constant != 1:
            raise SpecError(
                f"{type(self).__name__}: a dynamic range is that of one tensor, an average with averaging_constant="
                f"{averaging_constant} is not; use averaging_constant=1, or is_dynamic=False"
            )

    def _take_in(self, low: Tensor, high: Tensor) -> None:
        move_range(self.min_val, self.max_val, low, high, self.averaging_constant)


class AffineQuantizedPlaceholderObserver(AffineQuantizedObserverBase):
    """Watch nothing; qparams are computed at run time. Arguments as in AffineQuantizedObserverBase."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> NoReturn:
        """Always raises: there is no range to compute qparams from."""
        raise CalibrationError(
            f"{self._where}: an {type(self).__name__} looks at no data and has no qparams; a dynamic tensor gets them "
            "at run time. Use AffineQuantizedMinMaxObserver for static ones."
        )


def _ends(for_low: Tensor, for_high: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    if not dims:  # no dimensions mean all of them to amin
        return for_low.float(), for_high.float()
    return for_low.amin(dims).float(), for_high.amax(dims).float()
