"""The values of `limits`: an operator with its operands, quantized or to be, and a kernel with limits that judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.fx import Node

from .... import ops
from ....arguments import bind

__all__ = ["Case", "Kernel", "Limit", "Scales"]

Scales = Literal["tensor", "channel", "group"]
"""What shares one scale."""


@dataclass(frozen=True)
class Case:
    """An operator, and how its operands are quantized: as a configuration asks for it, or as a graph has it.

    Args:
        node: the operator.
        activation: 'static', 'dynamic' (qparams are chosen while the program runs), or None: floating point.
        weight: what shares a scale of the weight; None: floating point.
        group: how many neighbours in a row share a scale; 0 where they are not grouped.
        axis: of the weight's channels, where the graph says it.
        is_constant: whether a tensor is known before the program runs.
        output: the result is quantized as well.
    """

    node: Node
    activation: Literal["static", "dynamic"] | None = None
    weight: Scales | None = None
    is_constant: Callable[[Node], bool] = lambda node: False
    group: int = 0
    axis: int | None = None
    output: bool = True

    def argument(self, name: str) -> Any:
        """An argument of the operator; None when its schema has none of this name."""
        return bind(self.node).get(name)

    def shape(self, name: str) -> list[Any] | None:
        """The sizes of an operand; None where the graph does not record them."""
        return _shape(self.argument(name))

    def factors(self) -> tuple[list[Any] | None, list[Any] | None]:
        """The sizes of input and weight of a product."""
        x, weight, _ = ops.factors(self.node)
        return _shape(x), _shape(weight)


Limit = Callable[[Case], "str | None"]
"""The reason why a kernel does not take a case, or None."""


@dataclass(frozen=True)
class Kernel:
    """A family of operators that XNNPACK runs in integers.

    Args:
        name: in documents.
        ops: the operators, in-place twins included.
        limits: what it does not take, in the order in which reasons are given.
        fuses: what it computes as well, when it comes next and nothing else reads the result.
        moves: it only moves values, so input and output have one scale.
    """

    name: str
    ops: tuple[Any, ...]
    limits: tuple[Limit, ...] = ()
    fuses: tuple[Any, ...] = ()
    moves: bool = False

    def broken(self, case: Case) -> Iterator[tuple[Limit, str]]:
        """The limits that a case exceeds, with the reasons."""
        found = ((limit, limit(case)) for limit in self.limits)
        return ((limit, reason) for limit, reason in found if reason is not None)


def _shape(operand: object) -> list[Any] | None:
    value = operand.meta.get("val") if isinstance(operand, Node) else None
    return list(value.shape) if isinstance(value, Tensor) else None
