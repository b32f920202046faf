"""Run a graph on batches of data and see what its nodes compute: one convention for batches, one watcher of values."""

from __future__ import annotations

import linecache
import re
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..arguments import written_values
from ..errors import CalibrationError, QuantizationError
from ..fake_quantize.base import recomputes
from ..ops import memory_of
from ..where import locate

__all__ = [
    "Arguments",
    "Held",
    "Watcher",
    "arguments_of",
    "batches_of",
    "flat_inputs",
    "on_batch",
    "readers_of",
    "run_batch",
    "values_of",
    "writes_to_buffer",
]


class Arguments(NamedTuple):
    """Positional and keyword arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments_of(batch: Any) -> Arguments:
    """The arguments that one batch stands for.

    Args:
        batch: a mapping is keyword arguments; a tuple or a list is positional ones, as a DataLoader gives them;
            anything else is the only argument.
    """
    if isinstance(batch, Arguments):
        return batch
    if isinstance(batch, Mapping):
        return Arguments((), {str(name): value for name, value in batch.items()})
    return Arguments(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})


def batches_of(data: Iterable[Any], asked_by: str) -> Iterator[Arguments]:
    """The arguments of each batch of the data.

    Args:
        data: batches, each as `arguments_of` takes it; a DataLoader too.
        asked_by: what the data is for, for the messages: 'explain(prepared, data)'.

    Raises:
        CalibrationError: it is no collection of batches, or there is none in it.
    """
    if isinstance(data, (torch.Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"{asked_by} takes batches: a list or a DataLoader of tensors, tuples of arguments, or dictionaries of "
            f"keyword arguments. It got {type(data).__name__}; for a single batch, pass [batch]."
        )
    empty = True
    for batch in data:
        empty = False
        yield arguments_of(batch)
    if empty:
        raise CalibrationError(f"{asked_by}: there is no batch in the data")


@contextmanager
def on_batch(model: nn.Module, what: str) -> Iterator[None]:
    """Around a run on data of the user: what goes wrong says where, and what the model was exported for.

    Raises:
        CalibrationError: the model failed on the batch.
    """
    try:
        yield
    except (QuantizationError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        if recomputes():  # checkpointing ends what it computes again by an exception of its own
            raise
        raise CalibrationError(
            f"{what} failed on this batch: {type(failure).__name__}: {failure}\n"
            f"{_place(model, failure)}  {_advice(model)}"
        ) from failure


def _advice(model: nn.Module) -> str:
    if any(type(one).__name__ == "DTensor" for one in model.parameters()):
        return (
            "Nothing gathers its parameters, which are sharded: a graph reads those of its submodules without calling "
            "them. Give fully_shard the whole model, and none of its parts."
        )
    return (
        f"It was exported for {_inputs(model)}. Give it such inputs alone, without labels, on its device; sizes that "
        "vary are named at export (dynamic_shapes)."
    )


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


def run_batch(model: nn.Module, batch: Any) -> list[Any]:
    """The outputs of one call without gradients, flat."""
    args, kwargs = arguments_of(batch)
    with torch.no_grad():
        return pytree.tree_leaves(model(*args, **kwargs))


class Watcher(Interpreter):
    """Runs a graph and shows the value of each node, as soon as it is computed, to a function.

    Args:
        gm: the graph; what it writes to its buffers stays written.
        see: called with each node and its value.
        keep_values: let ops that write to a computed tensor in place write to a copy, so that values that were seen
            stay what they were.
    """

    def __init__(self, gm: GraphModule, see: Callable[[Node, Any], None], *, keep_values: bool = False) -> None:
        super().__init__(gm, garbage_collect_values=not keep_values)
        self._gm = gm
        self._see = see
        self._keep_values = keep_values

    def run_node(self, n: Node) -> Any:
        value = self._run_on_copies(n) if self._keep_values else super().run_node(n)
        self._see(n, value)
        return value

    def _run_on_copies(self, n: Node) -> Any:
        written = written_values(n)
        if not written or writes_to_buffer(n):
            return super().run_node(n)
        copies = {value: self.env[value].clone() for value in written}
        args, kwargs = map_arg((n.args, n.kwargs), lambda source: copies.get(source, self.env[source]))
        return self.call_function(n.target, tuple(args), kwargs)

    def run_batch(self, batch: Any) -> list[Any]:
        """The outputs for one batch, flat, without gradients."""
        with torch.no_grad(), on_batch(self._gm, "the graph"):
            return pytree.tree_leaves(self.run(*flat_inputs(self._gm, batch), enable_io_processing=False))


class Held(dict[Node, Any]):
    """Values of nodes, each dropped after its last reader.

    Args:
        readers: how often each is read, as `readers_of` counts it.
    """

    def __init__(self, readers: Counter[Node]) -> None:
        super().__init__()
        self._readers = readers

    def release(self, node: Node) -> None:
        """A reader of this node is done."""
        self._readers[node] -= 1
        if self._readers[node] == 0:
            self.pop(node, None)


def readers_of(gm: GraphModule) -> Counter[Node]:
    """How often each value is read; once more by the node itself, so that what nobody reads goes at once."""
    return Counter({node: len(node.users) + 1 for node in gm.graph.nodes if node.op != "output"})


def writes_to_buffer(node: Node) -> bool:
    """Whether a node writes to a parameter or buffer, directly or through a view of it."""
    for value in written_values(node):
        while (viewed := memory_of(value)) is not None:
            value = viewed
        if value.op == "get_attr":
            return True
    return False


def values_of(gm: GraphModule, batch: Any, names: Collection[str]) -> tuple[list[Any], dict[str, Any]]:
    """(outputs, flat; values of the nodes of these names) for one batch."""
    kept: dict[str, Any] = {}

    def see(node: Node, value: Any) -> None:
        if node.name in names:
            kept[node.name] = value

    return Watcher(gm, see).run_batch(batch), kept


def flat_inputs(gm: GraphModule, batch: Any) -> list[Any]:
    """The values of the graph's placeholders, in their order, for one batch.

    Raises:
        CalibrationError: the batch is not for the arguments of the model.
    """
    args, kwargs = arguments_of(batch)
    codegen = gm.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return [*args, *kwargs.values()]
    names, tree = codegen.pytree_info.orig_args, codegen.pytree_info.in_spec
    count = tree.child(0).num_children
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if set(given) != set(names) or len(args) > count:
        raise CalibrationError(
            f"the model takes the arguments {', '.join(names)}; this batch is for {_described(batch)}"
        )
    positional = [given[name] for name in names[:count]]
    return fx_pytree.tree_flatten_spec((positional, {name: given[name] for name in names[count:]}), tree)


def _described(batch: Any) -> str:
    args, kwargs = arguments_of(batch)
    return ", ".join(filter(None, (f"{len(args)} positional" if args else "", *kwargs))) or "none"
