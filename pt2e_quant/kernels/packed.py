"""Weights packed for torch's own engine, and its kernel for dynamic linears, which quantizes what comes in by itself.

What is packed is no tensor, and only torch's quantized tensors lead to it: the one place here that makes those, while
torch has them.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .. import qparams
from ..errors import QuantizedTensorError
from ..qtensor import to_torch
from .kernel import Dynamic, Kernel

if TYPE_CHECKING:
    from .products import Product

__all__ = ["KERNEL", "absent", "check_finite", "pack"]

_ENGINES = ("x86", "fbgemm", "onednn")
_has_vnni = functools.cache(torch.cpu._is_vnni_supported)


def pack(weight: Any) -> Any:
    """The weight of a linear, with its bias or zeros, packed for the engine that is set: where `absent` is None."""
    return _attempt(weight)[0]


def absent(weight: Any) -> str | None:
    """Why a Weight cannot be packed here, or None."""
    if torch.backends.quantized.engine not in _ENGINES or not _has_vnni():
        return f"the engine {torch.backends.quantized.engine!r} without VNNI has 7 bits for inputs"
    if not weight.is_symmetric or weight.quantized.device.type != "cpu":
        return "the weight has zero points, or is not on a CPU"
    return _attempt(weight)[1]  # type: ignore[no-any-return]


def check_finite(x: Tensor) -> None:
    """
    Raises:
        CalibrationError: x has a NaN or an infinity, which torch's kernels take for numbers.
    """
    if not math.isfinite(x.sum().item()):  # where finite values have such a sum, their range says so
        low, high = qparams.min_max(x.detach())
        qparams.affine_numbers(float(low), float(high), 0, 255)


def _attempt(weight: Any) -> Any:
    """(what is packed, None), or (None, the reason). Kept in the Weight."""
    return weight.once(("packed", torch.backends.quantized.engine), lambda: _packed(weight.quantized, weight.bias))


def _packed(weight: Tensor, bias: Tensor | None) -> tuple[Any, str | None]:
    added = torch.zeros(len(weight)) if bias is None else bias.detach().float()
    try:
        return torch.ops.quantized.linear_prepack(to_torch(weight), added), None
    except Exception as error:  # noqa: BLE001  # whatever forbids it, another kernel computes
        return None, f"this torch packs no weights: {error}"


def dynamic(product: Product) -> Dynamic:
    op, packed, is_finite = torch.ops.quantized.linear_dynamic.default, pack(product.weight), math.isfinite

    def run(x: Tensor, reduce_range: bool) -> Tensor:
        if not is_finite(x.sum().item()):
            check_finite(x)
        return op(x, packed, reduce_range)  # type: ignore[no-any-return]

    return run if len(product.shape) > 1 else lambda x, reduce_range: run(x[None], reduce_range)[0]


def _lacks(product: Product) -> str | None:
    if not product.dynamic:
        return "takes real numbers, not codes"
    return "no linear" if product.weight.geometry is not None else absent(product.weight)


def _refused(product: Product) -> NoReturn:
    raise QuantizedTensorError(f"packed: {_lacks(product)}")


KERNEL = Kernel(
    "packed",
    "torch's engine on weights that it packed, while torch has it: dynamic layers in one call",
    _refused,
    _refused,
    _lacks,
    dynamic=dynamic,
)
