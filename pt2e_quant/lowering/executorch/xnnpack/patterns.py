"""What ExecuTorch's XNNPACK backend sees as one integer kernel in a converted graph.

`as_gemm` reads a convolution or matrix product with its surroundings, `refusals` says why the backend will leave one to
the portable kernels, `as_integer_op` reads the other integer kernels. `xnnpack_contract` checks what was found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.values import rank
from ....ops import (
    ADAPTIVE_AVG_POOL,
    ADD,
    CAT,
    CLAMP,
    CONV,
    CONV_TRANSPOSE,
    CONVOLUTION,
    HARDTANH,
    LINEAR,
    MEAN,
    MUL,
    RELU,
    RELU6,
    SUB,
    is_call,
    is_conv_transpose,
    is_dequantize,
    is_quantize,
    op_name,
)
from ...common.gemm import Gemm, Q, _output_quantize

__all__ = ["IntegerOp", "as_integer_op", "moves_values", "refusals"]

_ARITHMETIC = frozenset((*ADD, *SUB, *MUL, *RELU, *RELU6, *HARDTANH, *CLAMP, *MEAN, *ADAPTIVE_AVG_POOL))


_SHAPES = "view reshape _unsafe_view flatten unflatten ravel view_as reshape_as unsqueeze squeeze"


_ORDERS = "permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT"


_PARTS = "slice narrow select split split_with_sizes chunk unbind tensor_split max_pool2d"


_MOVES = frozenset(f"{_SHAPES} {_ORDERS} {_PARTS}".split())


@dataclass(frozen=True)
class IntegerOp:
    """An operator other than Gemm between dequantized inputs and a quantized output."""

    node: Node
    inputs: tuple[Node, ...]
    quantize: Node


def moves_values(node: Node) -> bool:
    """True for the value-preserving ops that XNNPACK runs on integers, which demand one grid for input and output."""
    return node.target in CAT or op_name(node) in _MOVES


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
        yield f"its output has {len(users)} users; XNNPACK needs one: a quantize, after an optional relu or hardtanh"
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


def _is_per_channel(dequantize: Node) -> bool:
    return dequantize.target is Q.dequantize_per_channel.default


def _leads_to_quantize(node: Node) -> bool:
    return any(is_quantize(user) for user in node.users)
