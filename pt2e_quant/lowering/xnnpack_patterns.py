"""What ExecuTorch's XNNPACK backend sees as one integer kernel in a converted graph.

`as_gemm` reads a convolution or matrix product with its surroundings, `refusals` says why the backend will leave one to
the portable kernels, `as_integer_op` reads the other integer kernels. `xnnpack_contract` checks what was found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph import attribute
from ..ops import (
    ADAPTIVE_AVG_POOL,
    ADD,
    CAT,
    CHOOSE_QPARAMS,
    CLAMP,
    CONV,
    CONV_TRANSPOSE,
    CONVOLUTION,
    DEQUANTIZE,
    HARDTANH,
    LINEAR,
    MEAN,
    MUL,
    QUANTIZE,
    RELU,
    RELU6,
    SUB,
    functional,
    is_conv_transpose,
)

__all__ = [
    "Gemm",
    "IntegerOp",
    "as_gemm",
    "as_integer_op",
    "constant",
    "grid",
    "is_call",
    "is_dequantize",
    "is_quantize",
    "moves_values",
    "op_name",
    "rank",
    "refusals",
]

Q = torch.ops.quantized_decomposed
_FUSED = frozenset((*RELU, *RELU6, *HARDTANH))
_ARITHMETIC = frozenset((*ADD, *SUB, *MUL, *RELU, *RELU6, *HARDTANH, *CLAMP, *MEAN, *ADAPTIVE_AVG_POOL))
_SHAPES = "view reshape _unsafe_view flatten unflatten ravel view_as reshape_as unsqueeze squeeze"
_ORDERS = "permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT"
_PARTS = "slice narrow select split split_with_sizes chunk unbind tensor_split max_pool2d"
_MOVES = frozenset(f"{_SHAPES} {_ORDERS} {_PARTS}".split())
_GEMM_OPERANDS: dict[Any, tuple[str, str, str]] = {
    **dict.fromkeys((*CONV, *CONV_TRANSPOSE, *CONVOLUTION, *LINEAR), ("input", "weight", "bias")),
    torch.ops.aten.mm.default: ("self", "mat2", ""),
    torch.ops.aten.matmul.default: ("self", "other", ""),
    torch.ops.aten.addmm.default: ("mat1", "mat2", "self"),
}
_QUANTIZE, _DEQUANTIZE, _CHOOSE = frozenset(QUANTIZE), frozenset(DEQUANTIZE), frozenset(CHOOSE_QPARAMS)


@dataclass(frozen=True)
class Gemm:
    """A convolution or matrix product whose weight is dequantized.

    Args:
        node: the operator.
        activation, bias: its operands; in front of a convolution, zeros padded to the activation are part of it.
        weight: the dequantize of its weight.
        quantize: the quantize of its output, behind an optional relu or hardtanh that fuses; None without one.
        dynamic: the activation's qparams are computed while the program runs.
    """

    node: Node
    activation: Node
    weight: Node
    bias: Node | None
    quantize: Node | None
    dynamic: bool


@dataclass(frozen=True)
class IntegerOp:
    """An operator other than Gemm between dequantized inputs and a quantized output."""

    node: Node
    inputs: tuple[Node, ...]
    quantize: Node


def is_call(node: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function"


def is_quantize(node: object) -> bool:
    return isinstance(node, Node) and node.target in _QUANTIZE


def is_dequantize(node: object) -> bool:
    return isinstance(node, Node) and node.target in _DEQUANTIZE


def op_name(node: Node) -> str:
    """'conv2d' of aten.conv2d.default; in-place and _copy twins have the name of their functional form."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    return functional(target)._schema.name.partition("::")[2]


def moves_values(node: Node) -> bool:
    """True for the value-preserving ops that XNNPACK runs on integers, which demand one grid for input and output."""
    return node.target in CAT or op_name(node) in _MOVES


