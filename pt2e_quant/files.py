"""Files that are whole or not there: written aside, then put in place; all errors of the disk are a FileError.

Calibrations, reports and programs are saved with this. Before this: nothing but `errors`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from .errors import FileError

__all__ = ["make_folder", "open_file", "write_file", "write_files"]

_WAYS_OUT = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "Make the folder first, or check the name."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a place that you have the rights to."),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space there, or choose another disk."),
    errno.EISDIR: "A folder has this name; choose another one.",
    errno.EEXIST: "Something that is not an ordinary file has this name; choose another one.",
}


def write_file(path: str | PathLike[str], content: bytes) -> Path:
    """Write a file so that a reader sees the old one or the whole new one, never a part. Returns the path.

    Raises:
        FileError: it cannot be written; what was there before is still there.
    """
    return write_files({path: content})[0]


def write_files(contents: Mapping[str | PathLike[str], bytes]) -> tuple[Path, ...]:
    """Write files that belong together. None is replaced before all are written; when one fails, all are the old ones.

    Each file changes at one instant, but the set does not: who reads several of them at that very moment, or after the
    power failed there, may find files of both sets, each of them whole.

    Raises:
        FileError: one cannot be written; what was there before is still there.
    """
    paths = [_path(path) for path in contents]
    parts: list[Path] = []
    targets: list[Path] = []
    try:
        for path, content in zip(paths, contents.values(), strict=True):
            with _typed("write", path):
                targets.append(_target(path))
                parts.append(targets[-1].with_name(f".{uuid.uuid4().hex}.part"))
                _write(parts[-1], targets[-1], content)
        with _typed("write", paths[0] if len(paths) == 1 else paths[0].parent):
            _put_in_place(parts, targets)
    finally:
        _remove(parts)
    return tuple(paths)


def make_folder(path: str | PathLike[str]) -> Path:
    """A folder of this name, with those around it; it may be there already.

    Raises:
        FileError: it cannot be made, or a file has this name.
    """
    path = _path(path)
    with _typed("make the folder", path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def open_file(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """The file, open for reading.

    Raises:
        FileError: it cannot be opened or read.
    """
    path = _path(path)
    with _typed("read", path), path.open("rb") as file:
        yield file


def _path(path: object) -> Path:
    if isinstance(path, (str, PathLike)) and isinstance(name := os.fspath(path), str):
        return Path(name)
    raise FileError(f"a path is a str or a pathlib.Path, got {path!r}")


@contextlib.contextmanager
def _typed(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{str(path)!r} is not the name of a file: {error}") from error
    except OSError as error:
        missing = what == "read" and error.errno in (errno.ENOENT, errno.ENOTDIR)
        way_out = "Check the name." if missing else _WAYS_OUT.get(error.errno or 0, "")
        raised = FileError(f"cannot {what} {path}: {error.strerror or error}.{way_out and f' {way_out}'}")
        raised.errno = error.errno
        raise raised from error


def _target(path: Path) -> Path:
    """What to replace: where a link leads to, and no device, folder or write-protected file."""
    target = Path(os.path.realpath(path))
    kind = target.stat().st_mode if target.exists() else None
    if kind is not None and not target.is_file():
        number = errno.EISDIR if target.is_dir() else errno.EEXIST
        raise OSError(number, os.strerror(number))
    if kind is not None and not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return target


def _write(part: Path, target: Path, content: bytes) -> None:
    with part.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        shutil.copymode(target, part)


def _put_in_place(parts: list[Path], targets: list[Path]) -> None:
    """Rename all, or undo what was done. Of the last one nothing has to be kept: it is renamed or it is not."""
    kept: list[Path | None] = []
    try:
        kept += [_kept(target) for target in targets[:-1]]
        for part, target in zip(parts, targets, strict=True):
            part.replace(target)
    except BaseException:
        for target, old in zip(targets[:-1], kept, strict=False):
            if old is not None:
                old.replace(target)
            else:
                target.unlink(missing_ok=True)
        raise
    finally:
        _remove(old for old in kept if old is not None)


def _kept(target: Path) -> Path | None:
    """A second name for what the file holds now, None where there is none; a copy on disks that have no links."""
    if not target.exists():
        return None
    name = target.with_name(f".{uuid.uuid4().hex}.old")
    try:
        name.hardlink_to(target)
    except OSError:
        shutil.copy2(target, name)
    return name


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
