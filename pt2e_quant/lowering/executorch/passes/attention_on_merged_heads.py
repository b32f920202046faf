"""Attention on (batch * heads, length, width): XNNPACK multiplies batches of matrices in three dimensions.

It also reshapes to sizes of which one may be dynamic. Where one is, attention stays inside a delegate whole. Where
batch and length are, heads must be split and merged outside of any delegate: then all from the scores to the mixed
values is one delegate, and all between two attentions another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Symbol, Writer, call, function
from ....ops import ADD, MUL, is_call
from .looks import literal_sizes, merged_batch, names_of_sizes

__all__ = ["attention_on_merged_heads"]

aten = torch.ops.aten
bmm, contiguous, expand = function(aten.bmm.default), function(aten.contiguous.default), function(aten.expand.default)
unflatten = function(aten.unflatten.int)


def attention_on_merged_heads(gm: GraphModule) -> GraphModule:
    """Let matmul, scores and softmax run as bmm and 3-d operators.

    Scores have two dynamic sizes where the length is dynamic, so they must never be reshaped.
    """
    write = Writer(gm, "attention_on_merged_heads")
    masks: dict[Node, Symbol] = {}
    for node in list(gm.graph.nodes):
        chain = _attention_chain(node)
        if chain is not None:
            with write.before(chain[-1], like=node):
                write.replace(chain[-1], _on_merged_heads(write, chain, masks))
    return tidy(gm)


def _on_merged_heads(write: Writer, chain: list[Node], masks: dict[Node, Symbol]) -> Any:
    scores, *between = chain
    value = bmm(*(_merge(write(one)) for one in scores.args[:2]))
    for step in between:
        with write.origin(step):
            if step.target is aten.matmul.default:
                value = bmm(value, _merge(write(step.args[1])))
                continue
            operands = [_mask(write, one, scores, masks) if isinstance(one, Node) else one for one in step.args[1:]]
            value = call(step.target, value, *operands, **step.kwargs)
    sizes = literal_sizes(chain[-1])
    return unflatten(value, 0, [-1, sizes[1]]) if _is_free(scores) else value.view(sizes)


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
        elif user.target not in (*ADD, *MUL) or not _keeps_shape(user, scores) or not _is_mask(user, scores):
            return None
    return None


def _keeps_shape(step: Node, scores: Node) -> bool:
    return names_of_sizes(step) == names_of_sizes(scores)


def _whole(chain: list[Node]) -> list[Node] | None:
    """The chain, when its tensors can be merged and taken apart again."""
    scores, mixed = chain[0], chain[-1]
    if names_of_sizes(chain[-2])[:-2] != names_of_sizes(mixed)[:-2]:
        return None
    factors = [literal_sizes(one) for one in (*scores.args[:2], mixed.args[1], mixed)]
    if not _is_free(scores):
        return None if any(merged_batch(sizes) is None for sizes in factors) else chain
    if any(len(sizes) != 4 or sizes[1] == -1 for sizes in factors):
        return None
    users = list(mixed.users)
    if len(users) == 1 and users[0].target in MUL and users[0].args[0] is mixed and _is_mask(users[0], scores):
        return [*chain, users[0]]
    return chain


def _is_free(scores: Node) -> bool:
    """Both batch and length are dynamic."""
    return merged_batch(literal_sizes(scores.args[0])) is None


def _is_mask(step: Node, scores: Node) -> bool:
    """The other operand is a number, or has the same values for all heads: and for all of the batch, unless sizes are
    free, when it is repeated for each head, once for all layers."""
    other = step.args[1]
    if not isinstance(other, Node):
        return True
    shape = literal_sizes(other)
    if len(shape) <= 2 or all(size == 1 for size in shape[:-2]):
        return True
    same_batch = names_of_sizes(other)[0] == names_of_sizes(scores)[0]
    return _is_free(scores) and len(shape) == 4 and shape[1] == 1 and same_batch


def _mask(write: Writer, mask: Node, scores: Node, known: dict[Node, Symbol]) -> Symbol:
    """The operand for merged heads, made once."""
    if mask not in known:
        sizes, value = literal_sizes(mask), write(mask)
        if len(sizes) == 4 and sizes[0] != 1:
            value = expand(value, [-1, literal_sizes(scores)[1], -1, -1]).flatten(0, 1)
        else:
            for _ in sizes[3:]:
                value = value.squeeze(0)
        known[mask] = value
    return known[mask]


def _merge(factor: Symbol) -> Any:
    """What reshape would do; of that, export writes the sizes that it computes instead of -1."""
    sizes = merged_batch(literal_sizes(factor.node))
    copied = contiguous(factor)
    return copied.flatten(0, 1) if sizes is None else copied.view(sizes)
