"""For authors of a backend: patterns, rules, the Quantizer contract, targeting and composition.

The names of the reference API (torch.ao.quantization.quantizer) are all here, under the same spelling.
"""

from ..graph.constants import Constants
from ..passes.clamp_to_hardtanh import clamp_to_hardtanh
from ..passes.fold_zero_padding import fold_zero_padding
from ..passes.lift_scalars import lift_scalars
from ..passes.matmul_to_linear import matmul_to_linear
from ..passes.mean_keeps_dims import mean_keeps_dims
from ..passes.split_to_slices import split_to_slices
from ..reasons import Refusal, because, refusals, refuse
from ..specs import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)
from .base import Quantizer
from .compose import ComposableQuantizer
from .config import QuantizationConfig
from .pattern import Match, Op, Pattern, op, trace
from .registry import find_quantizers, load_quantizer
from .rule import BIAS, INHERIT, INPUT, OUTPUT, WEIGHT, Rule, one_scale, rule, same_as
from .rule_quantizer import RuleQuantizer
from .training import for_training, trained_activation, trained_weight, with_learned_scales

__all__ = [
    "BIAS",
    "INHERIT",
    "INPUT",
    "OUTPUT",
    "WEIGHT",
    "ComposableQuantizer",
    "Constants",
    "DerivedQuantizationSpec",
    "EdgeOrNode",
    "FixedQParamsQuantizationSpec",
    "Match",
    "Op",
    "Pattern",
    "QuantizationAnnotation",
    "QuantizationConfig",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "Quantizer",
    "Refusal",
    "Rule",
    "RuleQuantizer",
    "SharedQuantizationSpec",
    "because",
    "clamp_to_hardtanh",
    "find_quantizers",
    "fold_zero_padding",
    "for_training",
    "lift_scalars",
    "load_quantizer",
    "matmul_to_linear",
    "mean_keeps_dims",
    "one_scale",
    "op",
    "refusals",
    "refuse",
    "rule",
    "same_as",
    "split_to_slices",
    "trace",
    "trained_activation",
    "trained_weight",
    "with_learned_scales",
]
