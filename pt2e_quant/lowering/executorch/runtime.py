"""The one door to the `executorch` package: what is imported from it, when, and how XNNPACK's partitioner is asked.

`executorch` is optional, so nothing of it is imported before a function here is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from ...errors import LoweringError
from ...meta import PORTABLE, marks
from ..common.entry import origin, quietly
from .partition import by_level
from .startup import start_threads
from .xnnpack.short_cuts import decomposes_once, delegation_of

__all__ = [
    "Rejections",
    "configuration",
    "constants",
    "is_implicit",
    "require",
    "require_embeddings",
    "runtime",
    "xnnpack_partitioner",
]

_PARTITION_LOGGER = "executorch.backends.xnnpack.partition"


def require() -> None:
    """Import ExecuTorch's compiler and its quantized ops, which quantize and dequantize outside delegates become.

    Raises:
        LoweringError: the package is not there or is broken; says how to install it.
    """
    handlers = list(logging.root.handlers)
    try:
        with quietly():
            _load()
    except ImportError as error:
        raise LoweringError(
            f"lowering needs ExecuTorch, which cannot be imported here ({error}). "
            'Install it with: pip install "pt2e_quant[executorch]"'
        ) from error
    finally:
        logging.root.handlers[:] = handlers  # ExecuTorch configures the program's root logger when it is imported
    if not hasattr(torch.ops.quantized_decomposed.quantize_per_tensor, "out"):
        raise LoweringError(
            "this installation of ExecuTorch lacks its library of quantized ops (quantized_ops_aot_lib). "
            'Install a build for this platform: pip install --force-reinstall "pt2e_quant[executorch]"'
        )


def require_embeddings() -> None:
    """Register quantized_decomposed.embedding_byte and its kin, which ExecuTorch defines beside its passes."""
    with quietly():
        import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401


def _load() -> None:
    import executorch.backends.xnnpack.partition.xnnpack_partitioner
    import executorch.exir
    import executorch.kernels.quantized  # noqa: F401  loads the library, or leaves it without a word


def runtime() -> Any:
    """ExecuTorch's runtime in this process, with the quantized kernels loaded."""
    require()
    with quietly():
        from executorch.runtime import Runtime

        start_threads()
        return Runtime.get()


def configuration(share_buffers: bool) -> Any:
    """How a lowered graph becomes a program; `share_buffers`: methods share those that they write to."""
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    planning = MemoryPlanningPass(share_mutable_buffers=share_buffers)
    return ExecutorchBackendConfig(extract_delegate_segments=True, memory_planning_pass=planning)


def constants(program: Any, method: str) -> dict[int, int]:
    """Bytes of the constants that a method reads outside of its delegates, by their place in the program."""
    plan = next(plan for plan in program.execution_plan if plan.name == method)
    tensors = [value.val for value in plan.values if hasattr(value.val, "data_buffer_idx")]
    places = {one.data_buffer_idx for one in tensors if one.data_buffer_idx and one.allocation_info is None}
    return {place: len(program.constant_buffer[place].storage) for place in places}


