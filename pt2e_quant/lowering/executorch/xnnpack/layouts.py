"""Layouts around dynamic convolutions and linears: a repair of XNNPACK's compiler, in effect while a graph is lowered.

Convolutions compute channels last, so a pass of the compiler puts a transposing copy before an operator whose input has
the other layout. Where that input is quantized while the program runs, the copy goes to a wrong place: before a
convolution to the first input of the delegate that it comes from, whatever else reads that (the runtime ends with error
0x1), and before a linear between dequantize and linear, which then is no integer kernel ("Weight and Input should both
be quantized"). Here it goes before choose_qparams and quantize, for them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule, Node

__all__ = ["copying_before_quantize"]

_Convert = Callable[[Any, GraphModule, Node, Node], None]
_METHODS = ("input_to_nhwc", "input_to_nchw")


@contextmanager
def copying_before_quantize() -> Iterator[None]:
    """Around the compiler: layouts change in float, before qparams are chosen."""
    from executorch.backends.xnnpack._passes import ChannelsLastTaggedReshapePass

    stock = {name: getattr(ChannelsLastTaggedReshapePass, name) for name in _METHODS}
    for name, method in stock.items():
        setattr(ChannelsLastTaggedReshapePass, name, _before_quantize(method))
    try:
        yield
    finally:
        for name, method in stock.items():
            setattr(ChannelsLastTaggedReshapePass, name, method)


def _before_quantize(stock: _Convert) -> _Convert:
    from executorch.backends.xnnpack.utils.quant_utils import is_dynamic_qdq

    def convert(layouts: Any, gm: GraphModule, source: Node, reader: Node) -> None:
        if not is_dynamic_qdq(source):
            stock(layouts, gm, source, reader)
            return
        quantize, scale, *_ = source.all_input_nodes
        for step in (scale.all_input_nodes[0], quantize):
            stock(layouts, gm, quantize.all_input_nodes[0], step)

    return convert
