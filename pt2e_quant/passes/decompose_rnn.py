"""Write LSTM, GRU and RNN layers, and cells, as the linears, gates and steps that they stand for.

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
from ..graph.write import Symbol, Writer, function
from ..ops import RNN, RNN_CELL, op_name
from ..reasons import refuse

__all__ = ["decompose_rnn"]

aten = torch.ops.aten
linear, select = function(aten.linear.default), function(aten.select.int)
dropout = function(aten.dropout.default)
stack, cat = function(aten.stack.default), function(aten.cat.default)
unsqueeze = function(aten.unsqueeze.default)
sigmoid, tanh, relu = function(aten.sigmoid.default), function(aten.tanh.default), function(aten.relu.default)


def decompose_rnn(gm: GraphModule) -> GraphModule:
    """Unroll every recurrent layer, and write out cells; values agree up to rounding. torch.export fixes the length.

    Packed sequences, and dropout in training, stay whole, with the reason. In evaluation the dropouts between layers
    are written out too, for train() to switch on.
    """
    layers = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in (*RNN, *RNN_CELL)]
    write = Writer(gm, "decompose_rnn")
    for node in layers:
        if node.target in RNN_CELL:
            with write.before(node):
                _replace(node, _one_step(node, write))
            continue
        obstacle = _obstacle(node)
        if obstacle is not None:
            refuse(node, "decompose_rnn", f"captured as one op and not unrolled: {obstacle}", "composite_op")
            continue
        with write.before(node):
            _replace(node, _unrolled(node, write))
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

    of_input: Symbol
    of_state: Symbol
    input_bias: Symbol | None
    state_bias: Symbol | None
    projection: Symbol | None


def _unrolled(node: Node, write: Writer) -> list[Symbol]:
    """What the operator returns: the outputs of all steps, and the last states of all layers and directions."""
    bound = bind(node)
    lstm = "hx" in bound and isinstance(bound["hx"], (list, tuple))
    states = [write(state) for state in (bound["hx"] if lstm else [bound["hx"]])]
    time = 1 if bound["batch_first"] else 0
    directions = 2 if bound["bidirectional"] else 1
    projected = lstm and states[0].shape[-1] != states[1].shape[-1]
    parameters = _parameters([write(one) for one in bound["params"]], bound["has_biases"], projected)
    step = _STEPS[op_name(node)]
    value, last = write(bound["input"]), [[] for _ in states]  # type: ignore[var-annotated]
    for layer in range(bound["num_layers"]):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            first = [select(state, 0, index) for state in states]
            steps, final = _scan(value, first, parameters[index], step, time, backwards=direction == 1)
            outputs.append(_stacked(steps, time))
            for collected, state in zip(last, final, strict=True):
                collected.append(state)
        value = outputs[0] if directions == 1 else cat(outputs, -1)
        if bound["dropout"] and layer + 1 < bound["num_layers"]:
            value = dropout(value, bound["dropout"], False)
    return [value, *(_stacked(collected, 0) for collected in last)]


def _stacked(parts: list[Symbol], dimension: int) -> Symbol:
    """One alone is only reshaped: XNNPACK takes no concatenation of one tensor."""
    made: Symbol = stack(parts, dimension) if len(parts) > 1 else unsqueeze(parts[0], dimension)
    return made


def _one_step(node: Node, write: Writer) -> list[Symbol]:
    """What a cell returns: its states after one step."""
    bound = bind(node)
    states = [write(state) for state in (bound["hx"] if isinstance(bound["hx"], (list, tuple)) else [bound["hx"]])]
    biases = [None if bound[name] is None else write(bound[name]) for name in ("b_ih", "b_hh")]
    weights = _Weights(write(bound["w_ih"]), write(bound["w_hh"]), biases[0], biases[1], None)
    of_input = linear(write(bound["input"]), weights.of_input, weights.input_bias)
    return _STEPS[op_name(node).removesuffix("_cell")](of_input, states, weights)


def _parameters(flat: list[Symbol], biased: bool, projected: bool) -> list[_Weights]:
    count = 2 + 2 * biased + projected
    parts = []
    for start in range(0, len(flat), count):
        own = flat[start : start + count]
        input_bias, state_bias = (own[2], own[3]) if biased else (None, None)
        parts.append(_Weights(own[0], own[1], input_bias, state_bias, own[-1] if projected else None))
    return parts


Cell = Callable[[Any, list[Any], _Weights], list[Any]]
"""(the linear of one step's input, the states before, weights) -> the states after, the output first."""


def _scan(
    value: Symbol, states: list[Symbol], weights: _Weights, cell: Cell, time: int, backwards: bool
) -> tuple[list[Symbol], list[Symbol]]:
    """The outputs of all steps in order of time, and the states after the last one."""
    gates = linear(value, weights.of_input, weights.input_bias)
    order = range(value.shape[time])
    outputs = {}
    for index in reversed(order) if backwards else order:
        states = cell(select(gates, time, index), states, weights)
        outputs[index] = states[0]
    return [outputs[index] for index in order], states


def _lstm(of_input: Any, states: list[Any], weights: _Weights) -> list[Any]:
    state, cell = states
    gates = _parts(of_input + linear(state, weights.of_state, weights.state_bias), 4)
    keep_in, forget, out = (sigmoid(gates[index]) for index in (0, 1, 3))
    cell = forget * cell + keep_in * tanh(gates[2])
    state = out * tanh(cell)
    return [state if weights.projection is None else linear(state, weights.projection), cell]


def _gru(of_input: Any, states: list[Any], weights: _Weights) -> list[Any]:
    """h' = n + z * (h - n) with n = tanh(x_n + r * h_n)."""
    (state,) = states
    from_input, from_state = _parts(of_input, 3), _parts(linear(state, weights.of_state, weights.state_bias), 3)
    reset, update = (sigmoid(from_input[i] + from_state[i]) for i in (0, 1))
    fresh = tanh(from_input[2] + reset * from_state[2])
    return [fresh + update * (state - fresh)]


def _rnn(activation: Callable[[Any], Any], of_input: Any, states: list[Any], weights: _Weights) -> list[Any]:
    return [activation(of_input + linear(states[0], weights.of_state, weights.state_bias))]


_STEPS: dict[str, Cell] = {
    "lstm": _lstm, "gru": _gru, "rnn_tanh": partial(_rnn, tanh), "rnn_relu": partial(_rnn, relu),
}  # fmt: skip


def _parts(gates: Any, count: int) -> list[Any]:
    """Equal parts of the last dimension."""
    width = gates.shape[-1] // count
    return [gates.slice(-1, i * width, (i + 1) * width) for i in range(count)]


def _replace(node: Node, results: list[Symbol]) -> None:
    """Let the readers of the operator's results read those; the caller's names of them stay."""
    if len(results) == 1 and node.target in RNN_CELL:
        node.replace_all_uses_with(results[0].node)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]].node)  # type: ignore[index]
            node.graph.erase_node(user)
    node.graph.erase_node(node)
