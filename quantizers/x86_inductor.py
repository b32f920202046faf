"""X86InductorQuantizer: what Inductor runs with oneDNN's integer kernels on x86, and nothing else.

Activations are uint8 per tensor, weights int8 per output channel with zero point 0, biases stay float. A convolution or
linear may end in float, so an output is quantized only where something that runs in integers reads it. Ops that only
move values move the integers. Dynamic means: the qparams of a linear's input are computed at run time, one pair for the
whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch

from pt2e_quant.checks import checked
from pt2e_quant.errors import SpecError
from pt2e_quant.lowering.inductor import limits
from pt2e_quant.observer import HistogramObserver, PerGroupMinMaxObserver, PlaceholderObserver
from pt2e_quant.quantizer import Match, QuantizationConfig, because, for_training
from pt2e_quant.specs import FOUR_BITS, QuantizationSpec, uneven_groups

from .common import config_of
from .inductor_quantizer import InductorQuantizer
from .inductor_rules import (
    CONVOLUTIONS,
    LINEARS,
    average_pool,
    cat,
    copy,
    embedding,
    embedding_bag,
    matmul,
    max_pool2d,
    move,
    not_static,
    not_unsigned,
    pad,
    per_channel_int8,
    refusing,
    weight_format,
)

__all__ = [
    "RULES",
    "X86InductorQuantizer",
    "get_default_x86_inductor_quantization_config",
    "get_x86_inductor_int4_weight_only_quantization_config",
    "get_x86_inductor_linear_dynamic_fp16_config",
    "get_x86_inductor_weight_only_quantization_config",
]


@checked(SpecError)
def get_default_x86_inductor_quantization_config(
    is_qat: bool = False, is_dynamic: bool = False, reduce_range: bool = False
) -> QuantizationConfig:
    """uint8 activations (asymmetric) and int8 weights (symmetric, one scale per output channel).

    Args:
        is_qat: fake quantizers instead of observers, for prepare_qat_pt2e.
        is_dynamic: activation qparams at run time; needs no calibration data, works for linear.
        reduce_range: activations in [0, 127]. For processors without VNNI: there, two products of 8 bits are added
            in 16 bits, which overflow from 128 on. The lowering tells when a machine needs it.
    """
    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=limits.WITHOUT_VNNI if reduce_range else 255,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
        observer_or_fake_quant_ctr=PlaceholderObserver if is_dynamic else HistogramObserver,
    )
    config = QuantizationConfig(activation, None if is_dynamic else activation, per_channel_int8())
    return for_training(config) if is_qat else config


def get_x86_inductor_linear_dynamic_fp16_config() -> QuantizationConfig:
    """Linear with its weight in float16 and activations in float32; needs no calibration data."""
    weight = QuantizationSpec(dtype=torch.float16, observer_or_fake_quant_ctr=PlaceholderObserver)
    return QuantizationConfig(None, None, weight)


def get_x86_inductor_weight_only_quantization_config() -> QuantizationConfig:
    """Linear, embedding and embedding_bag with int8 weights, one scale per row, and float activations.

    It needs no calibration data, and saves memory in all models. It saves time in bfloat16 ones, for which torch has a
    kernel; in float32, weights become real numbers again in every run.
    """
    return QuantizationConfig(None, None, per_channel_int8())


@checked(SpecError)
def get_x86_inductor_int4_weight_only_quantization_config(group_size: int = 128) -> QuantizationConfig:
    """Linear and embedding with weights of 4 bits (-8..7) in groups, and float activations; needs no calibration data.

    Args:
        group_size: neighbours in a row that share a scale: 32, 64, 128 or 256. The scales are rounded to bfloat16,
            which torch's kernel reads, so the converted graph and the program compute with the same ones.

    Raises:
        SpecError: torch has no kernel for groups of that size.
    """
    if group_size not in limits.GROUPS:
        *sizes, largest = map(str, limits.GROUPS)
        known = f"{', '.join(sizes)} or {largest}"
        raise SpecError(f"torch has kernels for groups of {known} weights of 4 bits, got {group_size=}")
    low, high = FOUR_BITS
    weight = QuantizationSpec(
        dtype=torch.int8, quant_min=low, quant_max=high, qscheme=torch.per_channel_symmetric, ch_axis=0,
        observer_or_fake_quant_ctr=PerGroupMinMaxObserver.with_args(
            group_size=group_size, scale_dtype=torch.bfloat16
        ),
    )  # fmt: skip
    return QuantizationConfig(None, None, weight)


# Reasons for refusal --------------------------------------------------------------------------------------------------


def not_linear_scheme(match: Match) -> str | None:
    """Beside integers: float16 weights, with float activations, and weights in groups that fill their rows."""
    config, w = config_of(match), match.value("w")
    if isinstance(config.weight, QuantizationSpec) and config.weight.dtype is torch.float16:
        mixed = config.input_activation is not None
        why = "float16 weights need float activations; set input_activation=None"
        return because("configuration", why) if mixed else None
    width = 0 if w is None else w.shape[1]
    uneven = uneven_groups(width, min(config.group_size, width), f"its {width} inputs")
    return uneven or weight_format(match) or not_unsigned(match)


RULES = (
    *refusing(CONVOLUTIONS, not_static, weight_format, not_unsigned), *refusing(LINEARS, not_linear_scheme), matmul,
    embedding, embedding_bag, cat, max_pool2d, average_pool, move, copy, pad,
)  # fmt: skip


class X86InductorQuantizer(InductorQuantizer):
    """Annotates what Inductor runs in integers on x86; the report says why it leaves the rest.

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())

    matmul is quantized only where a selector narrower than the global one asks for it.
    """

    rules = RULES
    precisions: ClassVar[Mapping[str, Callable[[], QuantizationConfig]]] = {
        "int8": get_default_x86_inductor_quantization_config,
        "int4": get_x86_inductor_int4_weight_only_quantization_config,
    }
    modes = MappingProxyType(
        {
            "static": get_default_x86_inductor_quantization_config,
            "dynamic": partial(get_default_x86_inductor_quantization_config, is_dynamic=True),
            "weight_only": get_x86_inductor_weight_only_quantization_config,
            "weight_only_4bit": get_x86_inductor_int4_weight_only_quantization_config,
            "float16": get_x86_inductor_linear_dynamic_fp16_config,
        }
    )
    lowers_to = "inductor"
