"""Recurrent layers and cells, and which kernel runs them: torch's own, which takes weights that its engine has packed
and has no loop in Python, while torch has it; `gates.unroll` where it does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..qtensor.tensor import is_traced
from . import packed
from .gates import GATES, Held, State, unroll
from .kernel import NAMED
from .products import Weight

__all__ = ["RECURRENT", "Layers", "RecurrentKernel"]


@dataclass(frozen=True, eq=False)
class Layers:
    """A recurrent layer, or a cell, with all its weights.

    mode: a key of GATES.
    weights: for each layer, and in it for each direction, those that `unroll` takes.
    directions: 1 or 2.
    dropout: the probability that a value between two layers is dropped; 0 outside of training.
    """

    mode: str
    weights: Sequence[Sequence[Held]]
    directions: int = 1
    dropout: float = 0.0

    def run(self, x: Tensor, sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
        """All steps.

        Args:
            x: (steps, batch, features), float32; with sizes (rows of all steps one after another, features).
            sizes: how many rows each step has, int64, as a PackedSequence keeps them.
            state: (layers * directions, batch, units) each.

        Returns:
            The outputs in the order of x, and the state at the end of each sequence.

        Raises:
            CalibrationError: x is not finite.
        """
        return self.kernel(x).run(self, x, sizes, state)

    def step(self, x: Tensor, state: State) -> State:
        """One step of a cell: x (batch, features), state (batch, units) each. Errors as of `run`."""
        return self.kernel(x).step(self, x, state)

    def kernel(self, x: Tensor) -> RecurrentKernel:
        """The kernel that `using` names, or the first that fits."""
        named = RECURRENT.get(NAMED.get() or "")
        if NAMED.get() is not None:  # the kernel of another family computes the products of a loop
            return named if named is not None and named.lacks(self, x) is None else _LOOP
        return next(kernel for kernel in RECURRENT.values() if kernel.lacks(self, x) is None)


@dataclass(frozen=True)
class RecurrentKernel:
    """One way to run recurrent layers.

    name:  what `using` and `explain` call it
    why:   the reason for its place in the table
    run:   all steps of layers; step: one of a cell. Arguments as of Layers' methods
    lacks: why it cannot run these layers on this input, or None
    """

    name: str
    why: str
    run: Callable[[Layers, Tensor, Tensor | None, State], tuple[Tensor, State]]
    step: Callable[[Layers, Tensor, State], State]
    lacks: Callable[[Layers, Tensor], str | None]


# --- torch's kernel for weights that its engine has packed ------------------------------------------------------------

_STEPS = {"LSTM": "lstm", "GRU": "gru", "tanh": "rnn_tanh", "relu": "rnn_relu"}


def _run_packed(layers: Layers, x: Tensor, sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
    packed.check_finite(x)
    operands = (x,) if sizes is None else (x, sizes)
    batch_first = (False,) if sizes is None else ()
    depth, training = len(layers.weights) // layers.directions, layers.dropout > 0
    rest = (True, depth, layers.dropout, training, layers.directions == 2, *batch_first)
    cells = [_cell(weights) for weights in layers.weights]
    if layers.mode == "GRU":
        made = torch.quantized_gru(*operands, state[0], cells, *rest)
    else:
        options = {"dtype": torch.qint8, "use_dynamic": True}
        made = torch.quantized_lstm(*operands, list(state), cells, *rest, **options)
    return made[0], tuple(made[1:])


def _step_packed(layers: Layers, x: Tensor, state: State) -> State:
    """Two products and the gates: torch's kernels of whole cells use 7 bits for inputs."""
    packed.check_finite(x)
    multiply = torch.ops.quantized.linear_dynamic.default
    of_input, of_output = (
        multiply(operand, packed.pack(weight), False)
        for operand, weight in zip((x, state[0]), layers.weights[0], strict=True)
    )
    return GATES[layers.mode].step(of_input, of_output, state)


def _cell(weights: Sequence[Any]) -> Any:
    """One layer in one direction, as torch's kernel takes it; inputs get all 8 bits."""
    make = torch.ops.quantized.make_quantized_cell_params_dynamic
    key = ("cell", torch.backends.quantized.engine, weights[1])
    return weights[0].once(key, lambda: make(*map(packed.pack, weights), *map(_bias, weights), False))


