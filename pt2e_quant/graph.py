"""Utilities on exported graphs that every later part builds on: copy, tidy up, constants, metadata, train/eval.

Nothing here knows of quantization. A pass takes a GraphModule and returns a new one: it starts with `clone`, which
copies the graph and shares the parameters, and ends with `tidy`, which drops what is no longer used and lints.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.fx.traceback import NodeSource, NodeSourceAction

from .errors import CaptureError, locate
from .ops import mutated_arguments, set_argument, training_argument

__all__ = [
    "Constants",
    "ExportedModule",
    "attribute",
    "clone",
    "copy_origin",
    "free_name",
    "insert_attribute",
    "is_float_tensor",
    "is_guard",
    "rebuild",
    "set_attribute",
    "set_training",
    "state_bytes",
    "tidy",
    "with_value",
]

T = TypeVar("T")


class ExportedModule(GraphModule):
    """A GraphModule that came from torch.export, on which train() and eval() work.

    Export captures one mode of dropout and batch norm as a literal in the graph. Here train(mode) rewrites exactly that
    literal: p, eps and momentum keep their values, and nothing is recompiled when the mode is already the wanted one.
    Python branches on self.training were decided at capture and stay as they are.
    """

    def train(self, mode: bool = True) -> ExportedModule:
        super().train(mode)
        if set_training(self.graph, mode):
            self.recompile()
        return self


def set_training(graph: Graph, mode: bool) -> int:
    """Set the train/eval literal of every mode-dependent op to `mode`; the number of nodes that changed."""
    changed = 0
    for node in graph.nodes:
        name = training_argument(node.target) if node.op == "call_function" else None
        if name is not None:
            changed += set_argument(node, name, mode)
    return changed


def clone(gm: GraphModule) -> ExportedModule:
    """A copy with a graph of its own that shares parameters, buffers and submodules with `gm`."""
    # copy.deepcopy keeps the calling convention of exported modules (pytree in and out), Graph.graph_copy loses it.
    return _assemble(gm, copy.deepcopy(gm.graph))


def tidy(gm: GraphModule) -> ExportedModule:
    """Drop dead nodes and the attributes that only they used, lint, and compile the graph's code. Ends a pass."""
    gm.graph.eliminate_dead_code()
    return rebuild(gm)


def rebuild(gm: GraphModule) -> ExportedModule:
    """A module around the same graph, holding just the attributes that the graph names."""
    return _assemble(gm, gm.graph)


def state_bytes(gm: nn.Module) -> int:
    """Bytes of all parameters and buffers; memory that several of them share counts once."""
    storages = {}
    for tensor in (*gm.parameters(), *gm.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _assemble(root: GraphModule, graph: Graph) -> ExportedModule:
    module = ExportedModule(root, graph)  # copies only those attributes that the graph names
    graph.lint()
    _keep_persistence(root, module)
    module.meta.update(root.meta)
    nn.Module.train(module, _captured_mode(graph, root.training))
    return module


def _captured_mode(graph: Graph, default: bool) -> bool:
    for node in graph.nodes:
        name = training_argument(node.target) if node.op == "call_function" else None
        if name is not None:
            index = next(i for i, a in enumerate(node.target._schema.arguments) if a.name == name)
            return bool(node.args[index] if index < len(node.args) else node.kwargs.get(name, default))
    return default


def _keep_persistence(root: nn.Module, module: nn.Module) -> None:
    """GraphModule registers every buffer as persistent; restore what the original says, so state_dict keys agree."""
    originals = dict(root.named_modules())
    for path, child in module.named_modules():
        if path in originals:
            transient = originals[path]._non_persistent_buffers_set & set(child._buffers)
            child._non_persistent_buffers_set |= transient


def is_guard(node: Node) -> bool:
    """True for the call that torch.export adds to check input shapes; it computes nothing that the model uses."""
    return node.op == "call_module" and str(node.target) == "_guards_fn"


def is_float_tensor(node: Node) -> bool:
    """True when export recorded that the node's value is one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


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
    node = gm.graph.get_attr(target)
    copy_origin(node, like, by)
    return with_value(node, like, lambda: value.detach())


def copy_origin(node: Node, source: Node, by: str) -> Node:
    """Give a new node the stack trace and module of the node it stems from, and say which pass made it."""
    for key in ("stack_trace", "nn_module_stack", "custom"):
        if key in source.meta:
            node.meta.setdefault(key, source.meta[key])
    node.meta["from_node"] = [NodeSource(source, by, NodeSourceAction.CREATE)]
    return node


def with_value(node: Node, source: Node, compute: Callable[[], Any]) -> Node:
    """Record val and tensor_meta of a new node: `compute` runs under the fake mode of `source`, on its fake value."""
    mode = getattr(_first_tensor(source.meta.get("val")), "fake_mode", None)
    if mode is None:
        return node
    with mode:
        value = compute()
        if isinstance(value, Tensor) and not hasattr(value, "fake_mode"):
            value = mode.from_tensor(value, static_shapes=True)
    node.meta["val"] = value
    if isinstance(value, Tensor):
        node.meta["tensor_meta"] = _extract_tensor_metadata(value)
    return node


def _first_tensor(value: Any) -> Any:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value


class Constants:
    """Which nodes of a graph have a value that no input changes, and what it is.

    A node is constant when it reads a parameter or buffer that nothing in the graph writes to, or is a pure op on
    constants (weight_norm, a transposed weight, ...).
    """

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._values: dict[Node, Any] = {}
        self._nodes: set[Node] = set()
        written = _written_attributes(gm.graph)
        for node in gm.graph.nodes:
            self.note(node, written)

    def note(self, node: Node, written: Iterable[str] = ()) -> None:
        """Look at one more node, whose inputs were looked at before."""
        if node.op == "get_attr":
            known = node.target not in written and isinstance(_maybe_attribute(self._gm, str(node.target)), Tensor)
        else:
            inputs = node.all_input_nodes
            known = bool(inputs) and all(source in self._nodes for source in inputs) and _is_pure(node)
        if known:
            self._nodes.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def value(self, node: Node) -> Any:
        """The value of a constant node; computed once, without autograd.

        Raises:
            CaptureError: the node is not constant.
        """
        if node not in self._nodes:
            raise CaptureError(f"the value of this node is known only when the model runs:\n{locate(node)}")
        pending = [node]
        while pending:  # iterative: chains of constants may be longer than Python's stack
            current = pending[-1]
            missing = [source for source in current.all_input_nodes if source not in self._values]
            if missing:
                pending += missing
                continue
            pending.pop()
            if current not in self._values:
                self._values[current] = self._compute(current)
        return self._values[node]

    def _compute(self, node: Node) -> Any:
        if node.op == "get_attr":
            return attribute(self._gm, str(node.target)).detach()
        args = torch.fx.node.map_arg(node.args, self._values.__getitem__)
        kwargs = torch.fx.node.map_arg(node.kwargs, self._values.__getitem__)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _maybe_attribute(gm: nn.Module, target: str) -> Any:
    try:
        return attribute(gm, target)
    except AttributeError:
        return None


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not mutated_arguments(node.target)


def _written_attributes(graph: Graph) -> set[str]:
    """Names of parameters and buffers that some op writes to, directly or through a view."""
    written: set[str] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for index in mutated_arguments(node.target):
            target = node.args[index] if index < len(node.args) else None
            while isinstance(target, Node) and target.op == "call_function" and target.all_input_nodes:
                target = target.all_input_nodes[0]  # a view of the buffer
            if isinstance(target, Node) and target.op == "get_attr":
                written.add(str(target.target))
    return written
