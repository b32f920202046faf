"""InductorQuantizer: the selectors of the reference's Inductor quantizers, for a backend to fill with rules.

A backend is a subclass with the rules of inductor_rules that its processor has kernels for.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from pt2e_quant.errors import TargetingError
from pt2e_quant.quantizer import (
    QuantizationConfig,
    RuleQuantizer,
    clamp_to_hardtanh,
    fold_zero_padding,
    matmul_to_linear,
    split_to_slices,
)

from .inductor_rules import REASONS

__all__ = ["InductorQuantizer"]

aten = torch.ops.aten

Self = TypeVar("Self", bound="InductorQuantizer")


class InductorQuantizer(RuleQuantizer):
    """What the quantizers of all processors of Inductor share; each sets its `rules`.

    Precedence of the selectors: module name > module type > function > global; None leaves in float.
    """

    reasons = REASONS
    transforms = (matmul_to_linear, clamp_to_hardtanh, fold_zero_padding, split_to_slices)
    trims_outputs = True

    def get_global_quantization_config(self) -> QuantizationConfig | None:
        """What `set_global` was given last; None before."""
        return self.global_config

    def set_function_type_qconfig(
        self: Self, function_type: Callable[..., Any], quantization_config: QuantizationConfig | None
    ) -> Self:
        """Configuration of a function (torch.matmul, torch.nn.functional.linear) wherever it is called.

        Raises:
            TargetingError: no ATen operator belongs to the function.
        """
        return self.set_operator_type(_operator(function_type), quantization_config)

    def set_module_type_qconfig(
        self: Self, module_type: type[nn.Module] | str, quantization_config: QuantizationConfig | None
    ) -> Self:
        """Configuration of all ops inside modules of a class: `set_module_type` under the name of the reference."""
        return self.set_module_type(module_type, quantization_config)

    def set_module_name_qconfig(self: Self, module_name: str, quantization_config: QuantizationConfig | None) -> Self:
        """Configuration of all ops inside a module: `set_module_name` under the name of the reference."""
        return self.set_module_name(module_name, quantization_config)


_DISPATCHED = MappingProxyType(
    {functional.max_pool1d: "max_pool1d", functional.max_pool2d: "max_pool2d", functional.max_pool3d: "max_pool3d"}
)


def _operator(function: Any) -> Any:
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return function
    name = _DISPATCHED.get(function) or getattr(function, "__name__", "")
    if not name or not hasattr(aten, name):
        raise TargetingError(
            f"no operator belongs to {function!r}; pass a function of torch or torch.nn.functional, or an operator "
            "such as torch.ops.aten.linear.default"
        )
    return getattr(aten, name)
