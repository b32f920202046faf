"""The manifest beside every artefact: what it was made of and with, and whether the files still belong together."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..checks import checked
from ..errors import FileError, RecipeError
from ..files import open_file
from ..plain import PlainError, from_plain, parse_json, to_plain

__all__ = ["FILE", "Manifest", "check_saved", "packages"]

FILE = "manifest.json"
_FORMAT = "pt2e_quant manifest 1"
_PACKAGES = ("pt2e-quant", "torch", "executorch", "onnx", "onnxscript", "onnxruntime", "pillow")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artefact was made of and with. Hashes are SHA-256, in hexadecimal.

    Args:
        model: of the float graph with its parameters.
        data: of the batches that calibrated it; None without any.
        converted: of the converted graph with its integers.
        suffix: of the artefact's file.
        repeats: whether the same recipe gives the same bytes of the artefact; those of Inductor's packages vary.
        seed: of torch's random numbers.
        python, machine: that made it.
        packages: versions by name.
        artefact: name of its file.
        files: hashes of what was saved, by name.
        sources: how to make it again: 'model' and 'data' as the command line takes them; empty from Python.
    """

    model: str
    data: str | None
    converted: str
    suffix: str
    repeats: bool
    seed: int
    python: str = field(default_factory=platform.python_version)
    machine: str = field(default_factory=platform.machine)
    packages: dict[str, str] = field(default_factory=lambda: packages())
    artefact: str = ""
    files: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    format: str = _FORMAT

    def of_files(self, artefact: str, files: Mapping[str, bytes]) -> Manifest:
        """The same with the hashes of what is saved beside it."""
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        return replace(self, artefact=artefact, files=hashes)

    def to_json(self) -> str:
        return json.dumps(to_plain(self), indent=1) + "\n"

    def differences(self, other: Manifest) -> dict[str, tuple[str, str]]:
        """What the same recipe should have given again and did not: (here, there), by name."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in ("model", "data", "converted")}
        if self.repeats:
            pairs |= {self.artefact: (self.files.get(self.artefact), other.files.get(other.artefact))}
        return {name: (str(one), str(two)) for name, (one, two) in pairs.items() if one != two}


def packages() -> dict[str, str]:
    """Versions of the packages that an artefact depends on, as far as they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@checked(RecipeError)
def check_saved(folder: str | Path) -> Manifest:
    """The manifest in a folder that `Quantized.save` wrote, when all files are those that it names.

    Raises:
        RecipeError: there is none, it is damaged, or a file is missing or another one; names each.
    """
    path = Path(folder) / FILE
    try:
        manifest = from_plain(Manifest, parse_json(_read(path)))
    except (FileError, PlainError) as error:
        raise RecipeError(f"{path}: this is no manifest: {error}") from error
    wrong = []
    for name, wanted in manifest.files.items():
        try:
            found = hashlib.sha256(_read(Path(folder) / name)).hexdigest()
        except FileError as error:
            wrong.append(str(error))
            continue
        if found != wanted:
            wrong.append(f"{name} is not the file that was saved (SHA-256 {found[:12]}, not {wanted[:12]})")
    if manifest.format != _FORMAT:
        wrong.append(f"the manifest is of the form {manifest.format!r}, this package reads {_FORMAT!r}")
    if wrong:
        raise RecipeError(f"{folder}: " + "; ".join(wrong))
    return manifest


def _read(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()
