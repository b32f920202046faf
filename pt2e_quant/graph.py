"""Utilities on exported graphs that every later part builds on: copy, tidy up, constants, metadata, train/eval.

Nothing here knows of quantization. The engine starts with `clone`, a private copy that shares the parameters; passes
edit that copy, each ending with `tidy`; `finish` drops what is no longer used and generates the code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.fx.traceback import NodeSource, NodeSourceAction

from .arguments import bind, mutated_arguments, set_argument, training_argument
from .devices import device_of, move_graph, recorded_device
from .errors import CaptureError, locate
from .graph_pickle import dump_graph, load_graph, quiet_copies, restore_attributes, skeleton
from .nested import bodies, graphs, written

__all__ = [
    "Constants",
    "ExportedModule",
    "attribute",
    "clone",
    "collector_paused",
    "copy_origin",
    "copy_value",
    "drop_dead",
    "emit",
    "exported_name",
    "fake_like",
    "finish",
    "free_name",
    "insert_attribute",
    "is_float_tensor",
    "is_guard",
    "is_quantizable",
    "own_written",
    "refresh_values",
    "set_attribute",
    "set_training",
    "set_value",
    "state_bytes",
    "tidy",
    "with_value",
    "written_attributes",
]


class ExportedModule(GraphModule):
    """A GraphModule that came from torch.export, on which train() and eval() work.

    Export captures one mode of dropout and batch norm as a literal in the graph. Here train(mode) rewrites exactly that
    literal: p, eps and momentum keep their values, and nothing is recompiled when the mode is already the wanted one.
    Python branches on self.training were decided at capture and stay as they are.

    A *draft* is one that passes are at work on: no code is generated before `finish`, or before somebody runs it.
    """

    _draft = False

    def __init__(self, root: nn.Module, graph: Graph, class_name: str = "GraphModule", *, draft: bool = False) -> None:
        object.__setattr__(self, "_draft", draft)  # GraphModule.__init__ compiles, so this comes first
        super().__init__(root, graph, class_name)

    def train(self, mode: bool = True) -> ExportedModule:
        super().train(mode)
        if set_training(self.graph, mode):
            self.recompile()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExportedModule:
        """What to(), cuda() and the like call; the devices that the graph names move along."""
        before = recorded_device(self.graph) or device_of(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = device_of(self)
        if after is not None and after != before:
            move_graph(self, after)
        return self

    def recompile(self) -> Any:
        return None if self._draft else super().recompile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Replaced by generated code once the graph is finished."""
        return finish(self)(*args, **kwargs)

    @property
    def code(self) -> str:
        return self.graph.python_code("self").src if self._draft else super().code

    def __reduce__(self) -> tuple[Any, ...]:
        """As nodes, with what is known of each; code would lose that. See `graph_pickle`."""
        return _restore, (dump_graph(self.graph), skeleton(self), dict(self.meta), self._draft)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedModule:
        with quiet_copies():
            return super().__deepcopy__(memo)  # type: ignore[return-value]

    def __str__(self) -> str:
        return f"{nn.Module.__str__(self)}\n\n{self.code}"


def _restore(data: bytes, root: nn.Module, meta: dict[str, Any], draft: bool) -> ExportedModule:
    module = ExportedModule(root, load_graph(data), draft=draft)
    restore_attributes(module, root)
    module.meta.update(meta)
    return module


def set_training(graph: Graph, mode: bool) -> int:
    """Set the train/eval literal of every mode-dependent op to `mode`; the number of nodes that changed."""
    changed = 0
    for node in graph.nodes:
        name = training_argument(node.target) if node.op == "call_function" else None
        if name is not None:
            changed += set_argument(node, name, mode)
    return changed


def clone(gm: GraphModule) -> ExportedModule:
    """A draft with graphs and a module tree of its own that shares parameters, buffers and observers with `gm`."""
    with quiet_copies():
        # deepcopy keeps the calling convention of exported modules (pytree in and out), Graph.graph_copy loses it.
        graph = copy.deepcopy(gm.graph)
    module = ExportedModule(gm, graph, draft=True)  # copies only those attributes that the graph names
    _keep_persistence(gm, module)
    module.meta.update(gm.meta)
    for target, body in bodies(gm):
        set_attribute(module, target, clone(body))
    return module


def tidy(gm: GraphModule) -> GraphModule:
    """Drop dead nodes and lint. Ends a pass that changed the graph."""
    drop_dead(gm).graph.lint()
    return gm


def drop_dead(gm: GraphModule) -> GraphModule:
    """Drop the nodes that nobody reads."""
    for node in reversed(gm.graph.nodes):
        # What Graph.eliminate_dead_code does, which asks every node whether it is impure before whether it is used.
        if not node.users and not node.is_impure():
            gm.graph.erase_node(node)
    return gm


def finish(gm: ExportedModule) -> ExportedModule:
    """End of drafting: drop the attributes that the graphs do not name, and generate the code."""
    for _, part in reversed(list(graphs(gm))):
        part.graph.lint()
        _drop_unused(part)
        object.__setattr__(part, "_draft", False)
        part.recompile()
    nn.Module.train(gm, _captured_mode(gm))
    return gm


