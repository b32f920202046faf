"""Which kernel every quantized operator became: read from the graph that Inductor generates code from.

Nodes carry the name that they had in the converted graph; of a fused kernel, that of its last operator. So an operator
is joined with the first kernel that bears its name or that of one of the operators after it, up to its quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ...graph.nested import graphs
from ...meta import MERGED_KEY, NESTED_KEY
from ...ops import EMBEDDING, LINEAR, MATMUL, MAX_POOL, is_call, is_dequantize, is_elementwise, is_quantize, pads_zeros
from ..common.entry import origin
from ..common.gemm import as_gemm
from ..common.program import Fallback
from .limits import moves, taken_apart
from .program import InductorKernel, Precision

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
_HALF = torch.ops.quantized_decomposed.convert_element_type.no_fuse

_LOOPS: dict[str, Precision] = {"moved": "int8", "small": "float", "weight only": "weight only"}
"""What no kernel of a library computes, and is no fallback either."""

_FARTHEST = 12
"""Operators after a product that can be part of its kernel: a gelu that the model writes out has ten."""


@dataclass(frozen=True)
class _Found:
    """A kernel in Inductor's graph."""

    origin: str
    kernel: str
    precision: Precision
    fused: tuple[str, ...] = ()


# What Inductor's graph holds ------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """To be called by Inductor with every graph, after its last pass and before code is generated."""

    integer: list[_Found] = field(default_factory=list)
    floating: list[_Found] = field(default_factory=list)

    def __call__(self, graph: Graph) -> None:
        stored = _made_of_integers(graph)
        for node in filter(is_call, graph.nodes):
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
    return _Found(origin(node), text, "weight only") if text in _WEIGHT_ONLY else None


def _matched(node: Node, name: str) -> _Found:
    arguments = node.kwargs
    operations = [arguments.get(key) for key in ("binary_op_name", "unary_op_name", "postop_name")]
    fused = [str(operation) for operation in operations if operation not in (None, "none")]
    if arguments.get("output_dtype") in (torch.uint8, torch.int8):
        fused.append("quantize")
    precision: Precision = "dynamic" if isinstance(arguments.get("x_scale"), Node) else "int8"
    return _Found(origin(node), _LOWERED[name], precision, tuple(fused))


# What the converted graph promises ------------------------------------------------------------------------------------


def take_account(
    converted: GraphModule, ops: Mapping[str, str], recorder: Recorder
) -> tuple[tuple[InductorKernel, ...], tuple[Fallback, ...]]:
    """(kernels, fallbacks) of the quantized operators, in the order of the graph.

    Args:
        converted: the graph that was exported again for Inductor, after the passes of the lowering.
        ops: the operator of each node of the converted graph as the user has it, by the node's name.
        recorder: what Inductor's own graph showed.
    """
    kernels: list[InductorKernel] = []
    fallbacks: list[Fallback] = []
    kinds: dict[Node, str] = {}
    for _, part in graphs(converted):
        stored = _made_of_integers(part.graph)
        kinds |= {node: kind for node in part.graph.nodes if is_call(node) and (kind := _kind(node, stored))}
    integer, floating = _joined(list(kinds), recorder.integer), list(recorder.floating)
    for node, kind in kinds.items():
        op = ops.get(origin(node), str(node.target))
        found = integer.get(node)
        in_float = None if found else next((f for name in _names(node) if (f := _pop(floating, name))), None)
        if found is None:
            found = in_float if in_float is not None and in_float.precision == kind else None
        if in_float is None and found is None and kind in _LOOPS:
            found = _Found(origin(node), "generated", _LOOPS[kind])
        for name in node.meta.get(MERGED_KEY, (origin(node),)):
            if found is None:
                fallbacks.append(_fallback(node, name, "a generated loop" if in_float is None else in_float.kernel))
            else:
                kernels.append(InductorKernel(name, op, found.kernel, found.precision, found.fused))
    return tuple(kernels), tuple(fallbacks)


