"""Zero padding before an integer convolution becomes the kernel's own: ONNX pads each side by itself, ATen both alike.

onnxruntime pads in float, so that the integers before and after become real numbers on the way.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.onnx.ops import symbolic

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import CONV, PAD, is_dequantize, is_quantize, pads_zeros
from ...common.gemm import Gemm, gemms
from .sizes import sizes_of

__all__ = ["pads_into_convolutions"]


def pads_into_convolutions(gm: GraphModule) -> GraphModule:
    """Where the padded integers lie on the grid of those that are padded."""
    write = Writer(gm, "pads_into_convolutions")
    for gemm in gemms(gm):
        pad = _pad_before(gemm)
        if pad is not None and gemm.node.target in CONV:
            _rewrite(write, gemm, pad)
    return tidy(gm)


def _pad_before(gemm: Gemm) -> Node | None:
    quantize = gemm.activation.args[0] if gemm.is_integer else None
    pad = quantize.args[0] if isinstance(quantize, Node) and is_quantize(quantize) else None
    if not isinstance(pad, Node) or pad.target not in PAD or not pads_zeros(pad):
        return None
    source = pad.all_input_nodes[0]
    same = is_dequantize(source) and source.args[1:] == quantize.args[1:]  # type: ignore[union-attr]
    return pad if same and _sides(gemm.node, pad) is not None else None


def _sides(node: Node, pad: Node) -> list[int] | None:
    """How much is padded, all the beginnings and then all the ends; None where that is not known, or crops."""
    bound, amounts = bind(node), list(bind(pad)["pad"])
    dimensions = node.meta["val"].dim() - 2
    padding = bound["padding"]
    known = all(isinstance(amount, int) and amount >= 0 for amount in amounts)
    if isinstance(padding, str) or not known or len(amounts) > 2 * dimensions:
        return None
    own = list(padding) * (dimensions if len(padding) == 1 else 1)
    amounts += [0] * (2 * dimensions - len(amounts))
    begins, ends = amounts[0::2][::-1], amounts[1::2][::-1]  # the last dimension comes first
    return [a + b for a, b in zip(own, begins, strict=True)] + [a + b for a, b in zip(own, ends, strict=True)]


def _rewrite(write: Writer, gemm: Gemm, pad: Node) -> None:
    value, bound = gemm.node.meta["val"], bind(gemm.node)
    source = pad.all_input_nodes[0]
    spatial = list(value.shape[2:])
    if not all(isinstance(size, int) for size in spatial):
        return
    attributes: dict[str, Any] = {
        "pads": _sides(gemm.node, pad),
        "group": bound["groups"],
        "kernel_shape": list(gemm.weight.meta["val"].shape[2:]),
    }
    for name, argument in (("strides", "stride"), ("dilations", "dilation")):
        given = list(bound[argument])
        attributes[name] = given * (len(spatial) if len(given) == 1 else 1)
    inputs = [source, gemm.weight, *([] if gemm.bias is None else [gemm.bias])]
    with write.before(gemm.node):
        shape = [sizes_of(write(source))[0], value.shape[1], *spatial]
        made = write.call(symbolic, "Conv", inputs, attributes, dtype=value.dtype, shape=shape, version=11)
        write.replace(gemm.node, made)
