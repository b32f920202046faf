"""What FX mode is told about single modules of a model: the classes of torch.ao.quantization.fx.custom_config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..backend_config import BackendConfig
from ..checks import checked
from ..eager.helpers import QuantType
from ..errors import SpecError
from ..qconfig_mapping import QConfigMapping

__all__ = ["ConvertCustomConfig", "FuseCustomConfig", "PrepareCustomConfig", "StandaloneModuleConfigEntry"]

Classes = dict[QuantType, dict[type, type]]
_Config = TypeVar("_Config", bound="_Preserving")


@dataclass
class StandaloneModuleConfigEntry:
    """How one standalone module is prepared. None is what the model around it has.

    Args:
        qconfig_mapping: of its parts.
        example_inputs: positional arguments of it; () to take what the model around it hands over.
        prepare_custom_config: of its parts; its input and output indexes say where it takes and returns integers.
        backend_config: of its parts.
    """

    qconfig_mapping: QConfigMapping | None
    example_inputs: tuple[Any, ...]
    prepare_custom_config: PrepareCustomConfig | None
    backend_config: BackendConfig | None


class _Preserving:
    preserved_attributes: list[str]

    @checked(SpecError)
    def set_preserved_attributes(self: _Config, attributes: list[str]) -> _Config:
        """Attributes that the result is to have, although the forward of the model does not read them."""
        self.preserved_attributes = list(attributes)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({ {name: value for name, value in vars(self).items() if value} })"


class FuseCustomConfig(_Preserving):
    """For `fuse_fx`."""

    def __init__(self) -> None:
        self.preserved_attributes = []

    @classmethod
    @checked(SpecError)
    def from_dict(cls, fuse_custom_config_dict: dict[str, Any]) -> FuseCustomConfig:
        """What `to_dict` gave."""
        return cls().set_preserved_attributes(fuse_custom_config_dict.get("preserved_attributes", []))

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary, without what is empty."""
        return _filled({"preserved_attributes": self.preserved_attributes})


