"""Run in a process of its own: the old roots are gone from torch, and importing any of them raises.

python -m tests.compat.blocked walk               what of the reference's names is missing, as JSON
python -m tests.compat.blocked run program.py     a program under pt2e_quant.compat
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOTS = ("torch.ao", "torch.quantization", *(f"torch.nn.{x}" for x in ("quantized", "qat", "intrinsic", "quantizable")))
API = json.loads((Path(__file__).parents[1] / "reference_api.json").read_text())


class Gone:
    """A finder that raises for the old roots."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if any(f"{name}.".startswith(f"{root}.") for root in ROOTS):
            raise ImportError(f"{name} is gone")


def block() -> None:
    for name in [name for name in sys.modules if any(f"{name}.".startswith(f"{root}.") for root in ROOTS)]:
        del sys.modules[name]
    for root in ROOTS:
        parent, _, last = root.rpartition(".")
        delattr(sys.modules[parent], last)
    sys.meta_path.insert(0, Gone())
    for root in ROOTS:
        try:
            importlib.import_module(root)
        except ImportError:
            continue
        raise RuntimeError(f"{root} is still there")


def has(module: str, name: str) -> bool:
    """Whether a program can import a name from a module, or find it as its attribute."""
    from pt2e_quant.qtensor import QTensor

    if module == "torch.Tensor":  # methods of quantized tensors, which are ours
        return hasattr(QTensor, name)
    module, _, name = f"{module}.{name}".rpartition(".")  # fuse_modules.fuse_modules is a function in a file
    try:
        found = getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError):
        return False
    return not isinstance(found, ModuleType)


def walk() -> dict[str, list[str]]:
    names = [f"{module}.{name}" for module, listed in API["names"].items() for name in listed if not has(module, name)]
    modules = []
    for module in API["modules"]:
        try:
            importlib.import_module(module)
        except ImportError:
            modules.append(module)
    return {"names": names, "modules": modules}


if __name__ == "__main__":
    block()
    if sys.argv[1] == "run":
        from pt2e_quant.compat.__main__ import main

        main(sys.argv[2:])
    else:
        from pt2e_quant.compat import install, load_file

        for name in ("quantize_per_tensor", "quantize_per_channel", "dequantize"):
            delattr(torch, name)
        install()
        print(json.dumps({**walk(), "loaded": repr(load_file(sys.argv[2]))}))
