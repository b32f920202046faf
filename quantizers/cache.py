"""CacheQuantizer: what a model writes to its buffers, such as keys and values of a decoder, in 8 bits.

Combine it with the quantizer of a backend, calibrate, and let the buffers store the integers:
convert_pt2e(prepared, integer_buffers=["*cache*"]).
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from pt2e_quant.observer import MinMaxObserver
from pt2e_quant.quantizer import INPUT, Match, QuantizationConfig, RuleQuantizer, because, op, rule
from pt2e_quant.specs import QuantizationSpec

from .common import config_of

__all__ = ["RULES", "CacheQuantizer", "get_cache_config"]

aten = torch.ops.aten

index_copy = op(aten.index_copy_.default)
index_put = op(aten.index_put_.default)
copy = op(aten.copy_.default)


def get_cache_config() -> QuantizationConfig:
    """int8, symmetric, with one scale for each buffer, from the extremes that calibration wrote to it.

    An empty cache is then zeros, which a program need not store.
    """
    written = QuantizationSpec(
        dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-20),
    )  # fmt: skip
    return QuantizationConfig(written, None, None)


def no_buffer(match: Match) -> str | None:
    why = f"it writes to {match.memory}, which is not a buffer of the model"
    return None if match.memory.op == "get_attr" else because("computed_operand", why)


def static_only(match: Match) -> str | None:
    if config_of(match).input_activation is None:
        return because("configuration", "the configuration keeps what is written in float")
    why = "a buffer keeps its integers, so their qparams cannot change"
    return because("configuration", why) if config_of(match).is_dynamic else None


def accumulates(match: Match) -> str | None:
    adds = match.argument(index_put, "accumulate")
    return because("accumulate", "it adds to what the buffer holds") if adds else None


@rule(x=INPUT, unless=[static_only, no_buffer])
def write_rows(x):
    """cache.index_copy_(dim, positions, x), as StaticCache of transformers does."""
    return index_copy(source=x)


@rule(x=INPUT, unless=[static_only, no_buffer, accumulates])
def write_at(x):
    """cache[:, positions] = x"""
    return index_put(values=x)


@rule(x=INPUT, unless=[static_only, no_buffer])
def write_all(x):
    """cache[:, 3:4] = x, and cache.copy_(x)"""
    return copy(src=x)


RULES = (write_rows, write_at, write_all)


class CacheQuantizer(RuleQuantizer):
    """Quantizes what is written to buffers and nothing else."""

    rules = RULES
    modes = MappingProxyType({"static": get_cache_config})

    def __init__(self, config: QuantizationConfig | None = None) -> None:
        super().__init__(get_cache_config() if config is None else config)
