"""What Inductor would compile into wrong numbers or into code that fails: found before anything is compiled.

Its patterns look at the shape of a graph and not at all of its numbers: they take a transposed convolution for an
ordinary one and never read the zero points of weights. The facts are those of `limits`; what can be written so that it
runs rightly, the passes of `recipe` write so. What Inductor merely leaves in float is no breach: the account finds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ...arguments import bind
from ...errors import LoweringError
from ...graph.attributes import constant
from ...graph.nested import every_node
from ...grid import Grid
from ...ops import MAX_POOL, is_call, is_conv, is_conv_transpose, is_dequantize, is_quantize
from ...where import locate
from ..common.gemm import Q, as_gemm
from .limits import NO_TRANSPOSED, not_8_bits, padding_only, signed_convolution, weight

__all__ = ["check_inductor_contract", "check_package_contract"]

_FOLDED = (
    "a package computes this once, when it is made, for it reads {}, which the model writes to, and no input. "
    "Take mode='compile', or let it depend on an input"
)


def check_inductor_contract(model: GraphModule) -> None:
    """Refuse what would run wrongly.

    Raises:
        LoweringError: names every such node, with the reason and the way out.
    """
    calls = filter(is_call, every_node(model))
    _refuse([(node, reason) for node in calls for reason in _breaches(node)])


def check_package_contract(exported: ExportedProgram) -> None:
    """Refuse what a package of AOTInductor would compute once and for all, when it is made.

    Its constants are all parameters and buffers, written ones too, and what depends on constants alone is folded.

    Raises:
        LoweringError: names every such node, with the reason and the way out.
    """
    functional = exported.run_decompositions({})  # writes become outputs, so that a read after one depends on it
    signature = functional.graph_signature
    written = set(signature.buffers_to_mutate.values())
    constants = signature.inputs_to_parameters | signature.inputs_to_buffers
    constants |= signature.inputs_to_lifted_tensor_constants
    folded: dict[Node, set[str]] = {}  # with the written buffers that they depend on
    for node in functional.graph.nodes:
        if node.op == "placeholder" and node.name in constants:
            folded[node] = {constants[node.name]} & written
        elif is_call(node) and node.all_input_nodes and folded.keys() >= set(node.all_input_nodes):
            folded[node] = set().union(*(folded[source] for source in node.all_input_nodes))
    _refuse([(node, _FOLDED.format(", ".join(sorted(of)))) for node, of in folded.items() if is_call(node) and of])


def _refuse(found: list[tuple[Node, str]]) -> None:
    if found:
        places = "\n".join(f"- {reason}\n    {locate(node)}".replace("\n  in ", "\n    in ") for node, reason in found)
        raise LoweringError(
            f"the model breaks {len(found)} Inductor requirement{'s' * (len(found) > 1)} and was not compiled:\n"
            f"{places}"
        )


def _breaches(node: Node) -> Iterator[str]:
    if node.target in MAX_POOL:
        yield from _pooling(node)
    gemm = as_gemm(node)
    if gemm is None or gemm.weight.target is not Q.dequantize_per_channel.default:
        return
    if is_conv_transpose(node):
        yield f"{NO_TRANSPOSED}. Leave it in float: set_operator_type(node.target, None)"
        return
    if not gemm.is_integer:
        return  # no kernel of oneDNN, see `passes.integer_weights`
    bound = bind(gemm.weight)
    for reason in weight(bound["axis"], constant(bound["zero_points"]), constant(bound["scales"])):
        yield f"{reason}. Quantize weights with torch.per_channel_symmetric, ch_axis=0 and scales in float32"
    if is_conv(node) and (missing := _padding_only(bind(node))) is not None:
        yield missing
    signed = (signed_convolution if is_conv(node) else not_8_bits)(bind(gemm.activation)["dtype"])
    if signed is not None:
        yield signed


def _padding_only(bound: Mapping[str, Any]) -> str | None:
    x, w = (bound[name].meta.get("val") for name in ("input", "weight"))
    steps = {name: bound[name] for name in ("stride", "padding", "dilation")}
    return None if x is None or w is None else padding_only(x.shape[2:], w.shape[2:], **steps)


def _pooling(node: Node) -> Iterator[str]:
    """The pattern of the integer kernel compares no scales."""
    source, users = node.args[0], list(node.users)
    if not isinstance(source, Node) or not is_dequantize(source) or len(users) != 1 or not is_quantize(users[0]):
        return
    grids = Grid.of(source), Grid.of(users[0])
    if None not in grids and grids[0] != grids[1]:
        yield "max pooling on integers keeps their scale; input and output have different ones. Let them share one"
