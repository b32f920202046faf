"""Lower a converted graph to an ExecuTorch program (.pte), and say what became of every operator.

Comes after `convert_pt2e`; a float graph lowers just as well. What happens, in order: all passes, the check of
XNNPACK's contract, a new export, partitioning and lowering, the check of what ExecuTorch made of it, and the account.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ...checks import checked
from ...errors import LoweringError
from ...graph.module import ExportedModule, clone, finish
from ...graph.nested import every_node, written_inputs
from ...graph.run import Arguments
from ...meta import INITIALIZED_KEY
from ...ops import DEQUANTIZE, QUANTIZE
from ...passes.runner import run_everywhere, run_pass
from ...pt2e.record import record_of
from ...where import computed_name, locate_all
from ..common.calling import CallingConvention
from ..common.dynamic_shapes import derive_dynamic_shapes
from ..common.entry import Inputs, explaining, take, written_input
from ..common.program import Remark, remarks_on_float, verify_program
from ..common.verify import Program
from . import runtime as _executorch
from .account import Account, take_account
from .bounds import check_bounds, keeping_bounds
from .control_flow import check_control_flow
from .embeddings import tied_tables
from .kernels import check_kernels, check_out_variants, unchecked
from .methods import by_method, shared_buffers
from .program import ExecutorchMethods, ExecutorchProgram, Loaded, Sizes
from .recipe import AT_LAST, FOR_EXECUTORCH, FOR_XNNPACK
from .taps import find_taps
from .xnnpack.contract import Violation, check_xnnpack_contract, keep_outside, raise_fatal
from .xnnpack.delegates import check_delegates
from .xnnpack.images import mistakes_layout
from .xnnpack.layouts import copying_before_quantize

__all__ = ["lower_to_executorch"]

Model = GraphModule | ExportedProgram
Backend = Literal["xnnpack"] | None


@overload
def lower_to_executorch(
    model: Model,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    backend: Backend = "xnnpack",
    preflight: bool = True,
    verify: bool | Iterable[Any] = True,
) -> ExecutorchProgram: ...


@overload
def lower_to_executorch(
    model: Mapping[str, Model],
    example_inputs: Mapping[str, tuple[Any, ...]] | None = None,
    *,
    example_kwargs: Mapping[str, dict[str, Any]] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    backend: Backend = "xnnpack",
    preflight: bool = True,
    verify: bool | Mapping[str, Iterable[Any]] = True,
) -> ExecutorchMethods: ...


@checked(LoweringError, but=("model",))
def lower_to_executorch(
    model: Model | Mapping[str, Model],
    example_inputs: Any = None,
    *,
    example_kwargs: Any = None,
    dynamic_shapes: Any = None,
    backend: Backend = "xnnpack",
    preflight: bool = True,
    verify: bool | Iterable[Any] = True,
) -> ExecutorchProgram | ExecutorchMethods:
    """Lower a converted model, or a float one, to an ExecuTorch program.

    Operators that the backend does not take run in ExecuTorch's portable kernels; `undelegated` has them with reasons.

    Several methods, {"prefill": graph, "decode": graph}, become one program, and their arguments are dicts by method
    name. They may be one graph, lowered for several sizes. Equal weights are stored once. Methods that write to a
    buffer of the same name share it: what prefill writes to a key-value cache, decode reads.

    Args:
        model: what convert_pt2e returned, an ExportedProgram, or its module; or several of them by method name.
        example_inputs, example_kwargs: arguments to export with; may be left out when the model holds some.
        dynamic_shapes: as torch.export takes it; None keeps the dynamic dimensions that the graph has, ({}, {}) fixes
            those of two inputs. ExecuTorch plans its memory ahead and needs an upper bound for each.
        backend: 'xnnpack', or None for portable kernels only.
        preflight: check the backend's contract on the graph that is compiled, what ExecuTorch made of it, and that its
            runtime has every kernel; raise what would not run. False lowers whatever comes.
        verify: run the program on the example inputs, or on these batches instead, and compare every output with the
            converted graph's (`common.verify`). Costs one load, and a run of each; False leaves it out, and the program
            says so. Of several methods, each is run from the state that the model starts with; batches by method name.

    Raises:
        CaptureError: the model is no exported graph, or is prepared and not yet converted.
        LoweringError: ExecuTorch is not installed; the graph breaks the backend's contract (each node is named); it
            quantizes bfloat16; the model writes to an input; a dynamic dimension has no upper bound; methods disagree
            on a buffer that they share; ExecuTorch cannot lower the graph; or the program cannot run, or computes
            something else than the graph.
    """
    given = {
        "example_inputs": example_inputs,
        "example_kwargs": example_kwargs,
        "dynamic_shapes": dynamic_shapes,
        "verify": None if isinstance(verify, bool) else verify,
    }
    with torch.autocast("cpu", enabled=False):  # the program computes what the graph says, wherever it is lowered
        if isinstance(model, Mapping):
            return _lowered(model, by_method(model, **given), verify is not False, backend, preflight)
        arguments = {"forward": tuple(given.values())}
        return _lowered({"forward": model}, arguments, verify is not False, backend, preflight)["forward"]


def _lowered(
    models: Mapping[str, Model],
    arguments: Mapping[str, tuple[Any, ...]],
    verify: bool,
    backend: Backend,
    preflight: bool,
) -> ExecutorchMethods:
    """All methods, each run beside its graph; on what the last of its arguments has, or else on its example inputs."""
    origins = {name: _origins(model) for name, model in models.items()}  # `take` drops them
    taken = {
        name: take(models[name], args, kwargs, "lower_to_executorch") for name, (args, kwargs, *_) in arguments.items()
    }
    shared = shared_buffers({name: gm for name, (gm, _) in taken.items()})  # before passes fold what is only read
    graphs_of = {name: clone(gm) for name, (gm, _) in taken.items()}
    ready = {name: _ready(taken[name], arguments[name][2], backend, preflight) for name in models}
    made = _lower(ready, shared, backend, preflight)

    def lower(part: GraphModule, batch: Arguments) -> Program:
        inputs = take(part, batch.args, batch.kwargs, "")
        return _lower({"forward": _ready(inputs, None, backend, preflight)}, (), backend, preflight)["forward"].run

    batches = {name: verify and (True if given[3] is None else given[3]) for name, given in arguments.items()}
    checked = {
        name: replace(verify_program(one, graphs_of[name], taken[name][1], batches[name], lower), origins=origins[name])
        for name, one in made.items()
    }
    return replace(made, methods=checked)


def _origins(model: object) -> dict[str, str]:
    gm = model.graph_module if isinstance(model, ExportedProgram) else model
    return {node.name: computed_name(node) for node in gm.graph.nodes} if isinstance(gm, GraphModule) else {}


@dataclass(frozen=True)
class _Ready:
    """A method after all passes, exported again."""

    exported: ExportedProgram
    gm: GraphModule
    findings: tuple[Violation, ...]
    remarks: tuple[Remark, ...]
    calling: CallingConvention


def _ready(taken: tuple[ExportedModule, Inputs], dynamic_shapes: Any, backend: Backend, preflight: bool) -> _Ready:
    gm, (args, kwargs) = taken
    _refuse_written_inputs(gm)
    _refuse_bfloat16(gm)
    _executorch.require()
    check_control_flow(gm)
    remarks = remarks_on_float(gm) + (tied_tables(gm) if backend == "xnnpack" else ())
    for step in FOR_EXECUTORCH:
        gm = run_everywhere(step, gm)
    for step in (*FOR_XNNPACK, *AT_LAST) if backend == "xnnpack" else AT_LAST:
        gm = run_pass(step, gm)
    findings = check_xnnpack_contract(gm) if backend == "xnnpack" else ()
    if preflight:
        raise_fatal(findings)
    keep_outside(findings)
    finish(gm)
    if dynamic_shapes is None:
        dynamic_shapes, args, kwargs = derive_dynamic_shapes(gm, args, kwargs)
    calling = CallingConvention.of(args, kwargs)
    if backend == "xnnpack" and any(map(mistakes_layout, gm.graph.nodes)) and calling != calling.contiguous():
        calling = calling.contiguous()
        remarks += (Remark("program", _CONTIGUOUS),)
    exported = _export(gm, *calling.plain(args, kwargs), dynamic_shapes)
    check_bounds(exported)
    return _Ready(exported, gm, findings, remarks, calling)


_CONTIGUOUS = (
    "its inputs are contiguous, though an example is channels last: XNNPACK mistakes the layout of an image of one "
    "channel, which is both (executorch issue 19153), and of a sum or product of images with a constant"
)


def _refuse_written_inputs(gm: GraphModule) -> None:
    """ExecuTorch returns what such a model would write to an input as one more output."""
    found = [written_input(node, by, "ExecuTorch") for node, by in written_inputs(gm).items()]
    if found:
        raise LoweringError("\n".join(found))


def _refuse_bfloat16(gm: GraphModule) -> None:
    """ExecuTorch's quantize and dequantize end the process when they meet bfloat16, so no such program is made."""
    found = [node for node in every_node(gm) if node.target in (*QUANTIZE, *DEQUANTIZE) and _is_bfloat16(node)]
    if found:
        raise LoweringError(
            f"{len(found)} quantize and dequantize ops of this graph compute in bfloat16, for which ExecuTorch has no "
            f"kernels:\n{locate_all(found, limit=3)}\n"
            "  Export the model in float32 or float16 (model.to(torch.float16)) and quantize that."
        )


