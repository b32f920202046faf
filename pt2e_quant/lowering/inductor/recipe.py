"""The recipe: all passes of the lowering to Inductor, in their order.

They edit a private copy of the converted graph. Only `drop_unread_rounding` changes values beyond the rounding of
float32, and the program's remarks say so. Inductor's own passes then find the patterns of its integer kernels.
"""

from __future__ import annotations

from ...passes.absorb_clamps import absorb_clamps
from ...passes.cancel_requantize import cancel_requantize
from ...passes.numbers_as_qparams import numbers_as_qparams
from ...passes.own_dequantizes import own_dequantizes
from ...passes.own_storage import own_storage
from ...passes.remove_identities import remove_identities
from ...passes.runner import Pass
from ...passes.spell_out_sums import spell_out_sums
from .passes.cast_float16 import cast_float16
from .passes.contiguous_rows import contiguous_rows
from .passes.conv1d_as_conv2d import conv1d_as_conv2d
from .passes.drop_unread_rounding import drop_unread_rounding
from .passes.exact_without_vnni import exact_without_vnni
from .passes.float32_between_integers import float32_between_integers
from .passes.integer_weights import integer_weights
from .passes.keep_apart import keep_apart
from .passes.merge_linears import merge_linears
from .passes.move_integers import move_integers
from .passes.out_of_place import out_of_place
from .passes.own_memory import own_memory
from .passes.own_numbers import own_numbers
from .passes.own_weights import own_weights
from .passes.pointwise_as_linear import pointwise_as_linear
from .passes.run_time_qparams import run_time_qparams
from .passes.second_channel import second_channel
from .passes.whole_codes import whole_codes

__all__ = ["ALWAYS", "IN_INDUCTOR", "recipe"]

ALWAYS: tuple[Pass, ...] = (
    numbers_as_qparams, remove_identities, cancel_requantize, own_storage, out_of_place, own_dequantizes,
    # What computes in integers, and what does not.
    float32_between_integers, move_integers, drop_unread_rounding, integer_weights, cast_float16,
    # What Inductor's patterns get wrong.
    spell_out_sums, own_numbers, contiguous_rows, second_channel, conv1d_as_conv2d, own_weights, run_time_qparams,
    # What only saves time.
    absorb_clamps, merge_linears,
)  # fmt: skip

IN_INDUCTOR = (own_memory,)
"""On Inductor's own graph, before it generates code."""


def recipe(tuned: bool) -> tuple[Pass, ...]:
    """With what pays when Inductor tunes its own kernels: without that, oneDNN's for both forms take the same time."""
    # At last, when nothing moves any more between a kernel and what it may be fused with.
    return (*ALWAYS, *((pointwise_as_linear,) if tuned else ()), exact_without_vnni, keep_apart, whole_codes)
