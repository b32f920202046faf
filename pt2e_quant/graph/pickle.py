"""Pickling exported graphs, with all that later steps need to know of their nodes.

torch pickles a GraphModule as source code and traces that again, which forgets what each node computes and where it
comes from, and fails on the guards of input shapes. Here the nodes themselves are written down, one after the other.
For exchange between processes of one machine and for checkpoints of whole models; to keep a model for years, use
`torch.export.save`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import marshal
import math
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import SymInt, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv

from ..errors import CaptureError
from ..meta import TAG_KEY
from ..where import type_name

__all__ = ["dump_graph", "load_graph", "quiet_copies", "restore_attributes", "skeleton"]

_META = ("val", "tensor_meta", "stack_trace", "nn_module_stack", "from_node", "custom", TAG_KEY)
"""What is kept of node.meta. Annotations are not: they are read before the observers are made."""

_SYMBOLS = ("backed_var_to_val", "var_to_range", "replacements", "size_like", "divisible", "unbacked_symint_counter")
"""What a ShapeEnv knows of its symbols; the rest is the history of how it learnt that."""


def dump_graph(graph: Graph) -> bytes:
    """The graph as bytes, without the modules and parameters that it names."""
    with io.BytesIO() as file:
        pickler = _Pickler(file)
        pickler.dump((graph._codegen, len(graph.nodes)))
        for node in graph.nodes:
            pickler.dump((node.op, node.name, node.target, node.args, node.kwargs, node.type, _kept_meta(node)))
        return file.getvalue()


def load_graph(data: bytes) -> Graph:
    """The graph that `dump_graph` wrote."""
    graph = Graph()
    loader = _Unpickler(io.BytesIO(data))
    with quiet_copies():
        codegen, count = loader.load()
    for _ in range(count):
        op, name, target, args, kwargs, kind, meta = loader.load()
        node = graph.create_node(op, target, args, kwargs, name, kind)
        node.name = name
        node.meta = meta
        loader.nodes[name] = node
    graph.set_codegen(codegen)
    return graph


@contextlib.contextmanager
def quiet_copies() -> Iterator[None]:
    """Without the warning of torch 2.13 about its own code, whenever a calling convention is copied or read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".isinstance.treespec", FutureWarning)
        yield


def skeleton(module: nn.Module) -> nn.Module:
    """A plain module with the parameters and buffers of another, and what is portable of its submodules."""
    bare = nn.Module()
    restore_attributes(bare, module)
    bare.__dict__["_modules"] = {
        name: None if child is None else _portable(child) for name, child in module._modules.items()
    }
    return bare


def restore_attributes(module: nn.Module, root: nn.Module) -> None:
    """Give `module` the parameters, buffers and submodules of `root`, in their order."""
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training"):
        module.__dict__[name] = root.__dict__[name]


def _portable(module: nn.Module) -> Any:
    """What to pickle in the place of a module: itself, or a stand-in that unpickles to an equal module."""
    if isinstance(module, GraphModule):
        if type(module).__reduce__ is not GraphModule.__reduce__:
            return module  # one of ours, which comes here by itself
        return _StandIn(_restore_graph_module, dump_graph(module.graph), skeleton(module), dict(module.meta))
    if type(module).__name__ == "GuardsFn":
        return _StandIn(_restore_guards, sys.version_info[:2], marshal.dumps(_guard_code(module)))
    return skeleton(module) if type(module) is nn.Module else module


