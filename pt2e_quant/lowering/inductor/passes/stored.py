"""A matrix that is stored as integers, written out as real numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....graph.write import Symbol, Writer, call
from ...common.stored import Stored

__all__ = ["Forms", "floats"]

aten = torch.ops.aten
Q = torch.ops.quantized_decomposed


class Forms:
    """New constants of a graph: each form of a matrix once, however many nodes read it."""

    def __init__(self, write: Writer) -> None:
        self.write = write
        self._made: dict[tuple[str, int], Symbol] = {}

    def get(self, use: str, of: Stored, make: Callable[[], Tensor]) -> Symbol:
        """The symbol of `make()`, a form of the matrix for some use; written where it is first asked for."""
        key = use, id(of.codes)
        if key not in self._made:
            with self.write.origin(of.node):
                self._made[key] = self.write.constant(make())
        return self._made[key]


def floats(forms: Forms, of: Stored, dtype: torch.dtype, rows: Callable[[Symbol], Symbol] = lambda one: one) -> Symbol:
    """(codes - zeros) * scales in the given dtype, of those rows that `rows` takes out of a matrix.

    Begins with a dequantize of scale 1: what depends on constants alone Inductor computes beforehand, but not that one.
    """
    grouped = of.scales.shape[1] > 1

    def of_groups(use: str, tensor: Tensor) -> Symbol:
        found = rows(forms.get(use, of, lambda: tensor))
        return found.unsqueeze(-1) if grouped else found

    with forms.write.origin(of.node):
        value = _four_bits(forms, of, rows) if of.four else _as_floats(rows(forms.write(of.node.args[0])), torch.int8)
        value = call(aten.unflatten.int, value, -1, [-1, of.group]) if grouped else value
        if bool(of.zeros.any()):
            value = value - of_groups("zeros", of.zeros)
        value = value * of_groups("scales", of.scales)
        value = value.flatten(-2, -1) if grouped else value
        return value.to(dtype)  # type: ignore[no-any-return]


def _as_floats(codes: Symbol, dtype: torch.dtype) -> Symbol:
    held = torch.iinfo(dtype)
    return call(Q.dequantize_per_tensor.default, codes, 1.0, 0, held.min, held.max, dtype)  # type: ignore[no-any-return]


def _four_bits(forms: Forms, of: Stored, rows: Callable[[Symbol], Symbol]) -> Symbol:
    """Of two in a byte: the first half of a row lies in the low bits, the second in the high ones."""
    value = _as_floats(rows(forms.get("bytes", of, lambda: _two_in_a_byte(of.codes))), torch.uint8)
    high = call(aten.floor.default, value * (1 / 16))
    return call(aten.cat.default, [value - high * 16.0, high], -1) - 8.0  # type: ignore[no-any-return]


def _two_in_a_byte(codes: Tensor) -> Tensor:
    """uint8 (rows, columns / 2) of code + 8."""
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=1)
    return low | (high << 4)
