"""Prepare a model in FX mode: trace, fuse, choose, and let the engine plan and insert observers.

    model --trace--> symbolic graph --fuse--> modules that are one --record_values--> values
          --QConfigMappingQuantizer--> annotations --the engine's `observed`--> observers

A model that cannot be traced goes the way of the engine from the start: torch.export captures it, the same quantizer
annotates ATen operators, and `convert_fx` converts it as `convert_pt2e` does.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..backend_config import BackendConfig
from ..errors import CaptureError, CaptureWarning, QuantizationError
from ..graph.attributes import state_bytes
from ..graph.module import ExportedModule
from ..meta import FX_KEY, PRESERVED_KEY
from ..pt2e.capture import Captured
from ..pt2e.prepare import observed, prepare_pt2e
from ..pt2e.qat.prepare import prepare_qat_pt2e
from ..qconfig_mapping import QConfigMapping
from .custom_config import PrepareCustomConfig, StandaloneModuleConfigEntry
from .fuse import fuse
from .quantizer import QConfigMappingQuantizer
from .selection import check_keys, select
from .trace import finish_in_modes, record_values, trace
from .units import Unit, check_names, put_units

__all__ = ["FXState", "Wanted", "fused", "kept_attribute", "prepare", "preserve"]

_CALLER = 5  # frames between a warning and the call of prepare_fx: its decorators are some


@dataclass
class FXState:
    """What convert needs to know of prepare.

    custom: which inputs and outputs are quantized, and custom modules
    is_traced: False where torch.export captured the model
    kept: attributes to preserve, with their values
    units: custom and standalone modules, by path
    """

    custom: PrepareCustomConfig
    is_traced: bool
    kept: dict[str, Any] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """How to prepare a model: the arguments of prepare_fx, read."""

    mapping: QConfigMapping
    example_inputs: tuple[Any, ...]
    custom: PrepareCustomConfig
    backend_config: BackendConfig
    is_qat: bool


def prepare(model: nn.Module, wanted: Wanted) -> ExportedModule:
    """The model with observers, or with fake quantizers."""
    check_names(model, wanted.custom)
    try:
        traced = trace(model, wanted.custom, to_train=wanted.is_qat)
    except QuantizationError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever code of the model raises on symbols
        return _exported(model, wanted, error)
    return _prepared(model, traced, wanted)


def _prepared(model: nn.Module, traced: ExportedModule, wanted: Wanted) -> ExportedModule:
    before = state_bytes(traced)
    fuse(traced, wanted.backend_config, is_qat=wanted.is_qat)
    check_keys(wanted.mapping, traced, model)
    record_values(traced, wanted.example_inputs)
    units = put_units(traced, wanted.custom, select(traced, wanted.mapping), functools.partial(_standalone, wanted))
    backend = wanted.backend_config
    quantizer = QConfigMappingQuantizer(wanted.mapping, backend, is_qat=wanted.is_qat, units=units)
    captured = Captured(traced, (wanted.example_inputs, {}), before, model.training)
    draft = observed(captured, quantizer, type(quantizer).__name__, (), _asks_nothing(wanted.mapping))
    made = finish_in_modes(draft, model.training)
    kept = {name: kept_attribute(model, name) for name in wanted.custom.preserved_attributes}
    made.meta[FX_KEY] = FXState(wanted.custom, True, kept, units)
    return preserve(made)


def _standalone(
    around: Wanted, module: nn.Module, entry: StandaloneModuleConfigEntry, example_inputs: tuple[Any, ...]
) -> ExportedModule:
    wanted = Wanted(
        entry.qconfig_mapping or around.mapping,
        example_inputs,
        entry.prepare_custom_config or PrepareCustomConfig(),
        entry.backend_config or around.backend_config,
        around.is_qat,
    )
    return prepare(module, wanted)


def fused(model: nn.Module, backend_config: BackendConfig, preserved: list[str]) -> GraphModule:
    """The model traced and fused, without observers."""
    made = trace(model, PrepareCustomConfig())
    fuse(made, backend_config, is_qat=False)
    finish_in_modes(made, model.training)
    made.meta[FX_KEY] = FXState(PrepareCustomConfig(), True, {name: kept_attribute(model, name) for name in preserved})
    return preserve(made)


def preserve(gm: ExportedModule) -> ExportedModule:
    """Give a graph the attributes that were to be preserved."""
    gm.meta[PRESERVED_KEY] = gm.meta[FX_KEY].kept
    for name, value in gm.meta[PRESERVED_KEY].items():
        if not hasattr(gm, name):
            setattr(gm, name, value)
    return gm


def kept_attribute(model: nn.Module, name: str) -> Any:
    """The value of an attribute that is to be preserved.

    Raises:
        CaptureError: there is none.
    """
    if not hasattr(model, name):
        raise CaptureError(f"{type(model).__name__} has no attribute {name!r} that could be preserved")
    return getattr(model, name)


def _asks_nothing(mapping: QConfigMapping) -> bool:
    """Every qconfig is None: then that nothing is quantized is what was asked for."""
    given = [mapping.global_qconfig, *mapping.object_type_qconfigs.values(), *mapping.module_name_qconfigs.values()]
    given += mapping.module_name_regex_qconfigs.values()
    return all(one is None for one in (*given, *mapping.module_name_object_type_order_qconfigs.values()))


def _expect_no_modules(model: nn.Module, custom: PrepareCustomConfig, error: Exception) -> None:
    """What torch.export captures has operators alone, so nothing can be said of its modules and quantized inputs."""
    lost = sorted(set(custom.to_dict()) - {"preserved_attributes"})
    if lost:
        raise CaptureError(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error})\n  torch.export may, but "
            f"{', '.join(lost)} of prepare_custom_config cannot hold for its operators. Name the modules that stop the "
            "trace: set_non_traceable_module_names([...]); or leave these settings out"
        )


def _exported(model: nn.Module, wanted: Wanted, error: Exception) -> ExportedModule:
    """By torch.export, which follows what symbols cannot."""
    _expect_no_modules(model, wanted.custom, error)
    try:
        exported = torch.export.export(model, wanted.example_inputs)
    except Exception as failure:
        raise CaptureError(
            f"the model can neither be traced nor exported. torch.fx says: {error}\n  torch.export says: {failure}\n"
            "  Name the modules that stop it: PrepareCustomConfig().set_non_traceable_module_names([...])"
        ) from failure
    warnings.warn(
        f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {str(error).splitlines()[0]}), so "
        "torch.export captured it: the result holds ATen operators instead of modules",
        CaptureWarning,
        stacklevel=_CALLER,
    )
    quantizer = QConfigMappingQuantizer(wanted.mapping, wanted.backend_config)
    prepared = (prepare_qat_pt2e if wanted.is_qat else prepare_pt2e)(exported, quantizer)
    kept = {name: kept_attribute(model, name) for name in wanted.custom.preserved_attributes}
    prepared.meta[FX_KEY] = FXState(wanted.custom, False, kept)
    return preserve(prepared)
