"""Write a converted graph as an ONNX file of quantize-dequantize pairs, and say what onnxruntime runs for each op.

Comes after `convert_pt2e`; a float graph is written just as well. What happens, in order: the check of what ONNX can
say, all passes, a new export, the translation, onnx.checker, and the account of what onnxruntime makes of the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ...checks import checked
from ...errors import LoweringError
from ...graph.module import ExportedModule, clone, finish
from ...graph.run import Arguments
from ...passes.runner import run_everywhere
from ..common.calling import CallingConvention
from ..common.dynamic_shapes import derive_dynamic_shapes
from ..common.entry import Inputs, explaining, take
from ..common.program import Fallback, remarks_on_float, verify_program
from ..common.verify import Program
from .account import take_account
from .contract import check_onnx_contract
from .program import OnnxProgram
from .recipe import RECIPE
from .remarks import remarks_on
from .runtime import optimized, require

__all__ = ["OnnxProgram", "lower_to_onnx"]

_OLDEST = 21
"""The first opset with integers of 4 bits and scales of blocks."""


@checked(LoweringError, but=("model", "example_inputs", "example_kwargs"))
def lower_to_onnx(
    model: GraphModule | ExportedProgram,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset: int = _OLDEST,
    allow_float: bool = False,
    verify: bool | Iterable[Any] = True,
) -> OnnxProgram:
    """Write a converted model, or a float one, as an ONNX file.

    Args:
        model: what convert_pt2e returned, an ExportedProgram, or its module.
        example_inputs, example_kwargs: arguments to export with; may be left out when the model came from an
            ExportedProgram that holds some.
        dynamic_shapes: as torch.export takes it; None keeps the dynamic dimensions that the graph has.
        opset: version of ONNX's operators, 21 or later; what the installed torch and onnxruntime know.
        allow_float: do not raise when onnxruntime runs a quantized operator in floating point.
        verify: run the file on the example inputs, or on these batches instead, and compare every output with the
            converted graph's (`common.verify`). False leaves it out, and the program says so.

    Raises:
        CaptureError: the model is no exported graph, or is prepared and not yet converted.
        LoweringError: onnx, onnxscript or onnxruntime is not installed; the model has state or types that ONNX has
            not; torch cannot export the graph, or onnx.checker refuses the model; a quantized operator would run in
            float (each node is named); or the file computes something else than the graph.
    """
    if opset < _OLDEST:
        raise LoweringError(
            f"opset must be a number from {_OLDEST} on, which brought integers of 4 bits; got {opset!r}"
        )
    taken = take(model, example_inputs, example_kwargs, "lower_to_onnx")
    require()
    graph = clone(taken[0])

    def lower(part: GraphModule, batch: Arguments) -> Program:
        return _written(take(part, batch.args, batch.kwargs, ""), None, opset, True).run_flat

    with torch.autocast("cpu", enabled=False):  # the file computes what the graph says, wherever it is written
        program = _written(taken, dynamic_shapes, opset, allow_float)
        return verify_program(program, graph, taken[1], verify, lower)


def _written(taken: tuple[ExportedModule, Inputs], dynamic_shapes: Any, opset: int, allow_float: bool) -> OnnxProgram:
    from .model import write_model  # imports onnx and onnxscript

    gm, (args, kwargs) = taken
    check_onnx_contract(gm)
    before, remarks = clone(gm), (*remarks_on_float(gm), *remarks_on(gm))
    exported, calling = _exported(gm, args, kwargs, dynamic_shapes)
    with explaining("torch.onnx.export cannot write this graph"):
        content = write_model(exported, opset)
    with explaining("onnxruntime cannot load the file, or write its own form of it into the temporary folder"):
        kernels, fallbacks = take_account(before, optimized(content))
    if fallbacks and not allow_float:
        raise _fell_back(fallbacks)
    return OnnxProgram(
        opset=opset,
        kernels=kernels,
        fallbacks=fallbacks,
        remarks=tuple(remarks),
        calling=calling,
        outputs=exported.call_spec.out_spec,
        model=content,
    )


def _exported(
    gm: ExportedModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[ExportedProgram, CallingConvention]:
    """The graph after all passes, exported again."""
    for step in RECIPE:
        gm = run_everywhere(step, gm)
    finish(gm)
    if dynamic_shapes is None:
        dynamic_shapes, args, kwargs = derive_dynamic_shapes(gm, args, kwargs)
    calling = CallingConvention.of(args, kwargs).contiguous()
    with torch.no_grad(), explaining("torch.export cannot export the converted graph again with these example inputs"):
        return torch.export.export(gm, *calling.plain(args, kwargs), dynamic_shapes=dynamic_shapes), calling


def _fell_back(fallbacks: tuple[Fallback, ...]) -> LoweringError:
    places = "\n".join(f"- {fallback}" for fallback in fallbacks)
    return LoweringError(
        f"onnxruntime would run {len(fallbacks)} quantized operator{'s' * (len(fallbacks) > 1)} in floating point:\n"
        f"{places}\n  Leave them in float when quantizing, or pass allow_float=True."
    )
