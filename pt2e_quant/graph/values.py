"""What is known of the value of a node: its dtype, shape and memory layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import _extract_tensor_metadata

__all__ = [
    "copy_value",
    "fake_like",
    "is_float_tensor",
    "is_quantizable",
    "rank",
    "refresh_values",
    "set_value",
    "with_value",
]


def is_float_tensor(node: Node) -> bool:
    """True when export recorded that the node's value is one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def is_quantizable(node: Node) -> bool:
    """True for one tensor of a dtype that the q/dq ops take; float64 is not among them."""
    return is_float_tensor(node) and node.meta["val"].dtype in (torch.float32, torch.float16, torch.bfloat16)


def set_value(node: Node, value: Any) -> Node:
    """Record val, and tensor_meta when it is one tensor, of a new node."""
    node.meta["val"] = value
    if isinstance(value, Tensor):
        node.meta["tensor_meta"] = _extract_tensor_metadata(value)
    return node


def copy_value(node: Node, source: Node) -> Node:
    """Record, of a new node, what is known of the value of another one: it is the same."""
    node.meta.update({key: source.meta[key] for key in ("val", "tensor_meta") if key in source.meta})
    return node


def fake_like(value: Tensor, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Tensor:
    """A fake tensor with shape, device and memory layout of `value`, as empty_like under `mode` gives it.

    `mode` itself makes the same after a search of its caches that takes ten times as long.
    """
    dtype = dtype or value.dtype
    if value.is_contiguous():  # dimensions of size one may have any stride; `mode` gives them the usual one
        layout = torch.empty(value.shape, dtype=dtype, device="meta")
    else:
        layout = torch.empty_like(torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="meta"))
    return FakeTensor(mode, layout, value.device)


def refresh_values(gm: GraphModule, changed: Iterable[Node]) -> None:
    """Record anew the values of nodes whose memory layout (strides) a pass has changed."""
    stale = set(changed)
    for node in gm.graph.nodes:
        old = node.meta.get("val")
        if node.op != "call_function" or not isinstance(old, Tensor) or stale.isdisjoint(node.all_input_nodes):
            continue
        if not isinstance(node.target, torch._ops.OpOverload) or any("val" not in n.meta for n in node.all_input_nodes):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        with_value(node, node, functools.partial(node.target, *args, **kwargs))
        if str(node.meta["val"].stride()) != str(old.stride()):
            stale.add(node)


def with_value(node: Node, source: Node, compute: Callable[[], Any]) -> Node:
    """Record the value of a new node: `compute` runs under the fake mode of `source`, on its fake value.

    What an operator asks about a dynamic size is answered for the example and narrows nothing: the model is exported
    again, and there the guards that are due arise.
    """
    mode = getattr(_first_tensor(source.meta.get("val")), "fake_mode", None)
    if mode is None:
        return node
    with mode, nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards():
        return set_value(node, compute())


def _first_tensor(value: Any) -> Any:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value


def rank(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None
