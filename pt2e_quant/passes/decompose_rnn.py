"""Write LSTM, GRU and RNN layers as the linears, gates and steps that they stand for.

An exported nn.LSTM is one operator, in which no quantizer finds a linear. Here it becomes one linear over the inputs of
all steps, and for each step one over the state before it: the weights are stored once, however many steps there are.
Formulas and the order of gates are those of torch.nn.LSTM, torch.nn.GRU and torch.nn.RNN.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph.module import tidy
from ..graph.write import emit
from ..ops import RNN
from ..reasons import refuse

__all__ = ["decompose_rnn"]

aten = torch.ops.aten
_BY = "decompose_rnn"


def decompose_rnn(gm: GraphModule) -> GraphModule:
    """Unroll every recurrent layer; values agree up to rounding. The length is fixed: torch.export sees to that.

    Packed sequences, and dropout in training, stay whole, with the reason.
    """
    layers = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in RNN]
    for node in layers:
        obstacle = _obstacle(node)
        if obstacle is not None:
            refuse(node, _BY, f"captured as one op and not unrolled: {obstacle}", "composite_op")
            continue
        with gm.graph.inserting_before(node):
            _replace(node, _unrolled(node))
    return tidy(gm) if layers else gm


def _obstacle(node: Node) -> str | None:
    if node.target._overloadname == "data":  # type: ignore[union-attr]
        return "its sequences are packed (pack_padded_sequence); pad them in the model instead"
    bound = bind(node)
    if bound["train"] and bound["dropout"]:
        return "it was captured in training mode with dropout; call model.eval() before export"
    return None


class _Weights(NamedTuple):
    """Parameters of one layer in one direction. `projection`: of an LSTM with proj_size, from cell to state."""

    of_input: Node
    of_state: Node
    input_bias: Node | None
    state_bias: Node | None
    projection: Node | None


def _unrolled(node: Node) -> list[Node]:
    """What the operator returns: the outputs of all steps, and the last states of all layers and directions."""
    bound = bind(node)
    lstm = "hx" in bound and isinstance(bound["hx"], (list, tuple))
    states = list(bound["hx"]) if lstm else [bound["hx"]]
    time = 1 if bound["batch_first"] else 0
    directions = 2 if bound["bidirectional"] else 1
    projected = lstm and states[0].meta["val"].shape[-1] != states[1].meta["val"].shape[-1]
    parameters = _parameters(list(bound["params"]), bound["has_biases"], projected)
    step = _STEPS[node.target._schema.name.partition("::")[2]]  # type: ignore[union-attr]
    value, last = bound["input"], [[] for _ in states]  # type: ignore[var-annotated]
    for layer in range(bound["num_layers"]):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            first = [emit(node, _BY, aten.select.int, state, 0, index) for state in states]
            steps, final = _scan(node, value, first, parameters[index], step, time, backwards=direction == 1)
            outputs.append(emit(node, _BY, aten.stack.default, steps, time))
            for collected, state in zip(last, final, strict=True):
                collected.append(state)
        value = outputs[0] if directions == 1 else emit(node, _BY, aten.cat.default, outputs, -1)
    return [value, *(emit(node, _BY, aten.stack.default, collected, 0) for collected in last)]


def _parameters(flat: list[Node], biased: bool, projected: bool) -> list[_Weights]:
    count = 2 + 2 * biased + projected
    parts = []
    for start in range(0, len(flat), count):
        own = flat[start : start + count]
        input_bias, state_bias = (own[2], own[3]) if biased else (None, None)
        parts.append(_Weights(own[0], own[1], input_bias, state_bias, own[-1] if projected else None))
    return parts


Step = Callable[[Node, Node, list[Node], _Weights], list[Node]]
"""(the operator, the linear of one step's input, the states before, weights) -> the states behind, the output first."""


def _scan(
    node: Node, value: Node, states: list[Node], weights: _Weights, step: Step, time: int, backwards: bool
) -> tuple[list[Node], list[Node]]:
    """The outputs of all steps in order of time, and the states behind the last one."""
    gates = emit(node, _BY, aten.linear.default, value, weights.of_input, weights.input_bias)
    order = range(value.meta["val"].shape[time])
    outputs = {}
    for index in reversed(order) if backwards else order:
        states = step(node, emit(node, _BY, aten.select.int, gates, time, index), states, weights)
        outputs[index] = states[0]
    return [outputs[index] for index in order], states


def _lstm(node: Node, of_input: Node, states: list[Node], weights: _Weights) -> list[Node]:
    state, cell = states
    of_state = emit(node, _BY, aten.linear.default, state, weights.of_state, weights.state_bias)
    gates = _parts(node, emit(node, _BY, aten.add.Tensor, of_input, of_state), 4)
    keep_in, forget, out = (emit(node, _BY, aten.sigmoid.default, gates[index]) for index in (0, 1, 3))
    fresh = emit(node, _BY, aten.tanh.default, gates[2])
    kept, added = emit(node, _BY, aten.mul.Tensor, forget, cell), emit(node, _BY, aten.mul.Tensor, keep_in, fresh)
    cell = emit(node, _BY, aten.add.Tensor, kept, added)
    state = emit(node, _BY, aten.mul.Tensor, out, emit(node, _BY, aten.tanh.default, cell))
    if weights.projection is not None:
        state = emit(node, _BY, aten.linear.default, state, weights.projection)
    return [state, cell]


def _gru(node: Node, of_input: Node, states: list[Node], weights: _Weights) -> list[Node]:
    """h' = n + z * (h - n) with n = tanh(x_n + r * h_n)."""
    (state,) = states
    of_state = emit(node, _BY, aten.linear.default, state, weights.of_state, weights.state_bias)
    from_input, from_state = _parts(node, of_input, 3), _parts(node, of_state, 3)
    reset, update = (
        emit(node, _BY, aten.sigmoid.default, emit(node, _BY, aten.add.Tensor, from_input[i], from_state[i]))
        for i in (0, 1)
    )
    remembered = emit(node, _BY, aten.mul.Tensor, reset, from_state[2])
    fresh = emit(node, _BY, aten.tanh.default, emit(node, _BY, aten.add.Tensor, from_input[2], remembered))
    change = emit(node, _BY, aten.mul.Tensor, update, emit(node, _BY, aten.sub.Tensor, state, fresh))
    return [emit(node, _BY, aten.add.Tensor, fresh, change)]


def _rnn(activation: Any, node: Node, of_input: Node, states: list[Node], weights: _Weights) -> list[Node]:
    of_state = emit(node, _BY, aten.linear.default, states[0], weights.of_state, weights.state_bias)
    return [emit(node, _BY, activation, emit(node, _BY, aten.add.Tensor, of_input, of_state))]


_STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_rnn, aten.tanh.default),
    "rnn_relu": partial(_rnn, aten.relu.default),
}


def _parts(node: Node, gates: Node, count: int) -> list[Node]:
    """Equal parts of the last dimension."""
    width = gates.meta["val"].shape[-1] // count
    return [emit(node, _BY, aten.slice.Tensor, gates, -1, i * width, (i + 1) * width) for i in range(count)]


def _replace(node: Node, results: list[Node]) -> None:
    """Let the readers of the operator's results read those; the caller's names of them stay."""
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            node.graph.erase_node(user)
    node.graph.erase_node(node)
