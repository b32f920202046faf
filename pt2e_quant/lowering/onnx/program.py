"""What lowering to ONNX returns: the file, a session of onnxruntime to run it, and an account of its kernels.

Made by `onnx.lower_to_onnx`. All but the session is plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import LoweringError
from ...latency import Profile
from ..common.calling import CallingConvention
from ..common.program import Fallback, LoweredProgram, Remark
from ..common.verify import NOT_RUN, Verification
from .profile import take_profile
from .runtime import open_session

__all__ = ["OnnxKernel", "OnnxProgram", "Precision"]

Precision = Literal["int8", "dynamic", "weight only", "moved", "float"]


@dataclass(frozen=True)
class OnnxKernel:
    """A quantized operator and the operator of onnxruntime that computes it.

    Args:
        node: name of the node of the converted graph.
        op: its operator, such as 'aten.conv2d.default'.
        kernel: what runs, such as 'QLinearConv'.
        precision: 'int8': integers in; 'dynamic': the input becomes integers while running; 'weight only': integer
            weights, float input; 'moved': integers are moved and nothing is computed.
    """

    node: str
    op: str
    kernel: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.node} ({self.op}): {self.kernel}, {self.precision}"


@dataclass(frozen=True, repr=False)
class OnnxProgram(LoweredProgram):
    """A model as an ONNX file. Call it like the model: onnxruntime runs it, on the processor.

    Args:
        opset: the version of ONNX's operators.
        kernels: the quantized operators, each with what onnxruntime runs for it on this processor.
        fallbacks: quantized operators that onnxruntime runs in floating point.
        remarks: differences to expect between the program and the converted graph.
        calling: how the arguments of the model become the flat inputs.
        outputs: the structure of what the model returns.
        model: the content of the file.
        verified: what running it showed, against the converted graph; false when it was not run.
    """

    opset: int
    kernels: tuple[OnnxKernel, ...]
    fallbacks: tuple[Fallback, ...]
    remarks: tuple[Remark, ...]
    calling: CallingConvention = field(compare=False)
    outputs: pytree.TreeSpec = field(compare=False)
    model: bytes = field(compare=False)
    verified: Verification = field(compare=False, default=NOT_RUN)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it and return what the model returns.

        Raises:
            LoweringError: the arguments are not those that the model takes, or onnxruntime refuses them.
        """
        return pytree.tree_unflatten(self.run_flat(*args, **kwargs), self.outputs)

    run = __call__

    def run_flat(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        given = self._given(args, kwargs)
        try:
            found = self._session.run(None, self._feed(given))
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in given)
            raise LoweringError(
                f"onnxruntime failed on inputs {shapes}: {error}\n"
                "  Sizes must lie within those that the model was lowered for (dynamic_shapes), and dtypes must agree."
            ) from error
        return [torch.from_numpy(one.copy()) if one.ndim else torch.tensor(one) for one in found]

    def profile(self, *args: Any, runs: int = 20, **kwargs: Any) -> Profile:
        """Run it so many times on these arguments and tell where the time goes, node by node.

        Raises:
            LoweringError: the arguments do not fit.
        """
        self.run_flat(*args, **kwargs)  # which says what is wrong with them
        return take_profile(self.model, self._feed(self._given(args, kwargs)), runs)

    def fate(self, node: str) -> str:
        left = next((f"in float: {one.reason}" for one in self.fallbacks if one.node == node), None)
        taken = (f"{kernel.precision}, {kernel.kernel}" for kernel in self.kernels if kernel.node == node)
        return next(taken, left or "part of another kernel, or removed while lowering")

    def reset(self) -> None:
        """A file keeps no state."""

    def count(self, precision: str) -> int:
        """How many quantized operators run in this precision."""
        return super().count(precision) + (len(self.fallbacks) if precision == "float" else 0)

    def sections(self) -> dict[str, Sequence[Any]]:
        return {"Kernels": self.kernels, "Quantized, and yet in floating point": self.fallbacks}

    def to_dict(self) -> dict[str, Any]:
        fallbacks = [asdict(fallback) for fallback in self.fallbacks]
        return {"opset": self.opset, "bytes": len(self.model), "fallbacks": fallbacks, **self.account()}

    def __str__(self) -> str:
        kinds: tuple[Precision, ...] = ("int8", "dynamic", "weight only", "moved")
        counts = ", ".join(f"{self.count(kind)} {kind}" for kind in kinds if self.count(kind)) or "none"
        return (
            f"ONNX program, opset {self.opset}, {len(self.model) / 1024:.1f} KiB: quantized operators {counts}; "
            f"{len(self.fallbacks)} fell back to float"
        )

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return [value for value in self.calling.flatten(args, kwargs) if isinstance(value, Tensor)]

    def _feed(self, given: list[Tensor]) -> dict[str, Any]:
        """The inputs as onnxruntime takes them."""
        return {name: value.detach().cpu().numpy() for name, value in zip(self._inputs, given, strict=True)}

    def _file(self) -> bytes:
        """An .onnx file, which any runtime of ONNX loads."""
        return self.model

    @cached_property
    def _session(self) -> Any:
        return open_session(self.model)

    @cached_property
    def _inputs(self) -> tuple[str, ...]:
        """Names in the order of the model's arguments."""
        return tuple(one.name for one in self._session.get_inputs())
