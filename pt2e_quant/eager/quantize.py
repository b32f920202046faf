"""quantize, quantize_qat: all steps in one call; prepare_qat, which makes a model round in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..checks import checked
from ..errors import ConversionError
from .convert import convert
from .mappings import default_qat_mapping
from .observe import prepare
from .propagate import propagate_qconfig_
from .swap import Forms, swap_all

__all__ = ["default_eval_fn", "prepare_qat", "quantize", "quantize_qat"]


@checked(ConversionError)
def quantize(
    model: nn.Module,
    run_fn: Callable[..., Any],
    run_args: Iterable[Any],
    mapping: Mapping[Any, Any] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """`prepare`, a calibration run and `convert`.

    Args:
        model: float, with qconfigs; it is evaluated.
        run_fn: calibrates: it gets the prepared model and `run_args`.
        mapping, inplace: see `convert`.

    Raises:
        QuantizationError: as `prepare` and `convert`.
    """
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    prepare(model, inplace=True)
    run_fn(model, *run_args)
    return convert(model, mapping, inplace=True)


@checked(ConversionError)
def prepare_qat(model: nn.Module, mapping: Mapping[Any, Any] | None = None, inplace: bool = False) -> nn.Module:
    """Make a float model round its weights and activations while it is trained.

    Args:
        model: in training mode, with qconfigs of fake quantizers; fused with `fuse_modules_qat`.
        mapping: float class -> class with `weight_fake_quant`; None for `default_qat_mapping()`.
        inplace: change the model that was given. It cannot be replaced itself.

    Raises:
        ConversionError: the model is in evaluation mode.
        CoverageError: no module has a qconfig.
    """
    if not model.training:
        raise ConversionError("prepare_qat trains a model on: call model.train() first")
    forms = Forms(default_qat_mapping() if mapping is None else mapping, {})
    if not inplace:
        model = copy.deepcopy(model)
    propagate_qconfig_(model)
    made, _ = swap_all(model, forms, inplace=inplace)
    return prepare(made, inplace=True, observer_non_leaf_module_list=list(forms.mapping.values()))


@checked(ConversionError)
def quantize_qat(
    model: nn.Module, run_fn: Callable[..., Any], run_args: Iterable[Any], inplace: bool = False
) -> nn.Module:
    """`prepare_qat`, training and `convert`.

    Args:
        model: float, with qconfigs of fake quantizers; it is put into training mode.
        run_fn: trains: it gets the prepared model and `run_args`.
        inplace: change the model that was given.
    """
    if not inplace:
        model = copy.deepcopy(model)
    model.train()
    prepare_qat(model, inplace=True)
    run_fn(model, *run_args)
    return convert(model, inplace=True)


@checked(ConversionError)
def default_eval_fn(model: nn.Module, calib_data: Iterable[Any]) -> None:
    """Run a model on the inputs of pairs (input, target), without gradients.

    Raises:
        ConversionError: an item is no pair.
    """
    with torch.no_grad():
        for pair in calib_data:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ConversionError(f"default_eval_fn: calib_data gives pairs (input, target), got {type(pair)}")
            model(pair[0])
