"""The door for observers: what an observer or fake quantizer of any package has settled on, as values of ours.

`read_observer` looks at the fields of a module once; `read_qparams` asks it for scale and zero point, and says which
form of the q/dq ops they take. Before this: calibration. After it: `qdq` writes the pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConversionError, QuantizationError
from ..fake_quantize import FakeQuantizeBase, is_fake_quantizer
from ..observer import Granularity, PerAxis, PerGroup, PerRow, PerTensor, PerToken
from ..observer.derived import DerivedObserver
from ..qparams import FLOAT32_EPS, storage_dtype
from ..schemes import Scheme
from ..specs import FLOAT8, integer_range, is_per_channel, is_symmetric, range_of
from .authors import code_of
from .record import GroupRecord

__all__ = ["ObserverReading", "QParams", "read_observer", "read_qparams", "with_qparams"]


@dataclass(frozen=True, eq=False)
class ObserverReading:
    """One observer or fake quantizer, as the engine sees it.

    place:        what it watches, or its class where nobody said so
    dtype:        type of q; None for observers that write their own q/dq and do not say
    is_integer:   q are integers
    bounds:       smallest and largest q; None for a cast
    granularity:  which values share a scale; None where qscheme and axis say it
    rank:         dimensions of the tensor that it saw in blocks; None where it keeps none
    awaits_block: it learns the shape of a block from the first tensor that it sees
    has_data:     what it needs of calibration is there
    writes_pairs: it writes its own q/dq (`convert(model, node)`)
    """

    observer: nn.Module
    place: str
    dtype: torch.dtype | None
    is_integer: bool
    bounds: tuple[int, int] | None
    qscheme: torch.qscheme | None
    axis: int | None
    granularity: object
    scheme: Scheme | None
    rank: int | None
    awaits_block: bool
    eps: float
    is_dynamic: bool
    has_data: bool
    writes_pairs: bool

    @property
    def has_range(self) -> bool:
        """It can be asked for scale and zero point that the engine writes."""
        return not self.writes_pairs and self.has_data and hasattr(self.observer, "calculate_qparams")


def read_observer(observer: Any) -> ObserverReading:
    """The fields of an observer or fake quantizer, of this package or of another."""
    inner = getattr(observer, "activation_post_process", observer)
    dtype = getattr(observer, "dtype", None)
    is_integer = isinstance(dtype, torch.dtype) and integer_range(dtype) is not None
    scheme, block = getattr(observer, "scheme", None), getattr(inner, "block_size", None)
    is_dynamic = bool(getattr(observer, "is_dynamic", False))
    place = str(getattr(observer, "site", "") or type(observer).__name__)
    with code_of(f"has_data of {type(observer).__name__} on {place}", ConversionError):
        has_data = _has_data(observer)
    return ObserverReading(
        observer=observer,
        place=place,
        dtype=dtype,
        is_integer=is_integer,
        bounds=_bounds(observer, dtype if is_integer else None),
        qscheme=getattr(observer, "qscheme", None),
        axis=getattr(observer, "ch_axis", None),
        granularity=_granularity(observer),
        scheme=scheme if isinstance(scheme, Scheme) else None,
        rank=None if block is None else len(block),
        awaits_block=_awaits_block(observer),
        eps=_eps(observer, inner) if is_dynamic else FLOAT32_EPS,
        is_dynamic=is_dynamic,
        has_data=has_data,
        writes_pairs=hasattr(observer, "convert"),
    )


def _bounds(observer: Any, dtype: torch.dtype | None) -> tuple[int, int] | None:
    low, high = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    if dtype is not None:
        low, high = range_of(dtype, low, high)
    return None if low is None or high is None else (int(low), int(high))


def _granularity(observer: Any) -> object:
    """Placeholders per token have the word alone."""
    found = getattr(observer, "granularity", None)
    return {"token": PerToken(), "tensor": PerTensor()}.get(found, found) if isinstance(found, str) else found


def _eps(observer: Any, inner: Any) -> float:
    found = getattr(observer, "eps", getattr(inner, "eps", None))
    return FLOAT32_EPS if found is None else float(found)


def _awaits_block(observer: Any) -> bool:
    return getattr(observer, "block_size", ()) is None


def _has_data(observer: Any) -> bool:
    """False for a calibrated observer that has not seen a value yet, of this package or of another."""
    if _awaits_block(observer) and hasattr(observer, "convert"):
        return False  # those that write their own q/dq need the shape of a block, dynamic ones too
    dtype = getattr(observer, "dtype", None)
    if getattr(observer, "is_dynamic", False) or not isinstance(dtype, torch.dtype):
        return True
    if dtype.is_floating_point and getattr(observer, "quant_min", None) is None:  # a cast
        return True
    if isinstance(observer, DerivedObserver):
        return all(map(_has_data, observer.sources))
    known = getattr(observer, "has_data", None)
    if isinstance(known, bool):
        return known
    low = getattr(getattr(observer, "activation_post_process", observer), "min_val", None)
    if not isinstance(low, Tensor):
        return True
    return low.numel() > 0 and not math.isinf(float(low.flatten()[0]))


# --- scale and zero point ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QParams:
    """Everything that one q/dq pair is written from.

    scale, zero_point: tensors of one element, or of one per channel or group; None for run-time (dynamic) qparams and
        for casts
    axis: dimension with one scale per index; None for one scale in all
    group_size: neighbours in a row of a matrix that share a scale; scale has shape (rows, groups in a row)
    per_token: run-time qparams for each index of all dimensions but the last
    """

    dtype: torch.dtype
    quant_min: int
    quant_max: int
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    axis: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    per_token: bool = False
    eps: float = FLOAT32_EPS

    @property
    def is_cast(self) -> bool:
        return self.dtype.is_floating_point and self.scale is None


def read_qparams(reading: ObserverReading) -> QParams:
    """What an observer or fake quantizer has settled on.

    Raises:
        ConversionError: the q/dq ops have no form for its scheme, or its answer is no grid.
    """
    dtype, bounds = reading.dtype, reading.bounds
    if dtype is None or (reading.scheme is not None and reading.scheme.op is None):
        raise ConversionError(_no_op(reading))
    if bounds is None:
        return QParams(dtype, 0, 0)
    if not reading.is_integer and (dtype not in FLOAT8 or reading.is_dynamic):
        raise ConversionError(_no_op(reading))
    form = QParams(
        storage_dtype(dtype) if reading.is_integer else dtype,
        *bounds,
        symmetric=is_symmetric(reading.qscheme),
        eps=reading.eps,
    )
    if reading.is_dynamic:
        if reading.granularity not in (None, PerTensor(), PerToken()):
            raise ConversionError(_no_op(reading))
        return replace(form, per_token=isinstance(reading.granularity, PerToken))
    scale, zero_point = _answer(reading)
    _check_grid(reading, scale, zero_point, bounds)
    settled = replace(form, scale=scale, zero_point=zero_point)
    if isinstance(reading.granularity, Granularity):
        return _of_blocks(reading, settled)
    return replace(settled, axis=int(reading.axis) if is_per_channel(reading.qscheme) else None)  # type: ignore[arg-type]


def _answer(reading: ObserverReading) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) of an observer, whatever it does."""
    try:
        scale, zero_point = _asked(reading.observer)
        return torch.as_tensor(scale).detach(), torch.as_tensor(zero_point).detach()
    except QuantizationError:
        raise
    except Exception as error:  # observers of other packages raise what they like
        raise ConversionError(
            f"calculate_qparams of {type(reading.observer).__name__} does not give a scale and a zero point: "
            f"{type(error).__name__}: {error}\n{indent(reading.place, '  ')}"
        ) from error


