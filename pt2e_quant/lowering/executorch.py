"""Lower a converted graph to an ExecuTorch program (.pte), and say what became of every operator.

Comes after `convert_pt2e`; a float graph lowers just as well. What happens, in order: clean-up, the check of XNNPACK's
contract, a new export, partitioning and lowering, and the account of what was delegated.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..errors import LoweringError, locate_all
from ..graph import finish
from ..nested import graphs
from ..ops import DEQUANTIZE, QUANTIZE
from ..pt2e.record import record_of
from . import _executorch
from .account import take_account
from .calling import CallingConvention
from .cleanup import PASSES, XNNPACK_PASSES
from .control_flow import check_control_flow, copy_results_of_branches
from .delegable import DELEGABLE_PASSES
from .dynamic_shapes import check_bounds, derive_dynamic_shapes
from .embeddings import embeddings_to_kernels
from .entry import explaining, take
from .program import ExecutorchProgram, Sizes
from .xnnpack_contract import Violation, check_xnnpack_contract, raise_fatal

__all__ = ["lower_to_executorch"]


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
    gm, (args, kwargs) = take(model, example_inputs, example_kwargs, "lower_to_executorch")
    _refuse_bfloat16(gm)
    _executorch.require()
    check_control_flow(gm)
    for step in (*PASSES, embeddings_to_kernels):
        step(gm)
    findings: tuple[Violation, ...] = ()
    if backend == "xnnpack":
        findings = check_xnnpack_contract(gm)
        if preflight:
            raise_fatal(findings)
        for step in (*DELEGABLE_PASSES, *XNNPACK_PASSES):
            step(gm)
    copy_results_of_branches(gm)
    finish(gm)
    if dynamic_shapes is None:
        dynamic_shapes, args, kwargs = derive_dynamic_shapes(gm, args, kwargs)
    calling = CallingConvention.of(args, kwargs)
    exported = _export(gm, *calling.plain(args, kwargs), dynamic_shapes)
    check_bounds(exported)
    return _lower(exported, gm, findings, backend, calling)


def _refuse_bfloat16(gm: GraphModule) -> None:
    """ExecuTorch's quantize and dequantize end the process when they meet bfloat16, so no such program is made."""
    nodes = (node for _, part in graphs(gm) for node in part.graph.nodes)
    found = [node for node in nodes if node.target in (*QUANTIZE, *DEQUANTIZE) and _is_bfloat16(node)]
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


def _lower(
    exported: ExportedProgram,
    gm: GraphModule,
    findings: tuple[Violation, ...],
    backend: str | None,
    calling: CallingConvention,
) -> ExecutorchProgram:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    partitioner = _executorch.xnnpack_partitioner() if backend == "xnnpack" else None
    with explaining("ExecuTorch cannot lower this graph"), _executorch.Rejections().listen() as rejections:
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
    with explaining("ExecuTorch cannot turn the lowered graph into a program"):
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
        calling=calling,
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
