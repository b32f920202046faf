"""Lower a converted graph to an ExecuTorch program (.pte), and say what became of every operator.

Comes after `convert_pt2e`; a float graph lowers just as well. What happens, in order: clean-up, the check of XNNPACK's
contract, a new export, partitioning and lowering, and the account of what was delegated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..errors import CaptureError, LoweringError, locate, locate_all, node_id
from ..graph import ExportedModule, clone, finish, is_guard, own_written
from ..nested import graphs, mark
from ..ops import DEQUANTIZE, QUANTIZE
from ..pt2e.record import record_of
from . import _executorch
from .account import take_account
from .cleanup import PASSES, XNNPACK_PASSES
from .delegable import DELEGABLE_PASSES
from .dynamic_shapes import check_bounds, derive_dynamic_shapes
from .embeddings import embeddings_to_kernels
from .program import ExecutorchProgram, Sizes
from .xnnpack_contract import Violation, check_xnnpack_contract, raise_fatal

__all__ = ["lower_to_executorch"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def lower_to_executorch(
    model: GraphModule | ExportedProgram,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    backend: Literal["xnnpack"] | None = "xnnpack",
    preflight: bool = True,
) -> ExecutorchProgram:
    """Lower a converted model, or a float one, to an ExecuTorch program.

    Operators that the backend does not take run in ExecuTorch's portable kernels; `undelegated` has them with reasons.

    Args:
        model: what convert_pt2e returned, an ExportedProgram, or its module.
        example_inputs, example_kwargs: arguments to export with; may be left out when the model came from an
            ExportedProgram that holds some.
        dynamic_shapes: as torch.export takes it; None keeps the dynamic dimensions that the graph has. ExecuTorch
            plans its memory ahead and needs an upper bound for each.
        backend: 'xnnpack', or None for portable kernels only.
        preflight: check the backend's contract first and raise what it forbids. False lowers whatever comes.

    Raises:
        CaptureError: the model is no exported graph, or is prepared and not yet converted.
        LoweringError: ExecuTorch is not installed; the graph breaks the backend's contract (each node is named); it
            quantizes bfloat16; a dynamic dimension has no upper bound; or ExecuTorch cannot lower the graph.
    """
    if backend not in ("xnnpack", None):
        raise LoweringError(f"backend must be 'xnnpack' or None, got {backend!r}")
    gm, (args, kwargs) = _take(model, example_inputs, example_kwargs)
    _executorch.require()
    for step in (*PASSES, embeddings_to_kernels):
        step(gm)
    findings: tuple[Violation, ...] = ()
    if backend == "xnnpack":
        findings = check_xnnpack_contract(gm)
        if preflight:
            raise_fatal(findings)
        for step in (*DELEGABLE_PASSES, *XNNPACK_PASSES):
            step(gm)
    finish(gm)
    if dynamic_shapes is None:
        dynamic_shapes, args, kwargs = derive_dynamic_shapes(gm, args, kwargs)
    exported = _export(gm, args, kwargs, dynamic_shapes)
    check_bounds(exported)
    return _lower(exported, gm, findings, backend)


def _take(model: object, args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None) -> tuple[ExportedModule, Inputs]:
    """A private copy of the model's graph, each node marked with its name, and the inputs to export it with."""
    record = record_of(model)
    held = record.example_inputs if record is not None else None
    if isinstance(model, ExportedProgram):
        held, model = model.example_inputs, model.module()
    if not isinstance(model, GraphModule):
        kind = f"the nn.Module {type(model).__name__}" if isinstance(model, nn.Module) else repr(type(model))
        raise CaptureError(
            f"lower_to_executorch takes a converted graph or an exported model, got {kind}. "
            "Export it first: torch.export.export(model.eval(), example_inputs)"
        )
    foreign = [node for node in model.graph.nodes if node.op == "call_module" and not is_guard(node)]
    if foreign:
        raise CaptureError(
            f"this graph calls submodules, as a prepared model calls its observers: call convert_pt2e first\n"
            f"  {locate(foreign[0])}"
        )
    if args is None and not kwargs:
        if held is None:
            raise LoweringError(
                "this graph holds no example inputs to export it with: pass them, lower_to_executorch(model, (x,)), or "
                "prepare the ExportedProgram instead of its module"
            )
        args, kwargs = held
    if not isinstance(args, (tuple, list, type(None))):
        raise LoweringError(f"example_inputs must be a tuple of the positional arguments, got {type(args).__name__}")
    gm = clone(model)
    own_written(gm)  # without the history that autograd hangs on buffers when the model runs outside of no_grad
    _refuse_bfloat16(gm)
    for node in (node for _, part in graphs(mark(gm)) for node in part.graph.nodes):
        node.meta.pop("from_node", None)  # every later pass would deep-copy the whole chain, for every node
        node.meta["custom"] = {**(node.meta.get("custom") or {}), _executorch.ORIGIN: node_id(node)}
    return gm, (tuple(args or ()), dict(kwargs or {}))