class _StandIn:
    """Unpickles to the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def _restore_graph_module(data: bytes, root: nn.Module, meta: dict[str, Any]) -> GraphModule:
    module = GraphModule(root, load_graph(data))
    restore_attributes(module, root)
    module.meta.update(meta)
    return module


# --- the guards of input shapes: a module whose forward is a function made at run time --------------------------------


def _guard_code(guards: nn.Module) -> types.CodeType:
    """The code of the function that torch.export generated, inside the wrappers that keep it traceable."""
    function: Any = guards.forward
    while function.__name__ != "_":
        inside = inspect.getclosurevars(function).nonlocals.values()
        function = next((value for value in inside if isinstance(value, types.FunctionType)), None)
        if function is None:
            raise CaptureError(
                f"torch {torch.__version__} writes guards of input shapes in a way that cannot be pickled here; "
                "export with check_guards=False: exported.module(check_guards=False)"
            )
    code: types.CodeType = function.__code__
    return code


def _restore_guards(version: tuple[int, int], code: bytes) -> nn.Module:
    if version != sys.version_info[:2]:
        raise CaptureError(
            f"this model was pickled by Python {version[0]}.{version[1]} and cannot be read by another version; "
            "exchange models between versions with torch.export.save"
        )
    from torch.export._unlift import GuardsFn

    namespace = {**SYMPY_INTERP, "math": math, "inf": math.inf, "torch": torch}
    guards = GuardsFn()
    function = types.FunctionType(marshal.loads(code), namespace)
    guards.forward = torch._dynamo.dont_skip_tracing(function)  # type: ignore[method-assign]
    guards._is_impure = True  # type: ignore[assignment]  # or it would be removed as dead code
    return guards


# --- nodes ------------------------------------------------------------------------------------------------------------


def _kept_meta(node: Node) -> dict[str, Any]:
    meta = {key: node.meta[key] for key in _META if key in node.meta}
    if meta.get("nn_module_stack"):  # classes by name: those of a script or a test cannot be imported elsewhere
        meta["nn_module_stack"] = {
            key: (path, type_name(kind)) for key, (path, kind) in meta["nn_module_stack"].items()
        }
    return meta


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.name if isinstance(obj, Node) else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
            return _operator, (*_operator_name(obj),)
        if isinstance(obj, FakeTensor):
            strides = obj.stride() if obj.layout is torch.strided else None
            return _fake_tensor, (obj.fake_mode, tuple(obj.shape), strides, obj.dtype, obj.device, obj.requires_grad)
        if isinstance(obj, FakeTensorMode):
            return _fake_mode, (obj.shape_env,)
        if isinstance(obj, (SymInt, torch.SymFloat, torch.SymBool)):
            return _symbol, (type(obj), obj.node.expr, obj.node.shape_env, obj.node.pytype, obj.node._hint)
        if isinstance(obj, ShapeEnv):
            return _shape_env, ({name: getattr(obj, name) for name in _SYMBOLS if hasattr(obj, name)},)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.nodes: dict[str, Node] = {}

    def persistent_load(self, pid: Any) -> Node:
        return self.nodes[pid]


def _operator_name(operator: Any) -> list[str]:
    if isinstance(operator, HigherOrderOperator):
        return ["higher_order", operator.name()]
    if isinstance(operator, OpOverload):
        return [*operator._schema.name.split("::"), operator._overloadname]
    return list(operator._qualified_op_name.split("::"))


def _operator(*names: str) -> Any:
    found: Any = torch.ops
    for name in names:
        found = getattr(found, name)
    return found


def _fake_tensor(mode: FakeTensorMode, shape: Any, strides: Any, dtype: Any, device: Any, requires_grad: bool) -> Any:
    options = {"dtype": dtype, "device": device, "requires_grad": requires_grad}
    with mode:
        return torch.empty(shape, **options) if strides is None else torch.empty_strided(shape, strides, **options)


def _fake_mode(shape_env: ShapeEnv | None) -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=shape_env)


def _symbol(kind: type, expression: Any, shape_env: ShapeEnv, pytype: type, hint: Any) -> Any:
    return kind(SymNode(expression, shape_env, pytype, hint))


def _shape_env(known: dict[str, Any]) -> ShapeEnv:
    shape_env = ShapeEnv()
    for name, value in known.items():
        setattr(shape_env, name, value)
    return shape_env