def _asked(observer: Any) -> Any:
    """Of a fake quantizer of another package what it rounds to; it may answer with what its observer would choose."""
    if is_fake_quantizer(observer) and not isinstance(observer, FakeQuantizeBase):
        return observer.scale, observer.zero_point
    return observer.calculate_qparams()


def _check_grid(reading: ObserverReading, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> None:
    """Comparisons are written so that NaN fails them."""
    steps = bool(((scale > 0) & scale.isfinite()).all()) and bool(zero_point.isfinite().all())
    inside = zero_point.dtype.is_floating_point or bool(((zero_point >= bounds[0]) & (zero_point <= bounds[1])).all())
    if not steps or not inside:
        raise ConversionError(
            f"{type(reading.observer).__name__} answers with scale {_few(scale)} and zero point {_few(zero_point)}, "
            f"which is no grid: a scale is finite and > 0, a zero point lies in {list(bounds)}.\n"
            f"{indent(reading.place, '  ')}\n"
            "  Calibrate again; if the state came from a file, it was damaged, or made for another configuration."
        )


def _few(values: Tensor) -> str:
    first = ", ".join(f"{value:g}" for value in values.flatten()[:4].tolist())
    return first + (", ..." if values.numel() > 4 else "")


def _of_blocks(reading: ObserverReading, settled: QParams) -> QParams:
    """The forms that the ops have: per tensor, per channel, and for matrices per row and per group around zero."""
    blocks, matrix = reading.granularity, reading.rank == 2
    scale: Any = settled.scale
    zero_point: Any = settled.zero_point
    if isinstance(blocks, PerAxis):
        return replace(settled, scale=scale.flatten(), zero_point=zero_point.flatten(), axis=blocks.axis)
    if matrix and isinstance(blocks, PerRow) and blocks.dim in (-1, 1):  # its channels of dimension 0
        return replace(settled, scale=scale.flatten(), zero_point=zero_point.flatten(), axis=0)
    if matrix and isinstance(blocks, PerGroup) and not bool(zero_point.any()):
        rows = (scale.shape[0], -1)
        group_size = blocks.group_size
        return replace(settled, scale=scale.reshape(rows), zero_point=zero_point.reshape(rows), group_size=group_size)
    if not isinstance(blocks, PerTensor):
        raise ConversionError(_no_op(reading))
    return settled


def _no_op(reading: ObserverReading) -> str:
    scheme, blocks = reading.scheme, reading.granularity or "with a scale"
    wanted = f"{reading.dtype} {blocks}" if scheme is None else f"{scheme}"
    if scheme is not None and scheme.op is not None:
        wanted += " of a tensor that is not a matrix"
    return (
        f"torch.ops.quantized_decomposed has no op for {wanted}, so a tensor was prepared and calibrated but cannot be "
        f"converted.\n{indent(reading.place, '  ')}\n"
        "  A backend with an op of its own for it observes with a class that has convert(model, node), which writes "
        "that op; or choose a scheme that docs/schemes.md lists with an op; or leave this place in float."
    )


def with_qparams(group: GroupRecord, qparams: QParams | None) -> GroupRecord:
    """The record of a group with the scale, zero point and range that its observer has settled on."""
    if qparams is None or qparams.scale is None or qparams.zero_point is None:
        return group
    scales, zero_points = qparams.scale.flatten().tolist(), qparams.zero_point.flatten().tolist()
    if qparams.axis is not None or qparams.group_size is not None:
        return replace(group, scale=scales, zero_point=zero_points)
    scale, zero_point = scales[0], zero_points[0]
    ends = ((qparams.quant_min - zero_point) * scale, (qparams.quant_max - zero_point) * scale)
    return replace(group, scale=scale, zero_point=zero_point, range=ends)
