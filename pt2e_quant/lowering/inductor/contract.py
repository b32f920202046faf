"""What Inductor would compile into wrong numbers or into code that fails: found before anything is compiled.

Its patterns look at the shape of a graph and not at all of its numbers: they take a transposed convolution for an
ordinary one and never read the zero points of weights. Each rule was measured with torch 2.13; the tests hold the
measurements. What Inductor merely leaves in float is no breach: `inductor_account` finds it after compiling.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from ...arguments import bind
from ...errors import LoweringError
from ...graph.attributes import constant
from ...grid import Grid
from ...ops import MAX_POOL, is_call, is_conv, is_conv_transpose, is_dequantize, is_quantize
from ...where import locate
from ..common.gemm import Gemm, as_gemm

__all__ = ["check_inductor_contract", "remarks_on_this_machine"]

Q = torch.ops.quantized_decomposed
_WITHOUT_VNNI = 127


def check_inductor_contract(model: GraphModule) -> None:
    """Refuse what would run wrongly.

    Raises:
        LoweringError: names every such node, with the reason and the way out.
    """
    found = [(node, reason) for node in model.graph.nodes if is_call(node) for reason in _breaches(node)]
    if found:
        places = "\n".join(f"- {reason}\n    {locate(node)}".replace("\n  in ", "\n    in ") for node, reason in found)
        raise LoweringError(
            f"the model breaks {len(found)} Inductor requirement{'s' * (len(found) > 1)} and was not compiled:\n"
            f"{places}"
        )


def remarks_on_this_machine(model: GraphModule) -> Iterator[tuple[Node, str]]:
    """Where this processor rounds otherwise than the graph says: it lacks VNNI, and an activation uses all 8 bits."""
    if torch.cpu._is_vnni_supported():
        return
    for node in model.graph.nodes:
        gemm = as_gemm(node)
        if gemm is not None and is_dequantize(gemm.activation) and bind(gemm.activation)["quant_max"] > _WITHOUT_VNNI:
            yield (
                node,
                "this processor has no VNNI: sums of two products overflow 16 bits. Quantize with reduce_range=True",
            )


def _breaches(node: Node) -> Iterator[str]:
    if node.target in MAX_POOL:
        yield from _pooling(node)
    gemm = as_gemm(node)
    if gemm is None or gemm.weight.target is not Q.dequantize_per_channel.default:
        return
    if is_conv_transpose(node):
        yield (
            "Inductor computes this transposed convolution as an ordinary one, with wrong numbers. "
            "Leave it in float: set_operator_type(node.target, None)"
        )
        return
    if not is_dequantize(gemm.activation):
        return  # no kernel of oneDNN, see `inductor_weights`
    yield from _weight(gemm)
    if is_conv(node) and bind(gemm.activation)["dtype"] is not torch.uint8:
        yield "the convolution's input is signed, for which oneDNN fails when it runs. Use torch.uint8 activations"


def _weight(gemm: Gemm) -> Iterator[str]:
    bound = bind(gemm.weight)
    scales, zero_points = constant(bound["scales"]), constant(bound["zero_points"])
    if zero_points is not None and bool(zero_points.any()):
        yield "a channel of the weight has a zero point other than 0, which Inductor ignores. Use a symmetric scheme"
    if bound["axis"] != 0:
        yield f"the weight has its channels on axis {bound['axis']}, Inductor reads axis 0. Use ch_axis=0"
    if scales is not None and scales.dtype is not torch.float32:
        yield f"the scales of the weight are {scales.dtype}, oneDNN reads float32. Convert the buffer to float32"


def _pooling(node: Node) -> Iterator[str]:
    """The pattern of the integer kernel compares no scales."""
    source, users = node.args[0], list(node.users)
    if is_dequantize(source) and len(users) == 1 and is_quantize(users[0]) and isinstance(source, Node):
        grids = Grid.of(source), Grid.of(users[0])
        if None not in grids and grids[0] != grids[1]:
            yield "max pooling on integers keeps their scale; input and output have different ones. Let them share one"
