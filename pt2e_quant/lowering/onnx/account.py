"""Which kernel of onnxruntime every quantized operator became: read from the graph that it runs on this processor.

The nodes of that graph keep the names of the file, with what onnxruntime appends to them, so they are joined with the
nodes of the converted graph by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node

from ...arguments import bind
from ...graph.nested import every_node
from ...graph.values import rank
from ...ops import EMBEDDING, LINEAR, MATMUL, MEAN, RELUS, is_call, is_dequantize, is_value_preserving
from ...where import node_id
from ..common.gemm import as_gemm, output_quantize
from ..common.program import Fallback
from .limits import DYNAMIC_PRODUCT, WITH_KERNELS, ends_in_float, mean_of_part, not_float32
from .program import OnnxKernel, Precision
from .runtime import FUSED

__all__ = ["take_account"]

_INTEGER = frozenset(
    {
        "QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "ConvInteger", "QLinearAdd", "QLinearMul",
        "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearAveragePool", "QLinearGlobalAveragePool",
        "QLinearConcat", "QLinearWhere", "QLinearReduceMean", "NhwcMaxPool",
    }
)  # fmt: skip
_DYNAMIC = frozenset({"DynamicQuantizeMatMul", "MatMulInteger", "DynamicQuantizeLSTM"})
_WEIGHT_ONLY = frozenset({"MatMulNBits", "GatherBlockQuantized"})
_SAID_BETTER: Mapping[tuple[str, Precision], Precision] = {
    ("dynamic", "int8"): "dynamic",  # inputs that several products share are quantized once, before their kernels
    ("table", "moved"): "weight only",
}
_HELPERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant"})


def take_account(converted: GraphModule, optimized: Any) -> tuple[tuple[OnnxKernel, ...], tuple[Fallback, ...]]:
    """(kernels, fallbacks) of the quantized operators, in the order of the graph.

    Args:
        converted: the graph as the user has it, before the passes of the lowering.
        optimized: the onnx.ModelProto that onnxruntime runs.
    """
    found = _by_origin(optimized.graph)
    kernels: list[OnnxKernel] = []
    fallbacks: list[Fallback] = []
    for node in filter(is_call, every_node(converted)):
        name, kind = node_id(node), _kind(node)
        taken = _kernel(found.get(name, {})) if kind else None
        if taken is None:
            continue  # it was joined with another operator, or changes nothing
        kernel, precision = taken
        if precision != "float":
            precision = _SAID_BETTER.get((kind, precision), precision)
            kernels.append(OnnxKernel(name, str(node.target), kernel, precision))
        elif kind != "moved":
            fallbacks.append(Fallback.of(name, str(node.target), node, f"{_why(node)}; it became {kernel}"))
    return tuple(kernels), tuple(fallbacks)


def _kind(node: Node) -> str:
    """What an operator promises: 'product', 'dynamic', 'table', 'computed', 'moved', or '' for what is not quantized.

    What stands in float between a dequantize and a quantize without a kernel for integers promises nothing.
    """
    gemm = as_gemm(node)
    if gemm is not None and not is_call(gemm.weight.args[0]):  # a constant, or an operand of a nested graph
        return "dynamic" if gemm.dynamic else "product"
    if node.target in EMBEDDING:
        return "table" if any(map(is_dequantize, node.all_input_nodes)) else ""
    before = any(map(is_dequantize, node.all_input_nodes))
    if node.target in MATMUL:
        return "product" if all(map(is_dequantize, node.all_input_nodes)) else ""
    if not before or output_quantize(node, RELUS) is None:
        return ""
    if node.target in WITH_KERNELS:
        return "computed"
    return "moved" if is_value_preserving(node) else ""


def _by_origin(graph: Any) -> dict[str, dict[str, Precision]]:
    """Operators of the optimized graph by the node that they come from, each with the integers that it computes on."""
    found: dict[str, dict[str, Precision]] = defaultdict(dict)
    floats = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    for node in graph.node:
        for attribute in node.attribute:
            for origin, inner in _by_origin(attribute.g).items() if attribute.HasField("g") else ():
                found[origin] |= inner
        if node.op_type not in _HELPERS:
            found[node.name.removeprefix(FUSED).partition("/")[0]][node.op_type] = _precision(node, floats)
    return found


def _precision(node: Any, floats: set[str]) -> Precision:
    kinds: Mapping[Precision, frozenset[str]] = {"int8": _INTEGER, "dynamic": _DYNAMIC, "weight only": _WEIGHT_ONLY}
    named = next((kind for kind, names in kinds.items() if node.op_type in names), None)
    return named or ("float" if floats.intersection(node.input) else "moved")


def _kernel(operators: dict[str, Precision]) -> tuple[str, Precision] | None:
    """The one that says most of what the operator became."""
    for wanted in ("int8", "dynamic", "weight only", "float", "moved"):
        for name, precision in operators.items():
            if precision == wanted:
                return name, precision
    return None


def _why(node: Node) -> str:
    gemm, bound = as_gemm(node), bind(node)
    if node.target in EMBEDDING:
        return "every run would dequantize the whole table"
    if gemm is not None and gemm.dynamic and node.target not in LINEAR:
        return DYNAMIC_PRODUCT
    if gemm is not None and gemm.is_integer:
        quantized = output_quantize(node, RELUS) is not None
        reason = not_float32(node.meta["val"].dtype) or ends_in_float(node, quantized)
    elif node.target in MEAN:
        reason = mean_of_part(rank(node.all_input_nodes[0]) or 0, bound.get("dim"), bound.get("dtype"))
    else:
        reason = None
    return reason or "onnxruntime found no integer kernel for its operands"
