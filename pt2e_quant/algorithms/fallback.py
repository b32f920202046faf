"""Which ops cost a static recipe most of its accuracy, so that they can be quantized dynamically or not at all.

Each linear and each convolution is quantized alone: its input and its output per tensor with the range of the data, its
weight per channel. Then the outputs of the whole model are compared. Errors of different places are nearly independent:
their powers add. Of a model with n of them this takes, for each batch, two runs and n times what comes after an op:
about 2 + n / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import CaptureError
from ..graph.constants import Constants
from ..graph.module import finish
from ..graph.run import Arguments, batches_of
from ..ops import PRODUCTS, RELUS, factors, is_conv_transpose
from ..passes.fold_batch_norm import fold_batch_norm
from ..passes.private_copy import private_copy
from ..passes.runner import run_pass
from ..qparams import affine_qparams, fake_quantize
from ..sqnr import decibels, differences, floating, power
from ..where import module_path
from .calibrated import Batches, rounded_weight, run_again, run_all

__all__ = ["Sensitivity", "worst_ops"]


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one op statically does to the outputs of the model.

    Args:
        node: name of the op.
        sqnr: signal-to-quantization-noise ratio of the model's outputs, in dB.
        share: of the power of all errors, the part that is this one's.
        module: path of the module that it is in; None where export recorded none.
    """

    node: str
    sqnr: float
    share: float
    module: str | None

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.node}{where}: {self.sqnr:.1f} dB when quantized alone, {self.share:.0%} of all error"


@checked(CaptureError)
def worst_ops(
    model: ExportedProgram | GraphModule, batches: Batches, *, target: float, outputs: bool = True
) -> tuple[list[Sensitivity], list[Sensitivity]]:
    """Find the linears and convolutions to keep away from static int8, so that the rest together reach a target.

    Args:
        model: an exported float model. A batch norm counts as part of the op that it is folded into.
        batches: calibration data, as `graph.run.batches_of` takes it; a few batches are enough.
        target: wanted SQNR of the model's outputs, in dB.
        outputs: round what the ops return, as XNNPACK does. False for Inductor, which returns it in float.

    Returns:
        (fall back, keep), worst first. Give the first ones another configuration, or None, with `set_node_name` of the
        quantizer, before its other ops are configured or after.

    Raises:
        CalibrationError: there is no batch.
    """
    gm = run_pass(fold_batch_norm, private_copy(model))
    finish(gm)
    ops = _stored_products(gm)
    held = list(batches_of(batches, "worst_ops"))
    instead = _quantized(gm, ops, held, outputs)
    signal, noise = 0.0, dict.fromkeys(ops, 0.0)
    for batch in held:
        values = run_all(gm, batch)
        exact = floating(values[gm.graph.output_node()])
        signal += power(exact)
        for op in ops:
            noise[op] += power(differences(exact, run_again(gm, values, op, instead[op])))
    found = [
        Sensitivity(op.name, decibels(signal, error), error / max(sum(noise.values()), 1e-300), module_path(op))
        for op, error in sorted(noise.items(), key=lambda item: -item[1])
    ]
    powers = sorted(noise.values(), reverse=True)
    allowed = signal * 10 ** (-target / 10)
    count = next((n for n in range(len(found)) if sum(powers[n:]) <= allowed), len(found))
    return found[:count], found[count:]


def _stored_products(gm: GraphModule) -> list[Node]:
    """The linears and convolutions whose weight no input changes, in graph order."""
    constants = Constants(gm)
    products = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in PRODUCTS]
    return [node for node in products if factors(node)[1] in constants]


def _quantized(gm: GraphModule, ops: list[Node], batches: list[Arguments], outputs: bool) -> dict[Node, _Static]:
    ranges: dict[Node, _Codes] = {}
    rounded = {op: _rounded_last(op) for op in ops}
    watched = {*rounded.values(), *(factors(op)[0] for op in ops)}
    for batch in batches:
        values = run_all(gm, batch)
        for node in watched:
            ranges.setdefault(node, _Codes()).include(values[node])
    return {op: _Static(op, ranges[factors(op)[0]], ranges[rounded[op]] if outputs else None) for op in ops}


def _rounded_last(op: Node) -> Node:
    """Whose range the kernel's output has: that of the clamp which is fused with it, of the op itself without one."""
    readers = list(op.users)
    return readers[0] if len(readers) == 1 and readers[0].target in RELUS else op


class _Codes:
    """256 values with equal steps over the range of some tensors."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def include(self, value: Tensor) -> None:
        self._low, self._high = min(self._low, float(value.min())), max(self._high, float(value.max()))

    def __call__(self, x: Tensor) -> Tensor:
        scale, zero_point = affine_qparams(self._low, self._high, -128, 127, dtype=torch.int8)
        return fake_quantize(x, float(scale), int(zero_point), -128, 127)


class _Static:
    """An op on int8: input and, where it is rounded, output on one grid each, weights per output channel."""

    def __init__(self, op: Node, before: _Codes, after: _Codes | None) -> None:
        self._target: Any = op.target
        self._channels = 1 if is_conv_transpose(op) else 0
        self._before, self._after = before, after

    def __call__(self, x: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        value: Tensor = self._target(self._before(x), rounded_weight(weight, self._channels), *rest, **kwargs)
        return value if self._after is None else self._after(value)
