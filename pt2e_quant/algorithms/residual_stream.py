"""The residual stream of a transformer: the tensors that blocks read through norms and add to.

x Q, with an orthogonal Q, can take the place of x in all of them at once. What makes them can be multiplied by Q
(linears, embeddings, stored values); what adds, moves or scales whole rows passes it on; the mean of squares is the
same; and what reads them, linears behind norms, can undo it. Everything else stands in the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph.constants import Constants
from ..ops import (
    ADD,
    CAST,
    CAT,
    DIV,
    EMBEDDING,
    EMBEDDING_BAG,
    LINEAR,
    MAGNITUDE,
    MEAN,
    MM,
    MUL,
    NORM,
    POW,
    SUB,
    SUM,
    factors,
    op_name,
)
from .folds import keeps_channels, value_readers

__all__ = ["LINEARS", "Norm", "ResidualStream", "residual_streams"]

LINEARS = frozenset((*LINEAR, *MM))


@dataclass(eq=False)
class Norm:
    """What a norm does to a row after it has divided it: a factor and a summand for each channel.

    node: the norm, or the product with its weight where the model writes it out
    shift_at: the addition of its bias, where the model writes that out
    """

    node: Node
    scale: Node | None
    shift: Node | None = None
    shift_at: Node | None = None

    @property
    def takes_mean_out(self) -> bool:
        return op_name(self.node) == "layer_norm"


@dataclass(eq=False)
class ResidualStream:
    """A stream, or the reason why it has to stay as it is.

    size: channels
    values: the tensors
    writers: linears, embeddings and stored values that make some of them
    readers: linears that read them, each with the norm before it, if there is one
    exact: who reads rows with their mean
    """

    size: int
    values: dict[Node, None] = field(default_factory=dict)
    writers: dict[Node, None] = field(default_factory=dict)
    readers: dict[Node, Norm | None] = field(default_factory=dict)
    norms: list[Norm] = field(default_factory=list)
    exact: list[Node] = field(default_factory=list)
    reason: str | None = None

    @property
    def centred(self) -> bool:
        """Whether its readers take the mean of each row out."""
        return any(norm.takes_mean_out for norm in self.norms)


def residual_streams(gm: GraphModule, constants: Constants) -> Iterator[ResidualStream]:
    """The streams that norms of one dimension read, in the order of their first norm."""
    seen: set[Node] = set()
    for node in gm.graph.nodes:
        start = _normalized(node)
        if start is None or start in seen or start in constants:
            continue
        stream = _Search(start, constants).stream
        seen |= set(stream.values)
        yield stream


def _normalized(node: Node) -> Node | None:
    """What a norm over the last dimension reads; of one that is written out, whose squares it takes the mean of."""
    if _is_norm_of_rows(node):
        return bind(node)["input"]  # type: ignore[no-any-return]
    source = node.args[0] if node.op == "call_function" and node.args else None
    if isinstance(source, Node) and _is_square(node, source) and any(user.target in MEAN for user in node.users):
        return source
    return None


class _Search:
    """Goes from one tensor of a stream to everything that makes or reads the others."""

    def __init__(self, start: Node, constants: Constants) -> None:
        self._constants = constants
        self._size = start.meta["val"].shape[-1]
        self.stream = ResidualStream(self._size)
        self._waiting: list[Node] = []
        self._join(start)
        while self._waiting and self.stream.reason is None:
            node = self._waiting.pop()
            self._look_back(node)
            for reader in value_readers(node):
                self._look_on(node, reader)
        self.stream.values = dict.fromkeys(sorted(self.stream.values))
        self.stream.writers = dict.fromkeys(sorted(self.stream.writers))
        self.stream.readers = {node: self.stream.readers[node] for node in sorted(self.stream.readers)}
        if self.stream.centred and self.stream.exact:
            self._refuse(f"{self.stream.exact[0].name} reads it without taking the mean out, as others do")

    def _join(self, node: Node) -> None:
        if node not in self.stream.values:
            self.stream.values[node] = None
            self._waiting.append(node)

    def _refuse(self, reason: str) -> None:
        self.stream.reason = self.stream.reason or reason

    def _look_back(self, node: Node) -> None:
        """What makes a tensor of the stream."""
        if self._has_stored_weight(node):
            self.stream.writers[node] = None
        elif node.target in (*ADD, *SUB):
            for source in (bind(node)["self"], bind(node)["other"]):
                self._join_operand(node, source)
        elif (source := self._passed_from(node)) is not None:
            self._join(source)
        elif node.target in CAT and bind(node)["dim"] not in (-1, node.meta["val"].dim() - 1):
            for source in bind(node)["tensors"]:
                self._join(source)
        elif node in self._constants:
            self.stream.writers[node] = None
        else:
            made = (
                "is an input of the model" if node.op == "placeholder" else f"({node.target}) has no weight to rotate"
            )
            self._refuse(f"{node.name}, which makes a part of it, {made}")

    def _join_operand(self, node: Node, source: Any) -> None:
        if isinstance(source, Node) and _last(source) == self._size:
            self._join(source)
        else:
            self._refuse(f"{node.name} adds one value to all channels")

    def _passed_from(self, node: Node) -> Node | None:
        """The tensor of the stream that a node passes on, row by row."""
        if node.target in MUL or node.target in DIV:
            names = ("self", "other") if node.target in MUL else ("self",)
            for name, other in zip(names, ("other", "self"), strict=False):
                wide, factor = bind(node)[name], bind(node)[other]
                if isinstance(wide, Node) and _last(wide) == self._size and _is_of_rows(factor):
                    return wide
            return None
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, Node) or _last(source) != self._size:
            return None
        moves = node.target not in CAT and keeps_channels(source, node)
        return source if node.target in CAST or moves else None

    def _look_on(self, node: Node, reader: Node) -> None:
        """What reads a tensor of the stream."""
        if reader.target in CAST and reader.args[0] is not node:
            return
        if self._reads_as_linear(reader, node):
            self.stream.readers[reader] = None
            self.stream.exact.append(reader)
        elif _is_norm_of_rows(reader):
            self._normed(reader)
        elif _is_square(reader, node) and all(_is_over_last(user) for user in reader.users):
            self.stream.exact.append(reader)
        elif reader.target in (*ADD, *SUB, *CAT) or self._passed_from(reader) is node:
            self._join(reader)
        elif (scale := self._vector(reader, node, MUL)) is not None:
            self._follow(reader, Norm(reader, scale))
        else:
            self._refuse(f"{reader.name} ({reader.target}) reads it")

    def _normed(self, norm: Node) -> None:
        bound = bind(norm)
        found = Norm(norm, bound["weight"], bound.get("bias"))
        if not all(vector is None or vector in self._constants for vector in (found.scale, found.shift)):
            self._refuse(f"a parameter of {norm.name} is computed from the input")
        if not found.takes_mean_out:
            self.stream.exact.append(norm)
        self._follow(norm, found)

    def _follow(self, node: Node, norm: Norm) -> None:
        """What reads the rows of a norm, scaled by its weight: linears alone can take that over."""
        self.stream.norms.append(norm)
        waiting = [node]
        while waiting:
            for reader in value_readers(here := waiting.pop()):
                shift = self._vector(reader, here, ADD)
                if self._reads_as_linear(reader, here):
                    self.stream.readers[reader] = norm
                elif self._passed_from(reader) is here and reader.target not in (*MUL, *DIV):
                    waiting.append(reader)
                elif shift is not None and norm.shift is None and bind(reader)["alpha"] == 1:
                    norm.shift, norm.shift_at = shift, reader
                    waiting.append(reader)
                else:
                    self._refuse(f"{reader.name} ({reader.target}) reads what {norm.node.name} scales")

    def _vector(self, reader: Node, node: Node, ops: Any) -> Node | None:
        """The stored number for each channel that a product or sum has beside a tensor."""
        if reader.target not in ops:
            return None
        sides = [bind(reader)["self"], bind(reader)["other"]]
        other = next((side for side in sides if side is not node), None)
        if not isinstance(other, Node) or other not in self._constants:
            return None
        return other if other.meta["val"].shape == (self._size,) else None

    def _has_stored_weight(self, node: Node) -> bool:
        """Whether a node is an embedding, or a linear, whose weight no input changes."""
        if node.target in EMBEDDING and node.target not in EMBEDDING_BAG:
            return bind(node)["weight"] in self._constants
        weight = factors(node)[1] if node.target in LINEARS else None
        return isinstance(weight, Node) and weight in self._constants and weight.meta["val"].dim() == 2

    def _reads_as_linear(self, reader: Node, node: Node) -> bool:
        return reader.target in LINEARS and factors(reader)[0] is node and self._has_stored_weight(reader)


def _is_norm_of_rows(node: Node) -> bool:
    """A LayerNorm or RMSNorm over the last dimension alone."""
    return node.target in NORM and len(bind(node).get("normalized_shape", ())) == 1


def _is_square(node: Node, source: Node) -> bool:
    if node.target in POW:
        return node.args[0] is source and node.args[1] in (2, 2.0)
    if node.target in MUL:
        return node.args[0] is source and node.args[1] is source
    return node.target in MAGNITUDE and op_name(node) == "square" and node.args[0] is source


def _is_over_last(node: Node) -> bool:
    """A mean or a sum of each row."""
    if node.target not in (*MEAN, *SUM) or "dim" not in bind(node):
        return False
    rank = node.all_input_nodes[0].meta["val"].dim()
    return [dim % rank for dim in bind(node)["dim"] or ()] == [rank - 1]


def _is_of_rows(factor: object) -> bool:
    """A number, or one for each row."""
    return not isinstance(factor, Node) or _last(factor) == 1


def _last(node: Node) -> Any:
    """The size of the last dimension; 1 for numbers."""
    value = node.meta.get("val")
    return None if not isinstance(value, Tensor) else value.shape[-1] if value.dim() else 1
