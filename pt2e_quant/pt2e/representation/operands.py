"""One op of the float graph as a form sees it: its arguments, what they are in integers, and where to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ... import ops
from ...arguments import argument_index, bind
from ...graph.constants import Constants
from ...graph.write import Symbol, Writer
from ...requantization import NoIntegerForm
from .values import Integers, Lookup, Sum, Value

__all__ = ["Call"]

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Call:
    """A node, what the nodes before it are in integers, which of them are constant, and where to insert."""

    node: Node
    values: Mapping[Node, Value]
    constants: Constants
    writer: Writer

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """By the names of the schema, defaults filled in."""
        return bind(self.node)

    def value(self, name: str) -> Value:
        """What the argument is in integers.

        Raises:
            NoIntegerForm: it is a float tensor or a number.
        """
        return self._of(self.arguments[name])

    def _of(self, operand: object) -> Value:
        known = self.values.get(operand) if isinstance(operand, Node) else None
        if known is None:
            raise NoIntegerForm(f"its operand {operand} is not quantized")
        return known

    def integers_of(self, operand: object) -> Integers:
        value = self._of(operand)
        if isinstance(value, Sum | Lookup):
            raise NoIntegerForm(f"its operand {operand} has no scale of its own: nothing quantizes it in between")
        return value

    def integers(self, name: str) -> Integers:
        """The argument as integers without bounds that wait."""
        return self.integers_of(self.arguments[name]).settled()

    def one_scale(self, name: str) -> Integers:
        """The same, where the op mixes values of all channels."""
        found = self.integers(name)
        if found.scale.numel() != 1 or found.run_time is not None:
            raise NoIntegerForm("its operand has a scale per channel, or one that is known at run time only")
        return found

    def constant(self, operand: object) -> Tensor | None:
        """The value of a node that no input changes."""
        return self.constants.value(operand) if operand in self.constants else None  # type: ignore[arg-type]

    def number(self, operand: object) -> float | None:
        """A number of the graph, or a constant tensor of one element."""
        if isinstance(operand, int | float):
            return operand
        held = self.constant(operand)
        return None if held is None else held.item()

    def reach(self, operand: Node, zero_point: int, limits: tuple[int, int]) -> int:
        """The largest |code - zero_point|: of the codes themselves where they are constant."""
        held = self.constant(operand)
        low, high = limits if held is None else (int(held.min()), int(held.max()))
        return max(high - zero_point, zero_point - low)

    def symbol(self, node: Node) -> Symbol:
        return self.writer(node)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Symbol:
        return self.writer.call(target, *args, **kwargs)

    def emit_with(self, **replaced: Any) -> Symbol:
        """The op itself with other arguments."""
        arguments = {**self.arguments, **replaced}
        op = ops.functional(self.node.target)
        named = [name for name in arguments if argument_index(op, name) is None]
        return self.emit(op, *(v for n, v in arguments.items() if n not in named), **{n: arguments[n] for n in named})

    def shape_of(self, name: str) -> torch.Size:
        return self.arguments[name].meta["val"].shape  # type: ignore[no-any-return]

    @staticmethod
    def is_real(node: Node) -> bool:
        """Whether a node is a float tensor, or several."""
        value = node.meta.get("val")
        value = value[0] if isinstance(value, tuple | list) and value else value
        return isinstance(value, Tensor) and value.is_floating_point()

    @staticmethod
    def is_single(symbol: Symbol | None) -> bool:
        return symbol is not None and symbol.shape.numel() == 1

    @staticmethod
    def sum_dtype(bound: int) -> torch.dtype:
        """int32, unless sums can leave it."""
        return torch.int32 if bound <= _LARGEST else torch.int64
