"""Which steps of ExecuTorch's compiler a graph can do without: it traces the whole graph anew in each of them.

A delegate goes through all passes of XNNPACK, seventeen traces, whether they find something in it or not. They fuse
activations and batch norms, lay images out channels last, take pads, pools and copies apart. *Plain* operators are what
none of them touches: linears, elementwise arithmetic and moves, which recurrent layers and attention are made of.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from .... import ops
from .limits import LARGEST_CAT, LINEAR, POINTWISE, RESHAPE, SLICE, SQUEEZE

__all__ = ["decomposes_once", "delegation_of"]

_PLAIN = frozenset((
    *LINEAR.ops, *ops.MATMUL, *ops.ADD, *ops.SUB, *ops.MUL, *ops.DIV, *ops.POW, *ops.SOFTMAX, *POINTWISE,
    *RESHAPE.ops, *SLICE.ops, *SQUEEZE.ops, *ops.CAT, *ops.STACK, *ops.QUANTIZE, *ops.DEQUANTIZE, *ops.CHOOSE_QPARAMS,
))  # fmt: skip


def delegation_of(nodes: Iterable[Node]) -> Any:
    """How XNNPACK compiles the delegate of these nodes: a DelegationSpec, of one pass for plain operators, or of all.

    The one is ConvertToLinearPass, which XNNPACK's compiler runs alone when it is told that the delegate is a dynamic
    linear. The delegate has the same bytes (tests/lowering/test_short_cuts.py).
    """
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    short = all(map(_is_plain, nodes))
    return DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")] if short else [])


def decomposes_once(nodes: Iterable[Node], kept: Iterable[OpOverload], fits: Callable[[Node], bool]) -> bool:
    """Whether one decomposition of a program does: nothing would be kept whole at first that is taken apart later.

    ExecuTorch decomposes a program, asks the backend of each operator whether it fits, and decomposes the rest again.
    Plain operators have no part that the backend would be asked about, so if all of them fit, that is settled before.

    Args:
        nodes: of an exported program.
        kept: operators that the backend wants whole.
        fits: whether the backend takes one of them.
    """
    whole = frozenset(kept)
    return all(_is_plain(node) and (node.target not in whole or fits(node)) for node in nodes)


def _is_plain(node: Node) -> bool:
    if node.op != "call_function":
        return not _is_channels_last(node)
    if node.target is operator.getitem:
        return _overload(node.args[0]) in ops.CHOOSE_QPARAMS
    op = _overload(node)
    wide = op in ops.CAT and len(node.args[0]) > LARGEST_CAT  # type: ignore[arg-type]
    return op in _PLAIN and not wide and not any(map(_is_channels_last, (node, *node.all_input_nodes)))


def _overload(node: Any) -> Any:
    """The ATen operator of an operator of ExecuTorch's edge dialect, or the one that it is."""
    return node.target if isinstance(node.target, OpOverload) else getattr(node.target, "_op", node.target)


def _is_channels_last(node: Node) -> bool:
    """An image whose layout XNNPACK would follow; one of dynamic sizes may be."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return False
    return not all(isinstance(size, int) for size in value.shape) or not value.is_contiguous()
