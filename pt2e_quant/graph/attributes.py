"""Parameters, buffers and submodules that a graph names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..where import copy_origin
from .nested import written
from .values import _first_tensor, fake_like, set_value

__all__ = [
    "attribute",
    "constant",
    "free_name",
    "insert_attribute",
    "own_state",
    "own_written",
    "set_attribute",
    "state_bytes",
    "written_attributes",
]


def own_written(gm: GraphModule, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Give a graph copies of its own of the tensors that it writes to, and no others; returns the copies by name.

    Args:
        values: what the copies hold instead of what the tensors hold today.
    """
    copies: dict[str, Tensor] = {}
    for name in written_attributes(gm):
        old = attribute(gm, name)
        value = (values or {}).get(name, old).detach().to(old.device, copy=True)
        copies[name] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        path, _, leaf = name.rpartition(".")
        setattr(gm.get_submodule(path), leaf, copies[name])
    return copies


def own_state(gm: nn.Module) -> None:
    """Give a module copies of its own of all parameters and buffers; what was shared inside it stays shared."""
    copies: dict[int, Any] = {}
    for module in gm.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in copies:
                    value = old.detach().clone()
                    copies[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
                held[name] = None if old is None else copies[id(old)]


def state_bytes(gm: nn.Module) -> int:
    """Bytes of all parameters and buffers; memory that several of them share counts once."""
    storages = {}
    for tensor in (*gm.parameters(), *gm.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def attribute(gm: nn.Module, target: str) -> Any:
    """The parameter, buffer or submodule that the dotted path names."""
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value


def set_attribute(gm: nn.Module, target: str, value: Tensor | nn.Module) -> None:
    """Register a parameter, buffer or submodule under a dotted path, making the modules on the way."""
    *path, name = target.split(".")
    owner = gm
    for step in path:
        if not hasattr(owner, step):
            owner.add_module(step, nn.Module())
        owner = getattr(owner, step)
    if name in owner._parameters or name in owner._buffers:
        delattr(owner, name)  # a buffer may give way to a parameter and the other way round
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    elif isinstance(value, nn.Module):
        owner.add_module(name, value)
    else:
        owner.register_buffer(name, value)


def free_name(gm: nn.Module, prefix: str) -> Iterator[str]:
    """Endless prefix0, prefix1, ... of top-level names that the module does not use yet."""
    index = 0
    while True:
        name = f"{prefix}{index}"
        if not hasattr(gm, name):
            yield name
        index += 1


def insert_attribute(gm: GraphModule, target: str, value: Tensor, like: Node, by: str) -> Node:
    """Register `value` and make the get_attr node that reads it, at the graph's insertion point."""
    set_attribute(gm, target, value)
    node = gm.graph.create_node("get_attr", target)
    copy_origin(node, like, by)
    mode = getattr(_first_tensor(like.meta.get("val")), "fake_mode", None)
    if mode is not None:
        set_value(node, fake_like(value, mode))
    return node


def written_attributes(gm: GraphModule) -> list[str]:
    """Names of parameters and buffers that some op writes to, directly, through a view or in a nested graph."""
    found = written(gm)
    return list(dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr") if node in found))


def constant(node: object) -> Tensor | None:
    """The parameter or buffer that a node reads; None for any other node."""
    if not isinstance(node, Node) or node.op != "get_attr" or not isinstance(node.graph.owning_module, GraphModule):
        return None
    value = attribute(node.graph.owning_module, str(node.target))
    return value if isinstance(value, Tensor) else None
