"""QConfigMapping: which part of a model gets which QConfig, by type, name, and position.

Names, precedence and the form as a dictionary are those of torch.ao.quantization.qconfig_mapping.

Before this: `qconfig`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from .checks import checked
from .errors import SpecError
from .fake_quantize import (
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
    default_weight_fake_quant,
)
from .observer import (
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_placeholder_observer,
    default_weight_observer,
)
from .qconfig import (
    QConfig,
    QConfigAny,
    default_quint8_weight_qconfig,
    default_reuse_input_qconfig,
    get_default_qat_qconfig,
    get_default_qconfig,
)

__all__ = ["QConfigMapping", "get_default_qat_qconfig_mapping", "get_default_qconfig_mapping"]

ObjectType = Callable[..., Any] | str

_TRANSPOSED = (
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_INTO_0_1 = (
    torch.nn.Hardsigmoid,
    functional.hardsigmoid,
    "hardsigmoid",
    "hardsigmoid_",
    torch.nn.Sigmoid,
    torch.sigmoid,
    "sigmoid",
    "sigmoid_",
    torch.nn.Softmax,
)
_INTO_NEG1_1 = (torch.nn.Tanh, torch.tanh, "tanh", "tanh_")
_DICT_KEYS = ("", "object_type", "module_name_regex", "module_name", "module_name_object_type_order")


class QConfigMapping:
    """Which QConfig each module or function of a model gets; None leaves it in floating point.

    From the weakest to the strongest: `set_global`, `set_object_type`, `set_module_name_regex`, `set_module_name`,
    `set_module_name_object_type_order`. Each returns the mapping, so that calls chain; setting a key again replaces
    its QConfig and keeps its place.

    Raises:
        SpecError: a value is no QConfig, or a pattern no regular expression.
    """

    def __init__(self) -> None:
        self.global_qconfig: QConfigAny = None
        self.object_type_qconfigs: dict[ObjectType, QConfigAny] = {}
        self.module_name_regex_qconfigs: dict[str, QConfigAny] = {}
        self.module_name_qconfigs: dict[str, QConfigAny] = {}
        self.module_name_object_type_order_qconfigs: dict[tuple[str, ObjectType, int], QConfigAny] = {}

    def set_global(self, global_qconfig: QConfigAny) -> QConfigMapping:
        """For everything that nothing below speaks of."""
        self.global_qconfig = _checked(global_qconfig)
        return self

    @checked(SpecError, but=("qconfig",))
    def set_object_type(self, object_type: ObjectType, qconfig: QConfigAny) -> QConfigMapping:
        """For modules of a class, calls of a function, and calls of a method by its name."""
        self.object_type_qconfigs[object_type] = _checked(qconfig)
        return self

    @checked(SpecError, but=("qconfig",))
    def set_module_name_regex(self, module_name_regex: str, qconfig: QConfigAny) -> QConfigMapping:
        """For modules whose path begins with a match; of several patterns that fit, the one set first counts."""
        try:
            re.compile(module_name_regex)
        except (re.error, TypeError) as error:
            raise SpecError(f"{module_name_regex!r} is not a regular expression: {error}") from error
        self.module_name_regex_qconfigs[module_name_regex] = _checked(qconfig)
        return self

    @checked(SpecError, but=("qconfig",))
    def set_module_name(self, module_name: str, qconfig: QConfigAny) -> QConfigMapping:
        """For the module at a path, and for those inside it that have no name of their own here."""
        self.module_name_qconfigs[module_name] = _checked(qconfig)
        return self

    @checked(SpecError, but=("qconfig",))
    def set_module_name_object_type_order(
        self, module_name: str, object_type: ObjectType, index: int, qconfig: QConfigAny
    ) -> QConfigMapping:
        """For the use number `index`, counted from 0, of a type or function in the module at a path."""
        self.module_name_object_type_order_qconfigs[(module_name, object_type, index)] = _checked(qconfig)
        return self

    @checked(SpecError)
    def qconfig_for(self, module_name: str, object_type: ObjectType, index: int | None = None) -> QConfigAny:
        """The QConfig of one use, by the precedence above.

        Args:
            module_name: path of the module; for a function, of the module that calls it.
            object_type: class of the module, the function, or the name of the method.
            index: number of this use of object_type in that module, counted from 0.
        """
        if index is not None and (module_name, object_type, index) in self.module_name_object_type_order_qconfigs:
            return self.module_name_object_type_order_qconfigs[(module_name, object_type, index)]
        path = module_name
        while path:
            if path in self.module_name_qconfigs:
                return self.module_name_qconfigs[path]
            path = path.rpartition(".")[0]
        for pattern, qconfig in self.module_name_regex_qconfigs.items():
            if re.match(pattern, module_name):
                return qconfig
        return self.object_type_qconfigs.get(object_type, self.global_qconfig)

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary: "" for the global QConfig, lists of tuples that end in a QConfig for the rest."""
        lists = (self.object_type_qconfigs, self.module_name_regex_qconfigs, self.module_name_qconfigs)
        ordered = [(*key, qconfig) for key, qconfig in self.module_name_object_type_order_qconfigs.items()]
        values = (self.global_qconfig, *(list(each.items()) for each in lists), ordered)
        return dict(zip(_DICT_KEYS, values, strict=True))

    @classmethod
    @checked(SpecError)
    def from_dict(cls, qconfig_dict: dict[str, Any]) -> QConfigMapping:
        """What `to_dict` gave; every key may be missing.

        Raises:
            SpecError: a key is none of these.
        """
        unknown = [key for key in qconfig_dict if key not in _DICT_KEYS]
        if unknown:
            raise SpecError(f"keys {unknown} mean nothing in a qconfig dictionary; it has {list(_DICT_KEYS)}")
        mapping = cls().set_global(qconfig_dict.get(""))
        setters: tuple[Callable[..., QConfigMapping], ...] = (
            mapping.set_object_type,
            mapping.set_module_name_regex,
            mapping.set_module_name,
            mapping.set_module_name_object_type_order,
        )
        for key, setter in zip(_DICT_KEYS[1:], setters, strict=True):
            for entry in qconfig_dict.get(key, ()):
                try:
                    setter(*entry)
                except TypeError as error:
                    raise SpecError(f"{key!r} of a qconfig dictionary has an entry {entry!r}: {error}") from error
        return mapping

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, QConfigMapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        lines = [f"  global: {self.global_qconfig}"]
        for title, entries in self.to_dict().items():
            lines += [f"  {title} {entry[:-1]}: {entry[-1]}" for entry in (entries if title else ())]
        return "\n".join(["QConfigMapping(", *lines, ")"])


