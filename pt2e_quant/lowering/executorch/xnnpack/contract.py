"""The contract between a converted graph and ExecuTorch's XNNPACK backend, as a list of small checks.

What breaks a rule here would lower without a word and then compute wrong numbers, fail when the program is loaded, or
end in an assertion of the compiler. `executorch.lower_to_executorch` runs the checks after all passes, on the graph
that is exported and compiled. Each rule was measured with ExecuTorch's runtime; the tests hold the measurements, so
that a change in ExecuTorch shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....errors import LoweringError
from ....graph.attributes import constant
from ....graph.values import rank
from ....grid import Grid
from ....meta import PORTABLE, mark, marks
from ....ops import CONV3D, CONV_TRANSPOSE3D, CONVOLUTION, LINEAR, op_name
from ....where import locate, node_id
from ...common.entry import origin
from .limits import (
    ACTIVATION_RANGE,
    GROUP_UNIT,
    LARGEST_FACTOR,
    NO_3D,
    WEIGHT_RANGE,
    axis_of_channels,
    not_int8,
    scales_not_float32,
    shifted_weight,
    unfit_groups,
)
from .patterns import IntegerOp, Product, as_integer_op, as_product, why_portable

__all__ = ["Severity", "Violation", "check_xnnpack_contract", "keep_outside", "raise_fatal"]

Q = torch.ops.quantized_decomposed
Severity = Literal["wrong", "init", "error", "inexact", "portable"]

_MEANING: dict[str, str] = {
    "wrong": "the program would run and give wrong numbers",
    "init": "the program would lower and then fail when it is loaded",
    "error": "ExecuTorch would fail while lowering or running",
    "inexact": "the program's numbers differ from the converted graph's",
    "portable": "the operator runs in portable kernels on the CPU",
}
_FATAL = ("wrong", "init", "error")


@dataclass(frozen=True)
class Violation:
    """A rule of the backend that a node breaks.

    Args:
        rule: name of the check.
        node: the node of the converted graph.
        severity: 'wrong' (wrong numbers), 'init' (fails when loaded) and 'error' (fails while lowering or running)
            stop the lowering; 'inexact' (small differences) and 'portable' (not delegated) do not.
        why: what is wrong with the node.
        fix: the way out.
    """

    rule: str
    node: Node
    severity: Severity
    why: str
    fix: str

    @property
    def fatal(self) -> bool:
        return self.severity in _FATAL

    def __str__(self) -> str:
        where = locate(self.node).replace("\n", "\n  ")
        if origin(self.node) != node_id(self.node):
            where += f"\n    written for {origin(self.node)} of the converted graph"
        return f"{self.why}: {_MEANING[self.severity]} [{self.rule}]\n  {where}\n  {self.fix}"


Breach = tuple[Severity, str, str]
"""(severity, why, fix) of a Violation."""

T = TypeVar("T")
Check = Callable[[T], Iterator[Breach]]


def check_xnnpack_contract(model: GraphModule) -> tuple[Violation, ...]:
    """Everything in a converted graph that XNNPACK cannot run as it stands, in graph order; nested graphs included."""
    graphs = [module.graph for module in model.modules() if isinstance(module, GraphModule)]
    calls = (node for graph in graphs for node in graph.nodes if node.op == "call_function")
    return tuple(Violation(rule, node, *breach) for node in calls for rule, breach in _breaches(node))


def _breaches(node: Node) -> Iterator[tuple[str, Breach]]:
    yield from _run(CHECKS_OF_NODES, node)
    product, op = as_product(node), as_integer_op(node)
    if product is not None:
        refused = list(why_portable(product))
        for reason in refused:
            yield "left_to_portable_kernels", ("portable", reason, "Quantize it as XNNPACK needs it, or not at all.")
        if not refused:
            yield from _run(CHECKS_OF_PRODUCTS, product)
    if op is not None:
        yield from _run(CHECKS_OF_OTHER_KERNELS, op)


def _run(checks: tuple[Check[T], ...], subject: T) -> Iterator[tuple[str, Breach]]:
    for check in checks:
        for breach in check(subject):
            yield check.__name__, breach


def raise_fatal(violations: tuple[Violation, ...]) -> None:
    """Raise one error that names every node that must not be lowered.

    Raises:
        LoweringError: there is one.
    """
    fatal = [violation for violation in violations if violation.fatal]
    if fatal:
        listing = "\n".join(f"- {str(violation).replace(chr(10), chr(10) + '  ')}" for violation in fatal)
        raise LoweringError(
            f"the model breaks {len(fatal)} XNNPACK requirement{'s' * (len(fatal) > 1)} and was not lowered "
            f"(preflight=False lowers it anyway):\n{listing}"
        )


def keep_outside(violations: tuple[Violation, ...]) -> None:
    """Mark the nodes that run in portable kernels, so that no delegate takes one of them all the same."""
    for violation in violations:
        if violation.severity == "portable":
            known = marks(violation.node).get(PORTABLE)
            mark(violation.node, PORTABLE, "; ".join(filter(None, (known, violation.why))))


# --- weights ----------------------------------------------------------------------------------------------------------


def weight_zero_point_is_zero(product: Product) -> Iterator[Breach]:
    reason, in_all = shifted_weight(product.weight), product.weight.target is Q.dequantize_per_tensor.default
    if reason is not None:
        fix = "Quantize weights with a symmetric scheme (torch.per_channel_symmetric)."
        yield "init" if in_all else "wrong", reason, fix


def weight_scale_is_float32(product: Product) -> Iterator[Breach]:
    reason = scales_not_float32(product.weight)
    if reason is not None:
        yield "init", reason, "Store it as float32, as convert_pt2e does."


def weight_axis_is_the_output_channel(product: Product) -> Iterator[Breach]:
    if product.weight.target is not Q.dequantize_per_channel.default:
        return
    axis, wanted = bind(product.weight)["axis"], axis_of_channels(product.node)
    if wanted is None:
        fix = "Write it as torch.nn.functional.linear(x, weight.t()), or quantize the weight per tensor."
        yield "error", "XNNPACK takes a product without bias with per-tensor weights only", fix
    elif axis != wanted:
        name = op_name(product.node)
        severity: Severity = "error" if name == "addmm" else "init"
        yield severity, f"the scales of the weight lie along axis {axis}", f"XNNPACK needs axis {wanted} for {name}."


def weight_is_int8(product: Product) -> Iterator[Breach]:
    reason = not_int8(product.weight)
    if reason is not None:
        yield "error", reason, "XNNPACK takes weights of torch.int8 (-127..127, or -8..7)."


def weight_groups_are_of_4_bits_and_multiples_of_32(product: Product) -> Iterator[Breach]:
    grouped = product.weight.target is Q.dequantize_per_channel_group.default
    reason = unfit_groups(product.weight) if grouped else None
    if reason is not None:
        sizes = ", ".join(str(times * GROUP_UNIT) for times in (1, 2, 4))
        yield "error", reason, f"XNNPACK takes groups of 4 bits only, -8..7, with a group_size of {sizes}, ..."


def weights_are_stored_as_integers(node: Node) -> Iterator[Breach]:
    if node.target is Q.quantize_per_channel.default:
        yield (
            "error",
            "a tensor is quantized per channel while the program runs; ExecuTorch's kernel for that ends the process",
            "Fold weights when converting (convert_pt2e does); quantize activations per tensor.",
        )


def factor_can_be_requantized(product: Product) -> Iterator[Breach]:
    grids = [Grid.of(node) if node is not None else None for node in (product.activation, product.quantize)]
    given = product.weight.args[1]
    scale = constant(given) if isinstance(given, Node) else torch.tensor(given)
    if product.dynamic or scale is None or scale.numel() == 0 or grids[0] is None or grids[1] is None:
        return
    factor = float(scale.double().abs().max()) * grids[0].scale / grids[1].scale
    if factor >= LARGEST_FACTOR:
        yield (
            "portable",
            f"a step of its input times one of its weight is {factor:.4g} steps of its output; XNNPACK takes less than "
            f"{LARGEST_FACTOR:g}",
            "Its output is cut to a range that is tiny beside what it can reach: widen it, or leave it in float.",
        )


# --- activations ------------------------------------------------------------------------------------------------------


def inputs_and_output_are_int8(kernel: Product | IntegerOp) -> Iterator[Breach]:
    inputs = (kernel.activation,) if isinstance(kernel, Product) else kernel.inputs
    for tensor in (*inputs, kernel.quantize):
        dtype = bind(tensor)["dtype"] if tensor is not None and _is_per_tensor(tensor) else torch.int8
        if dtype != torch.int8:
            severity: Severity = "wrong" if dtype == torch.uint8 else "error"
            yield severity, f"{tensor} has {dtype}", "XNNPACK computes in torch.int8; use that for activations."


def activations_use_the_whole_range(node: Node) -> Iterator[Breach]:
    if node.target is not Q.quantize_per_tensor.default or constant(node.args[0]) is not None:
        return
    grid = Grid.of(node)
    if grid and grid.dtype == torch.int8 and grid.bounds != ACTIVATION_RANGE:
        severity: Severity = "inexact" if grid.bounds == WEIGHT_RANGE else "wrong"
        why = f"the quantized range is {grid.quant_min}..{grid.quant_max}, and XNNPACK saturates at -128..127"
        yield severity, why, "Use quant_min=-128, quant_max=127 for activations."


def operands_are_quantized_per_tensor(op: IntegerOp) -> Iterator[Breach]:
    fix = "XNNPACK needs one scale per operand here."
    for source in op.inputs:
        if source.target is Q.dequantize_per_channel.default:
            yield "error", f"the operand {source.name} is quantized per channel", fix


def dynamic_qparams_are_asymmetric(node: Node) -> Iterator[Breach]:
    if node.target is Q.choose_qparams_symmetric.tensor:
        yield (
            "error",
            "activations are quantized dynamically with a symmetric scheme",
            "XNNPACK and ExecuTorch's portable kernels choose asymmetric qparams only: use torch.per_tensor_affine.",
        )


def dynamic_qparams_are_per_row(product: Product) -> Iterator[Breach]:
    if not product.dynamic or product.activation.target is not Q.dequantize_per_tensor.tensor:
        return
    shape, linear = product.activation.meta["val"].shape, product.node.target in LINEAR
    if any(not isinstance(size, int) or size > 1 for size in (shape[:-1] if linear else shape[:1])):
        unit = "row" if linear else "sample"
        yield (
            "inexact",
            f"XNNPACK chooses dynamic qparams for each {unit}, the converted graph for the whole tensor",
            "Expect differences below one percent, in favour of XNNPACK; per-token qparams agree exactly.",
        )


# --- operators --------------------------------------------------------------------------------------------------------


def convolutions_have_one_or_two_dimensions(node: Node) -> Iterator[Breach]:
    if node.target in (*CONV3D, *CONV_TRANSPOSE3D) or (node.target in CONVOLUTION and rank(node) == 5):
        yield "error", NO_3D, "Lower to another backend, or write it with 2-D convolutions."


def _is_per_tensor(node: Node) -> bool:
    return node.target in (Q.quantize_per_tensor.default, Q.dequantize_per_tensor.default)


CHECKS_OF_NODES: tuple[Check[Node], ...] = (
    weights_are_stored_as_integers,
    activations_use_the_whole_range,
    dynamic_qparams_are_asymmetric,
    convolutions_have_one_or_two_dimensions,
)
"""Rules for every call in the graph."""

CHECKS_OF_PRODUCTS: tuple[Check[Product], ...] = (
    weight_zero_point_is_zero,
    weight_scale_is_float32,
    weight_axis_is_the_output_channel,
    weight_is_int8,
    weight_groups_are_of_4_bits_and_multiples_of_32,
    factor_can_be_requantized,
    inputs_and_output_are_int8,
    dynamic_qparams_are_per_row,
)
"""Rules for the convolutions and matrix products that XNNPACK takes."""

CHECKS_OF_OTHER_KERNELS: tuple[Check[IntegerOp], ...] = (
    inputs_and_output_are_int8,
    operands_are_quantized_per_tensor,
)
"""Rules for everything else that XNNPACK runs in integers."""
