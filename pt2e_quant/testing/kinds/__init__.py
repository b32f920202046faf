"""What a step of a sketch can be: a table of kinds, a row each. A kind is added by a row in the file of its topic."""

from __future__ import annotations

from . import layers, places, pointwise, reductions
from .row import Kind, OpKind

__all__ = ["COMMON", "OPS", "Kind", "OpKind"]

OPS: dict[str, Kind] = {
    **{name: pointwise.CLAMPS[name] for name in ("relu",)},
    **{name: layers.LINEARS[name] for name in ("linear",)},
    **{name: layers.CONVOLUTIONS[name] for name in ("conv",)},
    **{name: pointwise.PAIRS[name] for name in ("add",)},
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
    **layers.SHARED,
    **places.PARTS,
    **places.PADS,
    **places.RESIZES,
    **layers.LOOKUPS,
    **places.INDEXED,
    **pointwise.MIXED,
    **pointwise.IN_PLACE,
    **layers.STATE,
    **layers.RECURRENT,
}
"""Each kind by name, simplest first: hypothesis shrinks towards the front."""

COMMON = (
    "relu", "linear", "conv", "add", "scalar", "move", "cat", "pool", "mean", "conv_norm", "constant", "product", "matmul",
    "sigmoid", "softmax", "gelu", "silu", "hardswish", "residual", "split", "pad", "slice", "layer_norm", "in_place",
)  # fmt: skip
"""The kinds that backends have integer kernels for, and what stands beside them."""
