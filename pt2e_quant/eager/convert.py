"""convert: modules that `prepare` observed become quantized ones."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..checks import checked
from ..errors import ConversionError, ConversionWarning
from .custom import check_keys
from .hooks import remove_hooks
from .mappings import default_custom_config, default_reference_mapping, default_static_mapping
from .observe import remove_observers
from .rehearsal import rehearsal_of
from .report import Meeting, SwapReport, keep_report
from .swap import Forms, never_ran, swap_all

__all__ = ["convert"]

_SHOWN = 5


@checked(ConversionError)
def convert(
    module: nn.Module,
    mapping: Mapping[Any, Any] | None = None,
    inplace: bool = False,
    remove_qconfig: bool = True,
    is_reference: bool = False,
    convert_custom_config_dict: Mapping[str, Any] | None = None,
    use_precomputed_fake_quant: bool = False,
) -> nn.Module:
    """Replace modules that were prepared and calibrated, or trained, by quantized ones.

    Args:
        mapping: class -> quantized class with `from_float`; None for `default_static_mapping()`. A class stands for
            its subclasses that keep `forward`.
        inplace: change the model that was given. It cannot be replaced itself.
        remove_qconfig: take qconfigs and observers from what stays float.
        is_reference: modules of nn.quantized.reference, which compute in float with rounded weights.
        convert_custom_config_dict: 'observed_to_quantized_custom_module_class' is class -> class with `from_observed`.
        use_precomputed_fake_quant: do not show weights to their observers again.

    Returns:
        The quantized model; `swap_report` tells what stayed float and why.

    Raises:
        ConversionError: nothing could be quantized, no data was seen, or a qconfig does not fit its module. A module
            that alone saw no data stays float.

    Warns:
        ConversionWarning: where a float tensor meets a quantized one, as the first calibration run has shown.
    """
    custom = default_custom_config() if convert_custom_config_dict is None else convert_custom_config_dict
    check_keys(custom, "convert_custom_config_dict")
    if mapping is None:
        mapping = default_reference_mapping() if is_reference else default_static_mapping()
    if not inplace:
        module = copy.deepcopy(module)
    _check_calibrated(module)
    meetings = _meetings(module, mapping)
    observed = custom.get("observed_to_quantized_custom_module_class", {})
    made, report = swap_all(module, Forms(mapping, observed, use_precomputed_fake_quant), inplace=inplace)
    _check_any(made, report)
    remove_hooks(made)
    if remove_qconfig:
        remove_observers(made)
    keep_report(made, dataclasses.replace(report, meetings=meetings))
    if meetings:
        _warn(made, meetings)
    return made


def _meetings(prepared: nn.Module, mapping: Mapping[Any, Any]) -> tuple[Meeting, ...] | None:
    """What the first run has shown, where it holds for what is made now."""
    rehearsal = rehearsal_of(prepared)
    return rehearsal.meetings if rehearsal is not None and rehearsal.mapping == mapping else None


def _warn(model: nn.Module, meetings: tuple[Meeting, ...]) -> None:
    shown = [*map(str, meetings[:_SHOWN]), *([f"and {len(meetings) - _SHOWN} more"] if len(meetings) > _SHOWN else [])]
    text = "\n  ".join(shown)
    warnings.warn(
        f"convert: as the calibration run shows, {type(model).__name__} will stop where float and quantized tensors "
        f"meet:\n  {text}",
        ConversionWarning,
        stacklevel=4,  # the caller of convert, past its check of arguments
    )


def _check_calibrated(prepared: nn.Module) -> None:
    observed = [module for module in prepared.modules() if hasattr(module, "activation_post_process")]
    if observed and all(map(never_ran, observed)):
        raise ConversionError(
            f"convert: {type(prepared).__name__} has observers, none of which saw data; run at least one batch of "
            "calibration data through the prepared model. To fill it from a state dict, leave prepare and convert out: "
            "nn.load_quantized(float_model, state_dict)"
        )


def _check_any(model: nn.Module, report: SwapReport) -> None:
    if not report.swapped:
        why = "; ".join(f"{one.name or '(model)'}: {one.reason}" for one in report.stayed[:_SHOWN])
        raise ConversionError(f"convert: nothing of {type(model).__name__} would be quantized. {why}")
