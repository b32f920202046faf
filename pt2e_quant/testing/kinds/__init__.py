"""What a step of a sketch can be: a table of kinds, a row each. A kind is added by a row in the file of its topic."""

from __future__ import annotations

from . import layers, places, pointwise, reductions, state
from .row import Kind, OpKind

__all__ = ["COMMON", "OPS", "Kind", "OpKind"]

OPS: dict[str, Kind] = {
    "relu": pointwise.CLAMPS["relu"],
    "linear": layers.LINEARS["linear"],
    "conv": layers.CONVOLUTIONS["conv"],
    "add": pointwise.PAIRS["add"],
    **pointwise.SCALARS,
    **pointwise.CLAMPS,
    **pointwise.ACTIVATIONS,
    **places.MOVES,
    **places.JOINS,
    **reductions.POOLS,
    **reductions.REDUCTIONS,
    **layers.LINEARS,
    **layers.CONVOLUTIONS,
    **layers.NORMS,
    **pointwise.PAIRS,
    **pointwise.CURVES,
    **reductions.PRODUCTS,
    **state.SHARED,
    **places.PARTS,
    **places.PADS,
    **places.RESIZES,
    **state.LOOKUPS,
    **places.INDEXED,
    **pointwise.MIXED,
    **pointwise.IN_PLACE,
    **state.STATE,
    **state.RECURRENT,
}
"""Each kind by name, simplest first: hypothesis shrinks towards the front."""

COMMON = (
    "relu", "linear", "conv", "add", "scalar", "move", "cat", "pool", "mean", "conv_norm", "constant", "product",
    "matmul", "sigmoid", "softmax", "gelu", "silu", "hardswish", "residual", "split", "pad", "slice", "layer_norm",
    "in_place",
)  # fmt: skip
"""The kinds that backends have integer kernels for, and what stands beside them."""
