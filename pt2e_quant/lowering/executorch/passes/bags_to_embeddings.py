"""Write embedding_bag, for which ExecuTorch has no kernel, as an embedding and the sum, mean or maximum of each bag."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Symbol, Writer, function
from ....ops import EMBEDDING
from .looks import literal_sizes

__all__ = ["bags_to_embeddings"]

aten = torch.ops.aten
embedding, add_up, where = function(aten.embedding.default), function(aten.sum.dim_IntList), function(aten.where.self)
equal, differs, at_most = function(aten.eq.Tensor), function(aten.ne.Scalar), function(aten.le.Tensor)
matmul, clamp_min = function(aten.mm.default), function(aten.clamp.default)
maximum, is_empty = function(aten.amax.default), function(aten.eq.Scalar)
_MEAN, _MAX = 1, 2


def bags_to_embeddings(gm: GraphModule) -> GraphModule:
    """Of a fixed number of indices, where only the bags are read."""
    write = Writer(gm, "bags_to_embeddings", "_positions_")
    found = [node for node in gm.graph.nodes if node.target in EMBEDDING and "offsets" in bind(node)]
    for node in found:
        (bags, *others) = list(node.users) or [None]
        if others or bags is None or bags.target is not operator.getitem or bags.args[1] != 0:
            continue
        if -1 not in literal_sizes(bind(node)["indices"]) + literal_sizes(bind(node)["offsets"]):
            with write.before(bags, like=node):
                write.replace(bags, _bags(write, bind(node)))
    return tidy(gm) if found else gm


def _bags(write: Writer, bound: dict[str, Any]) -> Any:
    """The rows of each bag are next to each other: [bags, rows, width]; or one matrix says which rows are in which."""
    indices, mode = write(bound["indices"]), bound["mode"]
    rows = embedding(write(bound["weight"]), indices)
    count, width = literal_sizes(rows.node)
    dtype = rows.dtype
    weight = None if bound["per_sample_weights"] is None else write(bound["per_sample_weights"])
    if (bound.get("padding_idx") or 0) >= 0 and bound.get("padding_idx") is not None:
        counted = differs(indices, bound["padding_idx"]).to(dtype)
        weight = counted if weight is None else weight * counted
    length = _length(bound["offsets"], count)
    if length is None:
        member = _member(write, bound, count).to(dtype)
        member = member if weight is None else member * weight.unsqueeze(0)
        if mode == _MAX:
            return _maximum(rows.unsqueeze(0), member.unsqueeze(2))
        total, held = matmul(member, rows), add_up(member, [1], True)
    else:
        rows = rows.reshape([count // length, length, width])
        weight = None if weight is None else weight.reshape([count // length, length, 1])
        if mode == _MAX:
            return maximum(rows, [1]) if weight is None else _maximum(rows, weight)
        total = add_up(rows if weight is None else rows * weight, [1])
        held = None if weight is None else add_up(weight, [1])
    if mode != _MEAN:
        return total
    return total / float(length or 1) if held is None else total / clamp_min(held, 1.0)


def _maximum(rows: Symbol, member: Symbol) -> Any:
    """Of the rows that are in a bag; zero where there is none."""
    outside = is_empty(member, 0)
    writer = rows.writer
    lowest, zero = (writer.constant(torch.full((1,), value, dtype=rows.dtype)) for value in (-math.inf, 0.0))
    largest = maximum(where(outside, lowest, rows), [1])
    return where(is_empty(add_up(member, [1]), 0), zero, largest)


def _member(write: Writer, bound: dict[str, Any], count: int) -> Any:
    """[bags, rows]: whether a row is in a bag. As many bags begin at or before a row as the number of its own says."""
    offsets = write(bound["offsets"])
    (bags,) = literal_sizes(offsets.node)
    position = write.constant(torch.arange(count).unsqueeze(1))
    begun = add_up(at_most(offsets.unsqueeze(0), position), [1])
    bags -= bool(bound["include_last_offset"])
    return equal(begun.unsqueeze(0), write.constant(torch.arange(1, bags + 1).unsqueeze(1)))


def _length(offsets: Node, count: int) -> int | None:
    """How many rows each bag has, where all have as many."""
    value = constant(offsets)
    if offsets.target is aten.arange.start_step:
        value = torch.arange(*offsets.args)  # type: ignore[arg-type]
    if value is None or value.numel() == 0 or count == 0:
        return None
    length = count // value.numel()
    return length if length and torch.equal(value.long(), torch.arange(0, count, length)) else None
