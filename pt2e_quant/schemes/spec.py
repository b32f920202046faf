"""From a scheme to a QuantizationSpec: which observer finds its range, and which fake quantizer trains it.

Calibration and training land on one grid because they use one arithmetic: for the same range the same qparams.

Before this: `modules`, and the classes of the reference.
"""

from __future__ import annotations

from typing import Any

import torch

from ..checks import checked
from ..errors import SpecError
from ..fake_quantize import FakeQuantize
from ..observer import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PerTokenPlaceholderObserver,
    PlaceholderObserver,
)
from ..specs import QuantizationSpec, integer_range
from .modules import SchemeFakeQuantize, SchemeObserver
from .scheme import Scheme

__all__ = ["quantization_spec"]


@checked(SpecError)
def quantization_spec(scheme: Scheme, *, qat: bool = False, averaging_constant: float = 0.01) -> QuantizationSpec:
    """The spec of a scheme, for an annotation.

    Args:
        scheme: a legal one; an illegal one cannot be built.
        qat: round values while training, instead of watching them.
        averaging_constant: weight of a new batch in the moving average that training keeps of static ranges.

    Raises:
        SpecError: averaging_constant lies outside (0, 1].
    """
    if not 0.0 < averaging_constant <= 1.0:
        raise SpecError(f"averaging_constant is the weight of a new batch, in (0, 1], got {averaging_constant}")
    constant = averaging_constant if scheme.timing == "static" else 1.0
    if scheme.op is None or scheme.granularity not in ("tensor", "axis"):
        return _of_blocks(scheme, qat, constant)
    of, per_axis = scheme.format, scheme.granularity == "axis"
    observer: Any = PerChannelMinMaxObserver if per_axis else MinMaxObserver
    arguments: dict[str, Any] = {"eps": scheme.eps}
    if qat:
        average: Any = MovingAveragePerChannelMinMaxObserver if per_axis else MovingAverageMinMaxObserver
        arguments |= {"observer": average, "averaging_constant": constant}
        observer = FakeQuantize
    elif scheme.is_dynamic:
        observer = PlaceholderObserver
    return QuantizationSpec(
        of.storage,
        observer.with_args(**arguments),
        *_bounds(scheme),
        _qscheme(scheme),
        scheme.axis if per_axis else None,
        scheme.is_dynamic,
    )


def _qscheme(scheme: Scheme) -> torch.qscheme:
    if scheme.granularity == "axis":
        return torch.per_channel_symmetric if scheme.symmetric else torch.per_channel_affine
    return torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine


def _of_blocks(scheme: Scheme, qat: bool, constant: float) -> QuantizationSpec:
    of = scheme.format
    if scheme.op == "quantize_per_token" and not qat:
        return QuantizationSpec(
            of.storage, PerTokenPlaceholderObserver, qscheme=torch.per_tensor_affine, is_dynamic=True
        )
    if qat:
        observer = SchemeFakeQuantize.with_args(scheme=scheme, averaging_constant=constant)
    else:
        observer = SchemeObserver.with_args(scheme=scheme)
    return QuantizationSpec(of.storage, observer, *_bounds(scheme), is_dynamic=scheme.is_dynamic)


def _bounds(scheme: Scheme) -> tuple[int | None, int | None]:
    """quant_min and quant_max where they are not those of the storage dtype."""
    of = scheme.format
    whole = of.kind != "integer" or integer_range(of.storage) == (of.low, of.high)
    return (None, None) if whole else (of.low, of.high)
