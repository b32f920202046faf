"""Integer storage for buffers that the model writes to, such as key-value caches. On request, a late step of convert.

    cache.index_put_(at, dequantize(q))      becomes     cache.index_put_(at, q)
    softmax(query @ cache)                               softmax(query @ dequantize(cache))

The buffer takes the qparams of the quantized tensors that are written to it. Moving integers moves the values that they
stand for, so the model computes what it computed with the float buffer, bit for bit; the buffer has a quarter of its
size in float32.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..arguments import mutates
from ..errors import ConversionError, did_you_mean
from ..graph.attributes import attribute, written_attributes
from ..graph.module import is_guard, tidy
from ..graph.values import is_float_tensor, with_value
from ..graph.write import Writer
from ..grid import Grid
from ..ops import is_dequantize, is_value_preserving, memory_of
from ..where import locate
from .record import Record

__all__ = ["make_buffers_integer"]

_Q = torch.ops.quantized_decomposed
_DEQUANTIZE = _Q.dequantize_per_tensor.default
_WAY_OUT = "  Leave this buffer out of integer_buffers, or"


def make_buffers_integer(gm: GraphModule, wanted: Iterable[str], record: Record) -> Record:
    """Change a converted graph in place; the record with the qparams of the buffers.

    Args:
        wanted: names of buffers, or globs ("*.k_cache").

    Raises:
        ConversionError: an entry names no buffer that the graph writes to; what is written is not quantized per tensor
            with static qparams, or with different ones in several places; or the buffer is computed with in place.
    """
    written = [name for name in written_attributes(gm) if attribute(gm, name).dtype.is_floating_point]
    chosen: dict[str, Grid] = {}
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        found = fnmatch.filter(written, entry)
        if not found:
            raise ConversionError(
                f"integer_buffers names {entry!r}, but this model writes to no such float buffer."
                f"{did_you_mean(entry, written)}"
            )
        chosen.update((name, _convert(gm, name)) for name in found if name not in chosen)
    if chosen:
        tidy(gm)
    return replace(record, buffers=chosen)


def _convert(gm: GraphModule, name: str) -> Grid:
    aliases = _aliases(gm, name)
    writes = [node for node in aliases if mutates(node.target)]
    for write in writes:
        if not is_value_preserving(write) or not _values(write, aliases):
            raise ConversionError(
                f"buffer {name!r} cannot hold integers: an op computes with it in place, where only copies of "
                f"quantized values may be written (copy_, index_put_, index_copy_, ...):\n{locate(write)}\n"
                f"{_WAY_OUT} write the result of the computation with copy_."
            )
    qparams = _common_grid(name, writes, aliases)
    for write in writes:
        for written in _values(write, aliases):
            write.replace_input_with(written, _integers(gm, written, write, qparams))
    for node in aliases:
        _read_dequantized(gm, node, aliases, qparams)
    for node in aliases:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            with_value(node, node, lambda v=value: v.to(qparams.dtype))  # type: ignore[misc]
    path, _, leaf = name.rpartition(".")
    setattr(gm.get_submodule(path), leaf, _quantized(name, attribute(gm, name), qparams))
    return qparams


def _aliases(gm: GraphModule, name: str) -> dict[Node, None]:
    """The nodes whose value lies in the memory of the buffer: itself, its views, and the ops that write to it."""
    found: dict[Node, None] = {}
    for node in gm.graph.nodes:
        if (node.op == "get_attr" and node.target == name) or memory_of(node) in found:
            found[node] = None
    return found


def _values(write: Node, aliases: dict[Node, None]) -> list[Node]:
    """The float tensors that an op writes."""
    return [source for source in write.all_input_nodes if source not in aliases and is_float_tensor(source)]


def _common_grid(name: str, writes: list[Node], aliases: dict[Node, None]) -> Grid:
    """The one grid on which all that is written lies.

    What is moved around between its dequantize and the write (cat, slice_scatter, ...) stays on its grid.
    """
    grids: dict[Grid, Node] = {}
    pending = [value for write in writes for value in _values(write, aliases)]
    seen = set(pending)
    while pending:
        value = pending.pop()
        grid = Grid.of(value)
        if grid is not None and is_dequantize(value):
            grids.setdefault(grid, value)
        elif value not in aliases and not (value.op == "call_function" and is_value_preserving(value)):
            raise ConversionError(
                f"buffer {name!r} cannot hold integers: what is written to it is computed in floating point:\n"
                f"{locate(value)}\n{_WAY_OUT} quantize this op with a static per-tensor output spec."
            )
        else:
            sources = [] if value in aliases else [s for s in value.all_input_nodes if is_float_tensor(s)]
            pending += [source for source in sources if source not in seen]
            seen.update(sources)
    if len(grids) != 1:
        what = "\n".join(f"{locate(node)}: scale {g.scale:.6g}, zero point {g.zero_point}" for g, node in grids.items())
        raise ConversionError(
            f"buffer {name!r} cannot hold integers: {len(grids)} different qparams are written to it:\n{what}\n"
            f"{_WAY_OUT} let the tensors that are written share qparams (SharedQuantizationSpec)."
        )
    return next(iter(grids))


def _integers(gm: GraphModule, value: Node, write: Node, qparams: Grid) -> Node:
    """The integers that stand for what is written. Values on the grid are quantized without an error."""
    if value.target is _DEQUANTIZE:
        return value.args[0]  # type: ignore[return-value]
    made = Writer(gm, "integer_buffers")
    with made.before(write):
        return made.call(_Q.quantize_per_tensor.default, value, *qparams.arguments).node


def _read_dequantized(gm: GraphModule, node: Node, aliases: dict[Node, None], qparams: Grid) -> None:
    """Give each reader of the buffer, or of a view of it, a dequantize of its own."""
    dtype = node.meta["val"].dtype if is_float_tensor(node) else torch.float32
    kwargs = {} if dtype is torch.float32 else {"out_dtype": dtype}
    made = Writer(gm, "integer_buffers")
    for reader in [user for user in node.users if user not in aliases and not is_guard(user)]:
        with made.before(reader, like=reader if reader.op == "call_function" else node):
            arguments = (node, *qparams.arguments)  # the buffer's value is float here still, so the op cannot take it
            value = made.call_with_value(_DEQUANTIZE, arguments, kwargs, partial(node.meta.get, "val")).node
        reader.replace_input_with(node, value)


def _quantized(name: str, value: Tensor, qparams: Grid) -> Tensor:
    codes = qparams.quantize(value.detach())
    error = (qparams.dequantize(codes) - value.detach()).abs().max().item() if value.numel() else 0.0
    if not error <= 0.51 * qparams.scale:  # half a step and float32 rounding; written so that NaN fails it
        raise ConversionError(
            f"buffer {name!r} cannot hold integers: it starts with values from {value.min().item():.6g} to "
            f"{value.max().item():.6g}, outside the range of what calibration wrote to it "
            f"({(qparams.quant_min - qparams.zero_point) * qparams.scale:.6g} to "
            f"{(qparams.quant_max - qparams.zero_point) * qparams.scale:.6g}).\n"
            f"{_WAY_OUT} let it start with zeros."
        )
    return codes
