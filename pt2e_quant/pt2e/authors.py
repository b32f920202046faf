"""Where code of others runs inside the engine: what it raises becomes an error of ours that says whose code it was."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import CalibrationError, QuantizationError
from ..observer.batch import whole_batch
from ..where import locate

__all__ = ["calibrating", "code_of"]


@contextmanager
def code_of(author: str, error: type[QuantizationError] = QuantizationError) -> Iterator[None]:
    """Around a call of what the author of a backend wrote.

    Args:
        author: what is called, and where: 'validate() of MyQuantizer'.

    Raises:
        QuantizationError: of type `error`, for whatever was raised inside, but for errors that are ours already.
    """
    try:
        yield
    except QuantizationError:
        raise
    except Exception as failure:
        raise error(
            f"{author} failed: {type(failure).__name__}: {failure}\n  This is code of the backend's author; the error "
            "that this one stems from has its lines."
        ) from failure


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Around a run of a prepared model: a batch counts as a whole, and one that does not fit is an error with a place.

    Raises:
        CalibrationError: the model failed on the batch.
    """
    with whole_batch(model):
        try:
            yield
        except (QuantizationError, torch.OutOfMemoryError):
            raise
        except Exception as failure:
            raise CalibrationError(
                f"the prepared model failed on this batch: {type(failure).__name__}: {failure}\n"
                f"{_place(model, failure)}  It was exported for {_inputs(model)}. Give it such inputs alone, without "
                "labels, on its device; sizes that vary are named at export (dynamic_shapes)."
            ) from failure


_ASSIGNED = re.compile(r"\s*(\w+) = ")


def _place(model: nn.Module, failure: Exception) -> str:
    """The node at whose line the generated code stopped, '' where it never got there."""
    if not isinstance(model, GraphModule):
        return ""
    nodes = {node.name: node for node in model.graph.nodes}
    for frame, line in reversed(list(traceback.walk_tb(failure.__traceback__))):
        if "eval_with_key" in frame.f_code.co_filename:
            assigned = _ASSIGNED.match(linecache.getline(frame.f_code.co_filename, line))
            if assigned is not None and assigned.group(1) in nodes:
                return f"  at {locate(nodes[assigned.group(1)])}\n"
    return ""


def _inputs(model: nn.Module) -> str:
    if not isinstance(model, GraphModule):
        return "other inputs"
    values = {node.name: node.meta.get("val") for node in model.graph.find_nodes(op="placeholder")}
    words = [
        f"{name}: {str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else name
        for name, value in values.items()
    ]
    return ", ".join(words) or "no inputs"
