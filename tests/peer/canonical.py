"""A converted graph in a form that two engines can be compared in: what each input of each float op comes from.

A *site* is one tensor argument of one float op (or of the graph's output), followed back through quantize and
dequantize to the float op, graph input or constant before them. Names of nodes and buffers and the order of independent
nodes do not count; op overloads, scales, zero points, ranges, dtypes, axes and the integer values of weights do.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree

__all__ = ["Site", "differences", "sites"]

_RELATIVE = (
    1e-6  # one engine folds batch norm in float64 and the other in float32, so scales may differ in the last bits
)


@dataclass(frozen=True)
class Site:
    """One use of one tensor.

    source:   'conv2d.default#0' (the first conv2d in the graph), 'input x', or 'a constant'
    steps:    the q/dq ops between source and use, with their further arguments; run-time qparams are replaced by the
              op that chooses them and its arguments
    constant: the stored tensor when the source is a constant, else None
    """

    source: str
    steps: tuple[tuple[Any, ...], ...]
    constant: Tensor | None = None

    def __str__(self) -> str:
        return f"{self._kind()} of {self.source}"

    def _kind(self) -> str:
        if not self.steps:
            return "float"
        dtypes = [step for step in self.steps[-1] if isinstance(step, torch.dtype) and step is not torch.float32]
        dtype = dtypes[-1] if dtypes else torch.float32
        name, words = str(self.steps[-1][0]), [str(dtype).removeprefix("torch.")]
        if "per_channel" in name:
            words.append(f"per channel {self.steps[-1][3]}")
        else:
            words.append("per row" if "per_token" in name else "per tensor")
        if any(isinstance(argument, tuple) for argument in self.steps[-1]):
            words.append("at run time")
        return " ".join(words)


def sites(gm: GraphModule) -> dict[str, Site]:
    """Every site of a graph, by 'op#number[position of the argument]' and 'output[position]'."""
    labels = _labels(gm)
    found = {}
    for node in gm.graph.nodes:
        if node.op == "output" or (node.op.startswith("call_") and node in labels):
            leaves, _ = _pytree.tree_flatten((node.args, node.kwargs))
            name = "output" if node.op == "output" else labels[node]
            for position, leaf in enumerate(leaves):
                if isinstance(leaf, Node):
                    found[f"{name}[{position}]"] = _site(gm, leaf, labels)
    return found


def differences(ours: GraphModule, theirs: GraphModule) -> list[str]:
    """One line for each site that is not the same: 'site: ours / theirs'. Empty when the graphs are equal.

    Where all sites are the same, one line for each q/dq op that occurs more often in one graph: 'op: 3 / 2 times'.
    """
    left, right = sites(ours), sites(theirs)
    lines = []
    for key in sorted(left.keys() | right.keys()):
        one, other = left.get(key), right.get(key)
        if one is None or other is None or str(one) != str(other):
            lines.append(f"{key}: {one or 'absent'} / {other or 'absent'}")
        elif not _same(one.steps, other.steps):
            lines.append(f"{key}: {one}, other qparams")
        elif not _same(one.constant, other.constant):
            lines.append(f"{key}: {one}, other values")
    return lines or _counts(ours, theirs)


def _counts(ours: GraphModule, theirs: GraphModule) -> list[str]:
    left, right = (Counter(str(node.target) for node in gm.graph.nodes if _is_dialect(node)) for gm in (ours, theirs))
    keys = sorted(key for key in left | right if left[key] != right[key])
    return [f"{key.partition('.')[2]}: {left[key]} / {right[key]} times" for key in keys]


def _labels(gm: GraphModule) -> dict[Node, str]:
    """A name for everything that is not q/dq, the same in both graphs."""
    numbers: Counter[str] = Counter()
    labels = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            labels[node] = f"input {node.target}"
        elif node.op == "get_attr":
            labels[node] = "a constant"
        elif node.op == "call_function" and not _is_dialect(node) and not _is_item_of_dialect(node):
            target = str(node.target).removeprefix("aten.")
            labels[node] = f"{target}#{numbers[target]}"
            numbers[target] += 1
        elif node.op == "call_module" and node.target != "_guards_fn":
            kind = type(gm.get_submodule(str(node.target))).__name__
            labels[node] = f"{kind}#{numbers[kind]}"
            numbers[kind] += 1
    return labels


def _is_dialect(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "quantized_decomposed"


def _is_item_of_dialect(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem" and _is_dialect(node.args[0])


def _site(gm: GraphModule, node: Node, labels: dict[Node, str]) -> Site:
    steps = []
    while _is_dialect(node):
        steps.append((str(node.target), *(_argument(gm, argument) for argument in node.args[1:])))
        node = node.args[0]
    constant = operator.attrgetter(str(node.target))(gm) if node.op == "get_attr" else None
    return Site(labels[node], tuple(steps), constant)


def _argument(gm: GraphModule, argument: Any) -> Any:
    if not isinstance(argument, Node):
        return argument
    if argument.op == "get_attr":
        return getattr(gm, str(argument.target))
    choose, item = argument.args  # run-time qparams: item 0 (scale) or 1 (zero point) of a choose_qparams op
    return (str(choose.target), *choose.args[1:], item)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return (
            torch.allclose(one, other, rtol=_RELATIVE, atol=1e-7)
            if one.is_floating_point()
            else torch.equal(one, other)
        )
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= _RELATIVE * abs(other)
    return type(one) is type(other) and bool(one == other)
