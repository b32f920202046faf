"""What static activations cost the outputs of a model, and what they would cost with qparams computed at run time.

A static scale fits all inputs and all rows of a tensor, so a few values that reach far leave the others few steps. How
much that costs is measured: the model runs on the data with the grids that it was calibrated to, and once more with
the inputs of its linears and convolutions each on the grid of its own values. Where outputs are poor, each observer
rounds alone, on one batch: errors of different tensors are nearly independent, so their powers add, and what makes a
large part of the error alone is the reason for it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..ops import CONV, CONVOLUTION, LINEAR, factors
from ..pt2e.observed import ObserverReading, QParams, read_observer, read_qparams
from ..pt2e.record import OutputErrors, Record
from ..qparams import affine_qparams, fake_quantize, min_max
from ..sqnr import decibels, differences, floating, power
from ..where import in_graph
from .stand_ins import with_stand_ins

__all__ = ["MeasuredOutputs"]

_PRODUCTS = frozenset((*LINEAR, *CONV, *CONVOLUTION))
_INPUT, _WEIGHT = 0, 1  # places in `factors`
_POOR = 15.0
"""dB; an error of more than a sixth of the signal. Below it single observers are measured."""
_NAMED = 3


class MeasuredOutputs:
    """Adds up the errors of batches.

    Args:
        prepared: a calibrated model; stays as it is.
        record: its record.
        readings: its observers by their paths. Those without a range do not round, but for those of weights.
    """

    def __init__(self, prepared: GraphModule, record: Record, readings: dict[str, ObserverReading]) -> None:
        self._static_inputs = False
        self._rounded: dict[str, list[_Rounded]] = {}
        self._first: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None

        def static(name: str, call: Node) -> nn.Module:
            self._static_inputs |= not readings[name].is_dynamic and _feeds(call, _INPUT)
            return _Rounded(readings[name]) if readings[name].has_range else nn.Identity()

        def rounded(name: str, call: Node) -> nn.Module:
            module = static(name, call)
            if isinstance(module, _Rounded):
                self._rounded.setdefault(name, []).append(module)
            return module

        def of_weights(name: str, call: Node) -> nn.Module:  # in models prepared for training
            return static(name, call) if _feeds(call, _WEIGHT) else nn.Identity()

        self._twins = with_stand_ins(prepared, readings, rounded), with_stand_ins(prepared, readings, of_weights)
        _round_inputs(self._twins[1])
        for name, module in _round_constants(self._twins[0], record, readings, everywhere=True):
            self._rounded.setdefault(name, []).append(module)
        _round_constants(self._twins[1], record, readings, everywhere=False)
        self._signal, self._noise = 0.0, [0.0, 0.0]

    def include(self, exact: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One batch, and what the model returns for it without rounding."""
        if self._static_inputs:
            self._first = self._first or (exact, args, kwargs)
            self._signal += power(floating(exact))
            for index, twin in enumerate(self._twins):
                self._noise[index] += power(differences(exact, twin(*args, **kwargs)))

    def found(self) -> OutputErrors | None:
        """None where no product has a static input, or the outputs say nothing."""
        static, dynamic = (decibels(self._signal, noise) for noise in self._noise)
        if not (math.isfinite(static) and math.isfinite(dynamic)):
            return None
        return OutputErrors(static, dynamic, self._worst() if static < _POOR else {})

    def _worst(self) -> dict[str, float]:
        """SQNR on the first batch with one observer rounding alone, of those that cost most, the worst first."""
        if self._first is None:
            return {}
        exact, args, kwargs = self._first
        every = [module for modules in self._rounded.values() for module in modules]
        found: dict[str, float] = {}
        for name, modules in self._rounded.items():
            for module in every:
                module.rounds = any(module is one for one in modules)
            with torch.no_grad():
                found[name] = decibels(
                    power(floating(exact)), power(differences(exact, self._twins[0](*args, **kwargs)))
                )
        ranked = sorted((pair for pair in found.items() if math.isfinite(pair[1])), key=lambda pair: pair[1])
        return dict(ranked[:_NAMED])


def _feeds(call: Node, place: int) -> bool:
    return any(user.target in _PRODUCTS and factors(user)[place] is call for user in call.users)


def _round_inputs(twin: GraphModule) -> None:
    """Before each product whose input was observed; the other readers of that tensor see it exactly."""
    for gm in [gm for gm in twin.modules() if isinstance(gm, GraphModule)]:
        gm.add_module("_at_run_time", _RoundedAtRunTime())
        for node in [node for node in gm.graph.nodes if node.target in _PRODUCTS]:
            x = factors(node)[0]
            if isinstance(x, Node) and x.op == "call_module":
                with gm.graph.inserting_before(node):
                    node.replace_input_with(x, gm.graph.call_module("_at_run_time", (x,)))
        gm.recompile()


def _round_constants(
    twin: GraphModule, record: Record, readings: dict[str, ObserverReading], everywhere: bool
) -> list[tuple[str, _Rounded]]:
    """A prepared model does not call the observers of constants. Unless `everywhere`, products alone read integers.

    Returns what was inserted, with the name of its observer.
    """
    made = []
    nodes = {_name(node): node for gm in twin.modules() if isinstance(gm, GraphModule) for node in gm.graph.nodes}
    for number, point in enumerate(point for point in record.points if point.constant):
        constant, reading = nodes[point.producer], readings[point.observer]
        readers = {nodes[name] for name in point.consumers if everywhere or nodes[name].target in _PRODUCTS}
        if readers and not reading.writes_pairs:
            made.append((point.observer, _Rounded(reading)))
            _insert(made[-1][1], f"_constant_{number}", constant, readers)
    return made


def _name(node: Node) -> str:
    return in_graph(node.graph.owning_module, node.name)


def _insert(module: nn.Module, name: str, source: Node, readers: set[Node]) -> None:
    gm: Any = source.graph.owning_module
    gm.add_module(name, module)
    with gm.graph.inserting_after(source):
        call = gm.graph.call_module(name, (source,))
    source.replace_all_uses_with(call, delete_user_cb=readers.__contains__)
    gm.recompile()


class _Rounded(nn.Module):
    """To the grid of an observer, which sees the first tensor when it has no range; nothing where there is no grid.

    rounds: False lets every value pass.
    """

    def __init__(self, reading: ObserverReading) -> None:
        super().__init__()
        self.rounds = True
        self._reading = reading
        self._grid: QParams | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounds:
            return x
        if self._grid is None:
            self._grid = read_qparams(self._reading if self._reading.has_range else _after(self._reading, x))
        grid = self._grid
        if grid.scale is None or grid.zero_point is None or grid.dtype.is_floating_point:
            return x
        bounds = grid.quant_min, grid.quant_max
        return fake_quantize(x, grid.scale, grid.zero_point, *bounds, axis=grid.axis, group_size=grid.group_size)


def _after(reading: ObserverReading, x: Tensor) -> ObserverReading:
    observer = copy.deepcopy(reading.observer)
    observer(x)
    return read_observer(observer)


class _RoundedAtRunTime(nn.Module):
    """To 256 steps over the range of its values."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel() or not x.is_floating_point():
            return x
        scale, zero_point = affine_qparams(*min_max(x), -128, 127, dtype=torch.int8)
        return fake_quantize(x, scale, zero_point, -128, 127)
