"""BackendConfig: which patterns a backend quantizes, in which types, and what their modules become."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

from torch import nn

from ..checks import checked
from ..errors import SpecError
from .dtypes import DTypeConfig, ObservationType

__all__ = ["BackendConfig", "BackendPatternConfig", "Pattern"]

Pattern = Any
"""A class of modules, a function, the name of a method; or a tuple of these, in the order in which they run."""

_Classes = type[nn.Module] | None
_DEFAULT = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT

_PUBLIC = "pattern observation_type dtype_configs root_module qat_module fused_module fuser_method"
_PRIVATE = "root_node_getter extra_inputs_getter num_tensor_args_to_observation_type input_type_to_index"
_FIELDS = {
    **{name: name for name in _PUBLIC.split()},
    **{name: f"_{name}" for name in (*_PRIVATE.split(), "pattern_complex_format")},
    "reference_quantized_module_for_root": "reference_quantized_module",
}
"""Key of the dictionary -> attribute. The names of both are the reference's."""


class BackendPatternConfig:
    """What a backend does with one pattern.

    Args:
        pattern: a class of modules, a function, the name of a method; or a tuple of two or three of these, in the order
            in which they run.
    """

    def __init__(self, pattern: Pattern = None) -> None:
        self.pattern: Pattern = pattern
        self.observation_type = _DEFAULT
        self.dtype_configs: list[DTypeConfig] = []
        self.root_module: _Classes = None
        self.qat_module: _Classes = None
        self.reference_quantized_module: _Classes = None
        self.fused_module: _Classes = None
        self.fuser_method: Callable[..., Any] | None = None
        self._root_node_getter: Callable[..., Any] | None = None
        self._extra_inputs_getter: Callable[..., Any] | None = None
        self._num_tensor_args_to_observation_type: dict[int, ObservationType] = {}
        self._input_type_to_index: dict[str, int] = {}
        self._pattern_complex_format: Pattern = None

    def set_pattern(self, pattern: Pattern) -> BackendPatternConfig:
        """Another pattern.

        Raises:
            SpecError: the pattern was given in the nested form.
        """
        if self._pattern_complex_format is not None:
            raise SpecError("only one of 'pattern' and 'pattern_complex_format' can be set")
        self.pattern = pattern
        return self

    @checked(SpecError)
    def set_observation_type(self, observation_type: ObservationType) -> BackendPatternConfig:
        """Which tensors have a grid of their own; by default inputs and output each."""
        self.observation_type = observation_type
        return self

    @checked(SpecError)
    def add_dtype_config(self, dtype_config: DTypeConfig) -> BackendPatternConfig:
        """One more combination of types."""
        self.dtype_configs.append(dtype_config)
        return self

    @checked(SpecError)
    def set_dtype_configs(self, dtype_configs: list[DTypeConfig]) -> BackendPatternConfig:
        """All combinations of types."""
        self.dtype_configs = list(dtype_configs)
        return self

    @checked(SpecError)
    def set_root_module(self, root_module: type[nn.Module] | None) -> BackendPatternConfig:
        """The float class whose weight is rounded."""
        self.root_module = root_module
        return self

    @checked(SpecError)
    def set_qat_module(self, qat_module: type[nn.Module] | None) -> BackendPatternConfig:
        """The class to train in, with `from_float`."""
        self.qat_module = qat_module
        return self

    @checked(SpecError)
    def set_reference_quantized_module(
        self, reference_quantized_module: type[nn.Module] | None
    ) -> BackendPatternConfig:
        """The class that the root module becomes, with `from_float(module, weight_qparams)`."""
        self.reference_quantized_module = reference_quantized_module
        return self

    @checked(SpecError)
    def set_fused_module(self, fused_module: type[nn.Module] | None) -> BackendPatternConfig:
        """The class that the modules of the pattern become."""
        self.fused_module = fused_module
        return self

    @checked(SpecError)
    def set_fuser_method(self, fuser_method: Callable[..., Any] | None) -> BackendPatternConfig:
        """The function that makes it, of (is_qat, *modules), in the order of the pattern."""
        self.fuser_method = fuser_method
        return self

    def _set_num_tensor_args_to_observation_type(self, types: dict[int, ObservationType]) -> BackendPatternConfig:
        self._num_tensor_args_to_observation_type = types
        return self

    def _set_input_type_to_index(self, indexes: dict[str, int]) -> BackendPatternConfig:
        self._input_type_to_index = indexes
        return self

    def _set_pattern_complex_format(self, pattern: Pattern) -> BackendPatternConfig:
        """The reference's nested form, from the last operator to the first: (relu, (batch_norm, conv))."""
        if self.pattern is not None:
            raise SpecError("only one of 'pattern' and 'pattern_complex_format' can be set")
        self._pattern_complex_format = pattern
        return self

    @property
    def sequence(self) -> tuple[Any, ...]:
        """The pattern in the order in which its operators run.

        Raises:
            SpecError: it is no sequence; or there is none.
        """
        if self._pattern_complex_format is not None:
            return _unnested(self._pattern_complex_format)
        if self.pattern is None:
            raise SpecError("a BackendPatternConfig has no pattern; give it one: BackendPatternConfig(torch.nn.Linear)")
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)

    @classmethod
    @checked(SpecError)
    def from_dict(cls, backend_pattern_config_dict: dict[str, Any]) -> BackendPatternConfig:
        """What `to_dict` gave; every key may be missing.

        Raises:
            SpecError: a combination of types is none.
        """
        made = cls()
        for key, name in _FIELDS.items():
            if key in backend_pattern_config_dict:
                setattr(made, name, backend_pattern_config_dict[key])
        made.dtype_configs = [_dtype_config(one) for one in made.dtype_configs]
        if not isinstance(made.observation_type, ObservationType):
            raise SpecError(f"observation_type is an ObservationType, got {made.observation_type!r}")
        return made

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary, without what is not set."""
        held = {key: getattr(self, name) for key, name in _FIELDS.items()}
        held["dtype_configs"] = [one.to_dict() for one in self.dtype_configs]
        always = ("observation_type", "dtype_configs")
        return {key: value for key, value in held.items() if key in always or value not in (None, {})}

    def __repr__(self) -> str:
        return f"BackendPatternConfig({self.to_dict()})"


class BackendConfig:
    """The patterns that a backend quantizes.

    Args:
        name: of the backend.
    """

    @checked(SpecError)
    def __init__(self, name: str = "") -> None:
        self.name = name
        self._configs: dict[Hashable, BackendPatternConfig] = {}

    @checked(SpecError)
    def set_name(self, name: str) -> BackendConfig:
        """Another name."""
        self.name = name
        return self

    @checked(SpecError)
    def set_backend_pattern_config(self, config: BackendPatternConfig) -> BackendConfig:
        """One more pattern, in place of what its operators had before."""
        self._configs[config.sequence] = config
        return self

    def set_backend_pattern_configs(self, configs: Iterable[BackendPatternConfig]) -> BackendConfig:
        """More patterns, in place of what their operators had before."""
        for config in configs:
            self.set_backend_pattern_config(config)
        return self

    @property
    def configs(self) -> list[BackendPatternConfig]:
        """All patterns, in the order in which they were set; a list of its own."""
        return list(self._configs.values())

    @classmethod
    @checked(SpecError)
    def from_dict(cls, backend_config_dict: dict[str, Any]) -> BackendConfig:
        """What `to_dict` gave: "name", and "configs", a list of dictionaries or BackendPatternConfigs.

        Raises:
            SpecError: a pattern is neither.
        """
        made = cls(backend_config_dict.get("name", ""))
        for one in backend_config_dict.get("configs", ()):
            if not isinstance(one, (dict, BackendPatternConfig)):
                raise SpecError(f"'configs' of a backend dictionary holds {one!r}, where a dictionary is needed")
            made.set_backend_pattern_config(BackendPatternConfig.from_dict(one) if isinstance(one, dict) else one)
        return made

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary."""
        return {"name": self.name, "configs": [config.to_dict() for config in self.configs]}

    def __repr__(self) -> str:
        return f"BackendConfig({self.to_dict()})"


def _dtype_config(given: Any) -> DTypeConfig:
    if isinstance(given, DTypeConfig):
        return given
    if not isinstance(given, dict):
        raise SpecError(f"'dtype_configs' of a pattern's dictionary holds {given!r}, where a dictionary is needed")
    return DTypeConfig.from_dict(given)


def _unnested(pattern: Pattern) -> tuple[Any, ...]:
    """(conv, batch_norm, relu) of (relu, (batch_norm, conv))."""
    if not isinstance(pattern, tuple):
        return (pattern,)
    if len(pattern) != 2 or isinstance(pattern[0], tuple):
        raise SpecError(
            f"the pattern {pattern} is no sequence of operators with one input each; nested patterns are pairs of an "
            "operator and the pattern before it: (relu, (batch_norm, conv))"
        )
    return (*_unnested(pattern[1]), pattern[0])
