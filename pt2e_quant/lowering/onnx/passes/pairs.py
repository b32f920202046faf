"""Moves of integer tensors, written so that every quantize has its dequantize right after it.

onnxruntime turns pairs of int8 into pairs of uint8, which its kernels for x86 take, and knows no other signed form. It
moves the integers themselves where a pair stands on either side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ....graph.write import Symbol, Writer
from ....ops import DEQUANTIZE, QUANTIZE

__all__ = ["dequantized", "moved"]


def dequantized(write: Writer, quantize: Node, integers: Symbol | Node) -> Symbol:
    """The real numbers of integers on the grid of a quantize."""
    target = DEQUANTIZE[QUANTIZE.index(quantize.target)]
    return write.call(target, integers, *quantize.args[1:])


def moved(write: Writer, quantize: Node, integers: Symbol | Node, move: Callable[[Symbol], Any]) -> Symbol:
    """The integers after a move, on the same grid."""
    return write.call(quantize.target, move(dequantized(write, quantize, integers)), *quantize.args[1:])
