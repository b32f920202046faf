"""Values that come back: the residual stream that every block adds to, the state of a recurrence.

What is rounded there is rounded again in each block or step that follows. And a norm that reads a stream divides by the
spread of most values, while the steps of an integer follow from the largest: outliers that the norm takes out leave
their steps behind. A static recipe may keep such values in float, and quantize the products with weights alone.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch.fx import GraphModule, Node

from ..graph.nested import carried
from ..ops import ADAPTIVE_AVG_POOL, CAT, CONV, LINEAR, MEAN, NORM, POW, STACK, factors, is_value_preserving
from ..reasons import Refusal

__all__ = ["Streams"]

_PRODUCTS = frozenset((*LINEAR, *CONV))
_AVERAGES = frozenset((*MEAN, *ADAPTIVE_AVG_POOL))
_END_OF_STEP = frozenset((*_PRODUCTS, *CAT, *STACK))
"""A stack of states is for readers outside."""

_SAME = "set_operator_type(torch.ops.{}, ...) quantizes it all the same"


class Streams:
    """The streams of one graph."""

    def __init__(self, gm: GraphModule) -> None:
        self._steps = _steps(gm)

    def refusal(self, by: str, anchor: Node, root: Node) -> Refusal | None:
        """Why what a match computes should stay in float; None where no stream runs through it."""
        all_the_same = _SAME.format(anchor.target)
        if root in self._steps:
            reason = (
                f"it is part of a recurrence, where each step rounds what the one before has rounded; {all_the_same}"
            )
            return Refusal(by, reason, "recurrence")
        norm = _norm_of(root)
        if norm is None:
            return None
        reason = f"{norm} normalizes it, so steps of its whole range would cost much accuracy; {all_the_same}"
        return Refusal(by, reason, "normalized")


def _norm_of(tensor: Node) -> Node | None:
    """The normalization that reads a tensor, also after ops that move its values or average them; None without one."""
    waiting, seen = [tensor], {tensor}
    while waiting:
        for reader in waiting.pop().users:
            if reader.target in NORM or _starts_rms_norm(reader):
                return reader
            passes_on = is_value_preserving(reader) or reader.target in _AVERAGES
            if passes_on and reader not in seen:
                seen.add(reader)
                waiting.append(reader)
    return None


def _starts_rms_norm(reader: Node) -> bool:
    """The mean of squares, as models write it out: x.pow(2).mean(-1, keepdim=True)."""
    squares = reader.target in POW and reader.args[1] in (2, 2.0)
    return squares and any(user.target in MEAN for user in reader.users)


def _steps(gm: GraphModule) -> set[Node]:
    """What computes the next state of an unrolled layer, of a cell called in a loop, or of a loop's body.

    The ops after a product with a weight that an earlier step was multiplied with too, up to the next product.
    """
    again = _used_again(gm)
    steps: set[Node] = set()
    for node in gm.graph.nodes if again else ():
        goes_on = any(source in steps or _weight(source) in again for source in node.all_input_nodes)
        if goes_on and node.op == "call_function" and node.target not in _END_OF_STEP:
            steps.add(node)
    return steps


def _used_again(gm: GraphModule) -> set[Hashable]:
    """The weights of products whose input depends on a product with the same weight, or on what a loop carries."""
    bits: dict[Hashable, int] = {}
    passed = {start: 1 for start, _ in carried(gm)}  # of each node the weights that it depends on, bit by bit
    again: set[Hashable] = set()
    for node in gm.graph.nodes:
        passed.setdefault(node, 0)
        for source in node.all_input_nodes:
            passed[node] |= passed[source]
        weight = _weight(node)
        if weight is not None:
            bit = bits.setdefault(weight, 2 << len(bits))
            if passed[node] & (bit | 1):
                again.add(weight)
            passed[node] |= bit
    return again


def _weight(node: Node) -> Hashable:
    """What names the weight of a product; None for other ops."""
    if node.target not in _PRODUCTS:
        return None
    weight = factors(node)[1]
    return weight.target if isinstance(weight, Node) and weight.op == "get_attr" else weight
