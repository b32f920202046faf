"""Which kernel every quantized operator became: read from the graph that Inductor generates code from.

Nodes carry the name that they had in the converted graph; of a fused kernel, that of its last operator. So an operator
is joined with the first kernel that bears its name or that of one of the operators after it, up to its quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ...meta import MERGED_KEY
from ...ops import EMBEDDING, LINEAR, MATMUL, MAX_POOL, is_call, is_dequantize, is_quantize
from ...where import module_path, source_line
from ..common.entry import origin
from ..common.gemm import as_gemm
from .program import Fallback, InductorKernel, Precision

__all__ = ["Recorder", "take_account"]

_LOWERED = {
    "qconv": "onednn.qconv_pointwise",
    "qconv_binary": "onednn.qconv2d_pointwise.binary",
    "qlinear": "onednn.qlinear_pointwise",
    "qlinear_binary": "onednn.qlinear_pointwise.binary",
    "qmaxpool2d": "quantized.max_pool2d",
    "woq_int8": "aten._weight_int8pack_mm",
}
"""Functions that Inductor puts into its graph in the place of a matched pattern, and the kernels that they call."""

_FLOAT_PRODUCTS = (
    "aten.convolution", "aten.addmm", "aten.mm", "aten.bmm", "aten.baddbmm", "mkldnn._convolution", "mkldnn._linear",
    "mkl._mkl_linear",
)  # fmt: skip
_WEIGHT_ONLY = (
    "aten._weight_int8pack_mm", "aten._weight_int4pack_mm_for_cpu", "quantized.embedding_bag_byte_rowwise_offsets",
)  # fmt: skip
_LOOK_UPS = ("aten.embedding", "aten.index.Tensor")
_LONGEST_CHAIN = 5  # convolution, add, relu, quantize, and one more of a decomposed activation


@dataclass(frozen=True)
class _Found:
    """A kernel in Inductor's graph."""

    origin: str
    kernel: str
    precision: Precision
    fused: tuple[str, ...] = ()


@dataclass
class Recorder:
    """To be called by Inductor with every graph, after its last pass and before code is generated."""

    integer: list[_Found] = field(default_factory=list)
    floating: list[_Found] = field(default_factory=list)

    def __call__(self, graph: Graph) -> None:
        stored = _made_of_integers(graph)
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            found = _integer_kernel(node) or _look_up(node, stored)
            if found is not None:
                self.integer.append(found)
            elif str(node.target).startswith(_FLOAT_PRODUCTS):
                loop = not stored.isdisjoint(node.all_input_nodes)
                fused = ("dequantize",) if loop else ()
                self.floating.append(_Found(origin(node), str(node.target), "weight only" if loop else "float", fused))


def _made_of_integers(graph: Graph) -> set[Node]:
    """Nodes that depend on constants alone, integers among them: what Inductor computes from these in every run."""
    constants: dict[Node, bool] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            constants[node] = _is_integer(node)
        elif node.op == "call_function" and node.all_input_nodes and constants.keys() >= set(node.all_input_nodes):
            constants[node] = any(constants[source] for source in node.all_input_nodes)
    return {node for node, integer in constants.items() if integer}


def _is_integer(node: Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) in (torch.uint8, torch.int8)


def _look_up(node: Node, stored: set[Node]) -> _Found | None:
    """A generated loop that reads rows of a table of integers."""
    if not str(node.target).startswith(_LOOK_UPS) or node.args[0] not in stored or not _is_integer(node):
        return None
    return _Found(origin(node), "generated", "weight only", ("dequantize",))


def _integer_kernel(node: Node) -> _Found | None:
    name = str(getattr(node.target, "__name__", node.target))
    if not isinstance(node.target, torch._ops.OpOverload):
        return _matched(node, name) if name in _LOWERED else None
    text = str(node.target).removesuffix(".default")
    if text.startswith("onednn.linear") and "fp16" in text:
        return _Found(origin(node), text, "float16", ("relu",) if "relu" in text else ())
    if text in _WEIGHT_ONLY:
        return _Found(origin(node), text, "weight only")
    return None


def _matched(node: Node, name: str) -> _Found:
    arguments = node.kwargs
    operations = [arguments.get(key) for key in ("binary_op_name", "unary_op_name", "postop_name")]
    fused = [str(operation) for operation in operations if operation not in (None, "none")]
    if arguments.get("output_dtype") in (torch.uint8, torch.int8):
        fused.append("quantize")
    precision: Precision = "dynamic" if isinstance(arguments.get("x_scale"), Node) else "int8"
    return _Found(origin(node), _LOWERED[name], precision, tuple(fused))


