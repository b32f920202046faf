"""Files are replaced as a whole or not at all, and errors of the disk are typed."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from pathlib import Path

import pytest

from pt2e_quant.errors import FileError, QuantizationError
from pt2e_quant.files import open_file, write_file, write_files

NEW = b"new " * 5000


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def three(folder: Path) -> list[Path]:
    """Of three files that belong together, the second does not exist yet."""
    paths = [folder / name for name in ("a", "b", "c")]
    for path in (paths[0], paths[2]):
        path.write_bytes(b"old")
    return paths


def test_a_set_of_files_is_written(tmp_path):
    paths = three(tmp_path)
    assert write_files({path: path.name.encode() for path in paths}) == tuple(paths)
    assert held(tmp_path) == {"a": b"a", "b": b"b", "c": b"c"}


def test_when_the_disk_is_full_all_files_hold_what_they_held(tmp_path, small_disk):
    paths, before = three(tmp_path), held(tmp_path)
    with pytest.raises(FileError, match=r"cannot write .*c: File too large\. Free some space"):
        write_files({paths[0]: b"new", paths[1]: b"new", paths[2]: NEW})
    assert held(tmp_path) == before


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_when_a_rename_fails_midway_all_files_hold_what_they_held(failing, tmp_path, monkeypatch):
    paths, before = three(tmp_path), held(tmp_path)
    replace, left = Path.replace, [failing]

    def replace_until(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            if not left[0]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            left[0] -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_until)
    with pytest.raises(FileError, match="Input/output error"):
        write_files(dict.fromkeys(paths, b"new"))
    assert held(tmp_path) == before


def test_on_a_disk_without_links_old_files_come_back_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: os.link(tmp_path / "nothing", tmp_path / "else"))
    test_when_a_rename_fails_midway_all_files_hold_what_they_held(2, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "Free some space there, or choose another disk"),
        (errno.EDQUOT, "Free some space there, or choose another disk"),
        (errno.EROFS, "Choose a place that you have the rights to"),
        (errno.EACCES, "Choose a place that you have the rights to"),
        (errno.EIO, ""),
    ],
)
def test_each_error_of_the_disk_is_typed_and_says_the_way_out(number, way_out, tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr("pt2e_quant.files.os.fsync", fail)
    with pytest.raises(FileError, match=f"cannot write .*file: {os.strerror(number)}.*{way_out}") as raised:
        write_file(tmp_path / "file", NEW)
    assert held(tmp_path) == {"file": b"old"}
    assert raised.value.errno == number
    assert isinstance(raised.value, (QuantizationError, OSError))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/file", r"No such file or directory\. Make the folder first"),
        ("file/below", r"Not a directory\. Make the folder first"),
        ("folder", r"Is a directory\. A folder has this name"),
        ("pipe", "not an ordinary file has this name"),
        ("nul\0", "is not the name of a file"),
        ("long" * 100, "File name too long"),
    ],
)
def test_what_cannot_be_written_to_is_typed_and_stays(name, reason, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match=reason):
        write_file(tmp_path / name, NEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]
    assert held(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("path", [None, 3, b"file"])
def test_what_is_no_path_is_typed(path):
    for call in (lambda: write_file(path, NEW), lambda: open_file(path).__enter__()):
        with pytest.raises(FileError, match=r"a path is a str or a pathlib\.Path, got"):
            call()


@pytest.mark.parametrize(("name", "reason"), [("nothing", "No such file"), (".", "Is a directory")])
def test_what_cannot_be_read_is_typed(name, reason, tmp_path):
    with pytest.raises(FileError, match=f"cannot read .*{reason}"), open_file(tmp_path / name) as file:
        file.read()


def test_a_link_stays_one_and_a_mode_stays(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    assert write_file(link, NEW) == link
    assert (link.is_symlink(), real.read_bytes(), real.stat().st_mode & 0o777) == (True, NEW, 0o640)


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr("pt2e_quant.files.os.access", lambda path, mode: mode != os.W_OK)  # root may write to all
    with pytest.raises(FileError, match="Permission denied"):
        write_file(tmp_path / "file", NEW)
    assert held(tmp_path) == {"file": b"old"}


def test_a_reader_sees_one_whole_file_while_another_thread_writes(tmp_path):
    """Every read finds one letter, a million times; a file written in place would be found empty or mixed."""
    path, done = tmp_path / "file", threading.Event()
    write_file(path, b"a" * 1_000_000)

    def write() -> None:
        for letter in itertools.cycle((b"b", b"a")):
            write_file(path, letter * 1_000_000)
            if done.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[bytes] = []
    try:
        while len(seen) < 30 or len(set(seen)) < 2:
            content = path.read_bytes()
            seen.append(content[:1] if content == content[:1] * 1_000_000 else content)
    finally:
        done.set()
        writer.join()
    assert set(seen) == {b"a", b"b"}
