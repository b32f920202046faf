"""sensitivity: what quantizing each layer does to the outputs, from one forward and one backward run.

Let y be the outputs, a the result of a layer in the float model, and e what quantizing that layer alone does to a. To
first order the outputs move by J e, with J = dy/da. For v of independent signs, E[(v^T J e)^2] = |J e|^2 (Hutchinson, A
stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines, 1990), and v^T J is what one
backward run with v gives, for all layers at once. The product with e is taken for each row (index of the first
dimension) and squared: rows of a batch do not reach each other's outputs, so each is a sample of its own, and where
they do, errors of different rows are nearly independent. The first-order view of a layer's effect is that of Molchanov
et al., Importance Estimation for Neural Network Pruning, arXiv:1906.10771; e is the real error, no bound of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..checks import checked
from ..errors import CaptureError, FileError, QuantizationError
from ..files import open_file, write_file
from ..graph.module import ExportedModule
from ..graph.run import Arguments, Watcher, batches_of, flat_inputs, on_batch, run_batch
from ..sqnr import decibels, differences, floating, power
from .effects import Effects, LayerEffect
from .graft import Grafts
from .layers import Layer

__all__ = ["exact_sensitivity", "layer_noise", "sensitivity", "sqnr_on", "told"]

_SQNR = "SQNR in dB"
_MOST = 1000
"""Probes: the estimate is within 5 % then for a single row, and more change nothing."""


@checked(CaptureError)
def sensitivity(
    exact: ExportedProgram | GraphModule, found: GraphModule, data: Iterable[Any], *, probes: int = 1, seed: int = 0
) -> Effects:
    """Estimate what each quantized layer alone does to the outputs; the formula is above, at the top of this module.

    Args:
        exact: the float model, exported: what was given to prepare_pt2e.
        found: what convert_pt2e made of it.
        data: batches, as `graph.run.batches_of` takes them. The activations of one batch are held at a time.
        probes: backward runs for each batch. The estimate of a power has a relative standard deviation of about
            sqrt(2 / (probes * rows of all batches)).
        seed: of the random signs.

    Returns:
        For each layer the SQNR of the outputs in dB, the lowest first.

    Raises:
        CaptureError: `found` is no converted graph, or does not stem from `exact`; probes or seed is out of range.
        CalibrationError: there is no batch, or a model fails on one.
    """
    grafts = Grafts(exact, found, "sensitivity(exact, found, data)")
    if not 1 <= probes <= _MOST:
        raise CaptureError(f"sensitivity: probes must be at least 1 and at most {_MOST}, got {probes}")
    if not 0 <= seed < 1 << 63:
        raise CaptureError(f"sensitivity: seed must be at least 0 and below 2 ** 63, got {seed}")
    signal, noise = layer_noise(grafts, data, probes, seed)
    rows = [LayerEffect.of(layer, decibels(signal, noise[layer])) for layer in grafts.layers]
    return Effects.ranked("first order", _SQNR, float("inf"), rows)


def layer_noise(
    grafts: Grafts, data: Iterable[Any], probes: int = 1, seed: int = 0
) -> tuple[float, dict[Layer, float]]:
    """(power of the float outputs; of the error that each layer alone makes of them, to first order)"""
    gm, ends = grafts.beside()
    tape = _Tape(gm, ends)
    random = torch.Generator().manual_seed(int(seed))
    signal, noise = 0.0, [0.0] * len(ends)
    for batch in batches_of(data, "sensitivity(exact, found, data)"):
        outputs = tape.run_taped(batch)
        signal += power(floating(outputs))
        for last in range(probes - 1, -1, -1):
            for index, gradient in enumerate(tape.gradients(outputs, random, keep=last > 0)):
                noise[index] += _projected(gradient, tape.errors[index]) / probes
    return signal, dict(zip(grafts.layers, noise, strict=True))


def _projected(gradient: Tensor | None, error: Tensor) -> float:
    """The sum over rows of the squared product of both."""
    if gradient is None or not error.numel():
        return 0.0
    rows = error.shape[0] if error.dim() else 1
    product = (gradient.double() * error.double()).reshape(rows, -1).sum(1)
    return float(product.square().sum())


class _Tape(Watcher):
    """Runs a graph with quantized layers beside the float ones, and keeps what the backward run needs.

    errors: of each layer in the last run, quantized minus float
    """

    def __init__(self, gm: ExportedModule, ends: list[tuple[Node, Node]]) -> None:
        self._values: dict[Node, Tensor] = {}
        super().__init__(gm, lambda node, value: None, keep_values=True)
        self._ends = ends
        self._watched = {node for pair in ends for node in pair}
        self._floats = {end for end, _ in ends}
        self._beside = _only_for({copy for _, copy in ends}, gm)
        self.errors: list[Tensor] = []

    def run_taped(self, batch: Any) -> list[Any]:
        """The outputs, flat, with what their gradients need."""
        with torch.enable_grad(), on_batch(self._gm, "the graph"):
            outputs = pytree.tree_leaves(self.run(*flat_inputs(self._gm, batch), enable_io_processing=False))
        self.errors = [(self._values[copy] - self._values[end]).detach() for end, copy in self._ends]
        return outputs

    def run_node(self, n: Node) -> Any:
        with torch.set_grad_enabled(n not in self._beside):
            value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            return value.detach()  # weights need no gradients
        if n in self._floats and not value.requires_grad:
            value = value.detach().requires_grad_()
        if n in self._watched:
            self._values[n] = value
        return value

    def gradients(self, outputs: list[Any], random: torch.Generator, *, keep: bool) -> tuple[Tensor | None, ...]:
        """v^T J of each layer for one v of random signs."""
        reached = [one for one in outputs if isinstance(one, Tensor) and one.requires_grad]
        signs = [_signs(one, random) for one in reached]
        ends = [self._values[end] for end, _ in self._ends]
        return torch.autograd.grad(reached, ends, signs, retain_graph=keep, allow_unused=True)


def _signs(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=random).to(like) * 2 - 1


def _only_for(ends: set[Node], gm: GraphModule) -> set[Node]:
    """The nodes that nothing else depends on."""
    found: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if node in ends or (node.users and found.issuperset(node.users)):
            found.add(node)
    return found


@checked(CaptureError)
def exact_sensitivity(
    exact: ExportedProgram | GraphModule,
    found: GraphModule,
    data: Iterable[Any] | None = None,
    *,
    mode: Literal["alone", "without"] = "alone",
    metric: Callable[[GraphModule], float] | None = None,
    resume: str | Path | None = None,
) -> Effects:
    """Measure what each quantized layer does, one model run a layer.

    Args:
        exact, found: as `sensitivity` takes them.
        data: batches to measure the SQNR on; they are read once a layer, so no generator. Not needed with a metric.
        mode: 'alone': one layer quantized, all others in float; 'without': one in float, all others quantized.
        metric: what to measure instead of the outputs' SQNR: from a model, which is called as the exported one, to a
            number, the higher the better. Its data is its own.
        resume: a file that holds what was measured so far, written after each layer; a second call goes on from there.

    Returns:
        The value for each layer, the one that costs most first.

    Raises:
        CaptureError: `found` is no converted graph, or does not stem from `exact`; or there is neither data nor metric.
        FileError: the file cannot be written, or is one of another measurement.
        CalibrationError: there is no batch, or a model fails on one.
        QuantizationError: the metric failed.
    """
    grafts = Grafts(exact, found, "exact_sensitivity(exact, found, data)")
    if metric is None and data is None:
        raise CaptureError("exact_sensitivity needs data to measure the SQNR of the outputs on, or a metric")
    name = _SQNR if metric is None else getattr(metric, "__name__", "metric")
    if metric is None:
        measure = sqnr_on(grafts.exact, list(batches_of(() if data is None else data, "exact_sensitivity")))
    else:
        measure = told(metric)
    memory = _Memory(None if resume is None else Path(resume), f"{mode}, {name}, {len(grafts.layers)} layers")
    baseline = memory.recall("", lambda: measure(grafts.put([] if mode == "alone" else grafts.layers)))
    rows = []
    for layer in grafts.layers:
        chosen = [one for one in grafts.layers if (one is layer) == (mode == "alone")]
        key = f"{layer.name} ... {layer.end.name}"
        rows.append(LayerEffect.of(layer, memory.recall(key, lambda: float(measure(grafts.put(chosen))))))  # noqa: B023
    return Effects.ranked(mode, name, baseline, rows)


def told(metric: Callable[[GraphModule], float]) -> Callable[[GraphModule], float]:
    """A metric of the user's whose failure is told as one.

    Raises:
        QuantizationError: it failed, or returned no number.
    """
    name = getattr(metric, "__name__", "metric")

    def measure(model: GraphModule) -> float:
        try:
            found = metric(model)
            value = float(found.detach() if isinstance(found, Tensor) else found)
        except QuantizationError:
            raise
        except Exception as failure:
            raise QuantizationError(f"the metric {name!r} failed: {type(failure).__name__}: {failure}") from failure
        if math.isnan(value):
            raise QuantizationError(f"the metric {name!r} is NaN for a model, which ranks nowhere. Is its data empty?")
        return value

    return measure


def sqnr_on(exact: GraphModule, batches: list[Arguments]) -> Callable[[GraphModule], float]:
    """What measures the SQNR of a model's outputs on these batches, in dB."""
    with on_batch(exact, "the float model"):
        wanted = [run_batch(exact, batch) for batch in batches]
    signal = sum(power(floating(outputs)) for outputs in wanted)

    def measure(model: GraphModule) -> float:
        noise = sum(power(differences(one, run_batch(model, b))) for one, b in zip(wanted, batches, strict=True))
        return decibels(signal, noise)

    return measure


class _Memory:
    """Values by name, in a file where there is one."""

    def __init__(self, path: Path | None, job: str) -> None:
        self._path, self._job = path, job
        self._known: dict[str, float] = {}
        if path is not None and path.exists():
            self._read(path)

    def recall(self, name: str, compute: Callable[[], float]) -> float:
        """The value of this name, computed where it is not known yet."""
        if name not in self._known:
            self._known[name] = compute()
            if self._path is not None:
                write_file(self._path, json.dumps({"job": self._job, "values": self._known}).encode())
        return self._known[name]

    def _read(self, path: Path) -> None:
        try:
            with open_file(path) as file:
                held = json.loads(file.read())
            job, self._known = held["job"], {str(name): float(value) for name, value in held["values"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path} holds no measurements of exact_sensitivity: {error}. Give another name") from error
        if job != self._job:
            raise FileError(f"{path} holds another measurement ({job}), not this one ({self._job}). Give another name")
