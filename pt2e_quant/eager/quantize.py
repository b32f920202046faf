"""quantize: all steps in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..checks import checked
from ..errors import ConversionError
from .convert import convert
from .observe import prepare

__all__ = ["default_eval_fn", "quantize"]


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