def _refuse_bfloat16(gm: GraphModule) -> None:
    """ExecuTorch's quantize and dequantize end the process when they meet bfloat16, so no such program is made."""
    found = [node for node in gm.graph.nodes if node.target in (*QUANTIZE, *DEQUANTIZE) and _is_bfloat16(node)]
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
    with _explaining("torch.export cannot export the converted graph again with these example inputs"), torch.no_grad():
        return torch.export.export(gm, args, kwargs or None, dynamic_shapes=dynamic_shapes)


def _lower(
    exported: ExportedProgram, gm: GraphModule, findings: tuple[Violation, ...], backend: str | None
) -> ExecutorchProgram:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    partitioner = _executorch.xnnpack_partitioner() if backend == "xnnpack" else None
    with _explaining("ExecuTorch cannot lower this graph"), _executorch.Rejections().listen() as rejections:
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[partitioner] if partitioner is not None else None,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),  # q/dq ops are not core ATen
            constant_methods=_border_constants(gm),
        )
    _keep_initial_state(edge.exported_program())
    lowered = edge.exported_program().graph_module
    backend_ops = partitioner.target_partitioner_configs if partitioner is not None else None
    account = take_account(lowered, gm, findings, rejections, backend_ops)
    with _explaining("ExecuTorch cannot turn the lowered graph into a program"):
        program = edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True))
    buffer = program.buffer
    constants = sum(len(constant.storage) for constant in program.executorch_program.constant_buffer)
    return ExecutorchProgram(
        buffer=buffer,
        delegates=account.delegates,
        undelegated=account.undelegated,
        kernels=account.kernels,
        remarks=account.remarks,
        sizes=Sizes(file=len(buffer), delegates=account.delegate_bytes, constants=constants),
        input_tree=exported.call_spec.in_spec,
    )


def _keep_initial_state(program: ExportedProgram) -> None:
    """Store what the buffers that the model writes to start with; ExecuTorch leaves them zero unless told otherwise."""
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    for node in program.graph.find_nodes(op="placeholder"):
        name = signature.inputs_to_buffers.get(node.name)
        if name in written and {**program.constants, **program.state_dict}[name].any():
            node.meta["et_init_buffer"] = True  # what ExecuTorch's InitializedMutableBufferPass sets


def _border_constants(gm: GraphModule) -> dict[str, float | int]:
    """Scale and zero point of integer inputs and outputs, as methods of the program that return constants."""
    record = record_of(gm)
    if record is None:
        return {}
    borders = {"input": record.inputs, "output": record.outputs}
    return {
        f"{kind}_{index}_{name}": getattr(qparams, name)
        for kind, border in borders.items()
        for index, qparams in border.items()
        for name in ("scale", "zero_point")
    }


@contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Turn whatever ExecuTorch or torch.export raise into one error that says which step failed.

    Raises:
        LoweringError: something was raised.
    """
    try:
        with _executorch.quietly():
            yield
    except LoweringError:
        raise
    except Exception as error:
        causes: list[str] = []
        cause: BaseException | None = error
        while cause is not None:  # ExecuTorch wraps what a pass raised
            causes.append(f"{type(cause).__name__}: {str(cause).strip()}")
            cause = cause.__cause__
        raise LoweringError(f"{what}: " + "\n  because of ".join(causes)) from error
