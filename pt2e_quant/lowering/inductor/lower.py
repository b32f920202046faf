"""Compile a converted graph with Inductor for x86, in this process or ahead of time, and say what each operator became.

Comes after `convert_pt2e`. What happens, in order: the check of Inductor's contract, clean-up, a new export, compiling
with frozen weights, and the account of the kernels. Inductor's global configuration stays as it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from ...checks import checked
from ...errors import LoweringError
from ...graph.attributes import attribute, written_attributes
from ...graph.module import ExportedModule, clone, finish
from ...graph.nested import every_node
from ...graph.run import Arguments
from ...meta import DROPPED_KEY
from ...passes.runner import naming, run_everywhere
from ...where import node_id
from ..common.calling import CallingConvention
from ..common.dynamic_shapes import derive_dynamic_shapes, span_of
from ..common.entry import Inputs, explaining, take
from ..common.program import Fallback, Remark, remarks_on_float, verify_program
from ..common.verify import Program
from .account import Recorder, take_account
from .contract import check_inductor_contract, check_package_contract
from .program import InductorProgram, InputSpec
from .recipe import IN_INDUCTOR, recipe
from .remarks import overflows, remarks_on

__all__ = ["InductorProgram", "lower_to_inductor"]


@checked(LoweringError, but=("model", "example_inputs", "example_kwargs"))
def lower_to_inductor(
    model: GraphModule | ExportedProgram,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    mode: Literal["compile", "aoti"] = "compile",
    allow_float: bool = False,
    autotune: bool = False,
    profile: bool = False,
    verify: bool | Iterable[Any] = True,
) -> InductorProgram:
    """Compile a converted model with Inductor's integer kernels.

    Args:
        model: what convert_pt2e returned, an ExportedProgram, or its module.
        example_inputs, example_kwargs: arguments to export with; may be left out when the model came from an
            ExportedProgram that holds some.
        dynamic_shapes: as torch.export takes it; None keeps the dynamic dimensions that the graph has.
        mode: 'compile' for this process; 'aoti' makes a package that a process with torch alone loads.
            Under autocast to bfloat16, what is float between the integers computes in bfloat16.
        allow_float: do not raise when a quantized operator became a float kernel.
        autotune: let Inductor measure its own matrix-product templates against oneDNN, for convolutions of kernel
            size 1 too; takes seconds for each product.
        profile: keep the names of kernels, so that the program's `profile` tells where its time goes.
        verify: run the program on the example inputs, or on these batches instead, and compare every output with the
            converted graph's (`common.verify`). Costs one run of each, and loading a package; False leaves it out, and
            the program says so.

    Raises:
        CaptureError: the model is no exported graph, or is prepared and not yet converted.
        LoweringError: the graph breaks Inductor's contract, a quantized operator fell back to float (each node is
            named), Inductor cannot compile the graph, or the program computes something else than the graph.
    """
    _refuse_autocast_to_float16()
    taken = take(model, example_inputs, example_kwargs, "lower_to_inductor")
    graph = clone(taken[0])
    program = _compiled(taken, dynamic_shapes, mode, allow_float, autotune, profile)

    def lower(part: GraphModule, batch: Arguments) -> Program:
        return _compiled(take(part, batch.args, batch.kwargs, ""), None, "compile", allow_float, False, False).run_flat

    elsewhere = next((f"  {text}.\n" for _, text in overflows(graph)), "")
    return verify_program(program, graph, taken[1], verify, lower, elsewhere)


def _refuse_autocast_to_float16() -> None:
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.float16:
        raise LoweringError(
            "lower_to_inductor was called under autocast to float16, in which oneDNN's integer kernels do not end. "
            "Call it outside, or under autocast to bfloat16, where float operators then compute."
        )


def _compiled(
    taken: tuple[ExportedModule, Inputs],
    dynamic_shapes: Any,
    mode: Literal["compile", "aoti"],
    allow_float: bool,
    autotune: bool,
    profile: bool,
) -> InductorProgram:
    gm, ops, remarks, (args, kwargs) = _cleaned(taken, autotune)
    if dynamic_shapes is None:
        dynamic_shapes, args, kwargs = derive_dynamic_shapes(gm, args, kwargs)
    calling = CallingConvention.of(args, kwargs)
    # Inductor freezes weights, which every pattern needs, in no_grad alone, whatever its configuration says.
    with torch.no_grad():
        with explaining("torch.export cannot export the converted graph again with these example inputs"):
            exported = torch.export.export(gm, *calling.plain(args, kwargs), dynamic_shapes=dynamic_shapes)
        if mode == "aoti" and written_attributes(gm):
            check_package_contract(exported)
        inputs = _inputs(exported)  # before Inductor narrows ranges: it asks for s < 16, to lay out convolutions
        recorder = Recorder()
        options = _options(recorder, autotune, profile)
        with explaining("Inductor cannot compile this graph"):
            package = _package(exported, options) if mode == "aoti" else b""
            compiled, state = _compile(exported, options) if mode == "compile" else (None, ())
    kernels, fallbacks = take_account(gm, ops, recorder)
    if fallbacks and not allow_float:
        raise _fell_back(fallbacks)
    return InductorProgram(
        mode=mode,
        kernels=kernels,
        fallbacks=fallbacks,
        remarks=remarks,
        inputs=inputs,
        calling=calling,
        package=package,
        compiled=compiled,
        state=state,
    )


def _cleaned(
    taken: tuple[ExportedModule, Inputs], autotune: bool
) -> tuple[ExportedModule, dict[str, str], tuple[Remark, ...], Inputs]:
    """The graph after all passes, the operators that it had by name, what there is to remark, and the inputs."""
    gm, inputs = taken
    ops = {node_id(node): str(node.target) for node in every_node(gm)}
    check_inductor_contract(gm)
    remarks = [*remarks_on_float(gm), *remarks_on(gm)]
    for step in recipe(tuned=autotune):
        gm = run_everywhere(step, gm)
    finish(gm)
    remarks += [Remark(name, "no integer kernel reads it, so it was dropped") for name in gm.meta.get(DROPPED_KEY, ())]
    return gm, ops, tuple(remarks), inputs


def _options(recorder: Recorder, autotune: bool, profile: bool) -> dict[str, Any]:
    """Configuration of one compilation. A pass that is a plain function also keeps it out of the cache of graphs."""

    def last_pass(graph: Graph) -> None:
        for step in IN_INDUCTOR:
            with naming(step.__name__, "Inductor's graph"):
                step(graph)
        recorder(graph)

    tuning = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"} if autotune else {}
    return {
        "freezing": True,
        "cpp_wrapper": True,  # in Python, calls between kernels cost more than the kernels of a small model
        "cpp.enable_kernel_profile": profile,
        "post_grad_custom_post_pass": last_pass,
        **tuning,
    }


def _package(exported: ExportedProgram, options: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="pt2e_quant") as folder:
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(Path(folder) / "model.pt2"), inductor_configs=options
        )
        return Path(path).read_bytes()


def _compile(
    exported: ExportedProgram, options: dict[str, Any]
) -> tuple[Callable[[list[Any]], Any], tuple[tuple[Tensor, Tensor], ...]]:
    """Compile without Dynamo, which would trace, guard and compile again on the first call, outside of our options.

    Returns what to call, and the buffers that it writes to, each with a copy of its first values.
    """
    from torch._inductor.compile_fx import compile_fx

    gm = exported.module(check_guards=False)
    gm.graph.set_codegen(CodeGen())  # flat inputs, flat outputs
    gm.recompile()
    buffers = [attribute(gm, name).detach() for name in written_attributes(gm)]
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    run: Callable[..., Any] = compile_fx(gm, values, config_patches=options)  # type: ignore[assignment]
    tree = exported.call_spec.out_spec
    return lambda flat: pytree.tree_unflatten(run(*flat), tree), tuple((one, one.clone()) for one in buffers)


def _inputs(exported: ExportedProgram) -> tuple[InputSpec | None, ...]:
    """One for each input of the user, None for those that are no tensor."""
    users = set(exported.graph_signature.user_inputs)
    placeholders = [node for node in exported.graph.find_nodes(op="placeholder") if node.name in users]
    return tuple(
        InputSpec(node.name, value.dtype, tuple(map(_span, value.shape))) if isinstance(value, Tensor) else None
        for node in placeholders
        for value in (node.meta["val"],)
    )


def _span(size: Any) -> tuple[int, int | None]:
    if isinstance(size, int):
        return size, size
    smallest, largest = span_of(size)
    return smallest if smallest > 2 else 1, largest  # export traces sizes of 1 as 2


def _fell_back(fallbacks: tuple[Fallback, ...]) -> LoweringError:
    places = "\n".join(f"- {fallback}" for fallback in fallbacks)
    return LoweringError(
        f"{len(fallbacks)} quantized operator{'s' * (len(fallbacks) > 1)} fell back to floating point:\n{places}\n"
        "  Leave them in float when quantizing, or pass allow_float=True."
    )
