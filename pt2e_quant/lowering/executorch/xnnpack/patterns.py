"""What ExecuTorch's XNNPACK backend sees as one integer kernel in a converted graph.

`as_gemm` reads a convolution or matrix product with its surroundings, `refusals` says why the backend will leave one to
the portable kernels, `as_integer_op` reads the other integer kernels. `contract` checks what was found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from ....arguments import bind
from ....graph.attributes import constant
from ....ops import is_call, is_dequantize, is_quantize, op_name
from ...common.gemm import Gemm, Q, output_quantize
from .limits import PADDING, PRODUCTS, Case, Scales, kernel_of

__all__ = ["IntegerOp", "as_integer_op", "case_of", "refusals"]

_SCALES: dict[object, Scales] = {
    Q.dequantize_per_tensor.default: "tensor",
    Q.dequantize_per_channel.default: "channel",
    Q.dequantize_per_channel_group.default: "group",
}


@dataclass(frozen=True)
class IntegerOp:
    """An operator other than Gemm between dequantized inputs and a quantized output."""

    node: Node
    inputs: tuple[Node, ...]
    quantize: Node


def as_integer_op(node: Node) -> IntegerOp | None:
    """The operator with its surroundings, when XNNPACK will run it in integers."""
    kernel = kernel_of(node) if is_call(node) else None
    if kernel is None or kernel in (*PRODUCTS, PADDING):
        return None
    inputs = tuple(node.all_input_nodes)
    quantize = output_quantize(node, kernel.fuses)
    if quantize is None or not inputs or not all(is_dequantize(source) for source in inputs):
        return None
    return IntegerOp(node, inputs, quantize)


def refusals(gemm: Gemm) -> Iterator[str]:
    """Reasons why XNNPACK leaves the operator to the portable kernels; none when it takes it."""
    kernel = kernel_of(gemm.node)
    if kernel is not None:
        yield from (reason for _, reason in kernel.refusals(case_of(gemm)))
    if not gemm.dynamic and gemm.quantize is None:
        yield _without_quantize(gemm)


def case_of(gemm: Gemm) -> Case:
    """The operator, quantized as the graph has it."""
    weight, activation = bind(gemm.weight), "static" if is_dequantize(gemm.activation) else None
    return Case(
        gemm.node,
        activation="dynamic" if gemm.dynamic else activation,  # type: ignore[arg-type]
        weight=_SCALES.get(gemm.weight.target),
        is_constant=lambda node: constant(node.args[0] if node is gemm.weight else node) is not None,
        group=weight.get("group_size", 0),
        axis=weight.get("axis"),
    )


def _without_quantize(gemm: Gemm) -> str:
    users = list(gemm.node.users)
    if len(users) != 1:
        return f"its output has {len(users)} users; XNNPACK needs one: a quantize, after an optional relu or hardtanh"
    if users[0].op == "output" or not any(map(is_quantize, users[0].users)):
        return "its output is not quantized; XNNPACK's integer kernel ends in a quantize"
    return (
        f"{op_name(users[0])} stands between it and the quantize of its output; XNNPACK fuses one relu, relu6 or "
        "hardtanh there and nothing else"
    )
