"""Which tensors share qparams: an equivalence relation, solved as sets before any observer exists.

A *site* is the output of a node or one use of it (an edge). Two things join sites into a group:
1. a SharedQuantizationSpec joins a site with the one that it names;
2. uses of one tensor are joined with each other and with its output when their specs ask for the same integers
   (`SpecReading.key`) and the consumer's annotation allows implicit sharing. The observer is that of the output,
   without one that of the first use in the graph. A use whose spec differs is requantized instead. A value that a
   loop carries is one tensor as the result of its body and as the input of the next run. A *tied* use shares with
   other inputs of its op, as in a concatenation: it is joined with its tensor only where no other op reads that with
   a spec of its own, for such a reader would pay for the range of all of them; there, it is requantized.
Joining is symmetric and transitive, so neither the order of annotations nor the choice of anchor matters.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from typing import Generic, TypeVar

from torch.fx import Node

from ..errors import SharingError
from ..quantizer.reading import SpecReading
from ..specs import EdgeOrNode
from ..where import describe_site, locate

__all__ = ["DisjointSets", "Resolved", "share"]

Resolved = Mapping[EdgeOrNode, tuple[EdgeOrNode, SpecReading]]
"""Of each site the representative of its group and the spec of that: one that shares with nobody else's."""

T = TypeVar("T", bound=Hashable)

_MAX_SHOWN = 12


class DisjointSets(Generic[T]):
    """Union-find with path halving and union by size; without recursion, so that chains may be of any length."""

    def __init__(self) -> None:
        self._parent: dict[T, T] = {}
        self._size: dict[T, int] = {}

    def add(self, item: T) -> None:
        self._parent.setdefault(item, item)
        self._size.setdefault(item, 1)

    def find(self, item: T) -> T:
        """The representative of the set that holds `item`."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def union(self, first: T, second: T) -> T:
        """Join two sets; the representative of the result."""
        first, second = self.find(first), self.find(second)
        if first == second:
            return first
        if self._size[first] < self._size[second]:
            first, second = second, first
        self._parent[second] = first
        self._size[first] += self._size[second]
        return first


def share(
    specs: Mapping[EdgeOrNode, SpecReading],
    implicit: set[EdgeOrNode],
    same: Mapping[Node, Node] | None = None,
    tied: Set[EdgeOrNode] = frozenset(),
) -> Resolved:
    """(representative, concrete spec) of the group of each site.

    Args:
        specs: spec of each annotated site, in graph order.
        implicit: the edges that may be joined with other uses of the same tensor.
        same: nodes that count as one tensor with another one, as the result of a loop and its input do.
        tied: of `implicit`, the edges that share with other inputs of their op.

    Raises:
        SharingError: a spec shares with a site that has none, or a group is a circle without a concrete spec.
    """
    sets: DisjointSets[EdgeOrNode] = DisjointSets()
    for site in specs:
        sets.add(site)
    for site, spec in specs.items():
        if spec.shares_with is not None:
            sets.union(site, _anchor(site, spec.shares_with, specs))
    concrete = _concrete(specs, sets)
    _join_uses(specs, implicit, sets, concrete, same or {}, tied)
    return {site: (root := sets.find(site), concrete[root]) for site in specs}


def _anchor(site: EdgeOrNode, anchor: EdgeOrNode, specs: Mapping[EdgeOrNode, SpecReading]) -> EdgeOrNode:
    if anchor in specs:
        return anchor
    raise SharingError(
        f"{describe_site(site)} is to share qparams with {describe_site(anchor)}, which is not quantized itself:\n"
        f"  {locate(_node(site))}\n  {locate(_node(anchor))}\n"
        "  Annotate the tensor that it shares with, or give this one a spec of its own."
    )


def _concrete(specs: Mapping[EdgeOrNode, SpecReading], sets: DisjointSets[EdgeOrNode]) -> dict[EdgeOrNode, SpecReading]:
    """The one spec of each group that is not itself a reference to another site, by representative."""
    # At most one: every site but that one names exactly one other, so a group is a tree with it as root, or a circle.
    found = {sets.find(site): spec for site, spec in specs.items() if spec.shares_with is None}
    for site in specs:
        if sets.find(site) not in found:
            raise SharingError(
                "these tensors share qparams with each other in a circle, none of them says which:\n"
                f"{_chain(sets.find(site), specs, sets)}\n  Give one of them a QuantizationSpec."
            )
    return found


def _join_uses(
    specs: Mapping[EdgeOrNode, SpecReading],
    implicit: set[EdgeOrNode],
    sets: DisjointSets[EdgeOrNode],
    concrete: dict[EdgeOrNode, SpecReading],
    same: Mapping[Node, Node],
    tied: Set[EdgeOrNode],
) -> None:
    """Rule 2 of the module docstring. The first use of each kind stands for those that follow."""
    first_of: dict[tuple[Node, Hashable], EdgeOrNode] = {}

    def kind(site: EdgeOrNode) -> tuple[Node, Hashable]:
        tensor = site if isinstance(site, Node) else site[0]
        return same.get(tensor, tensor), concrete[sets.find(site)].key

    def join(site: EdgeOrNode) -> None:
        first = first_of.setdefault(kind(site), site)
        spec = concrete[sets.find(first)]
        concrete[sets.union(first, site)] = spec

    uses = [site for site in specs if site in implicit and site not in tied]
    for site in (*(site for site in specs if isinstance(site, Node)), *uses):
        join(site)
    read = {sets.find(use) for use in uses if specs[use].shares_with is None}
    # All are chosen before one of them is joined, so that their order does not matter.
    free = [site for site in specs if site in tied and sets.find(first_of.get(kind(site), site)) not in read]
    for site in free:
        join(site)


def _chain(root: EdgeOrNode, specs: Mapping[EdgeOrNode, SpecReading], sets: DisjointSets[EdgeOrNode]) -> str:
    members = [site for site in specs if sets.find(site) == root]
    lines = [f"  {describe_site(site)}: {specs[site]}" for site in members[:_MAX_SHOWN]]
    if len(members) > _MAX_SHOWN:
        lines.append(f"  ... and {len(members) - _MAX_SHOWN} more")
    return "\n".join((*lines, f"  {locate(_node(members[0]))}"))


def _node(site: EdgeOrNode) -> Node:
    return site if isinstance(site, Node) else site[1]
