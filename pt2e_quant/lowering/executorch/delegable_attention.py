"""Attention for XNNPACK, on (batch * heads, length, width): it multiplies batches of matrices in three dimensions.

It also reshapes to sizes of which one may be dynamic. Where one is, attention stays inside a delegate whole. Where
batch and length are, heads must be split and merged outside of any delegate: then all from the scores to the mixed
values is one delegate, and all between two attentions another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...graph.module import tidy
from ...graph.write import emit
from ...meta import PORTABLE
from ...ops import ADD, MUL, is_call, op_name

__all__ = ["attention_on_merged_heads", "moves_stay_with_their_reshapes"]

aten = torch.ops.aten
_BY = "lowering"
_BETWEEN = "moves values between two reshapes outside, where a delegate of its own would cost more than it saves"


def attention_on_merged_heads(gm: GraphModule) -> GraphModule:
    """Let matmul, scores and softmax run as bmm and 3-d operators.

    Scores have two dynamic sizes where the length is dynamic, so they must never be reshaped.
    """
    masks: dict[tuple[Node, bool], Node] = {}
    for node in list(gm.graph.nodes):
        chain = _attention_chain(node)
        if chain is None:
            continue
        scores, *between = chain
        free = _is_free(scores)
        with gm.graph.inserting_before(chain[-1]):
            value = emit(scores, _BY, aten.bmm.default, *(_merge(scores, one) for one in scores.args[:2]))
            for step in between:
                if step.target is aten.matmul.default:
                    value = emit(step, _BY, aten.bmm.default, value, _merge(step, step.args[1]))
                    continue
                others = [_mask(step, one, masks, scores) if isinstance(one, Node) else one for one in step.args[1:]]
                value = emit(step, _BY, step.target, value, *others, **step.kwargs)
            if free:
                value = emit(scores, _BY, aten.unflatten.int, value, 0, [-1, _sizes(chain[-1])[1]])
            else:
                value = emit(scores, _BY, aten.view.default, value, _sizes(chain[-1]))
        chain[-1].replace_all_uses_with(value)
        gm.graph.erase_node(chain[-1])
    return tidy(gm)


def _attention_chain(scores: Node) -> list[Node] | None:
    """matmul, its scaling and mask, softmax over the last dimension, matmul; each read by the next only.

    Where sizes are free also the product after it, which zeroes rows that see nothing.
    """
    chain = [scores]
    if not is_call(scores) or scores.target is not aten.matmul.default or scores.meta["val"].dim() < 4:
        return None
    while len(chain[-1].users) == 1:
        last, (user,) = chain[-1], chain[-1].users
        chain.append(user)
        if not is_call(user) or user.args[0] is not last:
            return None
        if user.target is aten.matmul.default:
            return _whole(chain) if any(one.target is aten.softmax.int for one in chain) else None
        if user.target is aten.softmax.int:
            if user.args[1] not in (-1, last.meta["val"].dim() - 1):
                return None
        elif user.target not in (*ADD, *MUL) or _names(user) != _names(scores) or not _is_mask(user, scores):
            return None
    return None


def _whole(chain: list[Node]) -> list[Node] | None:
    """The chain, when its tensors can be merged and taken apart again."""
    scores, mixed = chain[0], chain[-1]
    if _names(chain[-2])[:-2] != _names(mixed)[:-2]:
        return None
    factors = (*scores.args[:2], mixed.args[1], mixed)
    if not _is_free(scores):
        return None if any(_merged_sizes(one) is None for one in factors) else chain
    if any(len(_sizes(one)) != 4 or _sizes(one)[1] == -1 for one in factors):
        return None
    users = list(mixed.users)
    if len(users) == 1 and users[0].target in MUL and users[0].args[0] is mixed and _is_mask(users[0], scores):
        return [*chain, users[0]]
    return chain


def _is_free(scores: Node) -> bool:
    """Both batch and length are dynamic."""
    return _merged_sizes(scores.args[0]) is None


def _is_mask(step: Node, scores: Node) -> bool:
    """The other operand is a number, or has the same values for all heads: and for all of the batch, unless sizes are
    free, when it is repeated for each head, once for all layers."""
    other = step.args[1]
    if not isinstance(other, Node):
        return True
    shape = _sizes(other)
    if len(shape) <= 2 or all(size == 1 for size in shape[:-2]):
        return True
    return _is_free(scores) and len(shape) == 4 and shape[1] == 1 and _names(other)[0] == _names(scores)[0]


def _mask(step: Node, mask: Node, known: dict[tuple[Node, bool], Node], scores: Node) -> Node:
    """The operand for merged heads, made once."""
    sizes = _sizes(mask)
    repeated = len(sizes) == 4 and sizes[0] != 1
    if (mask, repeated) not in known:
        value = mask
        if repeated:
            value = emit(step, _BY, aten.expand.default, mask, [-1, _sizes(scores)[1], -1, -1])
            value = emit(step, _BY, aten.flatten.using_ints, value, 0, 1)
        for _ in range(0 if repeated else len(sizes) - 3):
            value = emit(step, _BY, aten.squeeze.dim, value, 0)
        known[mask, repeated] = value
    return known[mask, repeated]


def _merge(like: Node, tensor: Any) -> Node:
    """What reshape would do; of that, export writes the sizes that it computes instead of -1."""
    sizes = _merged_sizes(tensor)
    copied = emit(like, _BY, aten.contiguous.default, tensor)
    if sizes is None:
        return emit(like, _BY, aten.flatten.using_ints, copied, 0, 1)
    return emit(like, _BY, aten.view.default, copied, sizes)


def _merged_sizes(tensor: Any) -> list[int] | None:
    """(batch * heads, rows, columns), with -1 for the one that is dynamic; None when there are more."""
    sizes = _sizes(tensor)
    if sizes.count(-1) > 1:
        return None
    batch = sizes[:-2]
    return [-1 if -1 in batch else math.prod(batch), *sizes[-2:]]


def moves_stay_with_their_reshapes(gm: GraphModule) -> GraphModule:
    """Keep transposes outside where all around them is reshapes that XNNPACK cannot take."""
    for node in list(gm.graph.nodes):
        source = node.all_input_nodes[0] if _is_free_reshape(node) else None
        if source is not None and op_name(node) in ("reshape", "flatten") and not source.meta["val"].is_contiguous():
            with gm.graph.inserting_before(node):  # what export would do, out of our reach
                node.replace_input_with(source, emit(node, _BY, aten.contiguous.default, source))
    kept = {node for node in gm.graph.nodes if is_call(node) and op_name(node) in _MOVES}
    while True:
        inside = {
            node for node in kept for near in (*node.all_input_nodes, *node.users)
            if near not in kept and not _is_free_reshape(near)
        }  # fmt: skip
        if not inside:
            break
        kept -= inside
    for node in kept:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), PORTABLE: _BETWEEN}
    return gm


_MOVES = ("transpose", "permute", "contiguous", "clone")


def _is_free_reshape(node: Node) -> bool:
    return is_call(node) and op_name(node) in _RESHAPES and _sizes(node).count(-1) > 1


_RESHAPES = ("view", "reshape", "flatten", "unflatten", "expand", "unsqueeze")


def _sizes(tensor: Any) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in tensor.meta["val"].shape]


def _names(node: Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]
