"""What an export fixed, so that train() cannot change it: the user's own branches on `self.training`, momentum=None,
and attention of torch.nn that was exported in evaluation, where its dropout leaves no trace.

The graph holds one side of a branch alone, and no trace of the other. What tells of it is the source: nodes know the
lines that computed them, and so the functions, in which a test reads `self.training`, or a parameter `training`.
Torch's own files do not count, nor do tests that turn on checkpointing, which computes the same. A function that left
no node cannot be seen: stochastic depth that passes its input on.

Before this: `prepare`. After it: training.
"""

from __future__ import annotations

import ast
import functools
import linecache
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ...arguments import bind
from ...errors import CaptureWarning
from ...graph.nested import every_node
from ...ops import ATTENTION, DROPOUT, SOFTMAX
from ...passes.fold_batch_norm import is_batch_norm
from ...where import locate, module_path, module_type, type_name

__all__ = ["warn_of_what_is_fixed"]

_FRAME = re.compile(r'File "([^"<]+)", line (\d+), in ')
_ATTENTION = type_name(nn.MultiheadAttention)
_TORCH = str(Path(torch.__file__).parent)
_CALLER = 6  # frames between a warning and the call of prepare_qat_pt2e: its two decorators are some
_MOST = 8

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


def warn_of_what_is_fixed(gm: GraphModule, training: bool) -> None:
    """One warning each: lines of branches on `self.training`, batch norms that keep their statistics, attention.

    training: the mode of the export
    """
    nodes = every_node(gm)
    branches = sorted(_branches(nodes))
    if branches:
        lines = "".join(f"\n  {line}" for line in branches[:_MOST]) + ("\n  ..." if len(branches) > _MOST else "")
        _warn(
            f"the export fixed which side of these branches is taken, and train() cannot change it:{lines}\n"
            "  If they differ in what they compute, export the model in the mode that it is to be trained in."
        )
    still = [node for node in nodes if is_batch_norm(node) and _keeps_statistics(node)]
    if still:
        _warn(
            f"running statistics of {len(still)} batch norms never move, since their momentum is 0 here:\n"
            f"{locate(still[0])}\n  BatchNorm(momentum=None), an average over all batches, is exported so in "
            "evaluation. Give it a momentum, such as 0.1, before export."
        )
    attending = [] if training else _without_dropout(nodes)
    if attending:
        _warn(
            f"train() cannot bring back the dropout of {len(attending)} nn.MultiheadAttention, which an export in "
            f"evaluation leaves out:\n{locate(attending[0])}\n  Where they have one (nn.TransformerEncoderLayer has "
            "0.1), export the model in training mode; train() and eval() switch it then."
        )


def _without_dropout(nodes: Iterable[Node]) -> list[Node]:
    """The softmax, or what has it inside, of each nn.MultiheadAttention that holds no dropout."""
    inside: dict[str | None, list[Node]] = {}
    for node in nodes:
        if node.op == "call_function" and module_type(node) == _ATTENTION:
            inside.setdefault(module_path(node), []).append(node)
    silent = [part for part in inside.values() if not any(node.target in DROPOUT for node in part)]
    return [next((node for node in part if node.target in (*SOFTMAX, *ATTENTION)), part[0]) for part in silent]


def _warn(message: str) -> None:
    warnings.warn(message, CaptureWarning, stacklevel=_CALLER)


def _keeps_statistics(norm: Node) -> bool:
    arguments = bind(norm)
    return arguments.get("momentum") == 0.0 and arguments.get("running_mean") is not None


# --- branches ---------------------------------------------------------------------------------------------------------


def _branches(nodes: Iterable[Node]) -> Iterator[str]:
    """'model.py:41: if self.training:' for each branch in the functions that computed nodes."""
    traces = {node.meta["stack_trace"] for node in nodes if node.meta.get("stack_trace")}
    frames = {frame for trace in traces for frame in _FRAME.findall(trace) if not frame[0].startswith(_TORCH)}
    functions = {function for file, line in frames if (function := _function_at(file, int(line))) is not None}
    for file in {file for file, _ in functions}:
        for line in set().union(*(_tests(file, first) for of, first in functions if of == file)):
            yield f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"


def _function_at(file: str, line: int) -> tuple[str, int] | None:
    """The file and the first line of the innermost function around a line; None where none of the file can matter."""
    around = [one for one in _functions(file).values() if one.lineno <= line <= (one.end_lineno or one.lineno)]
    return (file, max(one.lineno for one in around)) if around else None


@functools.lru_cache(maxsize=256)
def _functions(file: str) -> dict[int, Function]:
    """The functions of a file, by their first lines; none where it does not speak of training, or is no source."""
    text = "".join(linecache.getlines(file))
    try:
        tree = ast.parse(text) if "training" in text else ast.Module([], [])
    except SyntaxError:
        return {}
    return {one.lineno: one for one in ast.walk(tree) if isinstance(one, Function)}


def _tests(file: str, first: int) -> set[int]:
    """The lines of the tests on the mode in one function, and in those of its file that it hands `self.training`."""
    functions = _functions(file)
    parameters = _parameters(functions[first])
    calls = [one for one in ast.walk(functions[first]) if isinstance(one, ast.Call)]
    given = {
        ast.unparse(call.func).rpartition(".")[2]
        for call in calls
        if any(_reads_mode(value, parameters) for value in (*call.args, *(one.value for one in call.keywords)))
    }
    return _own_tests(functions[first]).union(
        *(_own_tests(one) for one in functions.values() if one.name in given and "training" in _parameters(one))
    )


def _own_tests(function: Function) -> set[int]:
    parameters = _parameters(function)
    tests = [one.test for one in ast.walk(function) if isinstance(one, (ast.If, ast.IfExp, ast.While))]
    return {test.lineno for test in tests if _reads_mode(test, parameters) and "checkpoint" not in ast.unparse(test)}


def _parameters(function: Function) -> list[str]:
    return [argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)]


def _reads_mode(test: ast.expr, parameters: list[str]) -> bool:
    for part in ast.walk(test):
        if isinstance(part, ast.Attribute) and part.attr == "training" and isinstance(part.value, ast.Name):
            if part.value.id == next(iter(parameters), None):
                return True
        elif isinstance(part, ast.Name) and part.id == "training" and "training" in parameters:
            return True
    return False