def xnnpack_partitioner(method: str, rejections: Rejections) -> Any:
    """XNNPACK's partitioner for a method of a program, repaired; `rejections` learns what it says of that method.

    To judge a convolution or matrix product, the partitioner marks the dequantize before it as part of the integer
    kernel, and forgets to take the mark back when it then refuses. The delegate would hand the integers themselves to
    the portable kernel, with wrong results. Here a refusal leaves no trace. And partitions are merged by level,
    see `partition`.

    It looks for parameters by the names of nodes, also in nested graphs, whose inputs happen to have the same names.
    There it keeps operators whole that it never takes, and lowering fails. Here all in nested graphs are refused.

    What the compiler does without (`xnnpack.short_cuts`), each delegate says.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    partitioner = XnnpackPartitioner()
    for config in partitioner.target_partitioner_configs.values():
        config.check_constraints = _without_marks_on_refusal(config.check_constraints, method, rejections)
    stock = partitioner.generate_partitions
    partitioner.generate_partitions = lambda program: _partitions(partitioner, program) or stock(program)
    partitioner.partition = partial(_partition, partitioner.partition)
    partitioner.ops_to_not_decompose = partial(_kept_whole, partitioner.ops_to_not_decompose)
    return partitioner


def _partition(stock: Callable[[Any], Any], program: Any) -> Any:
    result = stock(program)
    members: dict[str, list[Node]] = {tag: [] for tag in result.partition_tags}
    for node in program.graph.nodes:
        if "delegation_tag" in node.meta:
            members[node.meta["delegation_tag"]].append(node)
    result.partition_tags = {tag: delegation_of(nodes) for tag, nodes in members.items()}
    return result


def _kept_whole(stock: Callable[[Any], Any], program: Any) -> Any:
    """The operators, and which of them; None for the second: all of them."""
    kept, fits = stock(program)
    return kept, None if decomposes_once(program.graph.nodes, kept, fits) else fits


def _partitions(partitioner: Any, program: Any) -> list[Any] | None:
    from torch.fx.passes.infra.partitioner import Partition

    parts = by_level(program.graph, partitioner.get_matched_nodes_from_configs(program))
    return None if parts is None else [Partition(id=number, nodes=part) for number, part in enumerate(parts)]


def is_implicit(node: Node) -> bool:
    """True for a quantize or dequantize that a delegate computes as part of the integer kernel next to it."""
    from executorch.backends.xnnpack.utils.quant_utils import is_tagged_as_implicit_q_dq

    return bool(is_tagged_as_implicit_q_dq(node))


def _without_marks_on_refusal(
    check: Callable[[Node, Any], bool], method: str, rejections: Rejections
) -> Callable[[Node, Any], bool]:
    from executorch.backends.xnnpack.utils.quant_utils import IS_IMPLICIT_Q_DQ_TAG as MARK

    def check_constraints(node: Node, program: Any) -> bool:
        near = _neighbours(node)
        marked = {other for other in near if MARK in other.meta}
        rejections.method = method
        fits = not _is_portable(node, program) and check(node, program)
        if not fits:
            for other in near - marked:
                other.meta.pop(MARK, None)
        return fits

    return check_constraints


def _is_portable(node: Node, program: Any) -> bool:
    return node.graph is not program.graph or PORTABLE in marks(node)


def _neighbours(node: Node) -> set[Node]:
    """Nodes that one kernel can take in: inputs up to pad <- dequantize <- quantize, users up to relu -> quantize."""
    found: set[Node] = set()
    front = [node]
    for _ in range(3):
        front = [source for near in front for source in near.all_input_nodes]
        found.update(front)
    front = [node]
    for _ in range(2):
        front = [user for near in front for user in near.users]
        found.update(front)
    return found


class Rejections(logging.Handler):
    """What XNNPACK's partitioner says, in its debug log, of nodes that it refuses.

    One node is judged several times on its way (as linear, then decomposed as addmm); the first word counts, being
    about the operator that the user wrote. Nodes of different methods may have the same name.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.method = ""
        self._said: dict[tuple[str, str], dict[str, list[str]]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        node, reason = getattr(record.msg, "node", None), getattr(record.msg, "reason", None)
        if isinstance(node, Node) and reason:
            reasons = self._said.setdefault((self.method, origin(node)), {}).setdefault(str(node.target), [])
            if reason not in reasons:
                reasons.append(str(reason))

    def of(self, method: str, node: Node) -> list[str]:
        """The reasons given for the node of the method's converted graph that this node comes from."""
        return next(iter(self._said.get((method, origin(node)), {}).values()), [])

    @contextmanager
    def listen(self) -> Iterator[Rejections]:
        logger = logging.getLogger(_PARTITION_LOGGER)
        level, propagate = logger.level, logger.propagate
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(self)
        try:
            yield self
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate
