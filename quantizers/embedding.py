"""EmbeddingQuantizer: embedding tables in 8 or 4 bits, one scale for each row or for each group in a row.

Combine it with the quantizer of a backend: ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer(...)]).
ExecuTorch has a kernel for each form, and Inductor gets a loop; both read only the rows that are asked for.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType

import torch

from pt2e_quant.checks import checked
from pt2e_quant.errors import SpecError
from pt2e_quant.observer import PerChannelMinMaxObserver, PerGroupMinMaxObserver
from pt2e_quant.quantizer import WEIGHT, Match, QuantizationConfig, RuleQuantizer, because, for_training, op, rule
from pt2e_quant.specs import FOUR_BITS, QuantizationSpec, uneven_groups

from .common import SYMMETRIC_RANGES, computed_table, config_of

__all__ = ["RULES", "EmbeddingQuantizer", "get_embedding_config"]

aten = torch.ops.aten

embedding_of = op(aten.embedding.default)


@checked(SpecError)
def get_embedding_config(bits: int = 8, group_size: int | None = None, is_qat: bool = False) -> QuantizationConfig:
    """Symmetric integers of 8 or 4 bits.

    Eight bits per row are the integers that XNNPACK's linears have: a table that a linear shares (tied embedding and
    output layer) is then quantized and stored once in the converted graph.

    Args:
        bits: 8 (-127..127) or 4 (-8..7).
        group_size: values of a row that share a scale; None is one scale for each row.
        is_qat: fake quantizers instead of observers, for prepare_qat_pt2e.

    Raises:
        SpecError: another number of bits.
    """
    if bits not in SYMMETRIC_RANGES:
        raise SpecError(f"embeddings have 8 or 4 bits, got {bits}")
    low, high = SYMMETRIC_RANGES[bits]
    observer = PerChannelMinMaxObserver.with_args(eps=2**-20)
    if group_size is not None:
        observer = PerGroupMinMaxObserver.with_args(group_size=group_size, eps=2**-20)
    weight = QuantizationSpec(
        dtype=torch.int8, quant_min=low, quant_max=high, qscheme=torch.per_channel_symmetric, ch_axis=0,
        observer_or_fake_quant_ctr=observer,
    )  # fmt: skip
    config = QuantizationConfig(None, None, weight)
    return for_training(config) if is_qat else config


def no_weight(match: Match) -> str | None:
    why = "the configuration keeps weights in float"
    return because("configuration", why) if config_of(match).weight is None else None


def uneven_rows(match: Match) -> str | None:
    config, value = config_of(match), match.value("w")
    if value is None:
        return None
    width, weight = value.shape[-1], config.weight_spec
    if weight is not None and weight.bounds == FOUR_BITS and width % 2:
        return because("shape", f"rows of {width} values of 4 bits do not fill bytes")
    return uneven_groups(width, min(config.group_size, width))


@rule(w=WEIGHT, unless=[no_weight, computed_table, uneven_rows])
def embedding(w, indices):
    """Only the table: what the kernel returns is floating point."""
    return embedding_of(w, indices)


RULES = (embedding,)


class EmbeddingQuantizer(RuleQuantizer):
    """Quantizes embedding tables and nothing else; 8 bits per row unless a configuration says otherwise.

    quantizer = EmbeddingQuantizer(get_embedding_config(bits=4, group_size=32))
    """

    rules = RULES
    modes = MappingProxyType(
        {"weight_only": get_embedding_config, "weight_only_4bit": partial(get_embedding_config, bits=4)}
    )

    def __init__(self, config: QuantizationConfig | None = None) -> None:
        super().__init__(get_embedding_config() if config is None else config)
