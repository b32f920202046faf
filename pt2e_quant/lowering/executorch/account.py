"""What became of every operator: reads the graph that ExecuTorch lowered, and finds the reasons for what it left.

Comes after partitioning, before the program is written. Nodes are joined with those of the converted graph through the
name that `common.entry` marked them with.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...meta import PORTABLE, marks
from ..common.entry import by_origin, origin
from ..common.program import Fallback, Remark
from .program import ExecutorchKernel
from .runtime import is_implicit
from .xnnpack.contract import Violation

__all__ = ["Account", "delegate_graphs", "edge_name", "nodes_outside", "take_account"]

_QDQ = ("quantize_per_", "dequantize_per_", "choose_qparams")
_TRANSLATED = {
    "Expected output node to have a dequantized node": "its output is not quantized",
    "Expected quantized node to have a single output": "its output has more than one user",
    "Expected act input to be dequant node": "its weight is quantized and its input is not",
    "Expected weight to be a static param": "its weight is not a constant",
    "Expected bias to be a static param": "its bias is not a constant",
}
_WAY_OUT = "export with fewer dynamic dimensions"
_OF_SHAPES = {
    "aten.view_copy.default": f"{{}} of its sizes are dynamic; XNNPACK reshapes with one; {_WAY_OUT}",
    "aten.slice_copy.Tensor": f"{{}} of its sizes are dynamic; XNNPACK slices tensors of fixed shape; {_WAY_OUT}",
}


@dataclass(frozen=True)
class Account:
    delegates: int
    undelegated: tuple[Fallback, ...]
    kernels: tuple[ExecutorchKernel, ...]
    remarks: tuple[Remark, ...]
    delegate_bytes: int
    """Of the delegates' graphs."""
    stored: dict[str, int]
    """Bytes of the weights that delegates keep beside them, by the keys that say which are the same."""


def take_account(
    lowered: GraphModule,
    converted: GraphModule,
    findings: tuple[Violation, ...],
    said: Callable[[Node], list[str]],
    backend_ops: Container[str] | None,
) -> Account:
    """Count and explain.

    Args:
        lowered: the graph after partitioning.
        converted: the graph before it was exported again.
        findings: what the pre-flight found in the converted graph.
        said: what the partitioner said of a node that it refused.
        backend_ops: names of the operators that the backend knows; None without a backend.
    """
    delegates = [_lowered_module(node) for node in _calls(lowered) if _is_delegate(node)]
    origins = by_origin(converted)
    left = nodes_outside(lowered)
    explain = _Reasons({id(node) for node in left}, findings, said, backend_ops)
    return Account(
        delegates=len(delegates),
        undelegated=tuple(_undelegated(node, origins, explain(node)) for node in left),
        kernels=tuple(kernel for index, module in enumerate(delegates) for kernel in _kernels(module, index)),
        remarks=tuple(Remark(origin(f.node), f"{f.why}. {f.fix}") for f in findings if f.severity == "inexact"),
        delegate_bytes=sum(len(module.processed_bytes) for module in delegates),
        stored=_stored(delegates),
    )


def nodes_outside(lowered: GraphModule) -> list[Node]:
    """What computes tensors outside every delegate, in nested graphs too."""
    return [node for node in _calls(lowered) if not _is_delegate(node) and _computes_a_tensor(node)]


def delegate_graphs(lowered: GraphModule) -> list[torch.fx.Graph]:
    """What the delegates hold, as ExecuTorch gave it to their backend."""
    return [_lowered_module(node).original_module.graph for node in _calls(lowered) if _is_delegate(node)]


def _calls(lowered: GraphModule) -> list[Node]:
    return [node for graph in _graphs(lowered) for node in graph.nodes if node.op == "call_function"]


def _graphs(module: GraphModule) -> Iterator[torch.fx.Graph]:
    """The graph and those of the branches and bodies of its control flow."""
    yield module.graph
    for child in module.children():
        if isinstance(child, GraphModule):
            yield from _graphs(child)


def _is_delegate(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "executorch_call_delegate"


def _lowered_module(call: Node) -> Any:
    reference = call.args[0]
    if not isinstance(reference, Node) or call.graph.owning_module is None:
        return None
    return getattr(call.graph.owning_module, str(reference.target))


def _computes_a_tensor(node: Node) -> bool:
    """False for the arithmetic of shapes, and for getitem, which only picks one of several results."""
    if getattr(node.target, "__name__", "") == "getitem":
        return False
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value))


def _undelegated(node: Node, origins: dict[str, Node], reason: str) -> Fallback:
    name = origin(node)
    source = origins.get(name, node)
    return Fallback.of(name, edge_name(node), source, reason)


