"""Where a division of each channel of a tensor can go: into the parameters that made the tensor.

y / s is linear(x) or conv(x) with the rows of its weight and its bias divided, and norm(x) with weight and bias
divided. Between there and the tensor a factor passes through whatever moves values (heads split, exchanged, repeated
and merged again; a map of features that becomes a vector), through relu, pools and pads of zeros, through one side of a
product, and through the values of attention. To learn which channel comes from which row, the numbers of the rows are
sent through the operators in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils import _pytree as pytree

from ..arguments import bind
from ..graph.module import is_guard
from ..ops import (
    ADAPTIVE_AVG_POOL,
    ADD,
    ATTENTION,
    AVG_POOL,
    HARDTANH,
    LEAKY_RELU,
    LINEAR,
    MATMUL,
    MEAN,
    MUL,
    RELU,
    RELU6,
    RELUS,
    factors,
    is_conv,
    is_conv_transpose,
    is_value_preserving,
    op_name,
)  # fmt: skip

__all__ = ["Fold", "Place", "channels_of", "find_fold", "is_relu6", "keeps_channels", "value_readers"]

aten = torch.ops.aten
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_SCALABLE = frozenset((*RELU, *LEAKY_RELU))
"""f(x / s) = f(x) / s for every s > 0; gelu, silu, tanh and the like are not so."""
_AVERAGES = frozenset((*AVG_POOL, *ADAPTIVE_AVG_POOL, *MEAN))
"""The same, of values in one channel."""
_UNKNOWN = 2
"""Stands for a size that data decides (x[mask]), so that channels can be followed past it."""


@dataclass(frozen=True)
class Place:
    """A parameter that takes the division.

    node:  who reads it
    name:  as which argument; absent (None in the graph) is a weight of ones to be made
    rows:  of each channel of the tensor, the index in the parameter's first dimension
    """

    node: Node
    name: str
    rows: Tensor


@dataclass(frozen=True)
class Fold:
    """All places that together divide a tensor; the first is the node that makes it.

    path: from that node to the tensor
    """

    places: tuple[Place, ...]
    path: tuple[Node, ...]

    @property
    def producer(self) -> Node:
        return self.places[0].node

    @property
    def rows(self) -> Tensor:
        """Channels with the same row must share a factor: those of heads that were repeated."""
        return self.places[0].rows


def find_fold(x: Node, readers: list[Node], *, clamps: bool = False) -> Fold | str:
    """Where the division of `x`, which only `readers` may read, goes; or the reason why nothing can take it.

    Args:
        x: the tensor.
        readers: linears, whose channels are the last dimension of x, or convolutions, whose channels are the second.
        clamps: go through relu6 as if it were relu; the caller sees it in the path, and makes it one.
    """
    others = [user.name for user in value_readers(x) if user not in readers]
    if others:
        return f"{x.name} is also read by {', '.join(others)}"
    found = _walk([x], clamps)
    if isinstance(found, str):
        return found
    places = []
    for path, names in found:
        rows = _rows(path, channels_of(readers[0]))
        if rows is None:
            return f"between {path[0].name} and {x.name} channels are mixed"
        places += [Place(path[0], name, rows) for name in names]
    return Fold(tuple(places), tuple(found[0][0]))


def channels_of(node: Node) -> int:
    """The dimension, counted from the end, of the channels that a linear, a norm or a convolution reads or makes."""
    conv = is_conv(node) or is_conv_transpose(node)
    return 1 - len(factors(node)[1].meta["val"].shape) if conv else -1


def is_relu6(node: Node) -> bool:
    """Whether a node clamps to [0, a number]."""
    return node.target in RELU6 or (node.target in HARDTANH and bind(node)["min_val"] == 0)


Found = list[tuple[list[Node], list[str]]]
"""Paths from a node with parameters to the tensor, and the parameters to divide there."""


def _walk(path: list[Node], clamps: bool) -> Found | str:
    """Go from the tensor to what made it; `path` starts with the node to look at."""
    node = path[0]
    others = [user.name for user in value_readers(node) if user not in path[1:2]]
    if len(path) > 1 and others:
        return f"{node.name} is also read by {', '.join(others)}"
    if node.op != "call_function":
        return f"{node.name} is an input of the model or a parameter"
    if node.target in (*_NORMS, *LINEAR) or is_conv(node):
        return _parameters(path)
    if node.target in (*MUL, *ADD):
        constants = [name for name in ("self", "other") if _is_vector(bind(node).get(name), node)]
        if constants:
            return _through_vector(path, constants[0], clamps)
    reasons = []
    for source in _sources(node, clamps):
        found = (
            _walk([source, *path], clamps) if _times(node, source) == 1 else f"{node.name} reads {source.name} twice"
        )
        if not isinstance(found, str):
            return found
        reasons.append(found)
    return reasons[0] if reasons else f"a factor does not pass through {node.name} ({node.target})"


def value_readers(node: Node) -> list[Node]:
    """Who reads the values, not the shape alone."""
    return [
        user
        for user in node.users
        if user.op == "output" or (not is_guard(user) and isinstance(user.meta.get("val"), (Tensor, tuple, list)))
    ]


def _times(node: Node, source: Node) -> int:
    return pytree.tree_leaves((node.args, node.kwargs)).count(source)


def _parameters(path: list[Node]) -> Found | str:
    """A norm or a linear with parameters of its own."""
    node = path[0]
    bound = bind(node)
    names = [name for name in ("weight", "bias") if bound.get(name) is not None]
    if node.target in _NORMS and len(bound["normalized_shape"]) != 1:
        return f"{node.name} normalizes over several dimensions"
    if not all(_own(bound[name]) for name in names):
        return f"a parameter of {node.name} is computed, or other operators read it too"
    return [(path, sorted({"weight", *names}, reverse=True))]


def _through_vector(path: list[Node], name: str, clamps: bool) -> Found | str:
    """The weight of a norm that is written out ends the way; its bias is divided on the way to the weight."""
    node = path[0]
    vector, rest = bind(node)[name], bind(node)["other" if name == "self" else "self"]
    if not _own(vector):
        return f"{vector.name} is read by several operators"
    if node.target in MUL:
        return [(path, [name])]
    if bind(node).get("alpha", 1) != 1 or not isinstance(rest, Node):
        return f"a factor does not pass through {node.name} ({node.target})"
    found = _walk([rest, *path], clamps)
    return found if isinstance(found, str) else [*found, (path, [name])]


def _is_vector(value: Any, node: Node) -> bool:
    """A stored value for each channel."""
    if not isinstance(value, Node) or value.op != "get_attr":
        return False
    shape = value.meta["val"].shape
    return len(shape) == 1 and shape[0] == node.meta["val"].shape[-1]


def _own(parameter: object) -> bool:
    return isinstance(parameter, Node) and parameter.op == "get_attr" and len(parameter.users) == 1


def _sources(node: Node, clamps: bool) -> Iterator[Node]:
    """Through which inputs a factor for each channel of the output can pass."""
    if node.target in MUL:
        width = node.meta["val"].shape[-1]
        wide = [source for source in reversed(node.all_input_nodes) if source.meta["val"].shape[-1:] == (width,)]
        yield from (source for source in wide if source.meta["val"].dim() == node.meta["val"].dim())
    elif node.target in MATMUL and len(node.all_input_nodes) == 2:
        yield node.args[1]  # type: ignore[misc]
    elif node.target in ATTENTION:
        yield bind(node)["value"]
    elif node.target in (*_SCALABLE, *_AVERAGES) or (clamps and is_relu6(node)):
        yield node.all_input_nodes[0]
    elif is_value_preserving(node) and isinstance(node.meta.get("val"), Tensor):
        tensors = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
        yield from tensors if len(tensors) == 1 else ()


def _rows(path: list[Node], channels: int) -> Tensor | None:
    """Of each channel at the end of a path, the one at its start; None when positions differ in that.

    Numbers count from 1; zeros that a pad fills in are of no channel.
    """
    sizes, start = _sizes(path[0]), channels_of(path[0])
    shape = [-1 if dim == len(sizes) + start else 1 for dim in range(len(sizes))]
    numbers: Tensor | None = torch.arange(1, sizes[start] + 1, dtype=torch.float32).reshape(shape).expand(sizes)
    for source, node in itertools.pairwise(path):
        numbers = None if numbers is None else _passed(node, source, numbers)
    if numbers is None or numbers.dim() < -channels:
        return None
    flat = numbers.movedim(channels, 0).flatten(1)
    first = flat.amax(1)
    same = bool(((flat == first[:, None]) | (flat == 0)).all()) and bool((first > 0).all())
    return first.long() - 1 if same else None


def _passed(node: Node, source: Node, numbers: Tensor) -> Tensor | None:
    """What a node on the way makes of the numbers; None where it mixes channels."""
    if node.target in (*MATMUL, *ATTENTION):
        if not torch.equal(numbers, numbers[..., :1, :].expand_as(numbers)):
            return None
        groups = _sizes(node)[-3] // numbers.shape[-3] if numbers.dim() > 3 else 1
        numbers = numbers[..., :1, :]
        return (numbers.repeat_interleave(groups, -3) if groups > 1 else numbers).expand(_sizes(node))
    if node.target in _AVERAGES:
        return _averaged(node, numbers)
    if node.target in (*_SCALABLE, *RELUS, *MUL, *ADD):
        return numbers.expand(_sizes(node))
    return _moved(node, source, numbers)


def keeps_channels(source: Node, node: Node) -> bool:
    """Whether an op that moves values leaves each in its place along the last dimension."""
    if not is_value_preserving(node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    sizes = _sizes(source)
    numbers = torch.arange(sizes[-1], dtype=torch.float32)
    moved = _moved(node, source, numbers.expand(sizes))
    return moved.shape[-1:] == numbers.shape and bool((moved == numbers).all())


def _averaged(node: Node, numbers: Tensor) -> Tensor | None:
    """Numbers behind a mean over places that all have the same one; zeros that were filled in count as none."""
    sizes = _sizes(node)
    dims = (
        list(range(numbers.dim() - _spatial(node), numbers.dim())) if node.target not in MEAN else bind(node).get("dim")
    )
    if not dims:
        return None
    top = numbers.amax(dims, keepdim=True)
    if not bool(((numbers == top) | (numbers == 0)).all()):
        return None
    return (top.reshape(sizes) if node.target in MEAN else top.expand(sizes)).contiguous()


def _spatial(node: Node) -> int:
    """Dimensions that a pool goes over: the 2 of avg_pool2d."""
    return int(op_name(node)[-2])


def _moved(node: Node, source: Node, numbers: Tensor) -> Tensor:
    """What a node that only moves values makes of other values; sizes are those of the example."""

    def value(argument: Node) -> Any:
        return numbers if argument is source else _hint(argument.meta["val"])

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
    target: Callable[..., Tensor] = aten.reshape.default if op_name(node) == "view" else node.target  # type: ignore[assignment]
    return target(*args, **kwargs)


def _sizes(node: Node) -> list[int]:
    return [_hint(size) for size in node.meta["val"].shape]


def _hint(size: Any) -> int:
    return optimization_hint(size, fallback=_UNKNOWN) if isinstance(size, torch.SymInt) else size
