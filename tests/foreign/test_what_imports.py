"""Every quantizer that torchao and executorch ship is run through the engine, or stands here with what it lacks."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from pathlib import Path

import pytest

from tests.foreign.foreign_quantizers import QUANTIZERS, missing

pytest.importorskip("torchao")
pytest.importorskip("executorch")

ABSENT = {
    "executorch.backends.mediatek.quantizer.quantizer": "ModuleNotFoundError: No module named 'mtk_converter'",
    "executorch.backends.nxp.quantizer.neutron_quantizer": (
        "RuntimeError: eIQ Neutron SDK not found. To install it, run 'examples/nxp/setup.sh'."
    ),
}
"""Modules whose import needs what only the vendor gives out, with the error. One that imports belongs in QUANTIZERS."""

PARTS = {
    "executorch.backends.arm.quantizer.arm_quantizer_utils": "the parts that Arm's quantizers are composed of",
    "executorch.backends.apple.coreai.quantizer.quantizer": "calls prepare and convert of its own; annotates nothing",
}
"""Modules with classes named Quantizer that are none to hand to prepare_pt2e."""

_CLASS = re.compile(r"^class \w*Quantizer\b.*:", re.MULTILINE)


def expected_errors() -> dict[str, str]:
    """What the listed modules raise here. Those of QUANTIZERS fail as long as a package that they need is missing."""
    needs = {entry.module: entry.needs for entry in QUANTIZERS.values()}
    lacking = {module: missing(packages) for module, packages in needs.items()}
    return ABSENT | {
        module: f"ModuleNotFoundError: No module named {names[0]!r}" for module, names in lacking.items() if names
    }


def import_error(module: str) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that load
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return None


def test_exactly_the_listed_modules_cannot_be_imported():
    modules = sorted({entry.module for entry in QUANTIZERS.values()} | ABSENT.keys())
    errors = {module: error for module in modules if (error := import_error(module)) is not None}
    assert errors == expected_errors()


def shipped(package: str, folder: str) -> set[str]:
    """Modules below a folder of a package, tests aside, that define a class whose name ends in Quantizer."""
    (root,) = importlib.util.find_spec(package).submodule_search_locations
    found = set()
    for file in Path(root, folder).rglob("*quantizer*.py"):
        parts = (package, *file.relative_to(root).with_suffix("").parts)
        if not {"test", "tests"} & set(parts) and _CLASS.search(file.read_text(encoding="utf-8")):
            found.add(".".join(parts))
    return found


def test_every_module_with_a_quantizer_is_listed():
    modules = shipped("executorch", "backends")
    modules |= shipped("torchao", "quantization/pt2e") | shipped("torchao", "testing/pt2e")
    interface = {"torchao.quantization.pt2e.quantizer.quantizer"}
    assert modules - interface == {entry.module for entry in QUANTIZERS.values()} | ABSENT.keys() | PARTS.keys()