class PrepareCustomConfig(_Preserving):
    """For `prepare_fx` and `prepare_qat_fx`."""

    def __init__(self) -> None:
        self.standalone_module_names: dict[str, StandaloneModuleConfigEntry] = {}
        self.standalone_module_classes: dict[type, StandaloneModuleConfigEntry] = {}
        self.float_to_observed_mapping: Classes = {}
        self.non_traceable_module_names: list[str] = []
        self.non_traceable_module_classes: list[type] = []
        self.input_quantized_indexes: list[int] = []
        self.output_quantized_indexes: list[int] = []
        self.preserved_attributes = []

    @checked(SpecError)
    def set_standalone_module_name(
        self,
        module_name: str,
        qconfig_mapping: QConfigMapping | None,
        example_inputs: tuple[Any, ...],
        prepare_custom_config: PrepareCustomConfig | None,
        backend_config: BackendConfig | None,
    ) -> PrepareCustomConfig:
        """The module at a path is prepared on its own, as one operator of the model."""
        entry = StandaloneModuleConfigEntry(qconfig_mapping, example_inputs, prepare_custom_config, backend_config)
        self.standalone_module_names[module_name] = entry
        return self

    @checked(SpecError)
    def set_standalone_module_class(
        self,
        module_class: type,
        qconfig_mapping: QConfigMapping | None,
        example_inputs: tuple[Any, ...],
        prepare_custom_config: PrepareCustomConfig | None,
        backend_config: BackendConfig | None,
    ) -> PrepareCustomConfig:
        """So is each module of a class."""
        entry = StandaloneModuleConfigEntry(qconfig_mapping, example_inputs, prepare_custom_config, backend_config)
        self.standalone_module_classes[module_class] = entry
        return self

    @checked(SpecError)
    def set_float_to_observed_mapping(
        self, float_class: type, observed_class: type, quant_type: QuantType = QuantType.STATIC
    ) -> PrepareCustomConfig:
        """A class of modules, and the class that `prepare` makes of it, with `from_float`.

        Raises:
            SpecError: of another type than static.
        """
        if quant_type is not QuantType.STATIC:
            raise SpecError(f"custom modules are observed for static quantization alone, not for {quant_type}")
        self.float_to_observed_mapping.setdefault(quant_type, {})[float_class] = observed_class
        return self

    @checked(SpecError)
    def set_non_traceable_module_names(self, module_names: list[str]) -> PrepareCustomConfig:
        """Paths of modules that stay as they are, in float."""
        self.non_traceable_module_names = list(module_names)
        return self

    @checked(SpecError)
    def set_non_traceable_module_classes(self, module_classes: list[type]) -> PrepareCustomConfig:
        """Classes of modules that stay as they are, in float."""
        self.non_traceable_module_classes = list(module_classes)
        return self

    @checked(SpecError)
    def set_input_quantized_indexes(self, indexes: list[int]) -> PrepareCustomConfig:
        """Positions of inputs that the converted model takes as quantized tensors."""
        self.input_quantized_indexes = list(indexes)
        return self

    @checked(SpecError)
    def set_output_quantized_indexes(self, indexes: list[int]) -> PrepareCustomConfig:
        """Positions of outputs that the converted model returns as quantized tensors."""
        self.output_quantized_indexes = list(indexes)
        return self

    @classmethod
    @checked(SpecError)
    def from_dict(cls, prepare_custom_config_dict: dict[str, Any]) -> PrepareCustomConfig:
        """What `to_dict` gave; every key may be missing, and dictionaries stand for the configs inside.

        Raises:
            SpecError: an entry does not fit.
        """
        given = prepare_custom_config_dict
        made = cls()
        for name in ("name", "class"):
            setter = getattr(made, f"set_standalone_module_{name}")
            for entry in given.get(f"standalone_module_{name}", []):
                setter(*_standalone(entry))
        made.float_to_observed_mapping = _classes(given, "float_to_observed_custom_module_class")
        return (
            made.set_non_traceable_module_names(given.get("non_traceable_module_name", []))
            .set_non_traceable_module_classes(given.get("non_traceable_module_class", []))
            .set_input_quantized_indexes(given.get("input_quantized_idxs", []))
            .set_output_quantized_indexes(given.get("output_quantized_idxs", []))
            .set_preserved_attributes(given.get("preserved_attributes", []))
        )

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary, without what is empty."""
        return _filled(
            {
                "standalone_module_name": [_entry(*item) for item in self.standalone_module_names.items()],
                "standalone_module_class": [_entry(*item) for item in self.standalone_module_classes.items()],
                "float_to_observed_custom_module_class": _plain(self.float_to_observed_mapping),
                "non_traceable_module_name": self.non_traceable_module_names,
                "non_traceable_module_class": self.non_traceable_module_classes,
                "input_quantized_idxs": self.input_quantized_indexes,
                "output_quantized_idxs": self.output_quantized_indexes,
                "preserved_attributes": self.preserved_attributes,
            }
        )


class ConvertCustomConfig(_Preserving):
    """For `convert_fx`."""

    def __init__(self) -> None:
        self.observed_to_quantized_mapping: Classes = {}
        self.preserved_attributes = []

    @checked(SpecError)
    def set_observed_to_quantized_mapping(
        self, observed_class: type, quantized_class: type, quant_type: QuantType = QuantType.STATIC
    ) -> ConvertCustomConfig:
        """A class that `prepare` made, and the class that `convert` makes of it, with `from_observed`."""
        self.observed_to_quantized_mapping.setdefault(quant_type, {})[observed_class] = quantized_class
        return self

    @classmethod
    @checked(SpecError)
    def from_dict(cls, convert_custom_config_dict: dict[str, Any]) -> ConvertCustomConfig:
        """What `to_dict` gave."""
        made = cls().set_preserved_attributes(convert_custom_config_dict.get("preserved_attributes", []))
        key = "observed_to_quantized_custom_module_class"
        made.observed_to_quantized_mapping = _classes(convert_custom_config_dict, key)
        return made

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary, without what is empty."""
        key = "observed_to_quantized_custom_module_class"
        held = {key: _plain(self.observed_to_quantized_mapping), "preserved_attributes": self.preserved_attributes}
        return _filled(held)


def _filled(held: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in held.items() if value}


def _plain(classes: Classes) -> dict[str, dict[type, type]]:
    return {kind.name.lower(): dict(pairs) for kind, pairs in classes.items()}


def _classes(given: Mapping[str, Any], key: str) -> Classes:
    kinds = {kind.name.lower(): kind for kind in QuantType}
    held = given.get(key, {})
    unknown = [name for name in held if name not in kinds]
    if unknown:
        raise SpecError(f"{key!r} has the keys {unknown}; it is a dictionary of {', '.join(kinds)}")
    return {kinds[name]: dict(pairs) for name, pairs in held.items()}


def _entry(key: Any, entry: StandaloneModuleConfigEntry) -> tuple[Any, ...]:
    parts = (entry.qconfig_mapping, entry.prepare_custom_config)
    mapping, custom = (None if part is None else part.to_dict() for part in parts)
    return key, mapping, entry.example_inputs, custom, entry.backend_config


def _standalone(entry: Any) -> tuple[Any, ...]:
    if not isinstance(entry, (tuple, list)) or len(entry) != 5:
        raise SpecError(
            f"a standalone module is (name or class, qconfig mapping, example inputs, prepare custom config, backend "
            f"config), got {entry!r}"
        )
    key, mapping, example_inputs, custom, backend = entry
    made = (
        QConfigMapping.from_dict(mapping) if isinstance(mapping, dict) else mapping,
        example_inputs,
        PrepareCustomConfig.from_dict(custom) if isinstance(custom, dict) else custom,
        BackendConfig.from_dict(backend) if isinstance(backend, dict) else backend,
    )
    return key, *made
