"""The number formats that a tensor can be quantized to, and the rounding to their elements.

    int2..int8, int16, uint2..uint8    integers; those narrower than a byte are stored in one, with narrower bounds
    float8_e4m3fn, float8_e5m2         8-bit floats with a float32 scale
    mxfp8, mxfp4                       8-bit (E4M3) and 4-bit (E2M1) floats in blocks of 32 that share an exponent of 8
                                       bits (E8M0): OCP Microscaling Formats (MX) Specification v1.0, 2023, section 5

Before this: nothing. After it: `scheme` says what may be combined with what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import SpecError

__all__ = ["FORMATS", "MX_BLOCK", "Format", "format_of"]

MX_BLOCK = 32
"""Neighbours in the last dimension that share an exponent (MX v1.0, section 5.2: k = 32 in every concrete format)."""


@dataclass(frozen=True)
class Format:
    """One number format.

    kind:             how a real number becomes an element: an integer with scale and zero point, a float with a scale,
                      a float with a shared exponent
    storage:          dtype of the tensor that holds elements, one each
    low, high:        bounds of an element, both included, in units of the scale
    largest_exponent: of an element, for shared exponents (`emax` in the MX specification)
    """

    name: str
    kind: Literal["integer", "float8", "mx"]
    storage: torch.dtype
    low: int
    high: int
    largest_exponent: int = 0

    def elements(self, x: Tensor) -> Tensor:
        """x, already divided by its scale and inside the bounds, rounded to elements, half to even; float formats."""
        if self.name != "mxfp4":
            return x.to(self.storage)
        size = x.abs()
        # E2M1 holds 0, 0.5, 1, 1.5 | 2, 3 | 4, 6: each step doubles where the exponent grows.
        step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
        return (torch.round(x / step) * step).to(self.storage)  # every E2M1 number is an E4M3 number


def _integers() -> list[Format]:
    made = [Format(f"int{bits}", "integer", torch.int8, -(1 << bits - 1), (1 << bits - 1) - 1) for bits in range(2, 9)]
    made += [Format(f"uint{bits}", "integer", torch.uint8, 0, (1 << bits) - 1) for bits in range(2, 9)]
    return [*made, Format("int16", "integer", torch.int16, -(1 << 15), (1 << 15) - 1)]


_FLOATS = [
    Format("float8_e4m3fn", "float8", torch.float8_e4m3fn, -448, 448),
    Format("float8_e5m2", "float8", torch.float8_e5m2, -57344, 57344),
    Format("mxfp8", "mx", torch.float8_e4m3fn, -448, 448, largest_exponent=8),
    Format("mxfp4", "mx", torch.float8_e4m3fn, -6, 6, largest_exponent=2),
]

FORMATS: dict[str, Format] = {one.name: one for one in [*_integers(), *_FLOATS]}
"""Every format by its name."""


def format_of(dtype: str | torch.dtype) -> Format:
    """The format of this name; torch's dtypes count by theirs: torch.int4 is "int4", torch.qint8 is "int8".

    Raises:
        SpecError: there is none.
    """
    name = str(dtype).removeprefix("torch.")
    name = {"qint8": "int8", "quint8": "uint8"}.get(name, name)
    if name not in FORMATS:
        raise SpecError(f"{dtype} is not a format to quantize to; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
