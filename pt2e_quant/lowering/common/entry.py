"""How every lowering begins: a private copy of the graph, its nodes marked, and errors that say which step failed.

A mark is the name that a node had in the converted graph; export and compilers pass it on, so that what they made can
be joined with what the user knows.
"""

from __future__ import annotations

import logging
import reprlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ...errors import CaptureError, LoweringError
from ...graph.attributes import own_written
from ...graph.module import ExportedModule, clone, is_guard
from ...graph.nested import every_node, name_nested
from ...meta import ORIGIN_KEY, mark, marks
from ...pt2e.record import record_of
from ...where import locate, node_id
from .provenance import sharing_provenance

__all__ = ["Inputs", "by_origin", "explaining", "origin", "quietly", "take", "written_input"]

# torchao, which ExecuTorch imports, logs which of its CUDA libraries do not load, and torch how torchao uses pytrees;
# its ONNX exporter, that there is no torchvision.
_NOISY_LOGGERS = ("torchao", "torch.export", "torch.utils._pytree", "torch.onnx._internal.exporter._registration")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""


def take(
    model: object, args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None, caller: str
) -> tuple[ExportedModule, Inputs]:
    """A private copy of the model's graph, each node marked with its name, and the inputs to export it with.

    Raises:
        CaptureError: the model is no exported graph, or is prepared and not yet converted.
        LoweringError: there are no example inputs, or they are no tuple and no dict of names.
    """
    _check_kinds(args, kwargs)
    record = record_of(model)
    held = record.example_inputs if record is not None else None
    if isinstance(model, ExportedProgram):
        held, model = model.example_inputs, model.module()
    if not isinstance(model, GraphModule):
        kind = f"the nn.Module {type(model).__name__}" if isinstance(model, nn.Module) else repr(type(model))
        raise CaptureError(
            f"{caller} takes a converted graph or an exported model, got {kind}. "
            "Export it first: torch.export.export(model.eval(), example_inputs)"
        )
    foreign = [node for node in model.graph.nodes if node.op == "call_module" and not is_guard(node)]
    if foreign:
        raise CaptureError(
            f"this graph calls submodules, as a prepared model calls its observers: call convert_pt2e first\n"
            f"  {locate(foreign[0])}"
        )
    if args is None and not kwargs:
        if held is None:
            raise LoweringError(
                "this graph holds no example inputs to export it with: pass them, "
                f"{caller}(model, (x,)), or "
                "prepare the ExportedProgram instead of its module"
            )
        args, kwargs = held
    gm = clone(model)
    own_written(gm)  # without the history that autograd hangs on buffers when the model runs outside of no_grad
    for node in every_node(name_nested(gm)):
        node.meta.pop("from_node", None)  # every later pass would deep-copy the whole chain, for every node
        mark(node, ORIGIN_KEY, node_id(node))
    return gm, (tuple(args or ()), dict(kwargs or {}))


def _check_kinds(args: object, kwargs: object) -> None:
    if not isinstance(args, (tuple, list, type(None))):
        raise LoweringError(f"example_inputs must be a tuple of the positional arguments, got {type(args).__name__}")
    named = kwargs if isinstance(kwargs, dict) else {}
    if not isinstance(kwargs, (dict, type(None))) or not all(isinstance(name, str) for name in named):
        raise LoweringError(f"example_kwargs must be a dict of arguments by name, got {reprlib.repr(kwargs)}")


def written_input(placeholder: Node, by: Node, runtime: str) -> str:
    """Why a model that writes to one of its inputs cannot become a program of that runtime, and the way out."""
    name = placeholder.name
    return (
        f"the model writes to its input {name!r}, and a program of {runtime} leaves the caller's tensors as they are. "
        f"Compute out of place, or on a copy: {name} = {name}.clone()\n    {locate(by)}"
    )


def origin(node: Node) -> str:
    """Name of the node of the converted graph that a node of the exported or lowered graph comes from."""
    return str(marks(node).get(ORIGIN_KEY, node.name))


def by_origin(gm: GraphModule) -> dict[str, Node]:
    """The nodes of a graph by their origins; of several with one origin, the last."""
    return {origin(node): node for node in every_node(gm)}


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turn whatever a compiler or torch.export raises into one error that says which step failed.

    Raises:
        LoweringError: something was raised.
    """
    try:
        with quietly(), sharing_provenance():
            yield
    except LoweringError:
        raise
    except Exception as error:
        causes: list[str] = []
        cause: BaseException | None = error
        while cause is not None:  # compilers wrap what a pass raised
            causes.append(f"{type(cause).__name__}: {str(cause).strip()}")
            cause = cause.__cause__
        raise LoweringError(f"{what}: " + "\n  because of ".join(causes)) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without what compilers, torchao and torch warn of in their own code; a user can do nothing about it."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        for logger in loggers:
            logger.addFilter(_is_error)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_error)


def _is_error(entry: logging.LogRecord) -> bool:
    return entry.levelno >= logging.ERROR
