"""Files with modules of torch.ao: state dicts and whole models load without its classes, and run nothing.

Before this: `aliases` says which class stands for which. After it: nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from io import IOBase
from os import PathLike
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ..checks import checked
from ..errors import FileError
from ..qtensor import from_torch
from .aliases import ALIASES, new_module

__all__ = ["load_file"]


@checked(FileError)
def load_file(file: str | PathLike[str] | IOBase, *, classes: Collection[type] = (), map_location: Any = None) -> Any:
    """What torch.save wrote of modules of torch.ao, as modules and QTensors of this package.

    The file is read with weights_only=True: it can make objects of the classes that stand for torch.ao's, of torch.nn's
    and of `classes`, and run nothing.

    Args:
        file: a path, or a file that is open in binary mode.
        classes: modules of the program that are in the file, under the names that they had then.
        map_location: of torch.load.

    Raises:
        FileError: it cannot be read, or has an object of another class, which the message names.
    """
    allowed: Any = [*_stand_ins(), *_of_torch(), *classes]
    try:
        with torch.serialization.safe_globals(allowed):
            made = torch.load(file, map_location=map_location, weights_only=True)  # type: ignore[arg-type]
            return from_torch(made)
    except OSError as error:
        raise FileError(f"cannot read {file}: {error}") from error
    except (RuntimeError, ValueError, EOFError, LookupError, UnpicklingError) as error:
        raise FileError(f"cannot load {file}: {_why(str(error))}") from error


def _stand_ins() -> Iterator[tuple[type[nn.Module], str]]:
    """Our classes under every name that the reference's have in files."""
    for old in ALIASES:
        for name, kind in vars(new_module(old) or nn.Module()).items():
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                yield kind, f"{old}.{name}"


def _of_torch() -> Iterator[type[nn.Module]]:
    for name in list(sys.modules):
        if name.startswith("torch.nn.modules."):
            found = vars(sys.modules[name]).values()
            yield from (kind for kind in found if isinstance(kind, type) and issubclass(kind, nn.Module))


def _why(text: str) -> str:
    """What torch says, without its advice to switch the safety off."""
    unknown = re.search(r"Unsupported global: GLOBAL (\S+)", text)
    if unknown is None:
        return text.partition("\n")[0]
    return f"it has an object of {unknown[1]}; if that is a class of the program, name it with classes=[...]"