def take_account(
    converted: GraphModule, ops: Mapping[str, str], recorder: Recorder
) -> tuple[tuple[InductorKernel, ...], tuple[Fallback, ...]]:
    """(kernels, fallbacks) of the quantized operators, in the order of the graph.

    Args:
        converted: the graph that was exported again for Inductor, after the passes of the lowering.
        ops: the operator of each node of the converted graph as the user has it, by the node's name.
        recorder: what Inductor's own graph showed.
    """
    kernels, fallbacks = [], []
    integer, floating = list(recorder.integer), list(recorder.floating)
    taken: dict[Node, _Found | None] = {}
    stored = _made_of_integers(converted.graph)
    kinds = {node: kind for node in converted.graph.nodes if is_call(node) and (kind := _kind(node, stored))}
    operators = list(kinds)
    for reach in range(_LONGEST_CHAIN):  # near ones first: of two products that are added, each gets its own
        for node in operators:
            names = _names(node)
            if taken.get(node) is None and reach < len(names):
                taken[node] = _pop(integer, names[reach])
    for node in operators:
        found = taken.get(node)
        name = origin(node)
        op = ops.get(name, str(node.target))
        together = node.meta.get(MERGED_KEY, (name,))
        if found is not None:
            kernels += [InductorKernel(one, op, found.kernel, found.precision, found.fused) for one in together]
            continue
        in_float = next((f for near in _names(node) if (f := _pop(floating, near)) is not None), None)
        if in_float is not None and in_float.precision == kinds[node]:
            kernels.append(InductorKernel(name, op, in_float.kernel, "weight only", in_float.fused))
        elif in_float is not None:
            fallbacks += [replace(_fallback(node, in_float.kernel), node=one) for one in together]
        elif kinds[node] == "moved":
            kernels.append(InductorKernel(name, op, "generated", "int8", ()))
        elif kinds[node] in ("pool", "table"):
            fallbacks.append(_fallback(node, "a generated loop"))
    return tuple(kernels), tuple(fallbacks)


def _kind(node: Node, stored: set[Node]) -> str:
    """What an operator promises: 'product', 'weight only', 'pool', 'table', 'moved', or '' for float ones."""
    gemm = as_gemm(node)
    if node.target in LINEAR and not stored.isdisjoint(node.all_input_nodes) and not _reads_integers(node):
        return "weight only"
    if gemm is not None or _is_half(node):
        return "product"
    sources = [source for source in node.all_input_nodes if is_dequantize(source)]
    if node.target in MATMUL and len(sources) == 2:
        return "product"
    if node.target in EMBEDDING:
        return "table" if sources or (node.args[0] in stored and _is_integer(node)) else ""
    if node.target in MAX_POOL and sources and any(is_quantize(user) for user in node.users):
        return "pool"
    named, value = str(node.target), node.meta.get("val")
    moved = named.startswith("aten.") and isinstance(value, Tensor) and value.dtype in (torch.uint8, torch.int8)
    if moved:
        return "moved"
    return "product" if named.startswith(_WEIGHT_ONLY) else ""


def _reads_integers(node: Node) -> bool:
    gemm = as_gemm(node)
    return gemm is not None and is_dequantize(gemm.activation)


def _is_half(node: Node) -> bool:
    cast = torch.ops.quantized_decomposed.convert_element_type.no_fuse
    return str(node.target) == "aten.linear.default" and any(s.target is cast for s in node.all_input_nodes)


def _names(node: Node) -> list[str]:
    """The node and what can be part of its kernel, outwards: single users up to and with the quantize."""
    names = [origin(node)]
    while len(names) < _LONGEST_CHAIN and len(node.users) == 1:
        (node,) = node.users
        if not is_call(node):
            break
        names.append(origin(node))
        if is_quantize(node):
            break
    return names


def _pop(found: list[_Found], name: str) -> _Found | None:
    position = next((index for index, one in enumerate(found) if one.origin == name), None)
    return None if position is None else found.pop(position)


def _fallback(node: Node, kernel: str) -> Fallback:
    return Fallback(
        origin(node), str(node.target), module_path(node), source_line(node), f"{_why(node)}; it became {kernel}"
    )


def _why(node: Node) -> str:
    return next((reason for check in _REASONS if (reason := check(node)) is not None), "Inductor's pattern missed it")


def _per_tensor_weight(node: Node) -> str | None:
    gemm = as_gemm(node)
    if gemm is None or "per_channel" in str(gemm.weight.target):
        return None
    return "its weight has one scale in all, Inductor's kernels need one per output channel"


def _float_input(node: Node) -> str | None:
    gemm = as_gemm(node)
    if gemm is None or is_dequantize(gemm.activation):
        return None
    return "only its weight is quantized, for which Inductor has a kernel for linear and int8 per channel only"


def _whole_table(node: Node) -> str | None:
    return "every run would dequantize the whole table" if node.target in EMBEDDING else None


def _two_activations(node: Node) -> str | None:
    return "Inductor has no integer kernel for the product of two activations" if node.target in MATMUL else None


def _half_precision(node: Node) -> str | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype is torch.float32:
        return None
    return f"it computes in {str(value.dtype).removeprefix('torch.')}, Inductor's patterns are those of float32 models"


_REASONS: tuple[Callable[[Node], str | None], ...] = (
    _whole_table, _two_activations, _per_tensor_weight, _float_input, _half_precision,
)  # fmt: skip