@checked(SpecError)
def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    """What to calibrate a model with for a backend: "x86", "fbgemm", "qnnpack" or "onednn".

    Raises:
        SpecError: another backend or version.
    """
    fixed = (default_fixed_qparams_range_0to1_observer, default_fixed_qparams_range_neg1to1_observer)
    return _default(get_default_qconfig(backend, version), backend, default_weight_observer, *fixed)


@checked(SpecError)
def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    """What to train a model with for a backend: "x86", "fbgemm", "qnnpack" or "onednn".

    Raises:
        SpecError: another backend or version.
    """
    fixed = (default_fixed_qparams_range_0to1_fake_quant, default_fixed_qparams_range_neg1to1_fake_quant)
    return _default(get_default_qat_qconfig(backend, version), backend, default_weight_fake_quant, *fixed)


def _default(qconfig: QConfig, backend: str, weight: Any, into_0_1: Any, into_neg1_1: Any) -> QConfigMapping:
    mapping = QConfigMapping().set_global(qconfig).set_object_type("reshape", default_reuse_input_qconfig)
    one_scale = QConfig(qconfig.activation, weight) if backend in ("fbgemm", "x86") else qconfig
    for kind in _TRANSPOSED:  # the kernels of these backends take one scale for the whole weight
        mapping.set_object_type(kind, one_scale)
    for layer_norm in (functional.layer_norm, torch.nn.LayerNorm):  # its kernel takes float weights
        mapping.set_object_type(layer_norm, QConfig(qconfig.activation, default_placeholder_observer))
    mapping.set_object_type(torch.nn.PReLU, default_quint8_weight_qconfig)
    for kinds, activation in ((_INTO_0_1, into_0_1), (_INTO_NEG1_1, into_neg1_1)):
        for fixed in kinds:
            mapping.set_object_type(fixed, QConfig(activation, weight))
    return mapping


def _checked(qconfig: Any) -> Any:
    if qconfig is not None and not (hasattr(qconfig, "activation") and hasattr(qconfig, "weight")):
        raise SpecError(
            f"{qconfig!r} is not a QConfig; pass QConfig(activation=..., weight=...), or None to stay in floating point"
        )
    return qconfig