def _drop_unused(gm: GraphModule) -> None:
    used = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    needed = used.union(*map(_prefixes, used))
    modules = [path for path, _ in gm.named_modules() if path not in needed and used.isdisjoint(_prefixes(path))]
    for path in filter(None, modules):  # first: they may belong to others as well, so their own attributes must stay
        gm.delete_submodule(path)
    for path, module in list(gm.named_modules()):
        if path in used or not used.isdisjoint(_prefixes(path)):
            continue  # an observer or a nested graph keeps all that is its own
        for name in (*module._parameters, *module._buffers):
            if (f"{path}.{name}" if path else name) not in used:
                delattr(module, name)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _captured_mode(gm: GraphModule) -> bool:
    """The mode that the first mode-dependent op of the graphs was captured in; False when there is none."""
    for node in (node for _, part in graphs(gm) for node in part.graph.nodes):
        name = training_argument(node.target) if node.op == "call_function" else None
        if name is not None:
            return bool(bind(node)[name])
    return False


def _keep_persistence(root: nn.Module, module: nn.Module) -> None:
    """GraphModule registers every buffer as persistent; restore what the original says, so state_dict keys agree."""
    originals = dict(root.named_modules())
    for path, child in module.named_modules():
        if path in originals:
            transient = originals[path]._non_persistent_buffers_set & set(child._buffers)
            child._non_persistent_buffers_set |= transient


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


def state_bytes(gm: nn.Module) -> int:
    """Bytes of all parameters and buffers; memory that several of them share counts once."""
    storages = {}
    for tensor in (*gm.parameters(), *gm.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector while a graph is built; also a decorator.

    Each of its full runs visits every live node, which makes building a graph of n nodes quadratic in n, and finds
    nothing: the nodes are all in use.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_guard(node: Node) -> bool:
    """True for the call that torch.export adds to check input shapes; it computes nothing that the model uses."""
    return node.op == "call_module" and str(node.target) == "_guards_fn"


def is_float_tensor(node: Node) -> bool:
    """True when export recorded that the node's value is one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def is_quantizable(node: Node) -> bool:
    """True for one tensor of a dtype that the q/dq ops take; float64 is not among them."""
    return is_float_tensor(node) and node.meta["val"].dtype in (torch.float32, torch.float16, torch.bfloat16)


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


def copy_origin(node: Node, source: Node, by: str) -> Node:
    """Give a new node the stack trace and module of the node it stems from, and say which pass made it."""
    for key in ("stack_trace", "nn_module_stack", "custom"):
        if key in source.meta:
            node.meta.setdefault(key, source.meta[key])
    origin = NodeSource(None, by, NodeSourceAction.CREATE)
    # NodeSource(source) would deep-copy the whole provenance of `source`; nobody writes to it, so it can be shared.
    origin.node_info = NodeSource.NodeInfo(source.name, str(source.target), id(source.graph))
    origin.from_node = source.meta.get("from_node", [])
    node.meta["from_node"] = [origin]
    return node


def emit(like: Node, by: str, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Add a call at the insertion point, with the origin of `like` and, where its inputs have one, its value."""
    node = like.graph.call_function(target, args, kwargs)
    copy_origin(node, like, by)
    sources = node.all_input_nodes
    if not sources or any("val" not in source.meta for source in sources):
        return node

    def value_of(source: Node) -> Any:
        return source.meta["val"]

    values = torch.fx.node.map_arg((args, kwargs), value_of)
    return with_value(node, sources[0], lambda: target(*values[0], **values[1]))


def exported_name(node: Node) -> str:
    """Name of the node of the exported program that this one is, or stems from; its own where that is not recorded."""
    name, sources = node.name, node.meta.get("from_node")
    while sources:
        name, made_by, sources = sources[0].name, sources[0].pass_name, sources[0].from_node
        if made_by == "ExportedProgram.module()":
            break
    return name


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
    """Record anew the values behind nodes whose memory layout (strides) a pass has changed."""
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
    """Record the value of a new node: `compute` runs under the fake mode of `source`, on its fake value."""
    mode = getattr(_first_tensor(source.meta.get("val")), "fake_mode", None)
    if mode is None:
        return node
    with mode:
        return set_value(node, compute())


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
        overwritten = written_attributes(gm)
        for node in gm.graph.nodes:
            self.note(node, overwritten)

    def note(self, node: Node, overwritten: Iterable[str] = ()) -> None:
        """Look at one more node, whose inputs were looked at before."""
        if node.op == "get_attr":
            target = str(node.target)
            known = target not in overwritten and isinstance(_maybe_attribute(self._gm, target), Tensor)
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
        pending = [] if node in self._values else [node]
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


def written_attributes(gm: GraphModule) -> list[str]:
    """Names of parameters and buffers that some op writes to, directly, through a view or in a nested graph."""
    found = written(gm)
    return list(dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr") if node in found))
