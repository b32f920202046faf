"""Values of which the small ones count: a logarithm reads them, or they divide.

The steps of an integer follow from the largest value, and below one step nothing is left. Where x is off by d, log(x)
is off by d / x: what was small enough to be rounded to zero is the largest error of the output. The front ends of
speech models are built this way, the logarithm of a filter bank of squares. A divisor that is rounded to zero makes
infinity.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ..arguments import bind
from ..ops import (
    ADAPTIVE_AVG_POOL,
    ADD,
    AVG_POOL,
    CLAMP,
    DIV,
    LOG,
    MAGNITUDE,
    MATMUL,
    MEAN,
    MUL,
    POW,
    PRODUCTS,
    RECIPROCAL,
    RELU,
    SQRT,
    SUM,
    factors,
    is_value_preserving,
)
from ..reasons import Refusal

__all__ = ["SmallValues"]

_KEEPS_SMALL = frozenset(
    (*ADD, *MUL, *MAGNITUDE, *POW, *SQRT, *SUM, *MEAN, *AVG_POOL, *ADAPTIVE_AVG_POOL, *CLAMP, *RELU)
)
"""What is small before them is small after them: squares, sums, averages, a floor under what has a logarithm."""
_KEEPS_DIVISORS = frozenset((*SQRT, *CLAMP))
"""A divisor is what is added up; its summands are divided by something that is larger."""
_LOOKED_THROUGH = 1
"""How many products: the filter bank, but not the net that predicts something."""


class SmallValues:
    """What in one graph a logarithm reads or something is divided by, also before ops that leave small values small."""

    def __init__(self, gm: GraphModule) -> None:
        self._readers: dict[Node, tuple[Node, int]] = {}  # of each node the op that magnifies it, and products left
        for node in reversed(gm.graph.nodes):
            found = [seen for seen in (self._seen(node, reader) for reader in node.users) if seen is not None]
            if found:
                self._readers[node] = max(found, key=lambda seen: seen[1])

    def _seen(self, node: Node, reader: Node) -> tuple[Node, int] | None:
        """The op that magnifies this node through this reader."""
        if reader.target in LOG:
            return reader, _LOOKED_THROUGH
        if _is_divisor(node, reader):
            return reader, 0
        behind = self._readers.get(reader)
        if behind is None:
            return None
        if reader.target in PRODUCTS or reader.target in MATMUL:
            return (behind[0], behind[1] - 1) if behind[1] and node in factors(reader)[:2] else None
        keeps = _KEEPS_SMALL if behind[0].target in LOG else _KEEPS_DIVISORS
        return behind if reader.target in keeps or is_value_preserving(reader) else None

    def refusal(self, by: str, anchor: Node, root: Node) -> Refusal | None:
        """Why what a match computes should stay in float; None where no small value of it is magnified."""
        if root not in self._readers:
            return None
        reader = self._readers[root][0]
        reason = (
            f"{reader} magnifies its small values, which steps of its whole range would round to zero; "
            f"set_operator_type(torch.ops.{anchor.target}, ...) quantizes it all the same"
        )
        return Refusal(by, reason, "magnified")


def _is_divisor(node: Node, reader: Node) -> bool:
    if reader.target in DIV:
        return bind(reader)["other"] is node
    if reader.target in POW:
        exponent = bind(reader)["exponent"]
        return isinstance(exponent, int | float) and exponent < 0
    return reader.target in RECIPROCAL
