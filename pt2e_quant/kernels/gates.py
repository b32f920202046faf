"""What one step of each kind of recurrent layer computes, and the loop over the steps: runs wherever torch does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .products import Post, Product, Weight

__all__ = ["GATES", "Gates", "Held", "State", "unroll"]

State = tuple[Tensor, ...]
_NO_POST = Post()
Held = Weight | tuple[Tensor, Tensor | None]
"""A weight with its bias: 8 bits with what kernels derive from them, or real numbers that float16 holds."""


@dataclass(frozen=True)
class Gates:
    """One kind of recurrent layer.

    chunks: a weight has so many rows for each unit.
    states: how many tensors the state has; the first one is the output.
    step:   from the products with the input and with the output before, (batch, chunks * units) both, and the state
            before, to the next state.
    """

    chunks: int
    states: int
    step: Callable[[Tensor, Tensor, State], State]


def unroll(
    gates: Gates, weights: Sequence[Held], x: Tensor, sizes: Sequence[int], state: State, *, reverse: bool = False
) -> tuple[Tensor, State]:
    """Run one layer in one direction over all steps; the product with the input is one for all of them.

    Args:
        weights: of the input, of the output before, and of the projection where there is one.
        x: (rows of all steps one after another, features), float32.
        sizes: how many rows each step has: the first ones of the batch, where the longest sequences stand.
        state: (batch, units) each, before the first step.
        reverse: begin at the last step.

    Returns:
        The outputs in the order of x, and the state at the end of each sequence.
    """
    inputs = _product(weights[0], x).split(list(sizes))
    outputs: list[Tensor] = []
    for t in reversed(range(len(inputs))) if reverse else range(len(inputs)):
        running = tuple(one[: sizes[t]] for one in state)
        after = gates.step(inputs[t], _product(weights[1], running[0]), running)
        if len(weights) > 2:
            after = (_product(weights[2], after[0]), *after[1:])
        outputs.append(after[0])
        state = tuple(_with_head(one, head) for one, head in zip(state, after, strict=True))
    return torch.cat(outputs[::-1] if reverse else outputs), state


def _product(held: Held, x: Tensor) -> Tensor:
    """x @ weight.T + bias in float32; x is quantized with the scale of its own range."""
    if isinstance(held, tuple):
        return F.linear(x, *held)
    return Product.compute_dynamic(held, _NO_POST, x)


def _with_head(whole: Tensor, head: Tensor) -> Tensor:
    return head if len(head) == len(whole) else torch.cat([head, whole[len(head) :]])


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    enter, forget, new, leave = (x + h).chunk(4, -1)
    cell = torch.addcmul(forget.sigmoid() * state[1], enter.sigmoid(), new.tanh())
    return leave.sigmoid() * cell.tanh(), cell


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    x_reset, x_keep, x_new = x.chunk(3, -1)
    h_reset, h_keep, h_new = h.chunk(3, -1)
    new = torch.addcmul(x_new, (x_reset + h_reset).sigmoid(), h_new).tanh()
    return (torch.lerp(new, state[0], (x_keep + h_keep).sigmoid()),)


GATES = {
    "LSTM": Gates(4, 2, _lstm),
    "GRU": Gates(3, 1, _gru),
    "tanh": Gates(1, 1, lambda x, h, _: ((x + h).tanh(),)),
    "relu": Gates(1, 1, lambda x, h, _: ((x + h).relu(),)),
}
"""By the mode of a layer; for a plain RNN by its nonlinearity."""
