"""The reference's import path of FX mode: prepare_fx, prepare_qat_fx, convert_fx, fuse_fx, convert_to_reference_fx."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.fx import GraphModule

from .backend_config import BackendConfig
from .backend_config.native import native
from .checks import checked
from .errors import CaptureError, ConversionError
from .fx.convert import How, convert
from .fx.custom_config import ConvertCustomConfig, FuseCustomConfig, PrepareCustomConfig
from .fx.prepare import Wanted, fused, prepare
from .graph.module import ExportedModule, collector_paused
from .qconfig_mapping import QConfigMapping

__all__ = ["convert_fx", "convert_to_reference_fx", "fuse_fx", "prepare_fx", "prepare_qat_fx"]

_Config = TypeVar("_Config", QConfigMapping, PrepareCustomConfig, ConvertCustomConfig, FuseCustomConfig)


@collector_paused()
@checked(CaptureError)
def prepare_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | dict[str, Any],
    example_inputs: tuple[Any, ...],
    prepare_custom_config: PrepareCustomConfig | dict[str, Any] | None = None,
    _equalization_config: None = None,
    backend_config: BackendConfig | dict[str, Any] | None = None,
) -> ExportedModule:
    """Insert observers into a float model; run calibration data through the result, then `convert_fx` it.

    Args:
        model: in evaluation mode. It stays as it was.
        qconfig_mapping: which part of it gets which qconfig, or that as a dictionary.
        example_inputs: positional arguments that it can be called with.
        prepare_custom_config: custom, standalone and non-traceable modules, quantized inputs and outputs.
        _equalization_config: not there: None.
        backend_config: what is quantized; None for `get_native_backend_config()`.

    Returns:
        A module that is called like the model. `explain(prepared)` says what became of each operator, and why. Where
        torch.fx cannot trace the model, torch.export captures it, and a CaptureWarning says so.

    Raises:
        CaptureError: it can be neither traced nor exported, or does not run on its example inputs.
        TargetingError: a key of the mapping names nothing in it.
        CoverageError: nothing would be quantized.
    """
    return prepare(model, _wanted(qconfig_mapping, example_inputs, prepare_custom_config, backend_config, False))


@collector_paused()
@checked(CaptureError)
def prepare_qat_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | dict[str, Any],
    example_inputs: tuple[Any, ...],
    prepare_custom_config: PrepareCustomConfig | dict[str, Any] | None = None,
    backend_config: BackendConfig | dict[str, Any] | None = None,
) -> ExportedModule:
    """`prepare_fx` for training: modules become those of nn.qat, and activations are rounded.

    Args, Returns, Raises: as there; the model is in training mode.
    """
    return prepare(model, _wanted(qconfig_mapping, example_inputs, prepare_custom_config, backend_config, True))


@collector_paused()
@checked(ConversionError)
def convert_fx(
    graph_module: GraphModule,
    convert_custom_config: ConvertCustomConfig | dict[str, Any] | None = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: QConfigMapping | dict[str, Any] | None = None,
    backend_config: BackendConfig | dict[str, Any] | None = None,
    keep_original_weights: bool = False,
    *,
    allow_uncalibrated: bool = False,
) -> ExportedModule:
    """Replace observers by integers and modules by quantized ones. The prepared model stays as it was.

    Args:
        graph_module: what `prepare_fx` returned, after calibration data ran through it, or `prepare_qat_fx`.
        convert_custom_config: custom modules.
        _remove_qconfig: accepted, and without effect: no module of the result has a qconfig.
        qconfig_mapping: accepted, and without effect: what was prepared is converted.
        backend_config: the one that `prepare_fx` was given: it says what modules become.
        keep_original_weights: accepted, and without effect; the prepared model has them.
        allow_uncalibrated: leave tensors whose observer never saw data in floating point instead of raising.

    Raises:
        ConversionError: the model is not a prepared one.
        CalibrationError: observers of static tensors never saw data; each is named.
    """
    return convert(graph_module, _how(convert_custom_config, backend_config, allow_uncalibrated, "convert_fx"))


@collector_paused()
@checked(ConversionError)
def convert_to_reference_fx(
    graph_module: GraphModule,
    convert_custom_config: ConvertCustomConfig | dict[str, Any] | None = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: QConfigMapping | dict[str, Any] | None = None,
    backend_config: BackendConfig | dict[str, Any] | None = None,
    *,
    allow_uncalibrated: bool = False,
) -> ExportedModule:
    """`convert_fx` to q/dq pairs and modules of nn.quantized.reference, for a backend to take on.

    Args, Raises: as there.
    """
    by = "convert_to_reference_fx"
    return convert(graph_module, _how(convert_custom_config, backend_config, allow_uncalibrated, by))


@checked(CaptureError)
def fuse_fx(
    model: nn.Module,
    fuse_custom_config: FuseCustomConfig | dict[str, Any] | None = None,
    backend_config: BackendConfig | dict[str, Any] | None = None,
) -> GraphModule:
    """Fuse what one module stands for: a convolution, its batch norm, its relu.

    Args:
        model: in evaluation mode. It stays as it was.
        fuse_custom_config: attributes to preserve.
        backend_config: what fuses; None for `get_native_backend_config()`.

    Raises:
        ConversionError: a batch norm is to be folded in training mode.
    """
    custom = _read(FuseCustomConfig, fuse_custom_config)
    return fused(model, _backend(backend_config), custom.preserved_attributes)


def _wanted(mapping: Any, example_inputs: tuple[Any, ...], custom: Any, backend: Any, is_qat: bool) -> Wanted:
    read = _read(PrepareCustomConfig, custom)
    return Wanted(_read(QConfigMapping, mapping), example_inputs, read, _backend(backend), is_qat)


def _how(custom: Any, backend: Any, allow_uncalibrated: bool, by: str) -> How:
    read = _read(ConvertCustomConfig, custom)
    return How(read, _backend(backend), by == "convert_to_reference_fx", allow_uncalibrated, by)


def _read(kind: type[_Config], given: _Config | dict[str, Any] | None) -> _Config:
    if given is None:
        return kind()
    return kind.from_dict(given) if isinstance(given, dict) else given


def _backend(given: BackendConfig | dict[str, Any] | None) -> BackendConfig:
    if given is None:
        return native()
    return BackendConfig.from_dict(given) if isinstance(given, dict) else given
