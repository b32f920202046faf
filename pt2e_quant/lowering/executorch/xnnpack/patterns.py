"""What ExecuTorch's XNNPACK backend sees as one integer kernel in a converted graph.

`as_product` reads a convolution or matrix product with its surroundings, `why_portable` says why the backend will leave
one to the portable kernels, `as_integer_op` reads the other integer kernels. `contract` checks what was found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.values import rank
from ....ops import RELUS, is_call, is_conv, is_dequantize, is_quantize, op_name
from ...common.gemm import Gemm, Q, as_gemm, is_dynamic, output_quantize
from .case import Case, Scales
from .limits import PADDING, PRODUCTS, kernel_of, not_zero_padding

__all__ = ["IntegerOp", "Product", "as_integer_op", "as_product", "case_of", "why_portable"]

_SCALES: dict[object, Scales] = {
    Q.dequantize_per_tensor.default: "tensor",
    Q.dequantize_per_channel.default: "channel",
    Q.dequantize_per_channel_group.default: "group",
}


@dataclass(frozen=True)
class Product(Gemm):
    """A convolution or matrix product whose weight is dequantized.

    Args:
        activation: before a convolution, zeros padded to the activation are part of the kernel.
        quantize: the quantize of its output, after an optional relu or hardtanh that fuses; None without one.
    """

    quantize: Node | None


def as_product(node: Node) -> Product | None:
    """The operator with its surroundings, when it is a convolution or matrix product with a dequantized weight."""
    gemm = as_gemm(node)
    if gemm is None:
        return None
    read = gemm.activation
    if is_conv(node) and _pads(read):
        read = read.all_input_nodes[0]
    return Product(node, read, gemm.weight, gemm.bias, is_dynamic(read), output_quantize(node, RELUS))


def _pads(node: Node) -> bool:
    """A pad with zeros around the image that only one node reads."""
    if not is_call(node) or node.target not in PADDING.ops or len(node.users) != 1:
        return False
    amounts, dimensions = list(bind(node)["pad"]), rank(node)
    inside = dimensions is not None and not any(amounts[2 * (dimensions - 2) :])
    return inside and all(isinstance(amount, int) for amount in amounts) and not_zero_padding(Case(node)) is None


@dataclass(frozen=True)
class IntegerOp:
    """An operator other than Product between dequantized inputs and a quantized output."""

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


def why_portable(product: Product) -> Iterator[str]:
    """Reasons why XNNPACK leaves the operator to the portable kernels; none when it takes it."""
    kernel = kernel_of(product.node)
    if kernel is not None:
        yield from (reason for _, reason in kernel.broken(case_of(product)))
    if not product.dynamic and product.quantize is None:
        yield _without_quantize(product)


def case_of(product: Product) -> Case:
    """The operator, quantized as the graph has it."""
    weight, activation = bind(product.weight), "static" if is_dequantize(product.activation) else None
    return Case(
        product.node,
        activation="dynamic" if product.dynamic else activation,  # type: ignore[arg-type]
        weight=_SCALES.get(product.weight.target),
        is_constant=lambda node: constant(node.args[0] if node is product.weight else node) is not None,
        group=weight.get("group_size", 0),
        axis=weight.get("axis"),
    )


def _without_quantize(product: Product) -> str:
    users = list(product.node.users)
    if len(users) != 1:
        return f"its output has {len(users)} users; XNNPACK needs one: a quantize, after an optional relu or hardtanh"
    if users[0].op == "output" or not any(map(is_quantize, users[0].users)):
        return "its output is not quantized; XNNPACK's integer kernel ends in a quantize"
    return (
        f"{op_name(users[0])} stands between it and the quantize of its output; XNNPACK fuses one relu, relu6 or "
        "hardtanh there and nothing else"
    )
