"""The recipe: all passes of the lowering to ExecuTorch, in their order.

They edit a private copy of the converted graph, before it is exported again, and keep its values up to the rounding of
float32. XNNPACK takes no operator of a nested graph, so its passes leave those alone.
"""

from __future__ import annotations

from ...passes.cancel_requantize import cancel_requantize
from ...passes.decompose_attention import decompose_attention
from ...passes.lift_scalars import lift_scalars
from ...passes.numbers_as_qparams import numbers_as_qparams
from ...passes.own_dequantizes import own_dequantizes
from ...passes.own_storage import own_storage
from ...passes.remove_identities import remove_identities
from ...passes.runner import Pass
from ...passes.spell_out_sums import spell_out_sums
from .passes.adaptive_max_pools import adaptive_max_pools
from .passes.arguments_with_kernels import arguments_with_kernels
from .passes.attention_on_merged_heads import attention_on_merged_heads
from .passes.bags_to_embeddings import bags_to_embeddings
from .passes.cats_of_few import cats_of_few
from .passes.clamps_after_products import clamps_after_products
from .passes.copies_to_concatenate import copies_to_concatenate
from .passes.copies_to_fresh_memory import copies_to_fresh_memory
from .passes.copy_results_of_branches import copy_results_of_branches
from .passes.embeddings_to_kernels import embeddings_to_kernels
from .passes.expands_to_products import expands_to_products
from .passes.float32_between_integers import float32_between_integers
from .passes.fold_constants import fold_constants
from .passes.fold_factors_into_linears import fold_factors_into_linears
from .passes.matmul_to_bmm import matmul_to_bmm
from .passes.means_to_linears import means_to_linears
from .passes.moves_on_their_grid import moves_on_their_grid
from .passes.moves_stay_with_their_reshapes import moves_stay_with_their_reshapes
from .passes.norms_to_linears import norms_to_linears
from .passes.numbers_to_vectors import numbers_to_vectors
from .passes.one_layout import one_layout
from .passes.own_biases import own_biases
from .passes.own_run_time_qparams import own_run_time_qparams
from .passes.parts_to_slices import parts_to_slices
from .passes.quantize_padding import quantize_padding
from .passes.reshapes_to_views import reshapes_to_views
from .passes.slices_to_linears import slices_to_linears
from .passes.softmax_on_rows import softmax_on_rows
from .passes.spell_out_defaults import spell_out_defaults
from .passes.take_apart import take_apart
from .passes.weighted_sums_to_products import weighted_sums_to_products

__all__ = ["AT_LAST", "FOR_EXECUTORCH", "FOR_XNNPACK"]

FOR_EXECUTORCH: tuple[Pass, ...] = (
    numbers_as_qparams, one_layout, take_apart, own_dequantizes, remove_identities, cancel_requantize, own_storage,
    copies_to_fresh_memory, spell_out_sums, adaptive_max_pools, arguments_with_kernels,
    bags_to_embeddings, embeddings_to_kernels,
)  # fmt: skip
"""First, on nested graphs too."""

FOR_XNNPACK: tuple[Pass, ...] = (
    lift_scalars, numbers_to_vectors, moves_on_their_grid,
    # What has no kernel, spelled with what has one: an operator outside cuts the delegate in two.
    decompose_attention, norms_to_linears, means_to_linears, weighted_sums_to_products, expands_to_products,
    slices_to_linears, copies_to_concatenate, cats_of_few, fold_factors_into_linears,
    # Shapes as XNNPACK matches them.
    attention_on_merged_heads, softmax_on_rows, moves_stay_with_their_reshapes, fold_constants, matmul_to_bmm,
    parts_to_slices, reshapes_to_views, spell_out_defaults,
    # Integers as XNNPACK matches them.
    clamps_after_products, own_biases, own_run_time_qparams, quantize_padding, float32_between_integers,
)  # fmt: skip

AT_LAST: tuple[Pass, ...] = (copy_results_of_branches,)
"""When all nested graphs are in their places."""
