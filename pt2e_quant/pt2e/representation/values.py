"""What a tensor of the float graph is in integers: codes with a scale, a sum of such, or rows of a table.

A real number r of the graph is  clamp(scale * (code - zero_point), low, high).  Bounds (relu, hardtanh) wait until the
tensor is quantized: rounding is monotone, so clamping codes at the rounded bounds gives the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...graph.write import Symbol, Writer, call
from ...grid import Grid
from ...requantization import NoIntegerForm, Rounding, Term, cast, codes, requantize, requantize_sum

__all__ = ["Integers", "Lookup", "Sum", "Value", "bounded"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Integers:
    """One tensor as integers.

    codes:      the integer tensor in the graph
    scale:      float64, of one element or of a shape that broadcasts to the tensor
    bound:      no |code - zero_point| is larger
    zero_point: a number, or a tensor of the graph where it is known at run time only
    run_time:   a further factor of the scale, known at run time only: a float tensor of the graph
    bias:       real numbers to add, a float tensor of the graph; only with `run_time`, where no int32 can hold them
    average:    the integers are sums that `scale` divides by a count
    limits:     smallest and largest code that the graph allows, where it says so
    """

    codes: Symbol
    scale: Tensor
    bound: int
    zero_point: int | Symbol = 0
    run_time: Symbol | None = None
    bias: Symbol | None = None
    average: bool = False
    limits: tuple[int, int] | None = None
    low: float = -math.inf
    high: float = math.inf

    def centred(self, dtype: torch.dtype = torch.int32) -> Any:
        """codes - zero_point as int32 or int64: twice eight bits reach 255, which no 8-bit type holds."""
        wide = cast(self.codes, dtype)
        if isinstance(self.zero_point, int):
            return wide - self.zero_point if self.zero_point else wide
        return wide - cast(self.zero_point, dtype)

    def settled(self) -> Integers:
        """The same with no bounds waiting, for ops that compute with the values.

        Raises:
            NoIntegerForm: a bound falls between two integers.
        """
        if self.bounds == (-math.inf, math.inf):
            return self
        limits = []
        for limit in self.bounds:
            step = limit / float(self.scale.flatten()[0])
            if limit not in (0.0, math.inf, -math.inf) and (self.scale.numel() > 1 or step != round(step)):
                raise NoIntegerForm(
                    f"it computes with values that end at {limit:g}, which is not a multiple of their scale"
                )
            limits.append(None if math.isinf(limit) else round(step))
        clamped = call(aten.clamp.default, self.centred(), *limits)
        return replace(self, codes=clamped, zero_point=0, low=-math.inf, high=math.inf)

    @property
    def bounds(self) -> tuple[float, float]:
        return self.low, self.high

    def quantized(self, out: Grid, rounding: Rounding, writer: Writer) -> Symbol:
        """Codes on the grid `out`, which are these codes themselves when the grid is the same.

        Raises:
            NoIntegerForm: the scale is known at run time only, or out of range.
        """
        if self.run_time is not None:
            raise NoIntegerForm(
                "its scale is known at run time only, so no constant factor leads to its output's codes"
            )
        limited = within(out, self.low, self.high)
        if self.scale.numel() != 1 or self.scale.float().item() != torch.tensor(out.scale).float().item():
            term = Term(self.centred_as_is(), self.scale, self.bound)
            return requantize(term, limited, rounding, writer.constant, zero_point_first=self.average)  # type: ignore[no-any-return]
        if (self.zero_point, self.limits) != (out.zero_point, (out.quant_min, out.quant_max)):
            return codes(self.centred_as_is(), limited)  # type: ignore[no-any-return]
        if limited == out:
            return self.codes
        return call(aten.clamp.default, self.codes, limited.quant_min, limited.quant_max)  # type: ignore[no-any-return]

    def centred_as_is(self) -> Any:
        """codes - zero_point in int32, or in int64 where the codes are that."""
        return self.centred(torch.int64 if self.codes.dtype is torch.int64 else torch.int32)

    def real(self, dtype: torch.dtype) -> Symbol:
        """The values as floating-point numbers: the exact integers times the scale. Bounds are left to their own op."""
        writer = self.codes.writer
        value = call(aten._to_copy.default, self.centred_as_is(), dtype=torch.float32)
        if self.run_time is not None:
            value = value * call(aten._to_copy.default, self.run_time, dtype=torch.float32)
        value = value * (float(self.scale) if self.scale.numel() == 1 else writer.constant(self.scale.float()))
        if self.bias is not None:
            value = value + self.bias
        return value if dtype is torch.float32 else call(aten._to_copy.default, value, dtype=dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Sum:
    """sum(sign * integers): becomes codes in one step, when the grid of the result is known."""

    terms: tuple[tuple[int, Integers], ...]
    low: float = -math.inf
    high: float = math.inf

    def quantized(self, out: Grid, rounding: Rounding, writer: Writer) -> Symbol:
        """Codes on the grid `out`.

        Raises:
            NoIntegerForm: a scale is known at run time only, or out of range.
        """
        if any(term.run_time is not None for _, term in self.terms):
            raise NoIntegerForm("an operand's scale is known at run time only")
        settled = ((sign, term.settled()) for sign, term in self.terms)
        terms = [Term(term.centred_as_is(), term.scale, term.bound, sign) for sign, term in settled]
        return requantize_sum(terms, within(out, self.low, self.high), rounding, writer.constant)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Lookup:
    """Rows of a constant table with a scale for each row: the table is requantized once, in advance.

    table, scale, zero_point: the weight as (rows, width), float64 (rows, 1) and of the same shape, any number type
    weight:                   the node of the table
    indices:                  the rows to take
    """

    table: Tensor
    scale: Tensor
    zero_point: Tensor
    weight: Symbol
    indices: Symbol
    low: float = -math.inf
    high: float = math.inf

    def quantized(self, out: Grid, rounding: Rounding, writer: Writer) -> Symbol:
        """Codes on the grid `out`.

        Raises:
            NoIntegerForm: zero points are floats, or a scale is out of range.
        """
        if self.zero_point.is_floating_point():
            raise NoIntegerForm("its zero points are floats")
        centred = self.table.long() - self.zero_point.long()
        term = Term(centred, self.scale, int(centred.abs().max()))
        limited = within(out, self.low, self.high)
        table = writer.constant(requantize(term, limited, rounding, lambda tensor: tensor))
        return call(aten.embedding.default, table, self.indices)  # type: ignore[no-any-return]

    def real(self, dtype: torch.dtype) -> Symbol:
        """The rows as floating-point numbers: looked up as integers, then scaled."""
        writer = self.weight.writer
        rows = call(aten._to_copy.default, call(aten.embedding.default, self.weight, self.indices), dtype=torch.float32)
        if self.zero_point.any():
            rows = rows - call(aten.embedding.default, writer.constant(self.zero_point.float()), self.indices)
        rows = rows * call(aten.embedding.default, writer.constant(self.scale.float()), self.indices)
        return rows if dtype is torch.float32 else call(aten._to_copy.default, rows, dtype=dtype)  # type: ignore[no-any-return]


Value = Integers | Sum | Lookup


def bounded(value: Value, low: float, high: float) -> Value:
    """clamp(value, low, high), after the bounds that it has."""
    return replace(value, low=min(max(value.low, low), high), high=min(max(value.high, low), high))


def within(out: Grid, low: float, high: float) -> Grid:
    """The grid without the codes beyond real bounds, each bound rounded as the graph's own quantize does it."""
    limits = [
        end if math.isinf(bound) else int(out.quantize(torch.tensor(bound)))
        for end, bound in ((out.quant_min, low), (out.quant_max, high))
    ]
    return replace(out, quant_min=limits[0], quant_max=limits[1])