def _joined(operators: list[Node], kernels: list[_Found]) -> dict[Node, _Found]:
    """The integer kernel of each operator; near names first: of two products that are added, each gets its own."""
    left, taken = list(kernels), {}
    for reach in range(_FARTHEST):
        for node in operators:
            names = _names(node)
            if node not in taken and reach < len(names) and (found := _pop(left, names[reach])):
                taken[node] = found
    return taken


def _kind(node: Node, stored: set[Node]) -> str:
    """What an operator promises: 'product', 'small', 'weight only', 'pool', 'table', 'moved', or '' for float ones."""
    gemm = as_gemm(node)
    integers = gemm is not None and gemm.is_integer
    if node.target in LINEAR and not stored.isdisjoint(node.all_input_nodes) and not integers:
        return "weight only"
    if gemm is not None or (node.target in LINEAR and any(s.target is _HALF for s in node.all_input_nodes)):
        return "small" if _is_small(node) else "product"
    sources = [source for source in node.all_input_nodes if is_dequantize(source)]
    if node.target in MATMUL and len(sources) == 2:
        return "product"
    if node.target in EMBEDDING:
        return "table" if sources or (node.args[0] in stored and _is_integer(node)) else ""
    if node.target in MAX_POOL and sources and any(is_quantize(user) for user in node.users):
        return "pool"
    if str(node.target).startswith("aten.") and _is_integer(node):
        return "moved" if node.name == origin(node) else ""  # what a pass of ours wrote is part of another operator
    return "product" if str(node.target).startswith(_WEIGHT_ONLY) else ""


def _is_small(node: Node) -> bool:
    value, weight = (argument.meta.get("val") for argument in node.args[:2])  # type: ignore[union-attr]
    if node.target not in LINEAR or not isinstance(value, Tensor) or not isinstance(weight, Tensor):
        return False
    return taken_apart(value.numel() // weight.shape[1], weight.shape[1], weight.shape[0]) is not None


def _names(node: Node) -> list[str]:
    """The node and what can be part of its kernel, outwards, up to and with a quantize."""
    nodes, seen = [node], {node}
    for later in _after(nodes, seen):
        nodes.append(later)
        if len(nodes) == _FARTHEST:
            break
    return list(dict.fromkeys(map(origin, nodes)))


def _after(nodes: list[Node], seen: set[Node]) -> Iterator[Node]:
    """Users of the first of a growing list of nodes, then of the next: elementwise ones, moves and quantizes."""
    for node in nodes:
        for user in node.users if not is_quantize(node) else ():
            if user not in seen and is_call(user) and _can_be_part(user):
                seen.add(user)
                yield user


def _can_be_part(node: Node) -> bool:
    return is_elementwise(node) or is_quantize(node) or moves(node)


def _pop(found: list[_Found], name: str) -> _Found | None:
    position = next((index for index, one in enumerate(found) if one.origin == name), None)
    return None if position is None else found.pop(position)


# Why not --------------------------------------------------------------------------------------------------------------


def _fallback(node: Node, name: str, kernel: str) -> Fallback:
    why = next((reason for check in _REASONS if (reason := check(node)) is not None), "Inductor's pattern missed it")
    return Fallback.of(name, str(node.target), node, f"{why}; it became {kernel}")


def _per_tensor_weight(node: Node) -> str | None:
    gemm = as_gemm(node)
    if gemm is None or "per_channel" in str(gemm.weight.target):
        return None
    return "its weight has one scale in all, Inductor's kernels need one per output channel"


def _float_input(node: Node) -> str | None:
    gemm = as_gemm(node)
    if gemm is None or gemm.is_integer:
        return None
    if pads_zeros(gemm.activation):
        return "its input is padded in float; quantize what the padding returns as well"
    return "only its weight is quantized, for which Inductor has a kernel for linear and int8 per channel only"


def _nested(node: Node) -> str | None:
    """Its weight arrives as an operand, and Inductor packs constants only."""
    module = node.graph.owning_module
    path = None if module is None else module.meta.get(NESTED_KEY)
    return f"it lies in a nested graph ({path}), where Inductor packs no weights" if path else None


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
    _nested, _whole_table, _two_activations, _per_tensor_weight, _float_input, _half_precision,
)  # fmt: skip
