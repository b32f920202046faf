"""Run passes: on one graph or on all that are nested in it, naming the one that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.fx import GraphModule

from ..errors import QuantizationError
from ..graph.attributes import set_attribute
from ..graph.module import ExportedModule, clone
from ..graph.nested import bodies, is_quantized_inside
from ..meta import NESTED_KEY

__all__ = ["Pass", "naming", "run_everywhere", "run_pass"]

Pass = Callable[[GraphModule], GraphModule]


def run_everywhere(step: Pass, gm: GraphModule, name: str | None = None) -> ExportedModule:
    """Run one pass on the graph, then on each graph nested in the result that is to be quantized like it.

    Raises:
        QuantizationError: the pass failed.
    """
    result = run_pass(step, gm, name)
    for target, body in bodies(result):
        if is_quantized_inside(result, target):
            set_attribute(result, target, run_everywhere(step, body, name))
    return result


def run_pass(step: Pass, gm: GraphModule, name: str | None = None) -> ExportedModule:
    """Run one pass; an unexpected failure inside it is reported with the name of the pass.

    Raises:
        QuantizationError: the pass failed.
    """
    name = str(name or getattr(step, "__name__", type(step).__name__))
    with naming(name, str(gm.meta.get(NESTED_KEY, "this graph"))):
        result = step(gm)
    if not isinstance(result, GraphModule):
        raise QuantizationError(f"pass {name!r} must return a GraphModule, it returned {type(result).__name__}")
    if not result.graph.find_nodes(op="output"):
        raise QuantizationError(
            f"pass {name!r} returned a graph without an output; Graph.graph_copy returns that for graph.output(...), "
            "and copy.deepcopy(graph) keeps it"
        )
    return result if isinstance(result, ExportedModule) else clone(result)


@contextmanager
def naming(name: str, where: str) -> Iterator[None]:
    """Around a pass: what it fails with says which pass it was, and on which graph.

    Raises:
        QuantizationError: the pass failed.
    """
    try:
        yield
    except QuantizationError:
        raise
    except Exception as error:
        raise QuantizationError(f"pass {name!r} failed on {where}: {type(error).__name__}: {error}") from error
