"""The form of a calibration file: entries to bytes and back. Nothing here knows of models or observers.

A file of safetensors. Its metadata hold one JSON text, `_Document`: the version, a checksum of all else that is in the
file, and for each entry what it is and the names of its tensors, which are called `<entry>.<key>` in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, BinaryIO

from torch import Tensor

from ..errors import CalibrationError, FileError
from ..files import open_file
from ..plain import PlainError, from_plain, parse_json, to_plain
from .entry import Entry, Kind

__all__ = ["from_file", "to_bytes"]

_FORMAT = "pt2e_quant calibration"
_VERSION = 2  # 1 had no checksum
_KEY = "pt2e_quant"  # one key of the metadata: the order of several is not defined
_LONGEST_HEADER = 100_000_000  # as in safetensors

_DAMAGED = "Take another copy of the file, or calibrate again."


@dataclass(frozen=True)
class _Described:
    """An entry but for its tensors."""

    name: str
    tensors: tuple[str, ...]
    kind: str
    arguments: dict[str, str]
    facts: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class _Document:
    """All metadata of a file."""

    format: str
    version: int
    observers: tuple[_Described, ...]
    checksum: str = ""


def to_bytes(entries: Iterable[Entry]) -> bytes:
    """A file that holds the entries. The same entries give the same bytes."""
    from safetensors.torch import save

    described: list[_Described] = []
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        tensors |= {f"{entry.name}.{key}": value for key, value in entry.state.items()}
        kind, names, facts = entry.kind, tuple(sorted(entry.tensors)), tuple(sorted(entry.kind.facts))
        described.append(
            _Described(entry.name, names, kind.name, dict(kind.arguments), facts, tuple(sorted(entry.state)))
        )
    document = _Document(_FORMAT, _VERSION, tuple(described))
    document = replace(document, checksum=_checksum(document, _parts(save(tensors))))
    return save(tensors, metadata={_KEY: json.dumps(to_plain(document), sort_keys=True)})


def from_file(path: str | PathLike[str]) -> list[Entry]:
    """The entries of a file, with their counts still packed.

    Raises:
        CalibrationError: the file cannot be read, is none of `to_bytes`, or is damaged.
    """
    try:
        with open_file(path) as file:
            header = _header(file)
            plain = _plain_document(header)
            return _entries(plain, header, file.read())
    except (FileError, PlainError) as error:
        raise CalibrationError(f"{path} is not a file of save_calibration: {error}") from error
    except _DamagedError as error:
        raise CalibrationError(f"{path} is damaged: {error}. {_DAMAGED}") from error


class _DamagedError(Exception):
    """The file is one of calibration, but not as it was written."""


def _header(file: BinaryIO) -> bytes:
    """The first part, known to be no longer than the file."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    header = file.read(size) if len(length) == 8 and size <= _LONGEST_HEADER else b""
    if not header or len(header) != size:
        raise PlainError("it does not begin with the header of safetensors")
    return length + header


def _plain_document(header: bytes) -> Any:
    """What stands in the metadata, known to be of this version."""
    fields = parse_json(header[8:])
    metadata = fields.get("__metadata__") if isinstance(fields, dict) else None
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    plain = parse_json(text) if isinstance(text, str) else {}
    plain = plain if isinstance(plain, dict) else {}
    name, version = plain.get("format"), plain.get("version")
    if name != _FORMAT:
        if isinstance(name, str) and name.startswith(_FORMAT):
            raise PlainError(
                f"its format is {name!r}, without a checksum; only version {_VERSION} is read. Calibrate again"
            )
        raise PlainError(f"its format is {name!r}")
    if version != _VERSION:
        raise PlainError(f"it has version {version!r}, and only version {_VERSION} is read. Calibrate again")
    return plain


def _entries(plain: Any, header: bytes, body: bytes) -> list[Entry]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        document = from_plain(_Document, plain)
        parts = _parts(header + body)
    except (PlainError, SafetensorError) as error:
        raise _DamagedError(str(error)) from error
    if document.checksum != _checksum(document, parts):
        raise _DamagedError("its checksum does not fit its content")
    names = Counter(f"{one.name}.{key}" for one in document.observers for key in one.keys)
    if names != Counter(parts.keys()):
        raise _DamagedError("its tensors are not those of its observers")
    try:
        tensors = load(header + body)
    except (KeyError, RuntimeError, ValueError) as error:
        raise _DamagedError(f"torch has no tensor like one of it ({error})") from error
    return [_entry(one, tensors) for one in document.observers]


def _entry(one: _Described, tensors: Mapping[str, Tensor]) -> Entry:
    state = {key: tensors[f"{one.name}.{key}"] for key in one.keys}
    return Entry(one.name, frozenset(one.tensors), Kind(one.kind, one.arguments, frozenset(one.facts)), state)


def _parts(data: bytes) -> dict[str, Any]:
    """dtype, shape and bytes of each tensor of a file of safetensors."""
    from safetensors import deserialize

    return dict(deserialize(data))  # type: ignore[no-untyped-call]


def _checksum(document: _Document, parts: Mapping[str, Any]) -> str:
    """Of what the file says, not of how: whoever writes the same content in another order gets the same."""
    digest = hashlib.sha256(json.dumps(to_plain(replace(document, checksum="")), sort_keys=True).encode())
    for name, part in sorted(parts.items()):
        digest.update(json.dumps([name, part["dtype"], list(part["shape"])]).encode())
        digest.update(part["data"])
    return digest.hexdigest()