def rank(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def constant(node: object) -> Tensor | None:
    """The parameter or buffer that a node reads; None for any other node."""
    if not isinstance(node, Node) or node.op != "get_attr" or not isinstance(node.graph.owning_module, GraphModule):
        return None
    value = attribute(node.graph.owning_module, str(node.target))
    return value if isinstance(value, Tensor) else None


def grid(node: Node) -> tuple[Any, ...]:
    """(scale, zero_point, quant_min, quant_max, dtype) of a per-tensor quantize or dequantize."""
    bound = bind(node)
    return tuple(bound[name] for name in ("scale", "zero_point", "quant_min", "quant_max", "dtype"))


def as_gemm(node: Node) -> Gemm | None:
    """The operator with its surroundings, when it is a convolution or matrix product with a dequantized weight."""
    names = _GEMM_OPERANDS.get(node.target) if is_call(node) else None
    if names is None:
        return None
    bound = bind(node)
    activation, weight, bias = bound[names[0]], bound[names[1]], bound.get(names[2])
    if not isinstance(activation, Node) or not is_dequantize(weight):
        return None
    if node.target in (*CONV, *CONVOLUTION) and _is_padding(activation) and not is_conv_transpose(node):
        activation = activation.all_input_nodes[0]  # the convolution's kernel pads, too
    dynamic = is_dequantize(activation) and _is_chosen_while_running(activation)
    return Gemm(node, activation, weight, bias, _output_quantize(node, _FUSED), dynamic)


def as_integer_op(node: Node) -> IntegerOp | None:
    """The operator with its surroundings, when XNNPACK will run it in integers."""
    if not is_call(node) or not (node.target in _ARITHMETIC or moves_values(node)):
        return None
    inputs = tuple(node.all_input_nodes)
    quantize = _output_quantize(node, frozenset(RELU) if node.target in ADD else frozenset())
    if quantize is None or not inputs or not all(is_dequantize(source) for source in inputs):
        return None
    return IntegerOp(node, inputs, quantize)


def refusals(gemm: Gemm) -> Iterator[str]:
    """Reasons why XNNPACK leaves the operator to the portable kernels; none when it takes it."""
    if constant(gemm.weight.args[0]) is None:
        yield "its weight is not constant: XNNPACK multiplies by integer weights only when they are stored as integers"
    if not is_dequantize(gemm.activation):
        yield "only its weight is quantized; XNNPACK needs the input quantized too, statically or dynamically"
    if gemm.bias is not None and constant(gemm.bias) is None:
        yield f"its bias is computed by {op_name(gemm.bias)}; XNNPACK needs a float32 parameter and quantizes it itself"
    yield from _dynamic_refusals(gemm) if gemm.dynamic else _static_refusals(gemm)
    if gemm.node.target in LINEAR:
        return
    ranks = rank(gemm.activation), rank(gemm.weight)
    if None not in ranks and ranks[0] != ranks[1]:
        yield f"its input has {ranks[0]} dimensions and its weight {ranks[1]}; XNNPACK needs as many"
    if is_conv_transpose(gemm.node) and _is_per_channel(gemm.weight):
        bound, axis = bind(gemm.node), bind(gemm.weight)["axis"]
        if bound["groups"] != 1 or axis != 1:
            needs = "with per-channel weights, a transposed convolution needs axis=1 and groups=1"
            yield f"{needs}, this one has {axis=} and groups={bound['groups']}"


def _static_refusals(gemm: Gemm) -> Iterator[str]:
    if gemm.quantize is not None:
        return
    users = list(gemm.node.users)
    if len(users) != 1:
        yield f"its output has {len(users)} users; XNNPACK needs one: a quantize, behind an optional relu or hardtanh"
    elif users[0].op == "output" or not _leads_to_quantize(users[0]):
        yield "its output is not quantized; XNNPACK's integer kernel ends in a quantize"
    else:
        yield (
            f"{op_name(users[0])} stands between it and the quantize of its output; XNNPACK fuses one relu, relu6 or "
            "hardtanh there and nothing else"
        )


def _dynamic_refusals(gemm: Gemm) -> Iterator[str]:
    if gemm.weight.target is Q.dequantize_per_tensor.default:
        yield "its activation is quantized dynamically, for which XNNPACK needs per-channel weights"
    if gemm.node.target in (*CONV, *CONV_TRANSPOSE, *CONVOLUTION):
        shape = gemm.weight.meta["val"].shape
        if len(shape) != 4 or shape[1] == 1 or is_conv_transpose(gemm.node):  # one channel counts as depthwise
            yield "XNNPACK quantizes dynamically for 2-D convolutions that are neither depthwise nor transposed"


def _is_padding(node: Node) -> bool:
    """A pad with zeros around the image that only one node reads."""
    if not is_call(node) or op_name(node) not in ("pad", "constant_pad_nd") or len(node.users) != 1:
        return False
    bound, dimensions = bind(node), rank(node)
    amounts = list(bound["pad"])
    zeros = bound.get("mode", "constant") == "constant" and not bound["value"]
    inside = dimensions is not None and not any(amounts[2 * (dimensions - 2) :])
    return zeros and inside and all(isinstance(amount, int) and amount >= 0 for amount in amounts)


def _is_per_channel(dequantize: Node) -> bool:
    return dequantize.target is Q.dequantize_per_channel.default


def _is_chosen_while_running(dequantize: Node) -> bool:
    scale = dequantize.args[1]
    if not isinstance(scale, Node) or not is_call(scale) or not scale.all_input_nodes:
        return False
    return scale.all_input_nodes[0].target in _CHOOSE


def _output_quantize(node: Node, fused: frozenset[Any]) -> Node | None:
    """The quantize that is the only user of the node, or of the fused activation that is its only user."""
    for _ in range(2):
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if is_quantize(user):
            return user
        if user.target not in fused:
            return None
        node = user
    return None


def _leads_to_quantize(node: Node) -> bool:
    return any(is_quantize(user) for user in node.users)
