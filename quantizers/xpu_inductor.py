"""XPUInductorQuantizer: what Inductor runs with oneDNN's integer kernels on Intel GPUs, and nothing else.

Nothing here was run on an Intel GPU: these are the facts of torch 2.13's Inductor and of its kernels, read in their
sources; the tests look at graphs. Activations are int8 (or uint8) per tensor, weights int8 per output channel with zero
point 0, biases stay float. As on x86, a convolution or linear takes an add and an activation function with it, an
output is quantized only where something that runs in integers reads it, and ops that only move values move the
integers. Max pooling in integers is for processors only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

import torch

from pt2e_quant.checks import checked
from pt2e_quant.errors import SpecError
from pt2e_quant.observer import HistogramObserver
from pt2e_quant.quantizer import Match, QuantizationConfig, Rule, because, for_training
from pt2e_quant.specs import QuantizationSpec

from .inductor_quantizer import InductorQuantizer
from .inductor_rules import (
    CONVOLUTIONS,
    LINEARS,
    NO_TABLES,
    REASONS,
    after_conv,
    average_pool,
    cat,
    copy,
    embedding,
    embedding_bag,
    float_activations,
    lacking,
    matmul,
    max_pool2d,
    move,
    not_8_bits,
    not_static,
    pad,
    per_channel_int8,
    plus,
    refusing,
    weight_format,
)

__all__ = [
    "RULES",
    "XPUInductorQuantizer",
    "get_default_xpu_inductor_quantization_config",
    "get_xpu_inductor_symm_quantization_config",
]


@checked(SpecError)
def get_default_xpu_inductor_quantization_config(is_qat: bool = False) -> QuantizationConfig:
    """int8 activations (asymmetric) and int8 weights (symmetric, one scale per output channel).

    Args:
        is_qat: fake quantizers instead of observers, for prepare_qat_pt2e.
    """
    return _static(torch.per_tensor_affine, is_qat)


@checked(SpecError)
def get_xpu_inductor_symm_quantization_config(is_qat: bool = False) -> QuantizationConfig:
    """The same with symmetric activations: without zero points to correct for, the kernels do less.

    What is never negative, such as the output of relu, then has 7 bits instead of 8.

    Args:
        is_qat: fake quantizers instead of observers, for prepare_qat_pt2e.
    """
    return _static(torch.per_tensor_symmetric, is_qat)


def _static(qscheme: torch.qscheme, is_qat: bool) -> QuantizationConfig:
    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=qscheme,
        observer_or_fake_quant_ctr=HistogramObserver,
    )
    config = QuantizationConfig(activation, activation, per_channel_int8())
    return for_training(config) if is_qat else config


_AFTER = frozenset((*after_conv.targets, *plus.targets))
_POOLING = max_pool2d.pattern.root.op.targets


def fused_in_1d(match: Match) -> str | None:
    """Inductor fuses what follows a convolution in any number of dimensions; the kernel raises when it runs."""
    w, users = match.value("w"), list(match.root.users)
    if w is None or w.dim() != 3:
        return None
    fused = len(match.calls) > 1 or (len(users) == 1 and users[0].target in _AFTER)
    why = "Inductor fuses what follows into it, which Intel GPUs do for conv2d only"
    return because("unsupported_op", why) if fused else None


def pooled(match: Match) -> str | None:
    """Inductor takes pooling between a dequantize and a quantize for its integer one, whatever the device."""
    read = any(user.target in _POOLING for user in match.root.users)
    why = "max pooling reads its output, which Intel GPUs have in float only"
    return because("output_not_read", why) if read else None


def in_float_for_pools(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Each rule twice: where max pooling reads the output, that stays float."""
    return tuple(both for rule in rules for both in (*refusing((rule,), pooled), replace(rule, output=None)))


RULES = (
    *in_float_for_pools(refusing(CONVOLUTIONS, not_static, weight_format, not_8_bits, fused_in_1d)),
    *in_float_for_pools(refusing(LINEARS, float_activations, weight_format, not_8_bits)),
    matmul,
    *refusing((cat, average_pool, move, copy, pad), pooled),
)

_POOL = "Inductor has integer max pooling for processors only, not for Intel GPUs"


class XPUInductorQuantizer(InductorQuantizer):
    """Annotates what Inductor runs in integers on Intel GPUs; the report says why it leaves the rest.

    quantizer = XPUInductorQuantizer().set_global(get_default_xpu_inductor_quantization_config())

    matmul is quantized only where a selector narrower than the global one asks for it.
    """

    rules = RULES
    reasons = MappingProxyType(lacking(_POOL, max_pool2d) | lacking(NO_TABLES, embedding, embedding_bag) | REASONS)
    precisions: ClassVar[Mapping[str, Callable[[], QuantizationConfig]]] = {
        "int8": get_default_xpu_inductor_quantization_config
    }
    modes = MappingProxyType(
        {
            "static": get_default_xpu_inductor_quantization_config,
            "static_symmetric": get_xpu_inductor_symm_quantization_config,
        }
    )
