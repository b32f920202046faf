"""quantize_dynamic: linears, recurrent layers and embeddings with integer weights; no calibration."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..checks import checked
from ..errors import ConversionError, TargetingError, did_you_mean
from ..nn.intrinsic import LinearReLU
from ..qconfig import (
    QConfig,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    per_channel_dynamic_qconfig,
)
from .mappings import default_dynamic_mapping
from .propagate import propagate_qconfig_, unused_types
from .report import SwapReport, keep_report
from .swap import Forms, swap_all

__all__ = ["quantize_dynamic"]

_RECURRENT = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.RNNCell, nn.GRUCell)
_DTYPES: dict[torch.dtype, tuple[QConfig, tuple[type[nn.Module], ...]]] = {
    torch.qint8: (default_dynamic_qconfig, (nn.Linear, *_RECURRENT)),
    torch.float16: (float16_dynamic_qconfig, (nn.Linear, *_RECURRENT)),
    torch.quint8: (float_qparams_weight_only_qconfig, (nn.EmbeddingBag, nn.Embedding)),
    torch.quint4x2: (float_qparams_weight_only_qconfig_4bit, (nn.EmbeddingBag,)),
}
"""By the type of weights: the qconfig, and the classes that get it when none are named."""


@checked(ConversionError)
def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Mapping[Any, Any] | set[Any] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[Any, Any] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Give layers integer (or float16) weights. Inputs are quantized while the model runs, each with its own range.

    Args:
        model: float; it is copied unless `inplace`, and the result is in evaluation mode.
        qconfig_spec: a set of classes and paths of modules, which get what `dtype` says; or a dict from these to
            QConfigs, None to leave one in float. None takes the classes that are usual for `dtype`. A class stands for
            its subclasses, too, nn.Linear for a fused LinearReLU, and a module for all below it.
        dtype: of the weights: torch.qint8 and float16 for linears and recurrent layers, quint8 for embeddings, quint4x2
            for EmbeddingBag.
        mapping: float class -> quantized class; None for `default_dynamic_mapping()`.
        inplace: change the model that was given. It cannot be replaced itself.

    Returns:
        The quantized model; `swap_report` tells what stayed float and why.

    Weights of recurrent layers have a scale for each channel, those of linears one in all, as in the reference.

    Raises:
        TargetingError: a path of `qconfig_spec` is not in the model, or nothing in the model is of its classes.
        ConversionError: `dtype` has no defaults, or a module cannot be quantized as asked.
    """
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    wanted = _spec(model, qconfig_spec, dtype)
    fused = {LinearReLU: wanted[nn.Linear]} if nn.Linear in wanted else {}
    propagate_qconfig_(model, {**fused, **wanted})
    unused = [kind.__name__ for kind in unused_types(model, wanted)] if qconfig_spec is not None else []
    if unused and len(unused) == len(wanted):
        present = {type(module).__name__ for module in model.modules()}
        raise TargetingError(f"{type(model).__name__} has no module of {unused}.{did_you_mean(unused[0], present)}")
    forms = Forms(default_dynamic_mapping() if mapping is None else mapping, {})
    made, report = swap_all(model, forms, inplace=inplace)
    for module in made.modules():
        module.__dict__.pop("qconfig", None)
    keep_report(made, SwapReport(report.swapped, report.stayed, tuple(unused)))
    return made


def _spec(model: nn.Module, given: Mapping[Any, Any] | set[Any] | None, dtype: torch.dtype) -> Mapping[Any, Any]:
    if isinstance(given, Mapping):
        return given
    if dtype not in _DTYPES:
        raise ConversionError(
            f"quantize_dynamic has no defaults for weights of {dtype}; pass one of {', '.join(map(str, _DTYPES))}, or "
            "a dict of QConfigs"
        )
    qconfig, usual = _DTYPES[dtype]
    keys: Iterable[Any] = usual if given is None else given
    return {key: per_channel_dynamic_qconfig if _gets_channels(model, key, dtype) else qconfig for key in keys}


def _gets_channels(model: nn.Module, key: Any, dtype: torch.dtype) -> bool:
    kind = key if isinstance(key, type) else type(dict(model.named_modules(remove_duplicate=False)).get(key))
    return dtype is torch.qint8 and issubclass(kind, _RECURRENT)
