"""Precisions: which op gets which format, as a value to be saved, read, edited, and applied to another export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_fields, checked
from ..errors import FileError, TargetingError, did_you_mean
from ..files import open_file, write_file
from ..quantizer import QuantizationConfig, RuleQuantizer

__all__ = ["FLOAT", "Precisions", "configurations"]

FLOAT = "float"
_VERSION = 1


@dataclass(frozen=True)
class Precisions:
    """A format for each op of one model.

    formats: by the name of the op in the exported program: 'float', or a name of the quantizer's `precisions`. Ops that
             are not in it follow the other selectors of the quantizer.
    """

    formats: Mapping[str, str]

    def __post_init__(self) -> None:
        check_fields(self, TargetingError)

    @checked(TargetingError)
    def apply(
        self, quantizer: RuleQuantizer, precisions: Mapping[str, QuantizationConfig | None] | None = None
    ) -> RuleQuantizer:
        """A copy of a quantizer that gives each op its format.

        Args:
            quantizer: with a global configuration for all other ops.
            precisions: configurations by names of formats, where the quantizer does not declare them.

        Raises:
            TargetingError: a format has no configuration. prepare_pt2e raises it for an op that the model lacks.
        """
        known = configurations(quantizer, precisions)
        chosen = quantizer.copy()
        for op, name in self.formats.items():
            if name not in known:
                hint = did_you_mean(name, known)
                raise TargetingError(f"{op} is to be in {name!r}, which {quantizer.name} lacks.{hint}")
            chosen.set_node_name(op, known[name])
        return chosen

    @checked(FileError)
    def save(self, path: str | Path) -> Path:
        """Write a JSON file, one op a line.

        Raises:
            FileError: it cannot be written.
        """
        return write_file(path, json.dumps({"version": _VERSION, "formats": dict(self.formats)}, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Precisions:
        """Read what `save` wrote, and what somebody made of it.

        Raises:
            FileError: it cannot be read, or holds something else; the message says what.
        """
        with open_file(path) as file:
            text = file.read()
        try:
            plain: Any = json.loads(text)
        except ValueError as error:
            raise FileError(f"{path} holds no JSON: {error}") from error
        formats = plain.get("formats") if isinstance(plain, dict) and plain.get("version") == _VERSION else None
        if not isinstance(formats, dict):
            shape = f'{{"version": {_VERSION}, "formats": {{op: format}}}}'
            raise FileError(f"{path} holds no precisions: {shape} is expected")
        wrong = next((name for name, one in formats.items() if not isinstance(one, str)), None)
        if wrong is not None:
            raise FileError(f"{path}: the format of {wrong!r} must be a text, got {formats[wrong]!r}")
        return cls(formats)


def configurations(
    quantizer: RuleQuantizer, given: Mapping[str, QuantizationConfig | None] | None = None
) -> dict[str, QuantizationConfig | None]:
    """The configurations that an op may get, by name: those given, or those that the quantizer declares; and float.

    The first that a quantizer declares, 'int8', stands for its global configuration where it has one.
    """
    if given is not None:
        return {**given, FLOAT: None}
    known: dict[str, QuantizationConfig | None] = {name: make() for name, make in type(quantizer).precisions.items()}
    if known and quantizer.global_config is not None:
        known[next(iter(known))] = quantizer.global_config
    return {**known, FLOAT: None}
