"""`pt2e-quant migrate`: source files for torch.ao.quantization import from this package afterwards."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import FileError, LegacyImportError
from ..files import open_file, write_files
from .output import tell

__all__ = ["migrate_files"]

_WORDS = (b"quantiz", b"intrinsic", b"qat", b"torch.ao", b"import ao")
"""One of these is in every name below the old roots. Files without them are not parsed, which takes the time."""


def migrate_files(paths: list[Path], write: bool, as_json: bool) -> bool:
    """Print the changes of all files, and what is left to do by hand. Write either all of the files or none.

    Returns:
        Whether nothing is left.

    Raises:
        FileError: a path does not exist, or a file cannot be written.
        LegacyImportError: the extra is missing.
    """
    changed: dict[Path, tuple[str, str]] = {}
    left: list[dict[str, Any]] = []
    for path in _sources(paths):
        _migrate(path, changed, left)
    diffs = {str(path): _diff(path, *sources) for path, sources in changed.items()}
    done = "written" if write else "would change; add --write" if changed else "would change"
    lines = [*(f"{one['file']}:{one['line']}: {one['why']}" for one in left), f"{len(changed)} file(s) {done}"]
    tell({"changed": diffs, "left": left, "written": write}, "".join(diffs.values()) + "\n".join(lines), as_json)
    if write and changed:
        write_files({path: new.encode() for path, (_, new) in changed.items()})
    return not left


def _sources(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.exists():
            raise FileError(f"{path} does not exist")
        below = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        yield from (file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts))


def _migrate(path: Path, changed: dict[Path, tuple[str, str]], left: list[dict[str, Any]]) -> None:
    try:
        from ..compat.migrate import migrate_source
    except ModuleNotFoundError as error:
        raise LegacyImportError('migrate needs libcst: pip install "pt2e-quant[migrate]"') from error
    with open_file(path) as file:
        content = file.read()
    if not any(word in content for word in _WORDS):
        return
    try:
        source = content.decode()
        made = migrate_source(source)
    except UnicodeDecodeError as error:
        left.append({"file": str(path), "line": 1, "why": str(error)})
        return
    left += [{"file": str(path), "line": one.line, "why": one.why} for one in made.left]
    if made.source != source:
        changed[path] = source, made.source


def _diff(path: Path, old: str, new: str) -> str:
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(path), str(path))
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
