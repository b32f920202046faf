"""What one net of the zoo becomes on one backend: quantized, lowered, verified, and timed beside its float program."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from benchmarks.turns import take_turns
from benchmarks.zoo.net import Net
from pt2e_quant import QuantizationError, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.executorch import ExecutorchProgram, lower_to_executorch
from pt2e_quant.lowering.inductor import InductorProgram, lower_to_inductor
from pt2e_quant.sqnr import sqnr
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = ["BACKENDS", "rows"]

CALIBRATION_BATCHES, TURNS, SHOWN = 4, 5, 3
SLOWER = 0.97
"""A speed ratio below this is named. Two timings of one program in turns differ by about 3 %."""

Row = dict[str, Any]
Batch = tuple[Tensor, ...]


def _xnnpack(recipe: str) -> Any:
    return XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True, is_dynamic=recipe == "dynamic")
    )


def _x86(recipe: str) -> Any:
    return X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config(is_dynamic=recipe == "dynamic")
    )


BACKENDS: dict[str, tuple[Callable[[str], Any], Callable[..., Any]]] = {
    "xnnpack": (_xnnpack, lower_to_executorch),
    "inductor": (_x86, lower_to_inductor),
}
"""By name: the quantizer of a recipe, and how to lower."""


def rows(net: Net, backend: str, recipes: Sequence[str], profile: bool = False) -> list[Row]:
    """A row for each recipe. What fails is a result: its row has the error, and whether it is typed.

    `profile` tells where the time of a program goes that is slower than its float form; it compiles both once more.
    """
    module, inputs = net.make()
    with torch.no_grad():
        exported = torch.export.export(module, inputs)
    _, lower = BACKENDS[backend]
    exact, why_not = _tried(lambda: lower(exported))
    found = []
    for recipe in recipes:
        start = time.perf_counter()
        row, error = _tried(lambda recipe=recipe: _row(net, module, exported, inputs, backend, recipe, exact, profile))
        row = row or error
        row.update(net=net.name, family=net.family, backend=backend, recipe=recipe)
        row["float_error"] = (why_not or {}).get("error")
        row["seconds"] = round(time.perf_counter() - start, 1)
        found.append(row)
    return found


def _tried(make: Callable[[], Any]) -> tuple[Any, Row | None]:
    try:
        return make(), None
    except Exception as error:  # noqa: BLE001  # what fails is a result
        words = str(error).strip().splitlines()
        typed = isinstance(error, QuantizationError)
        return None, {"error": f"{type(error).__name__}: {' '.join(words[:6])[:600]}", "typed": typed}


def _row(
    net: Net, module: nn.Module, exported: ExportedProgram, inputs: Batch, backend: str, recipe: str, exact: Any,
    profile: bool,
) -> Row:  # fmt: skip
    quantizer, lower = BACKENDS[backend]
    prepared = prepare_pt2e(exported, quantizer(recipe))
    unseen = net.batch(inputs, 99)
    with torch.no_grad():
        for seed in range(CALIBRATION_BATCHES):
            prepared(*net.batch(inputs, seed))
        converted = convert_pt2e(prepared)
        row = {"sqnr": sqnr(module(*unseen), converted(*unseen)), "quantized": _coverage(converted)}
    program = lower(converted)
    row |= {"verified": program.verified.sqnr, "passed": bool(program.verified), "said": str(program.verified)}
    row |= _account(program)
    if exact is not None:
        row |= _speed(program, exact, inputs)
        if profile and row["speed"] < SLOWER:
            row["where"] = _where(program, exact, converted, exported, inputs)
    return row


def _coverage(converted: GraphModule) -> str:
    decisions = explain(converted).record.decisions
    return f"{sum(decision.quantized for decision in decisions)}/{len(decisions)}"


def _account(program: ExecutorchProgram | InductorProgram) -> Row:
    precisions = dict(Counter(kernel.precision for kernel in program.kernels))
    if isinstance(program, InductorProgram):
        return {"kernels": precisions, "outside": [str(left) for left in program.fallbacks]}
    outside = Counter(left.op for left in program.undelegated)
    return {"kernels": precisions, "delegates": program.delegates, "outside": dict(outside)}


# Time -----------------------------------------------------------------------------------------------------------------


def _speed(program: Any, exact: Any, inputs: Batch) -> Row:
    timings = take_turns({"float": exact.run, "int8": program.run}, [inputs] * TURNS)
    (_, base), (_, ours) = (timings[name].milliseconds() for name in ("float", "int8"))
    return {"float_ms": base, "ms": ours, "speed": base / ours}


def _where(program: Any, exact: Any, converted: GraphModule, exported: ExportedProgram, inputs: Batch) -> str:
    """Where the time of a program goes that is slower than its float form."""
    if isinstance(program, ExecutorchProgram):
        parts = (f"{one.delegates} delegates, {len(one.undelegated)} operators outside" for one in (program, exact))
        return "; float: ".join(parts)
    lines = []
    for model in (converted, exported):
        taken = lower_to_inductor(model, profile=True, verify=False).profile(*inputs)
        slowest = ", ".join(
            f"{kernel.kernel[:60]} {kernel.calls} x {kernel.microseconds:.0f} us" for kernel in taken.kernels[:SHOWN]
        )
        calls = sum(kernel.calls for kernel in taken.kernels)
        lines.append(f"{taken.microseconds:.0f} us in {calls} kernels ({slowest}; outside {taken.elsewhere:.0f} us)")
    return "; float: ".join(lines)