def _is_bfloat16(node: Node) -> bool:
    """A quantize that reads bfloat16, or a dequantize that returns it."""
    value = node.all_input_nodes[0].meta.get("val")
    return getattr(value, "dtype", None) is torch.bfloat16 or torch.bfloat16 in (*node.args, *node.kwargs.values())


def _export(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    # Without no_grad, a buffer that values with gradients are written to would count as one with gradients.
    with explaining("torch.export cannot export the converted graph again with these example inputs"), torch.no_grad():
        return torch.export.export(gm, args, kwargs or None, dynamic_shapes=dynamic_shapes)


def _lower(ready: dict[str, _Ready], shared: tuple[str, ...], backend: Backend, preflight: bool) -> ExecutorchMethods:
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    rejections = _executorch.Rejections()
    partitioners = {}
    if backend == "xnnpack":
        partitioners = {name: [_executorch.xnnpack_partitioner(name, rejections)] for name in ready}
    kept = keeping_bounds(method.exported for method in ready.values())
    repaired = copying_before_quantize()
    with explaining("ExecuTorch cannot lower this graph"), rejections.listen(), kept, repaired:
        edge = to_edge_transform_and_lower(
            {name: method.exported for name, method in ready.items()},
            partitioner=partitioners or None,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),  # q/dq ops are not core ATen
            constant_methods=_border_constants(ready),
        )
    accounts, lowered = {}, {}
    for name, method in ready.items():
        program = edge.exported_program(name)
        _keep_initial_state(program)
        lowered[name] = program.graph_module
        if preflight:
            check_delegates(lowered[name], method.gm)
            check_out_variants(lowered[name], method.gm)
        known = partitioners[name][0].target_partitioner_configs if partitioners else None
        said = partial(rejections.of, name)
        accounts[name] = take_account(lowered[name], method.gm, method.findings, said, known)
    with explaining("ExecuTorch cannot turn the lowered graph into a program"):
        program = edge.to_executorch(_executorch.configuration(bool(shared)))
    for name, method in ready.items() if preflight else ():
        check_kernels(program, name, lowered[name], method.gm)
    return _programs(ready, accounts, shared, program)


