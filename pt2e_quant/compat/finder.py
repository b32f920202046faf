"""Programs written for torch.ao.quantization run unchanged: imports of the old roots get the modules of this package.

Before this: `aliases` says which module stands for which.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

from .aliases import ALIASES, FUNCTIONS, ROOTS, is_legacy, missing, new_module

__all__ = ["install", "is_installed", "uninstall"]

_LIBRARIES = ("torch", "torchao", "executorch")
"""They import from the old roots what no program does. Where we lack such a name, they get torch's."""


def install() -> None:
    """From now on, imports of torch.ao.quantization, torch.quantization, torch.nn.quantized and the like get ours.

    Modules and names that we have come from us, whether torch still has them or not; attributes (torch.quantization)
    and pickles that name an old class, too. A module that we lack is torch's own, where torch has it; a name that we
    lack is an error that says so. What was imported before stays what it was: call this first.

    Raises:
        LegacyImportError: later, on the import of a name that nothing has.
    """
    if is_installed():
        return
    _FINDER.replaced = {name: sys.modules.pop(name) for name in list(sys.modules) if name in ALIASES}
    _FINDER.before = frozenset(sys.modules)
    sys.meta_path.insert(0, _FINDER)
    for root in ROOTS:
        importlib.import_module(root)  # which makes it an attribute of torch
    _FINDER.provided = [name for name in FUNCTIONS if not hasattr(torch, name)]
    for name in _FINDER.provided:
        setattr(torch, name, getattr(importlib.import_module("pt2e_quant"), name))


def uninstall() -> None:
    """Undo `install`: the next import gets torch's modules again. What a program has imported stays what it is."""
    if not is_installed():
        return
    sys.meta_path.remove(_FINDER)
    for name in [name for name in sys.modules if is_legacy(name) and name not in _FINDER.before]:
        del sys.modules[name]
    sys.modules.update(_FINDER.replaced)
    for root in ROOTS:
        parent, _, last = root.rpartition(".")
        if root in _FINDER.replaced:
            setattr(sys.modules[parent], last, _FINDER.replaced[root])
        else:
            delattr(sys.modules[parent], last)
    for name in _FINDER.provided:
        delattr(torch, name)


def is_installed() -> bool:
    """Whether the old roots are ours now."""
    return _FINDER in sys.meta_path


class _Alias(ModuleType):
    """An old module. Its names are those of the module that stands for it; every module can have others below it."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"{ALIASES[name] or 'pt2e_quant'}, under the reference's path.")
        self.__path__: list[str] = []
        self.__all__ = list(getattr(new_module(name), "__all__", ()))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(new_module(self.__name__), name, None)
        if found is not None and not isinstance(found, ModuleType):
            return found
        child = f"{self.__name__}.{name}"
        if child in ALIASES or child in sys.modules:
            return importlib.import_module(child)
        theirs = _FINDER.replaced.get(self.__name__)
        if hasattr(theirs, name) and _importer() in _LIBRARIES:
            return getattr(theirs, name)
        raise AttributeError(str(missing(child)))

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a module sets it in its parent. Where that has a function of the same name (fuse_modules), programs
        # get the function, as from the reference.
        if not (isinstance(value, _Alias) and hasattr(new_module(self.__name__), name)):
            super().__setattr__(name, value)


def _importer() -> str:
    """The package whose code asks for a name of ours."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "importlib":
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0] if frame else ""


class _Finder(MetaPathFinder, Loader):
    """Stands before all other finders.

    replaced: torch's modules that ours stand for now.
    before:   names of all modules that were imported before and not replaced.
    provided: names that torch did not have any more.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, ModuleType] = {}
        self.before: frozenset[str] = frozenset()
        self.provided: list[str] = []

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if not is_legacy(fullname):
            return None
        if fullname in ALIASES:
            return ModuleSpec(fullname, self, is_package=True)
        return self._of_torch(fullname)

    def _of_torch(self, fullname: str) -> ModuleSpec:
        folder = Path(torch.__file__).parent.joinpath(*fullname.split(".")[1:-1])
        others = [finder for finder in sys.meta_path if finder is not self]
        try:
            found = [finder.find_spec(fullname, [str(folder)]) for finder in others]
        except ImportError as error:
            raise missing(fullname) from error
        spec = next((one for one in found if one is not None), None)
        if spec is None:
            raise missing(fullname)
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: an alias has no code."""


_FINDER = _Finder()