def edge_name(node: Node) -> str:
    """'aten.add.Tensor' of an operator of ExecuTorch's edge dialect."""
    return str(getattr(node.target, "__name__", node.target))


class _Reasons:
    """Why a node is outside every delegate: the pre-flight knows best, then the partitioner, then the neighbours."""

    def __init__(
        self,
        left: set[int],
        findings: tuple[Violation, ...],
        said: Callable[[Node], list[str]],
        backend_ops: Container[str] | None,
    ) -> None:
        self._left = left
        self._said = said
        self._backend_ops = backend_ops
        self._findings: dict[str, list[str]] = {}
        for finding in findings:
            if finding.severity != "inexact":
                self._findings.setdefault(origin(finding.node), []).append(finding.why)

    def __call__(self, node: Node) -> str:
        if self._backend_ops is None:
            return "no backend was asked for"
        if "." in origin(node):
            return "inside a nested graph, where XNNPACK takes no operators"
        if PORTABLE in marks(node):
            return str(marks(node)[PORTABLE])
        return (
            "; ".join(self._findings.get(origin(node), []))
            or "; ".join(dict.fromkeys(self._translate(said, node) for said in self._said(node)))
            or self._next_to(node)
            or self._unknown(node)
        )

    def _translate(self, said: str, node: Node) -> str:
        if edge_name(node) in _OF_SHAPES and ("dtype" in said or "shape" in said):
            dynamic = _dynamic_sizes(node)
            if dynamic:
                return _OF_SHAPES[edge_name(node)].format(dynamic)
        if said == "invalid dtype":
            tensors = [source.meta.get("val") for source in (node, *node.all_input_nodes)]
            dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if isinstance(t, Tensor)})
            return f"dtype {' and '.join(dtypes)}; XNNPACK computes in float32, float16 and int8"
        return _TRANSLATED.get(said, f"XNNPACK refused it: {said.strip().rstrip('.')}")

    def _next_to(self, node: Node) -> str:
        """The reason of a quantize or dequantize is the operator that it belongs to."""
        if not any(word in edge_name(node) for word in _QDQ):
            return ""
        near = list(node.users) if "dequantize" in edge_name(node) else node.all_input_nodes
        for other in (*near, *node.users, *node.all_input_nodes):
            if id(other) in self._left and not any(word in edge_name(other) for word in _QDQ):
                return f"belongs to {origin(other)} ({edge_name(other)}), which runs in portable kernels"
        return "no operator that the backend runs in integers is next to it"

    def _unknown(self, node: Node) -> str:
        known = self._backend_ops is not None and edge_name(node).partition(".")[2] in self._backend_ops
        if not known:
            return f"XNNPACK has no kernel for {edge_name(node)}"
        return "XNNPACK refused these arguments, or a delegate around it would depend on itself; it says no more"


def _dynamic_sizes(node: Node) -> int:
    """Of a float tensor that is reshaped or sliced; integers stay outside whatever their shape."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return 0
    return sum(not isinstance(size, int) for size in (*value.shape,))


def _kernels(module: Any, delegate: int) -> Iterator[ExecutorchKernel]:
    integer: dict[Node, Literal["int8", "dynamic", "float"]] = {}
    for node in module.original_module.graph.nodes:
        name = edge_name(node)
        if node.op != "call_function" or name == "getitem" or any(word in name for word in _QDQ):
            continue
        integer[node] = _precision(node, integer)
        yield ExecutorchKernel(origin(node), name, integer[node], delegate)


def _precision(
    node: Node, known: dict[Node, Literal["int8", "dynamic", "float"]]
) -> Literal["int8", "dynamic", "float"]:
    fused = [known[source] for source in node.all_input_nodes if source in known]
    if any(user for user in node.users if "quantize_per_" in edge_name(user) and is_implicit(user)) and fused == [
        "int8"
    ]:
        return "int8"  # relu after a convolution: one kernel
    implicit = [n for n in node.all_input_nodes if "dequantize_per_" in edge_name(n) and is_implicit(n)]
    if not implicit:
        return "float"
    chosen = any(isinstance(n.args[1], Node) and edge_name(n.args[1]) == "getitem" for n in implicit)
    return "dynamic" if chosen else "int8"


def _stored(delegates: list[Any]) -> dict[str, int]:
    stored: dict[str, int] = {}
    for module in delegates:
        store = getattr(module, "named_data_store_output", None)
        if store is not None:
            stored |= {key: len(store.buffers[entry.buffer_index]) for key, entry in store.pte_data.items()}
    return stored
