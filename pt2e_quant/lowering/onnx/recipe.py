"""The recipe: all passes of the lowering to ONNX, in their order.

They edit a private copy of the converted graph and keep its values up to the rounding of float32; `integer_biases`
rounds biases to the grid that integer kernels add them on.
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
from .passes.integer_biases import integer_biases
from .passes.integers_at_run_time import integers_at_run_time
from .passes.linears_on_rows import linears_on_rows
from .passes.means_to_pools import means_to_pools
from .passes.pads_into_convolutions import pads_into_convolutions
from .passes.rows_of_tables import rows_of_tables
from .passes.weights_in_columns import weights_in_columns

__all__ = ["RECIPE"]

RECIPE: tuple[Pass, ...] = (
    numbers_as_qparams, remove_identities, cancel_requantize, own_storage, own_dequantizes, spell_out_sums,
    absorb_clamps, pads_into_convolutions, rows_of_tables, means_to_pools, integers_at_run_time, weights_in_columns,
    linears_on_rows, integer_biases,
)  # fmt: skip
