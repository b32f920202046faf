"""ArmInductorQuantizer: what Inductor runs with oneDNN's integer kernels on 64-bit Arm processors, and nothing else.

Nothing here was run on Arm: these are the facts of torch 2.13's Inductor and of its kernels, read in their sources; the
tests look at graphs. torch's builds for Arm under Linux hold the Arm Compute Library, and with it Inductor packs
integer weights but fuses nothing: a convolution or linear reads integers and ends in float, and everything between them
is float. So inputs and weights are quantized, outputs never.

Two differences to the reference's recipe, whose graphs Inductor would run in float or not at all: weights have a scale
for each output channel, as Inductor packs no others, and static activations are unsigned, as its convolution takes no
others. Which kernel oneDNN picks for these, and how fast it is, nobody measured here; the Arm Compute Library's own
matrix product takes signed activations and one weight scale in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch

from pt2e_quant.checks import checked
from pt2e_quant.errors import SpecError
from pt2e_quant.observer import HistogramObserver, PlaceholderObserver
from pt2e_quant.quantizer import QuantizationConfig, for_training
from pt2e_quant.specs import QuantizationSpec

from .inductor_quantizer import InductorQuantizer
from .inductor_rules import (
    NO_TABLES,
    REASONS,
    average_pool,
    cat,
    conv_only,
    copy,
    embedding,
    embedding_bag,
    float_activations,
    lacking,
    linear_only,
    matmul,
    max_pool2d,
    move,
    not_8_bits,
    not_unsigned,
    pad,
    per_channel_int8,
    refusing,
    run_time_qparams,
    weight_format,
)

__all__ = ["RULES", "ArmInductorQuantizer", "get_default_arm_inductor_quantization_config"]


@checked(SpecError)
def get_default_arm_inductor_quantization_config(is_qat: bool = False, is_dynamic: bool = False) -> QuantizationConfig:
    """Asymmetric activations, uint8 when static and int8 when dynamic; int8 weights, one scale per output channel.

    Args:
        is_qat: fake quantizers instead of observers, for prepare_qat_pt2e.
        is_dynamic: activation qparams at run time; needs no calibration data, works for linear.
    """
    activation = QuantizationSpec(
        dtype=torch.int8 if is_dynamic else torch.uint8,
        quant_min=-128 if is_dynamic else 0,
        quant_max=127 if is_dynamic else 255,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
        observer_or_fake_quant_ctr=PlaceholderObserver if is_dynamic else HistogramObserver,
    )
    config = QuantizationConfig(activation, None if is_dynamic else activation, per_channel_int8())
    return for_training(config) if is_qat else config


RULES = (
    *refusing((replace(conv_only, output=None),), run_time_qparams, float_activations, weight_format, not_unsigned),
    *refusing((replace(linear_only, output=None),), float_activations, weight_format, not_8_bits),
    matmul,
)

_NOT_FUSED = "on Arm, Inductor computes it in float: it fuses nothing with integers there"


class ArmInductorQuantizer(InductorQuantizer):
    """Annotates what Inductor runs in integers on Arm; the report says why it leaves the rest.

    quantizer = ArmInductorQuantizer().set_global(get_default_arm_inductor_quantization_config())

    matmul is quantized only where a selector narrower than the global one asks for it.
    """

    rules = RULES
    reasons = MappingProxyType(
        lacking(_NOT_FUSED, cat, max_pool2d, average_pool, move, copy, pad)
        | lacking(NO_TABLES, embedding, embedding_bag)
        | REASONS
    )
    precisions: ClassVar[Mapping[str, Callable[[], QuantizationConfig]]] = {
        "int8": get_default_arm_inductor_quantization_config
    }
    modes = MappingProxyType(
        {
            "static": get_default_arm_inductor_quantization_config,
            "dynamic": partial(get_default_arm_inductor_quantization_config, is_dynamic=True),
        }
    )
