"""The pains that users of PT2E report, as a list: each has a test that states in its docstring what must hold."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ITEMS = {
    1: "nothing was quantized",
    2: "no way to see what was quantized, how, and why the rest was not",
    3: "observers without data",
    5: "parameters of batch norm and dropout overwritten by train and eval",
    6: "buffers that are written to",
    7: "weights that are shared",
    12: "checkpoints of prepared models",
    14: "annotations that depend on metadata",
    15: "sharing that depends on order",
    16: "several quantizers on one model",
    17: "one layer kept in float",
    18: "dynamic shapes",
    19: "devices",
    20: "half precision",
    21: "control flow",
    22: "inputs and outputs that are no tensors",
    23: "programs that do not load",
    24: "quantize and dequantize left over",
    28: "integer inputs and outputs",
    30: "saving and loading",
    31: "size of the file",
    39: "errors without words",
}


@functools.cache
def named_in_docstrings() -> set[int]:
    """Numbers after "users' item", or "users' pain", in the docstring of a test or of its file."""
    found: set[int] = set()
    for path in TESTS.rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        tests = (node for node in functions if node.name.startswith("test_"))
        texts = (ast.get_docstring(node) or "" for node in (tree, *tests) if node is not tree or path != Path(__file__))
        for text in texts:
            for numbers in re.findall(r"[Uu]sers'\s+(?:item|pain)s?\s+([\d, and]+)", text):
                found.update(map(int, re.findall(r"\d+", numbers)))
    return found


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: f"{item} {ITEMS[item]}")
def test_a_pain_of_users_has_a_test_that_names_it(item):
    assert item in named_in_docstrings()