def _bias(weight: Weight) -> Tensor:
    return torch.zeros(len(weight.quantized)) if weight.bias is None else weight.bias.float()


def _packed_lacks(layers: Layers, x: Tensor) -> str | None:
    if is_traced():
        return "a graph cannot hold weights that an engine has packed"
    if x.device.type != "cpu" or not x.numel():
        return "not on a CPU, or nothing to compute"
    first = layers.weights[0][0]
    if not isinstance(first, Weight):
        return "weights of float16"
    key = "packed layers", torch._C._get_qengine(), layers.weights
    return first.once(key, lambda: _unpacked(layers))  # type: ignore[no-any-return]


def _unpacked(layers: Layers) -> str | None:
    """Why these weights cannot be packed, or None."""
    if len(layers.weights[0]) > 2:
        return "a projection"
    weights = [one for parts in layers.weights for one in parts]
    if not all(isinstance(one, Weight) for one in weights):
        return "weights of float16"
    return next(filter(None, map(packed.absent, weights)), None)


# --- real numbers -----------------------------------------------------------------------------------------------------


def _run_float(layers: Layers, x: Tensor, sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
    operands, batch_first = ((x,), (False,)) if sizes is None else ((x, sizes), ())
    depth, given = len(layers.weights) // layers.directions, list(state) if len(state) > 1 else state[0]
    rest = (True, depth, layers.dropout, layers.dropout > 0, layers.directions == 2, *batch_first)
    flat = [part for weights in layers.weights for part in _with_biases(weights)]
    op: Any = torch.lstm if layers.mode == "LSTM" else torch.gru
    made = op(*operands, given, flat, *rest)
    return made[0], tuple(made[1:])


def _step_float(layers: Layers, x: Tensor, state: State) -> State:
    op = getattr(torch, f"{_STEPS[layers.mode]}_cell")
    made = op(x, list(state) if len(state) > 1 else state[0], *_with_biases(layers.weights[0]))
    return tuple(made) if len(state) > 1 else (made,)


def _with_biases(weights: Any) -> list[Tensor]:
    """Weights of input and output, their biases, and the projection's weight."""
    biases = [torch.zeros(len(w), device=w.device) if b is None else b.float() for w, b in weights[:2]]
    return [*(w for w, _ in weights[:2]), *biases, *(w for w, _ in weights[2:])]


def _float_lacks(layers: Layers, x: Tensor) -> str | None:
    if not x.numel():
        return "nothing to compute"
    whole = all(isinstance(one, tuple) for parts in layers.weights for one in parts)
    return None if whole else "weights of 8 bits"


# --- the loop ---------------------------------------------------------------------------------------------------------


def _run_loop(layers: Layers, x: Tensor, sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
    rows = [x.shape[1]] * x.shape[0] if sizes is None else sizes.tolist()
    made, last, depth = x if sizes is not None else x.flatten(0, 1), [], len(layers.weights)
    for at in range(0, depth, layers.directions):
        each = []
        for direction in range(layers.directions):
            before = tuple(one[at + direction] for one in state)
            weights = layers.weights[at + direction]
            out, end = unroll(GATES[layers.mode], weights, made, rows, before, reverse=direction == 1)
            each.append(out)
            last.append(end)
        made = torch.cat(each, -1)
        if at + layers.directions < depth:
            made = F.dropout(made, layers.dropout)
    ends = tuple(map(torch.stack, zip(*last, strict=True)))
    return made if sizes is not None else made.unflatten(0, x.shape[:2]), ends


def _step_loop(layers: Layers, x: Tensor, state: State) -> State:
    return unroll(GATES[layers.mode], layers.weights[0], x, [len(x)], state)[1]


_LOOP = RecurrentKernel("loop", "a loop in Python: needs nothing of torch's", _run_loop, _step_loop, lambda *_: None)
_FAST = "torch's kernel on packed weights, while torch has it: no step in Python"
_REAL = "torch's kernel for real numbers, on weights that float16 holds"
_ORDER = (
    RecurrentKernel("packed", _FAST, _run_packed, _step_packed, _packed_lacks),
    RecurrentKernel("float", _REAL, _run_float, _step_float, _float_lacks),
    _LOOP,
)

RECURRENT: dict[str, RecurrentKernel] = {kernel.name: kernel for kernel in _ORDER}
"""The kernels, in the order in which they are asked."""