def _programs(
    ready: dict[str, _Ready], accounts: dict[str, Account], shared: tuple[str, ...], program: Any
) -> ExecutorchMethods:
    buffer = program.buffer
    loaded = Loaded(buffer, tuple(ready))
    constants = {name: _executorch.constants(program.executorch_program, name) for name in ready}
    methods = {
        name: ExecutorchProgram(
            buffer=buffer,
            delegates=account.delegates,
            undelegated=account.undelegated,
            kernels=account.kernels,
            remarks=account.remarks + ready[name].remarks + unchecked(),
            sizes=_sizes(buffer, [account], [constants[name]]),
            calling=ready[name].calling,
            outputs=ready[name].exported.call_spec.out_spec,
            loaded=loaded,
            method=name,
            taps=find_taps(program, name, ready[name].gm),
        )
        for name, account in accounts.items()
    }
    return ExecutorchMethods(buffer, methods, shared, _sizes(buffer, [*accounts.values()], [*constants.values()]))


def _sizes(buffer: bytes, accounts: list[Account], constants: list[dict[int, int]]) -> Sizes:
    """What methods share counts once."""
    stored = {key: size for account in accounts for key, size in account.stored.items()}
    outside = {key: size for one in constants for key, size in one.items()}
    delegates = sum(account.delegate_bytes for account in accounts) + sum(stored.values())
    return Sizes(file=len(buffer), delegates=delegates, constants=sum(outside.values()))


def _keep_initial_state(program: ExportedProgram) -> None:
    """Store what the buffers that the model writes to start with; ExecuTorch leaves them zero unless told otherwise."""
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    for node in program.graph.find_nodes(op="placeholder"):
        name = signature.inputs_to_buffers.get(node.name)
        if name in written and {**program.constants, **program.state_dict}[name].any():
            node.meta[INITIALIZED_KEY] = True


def _border_constants(ready: dict[str, _Ready]) -> dict[str, float | int]:
    """Scale and zero point of integer inputs and outputs, as methods of the program that return constants."""
    found: dict[str, float | int] = {}
    for method, one in ready.items():
        record = record_of(one.gm)
        borders = {"input": record.inputs, "output": record.outputs} if record is not None else {}
        prefix = "" if method == "forward" else f"{method}_"
        for kind, border in borders.items():
            for index, qparams in border.items():
                for name in ("scale", "zero_point"):
                    found[f"{prefix}{kind}_{index}_{name}"] = getattr(qparams, name)
    return found
