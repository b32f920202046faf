"""A case: an operator, and how its operands are quantized or would be, for `limits` to judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.fx import Node

from .... import ops
from ....arguments import bind

__all__ = ["Case", "Scales"]

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


def _shape(operand: object) -> list[Any] | None:
    value = operand.meta.get("val") if isinstance(operand, Node) else None
    return list(value.shape) if isinstance(value, Tensor) else None
