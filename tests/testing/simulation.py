"""The quantized model computed once more, by hand: float ops on values that are rounded where the annotations say so.

Shares no code with prepare and convert but the plan (which site belongs to which group). The qparams come from the
smallest and largest values by the formula of the spec; rounding is four lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from pt2e_quant.graph.module import is_guard
from pt2e_quant.graph.nested import graphs
from pt2e_quant.passes.decompose import decompositions
from pt2e_quant.passes.runner import run_everywhere
from pt2e_quant.pt2e.capture import capture
from pt2e_quant.pt2e.plan import make_plan
from pt2e_quant.specs import is_per_channel, is_symmetric
from pt2e_quant.testing import Sketch
from pt2e_quant.testing.running import state_kept

__all__ = ["QParams", "Simulation", "sqnr"]

EPS = 2**-20


@dataclass(frozen=True)
class QParams:
    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def round(self, x: Tensor) -> Tensor:
        """x on the grid of these qparams, in the arithmetic of the q/dq ops: float32, multiplied with 1 / scale."""
        q = torch.clamp(torch.round(x.float() * (1.0 / self.scale)) + self.zero_point, self.low, self.high)
        return ((q - self.zero_point) * self.scale).to(x.dtype)


class Simulation:
    """One sketch under one quantizer whose specs are static and observed by the smallest and largest value.

    batches: what the model is calibrated with.
    """

    def __init__(self, sketch: Sketch, quantizer: Any, batches: Sequence[tuple[Tensor, ...]]) -> None:
        captured = capture(sketch.exported, decompositions(None, quantizer)).gm
        gm = run_everywhere(quantizer.transform_for_annotation, captured)
        self._gm = gm = run_everywhere(quantizer.annotate, gm)
        groups: list[Any] = []
        self._group_of: dict[Any, int] = {}
        for _, part in graphs(gm, opaque=False):
            plan = make_plan(part, "simulation")
            self._group_of |= {site: len(groups) + number for site, number in plan.group_of.items()}
            groups += plan.groups
        ranges = _Ranges(gm, self._group_of, groups)
        for batch in batches:
            with state_kept(gm):
                ranges.run(*(value.clone() for value in tree_leaves(batch)), enable_io_processing=False)
        self.rms = ranges.rms
        self.qparams = [_by_hand(group.spec, *ranges.ends[number]) for number, group in enumerate(groups)]

    def run(self, inputs: tuple[Tensor, ...], only: int | None = None) -> list[Any]:
        """All outputs; `only` rounds one group and leaves the others in float."""
        rounding = _Rounding(self._gm, self._group_of, self.qparams, only)
        with state_kept(self._gm):
            return tree_leaves(
                rounding.run(*(value.clone() for value in tree_leaves(inputs)), enable_io_processing=False)
            )


def _by_hand(spec: Any, low: Tensor, high: Tensor) -> QParams:
    q_low, q_high = spec.bounds
    low, high = torch.clamp(low.float(), max=0.0), torch.clamp(high.float(), min=0.0)
    eps = torch.tensor(spec.constructor.arguments.get("eps", 0.0))
    if is_symmetric(spec.qscheme):
        scale = torch.maximum(torch.maximum(-low, high) / ((q_high - q_low) / 2), eps)
        return QParams(scale, torch.zeros_like(scale), q_low, q_high)
    scale = torch.maximum((high - low) / (q_high - q_low), eps)
    zero_point = torch.clamp(q_low - torch.round(low / scale), q_low, q_high)
    return QParams(scale, zero_point, q_low, q_high)


class _Interpreter(Interpreter):
    """Follows branches into their graphs."""

    def run_node(self, n: Node) -> Any:
        return None if is_guard(n) else super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.higher_order.cond:
            return super().call_function(target, args, kwargs)
        condition, true, false, operands = args
        return self.inside(true if condition else false).run(*operands)

    def inside(self, gm: GraphModule) -> Interpreter:
        raise NotImplementedError


class _Ranges(_Interpreter):
    """Runs the float model and keeps the range of every group: over its members, and over batches."""

    def __init__(self, gm: GraphModule, group_of: dict[Any, int], groups: list[Any]) -> None:
        super().__init__(gm)
        self.ends: dict[int, tuple[Tensor, Tensor]] = {}
        self.rms: dict[int, float] = {}
        self._group_of, self._groups = group_of, groups
        self._groups_of_value: dict[Node, set[int]] = {}
        for site, number in group_of.items():
            self._groups_of_value.setdefault(site if isinstance(site, Node) else site[0], set()).add(number)

    def inside(self, gm: GraphModule) -> Interpreter:
        inner = _Ranges(gm, self._group_of, self._groups)
        inner.ends, inner.rms = self.ends, self.rms
        return inner

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        for number in self._groups_of_value.get(n, ()):
            spec = self._groups[number].spec
            seen = value if value.numel() else value.new_zeros(1)  # no value is on the grid of zero alone
            dims = tuple(range(seen.dim()))
            if is_per_channel(spec.qscheme):
                dims = tuple(dim for dim in dims if dim != spec.axis % seen.dim())
            low = seen.amin(dims, keepdim=True) if dims else seen.clone()
            high = seen.amax(dims, keepdim=True) if dims else seen.clone()
            if not is_per_channel(spec.qscheme):
                low, high = low.reshape(()), high.reshape(())
            if number in self.ends:
                low, high = torch.minimum(low, self.ends[number][0]), torch.maximum(high, self.ends[number][1])
            self.ends[number] = low, high
            rms = float(seen.double().square().mean().sqrt())
            self.rms[number] = min(rms, self.rms.get(number, math.inf))
        return value


class _Rounding(_Interpreter):
    """Runs the float model on rounded values: each output that is claimed, and after it each use that is claimed."""

    def __init__(self, gm: GraphModule, group_of: dict[Any, int], qparams: list[QParams], only: int | None) -> None:
        super().__init__(gm)
        self._group_of, self._qparams, self._only = group_of, qparams, only

    def inside(self, gm: GraphModule) -> Interpreter:
        return _Rounding(gm, self._group_of, self._qparams, self._only)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[Any, Any]:
        def seen(source: Node) -> Any:
            value = self.env[source]
            output, use = self._group_of.get(source), self._group_of.get((source, n))
            if output is not None:
                value = self._round(value, output)
            return value if use is None or use == output else self._round(value, use)

        return torch.fx.node.map_arg(n.args, seen), torch.fx.node.map_arg(n.kwargs, seen)

    def _round(self, value: Tensor, group: int) -> Tensor:
        return value if self._only not in (None, group) else self._qparams[group].round(value)


def sqnr(actual: Sequence[Any], expected: Sequence[Any]) -> float:
    """Signal to quantization noise in dB, over all float outputs together."""
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True) if e.is_floating_point()]
    signal = sum(float(e.square().sum()) for _, e in pairs)
    noise = sum(float((a - e).square().sum()) for a, e in pairs)
    if noise == 0.0:
        return math.inf
    return -math.inf if signal == 0.0 else 10 * math.log10(signal / noise)
