"""What lowering to Inductor returns: something to call, with an account of the kernel that each operator became.

Made by `inductor.lower_to_inductor`. All but the callable is plain data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import LoweringError
from ...files import write_file
from ...latency import Profile
from ..common.calling import CallingConvention
from ..common.entry import quietly
from ..common.program import Fallback, LoweredProgram, Remark
from ..common.verify import NOT_RUN, Verification
from .profile import take_profile

__all__ = ["InductorKernel", "InductorProgram", "InputSpec", "Precision"]

Precision = Literal["int8", "dynamic", "weight only", "float16", "float"]


@dataclass(frozen=True)
class InductorKernel:
    """A quantized operator and the kernel that computes it; linears that read one tensor may share theirs.

    Args:
        node: name of the node of the converted graph.
        op: its operator, such as 'aten.conv2d.default'.
        kernel: what runs: an operator of oneDNN or ATen, or 'generated', a loop that Inductor wrote.
        precision: 'int8': integers in; 'dynamic': the input becomes integers while running; 'weight only': integer
            weights, float input; 'float16': half-precision weights, float input; 'float': too small for any kernel.
        fused: what the kernel does besides: 'sum' or 'add', 'relu', 'hardtanh', ..., 'quantize'.
    """

    node: str
    op: str
    kernel: str
    precision: Precision
    fused: tuple[str, ...]

    def __str__(self) -> str:
        more = f" + {' + '.join(self.fused)}" if self.fused else ""
        return f"{self.node} ({self.op}): {self.kernel}{more}, {self.precision}"


@dataclass(frozen=True)
class InputSpec:
    """What an input must be: its dtype, and for each dimension the smallest and largest size, None for no bound."""

    name: str
    dtype: torch.dtype
    sizes: tuple[tuple[int, int | None], ...]

    def accepts(self, value: object) -> bool:
        if not isinstance(value, Tensor) or value.dtype is not self.dtype or value.dim() != len(self.sizes):
            return False
        spans = zip(value.shape, self.sizes, strict=True)
        return all(low <= size and (high is None or size <= high) for size, (low, high) in spans)

    def __str__(self) -> str:
        spans = (str(low) if low == high else f"{low}..{'' if high is None else high}" for low, high in self.sizes)
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(spans)}]"


@dataclass(frozen=True, repr=False)
class InductorProgram(LoweredProgram):
    """A model compiled by Inductor. Call it like the model.

    Args:
        mode: 'compile': lives in this process; 'aoti': a package that any process with torch loads.
        kernels: the quantized operators, each with the kernel that it became.
        fallbacks: quantized operators that run in floating point.
        remarks: differences to expect between the program and the converted graph.
        inputs: what the flat inputs must be.
        calling: how the arguments of the model become the flat inputs.
        package: the bytes of the package (.pt2), empty for 'compile'.
        compiled: what to call with flat inputs, for 'compile'.
        state: the buffers that it writes to, each with its first values, for 'compile'.
        verified: what running it showed, against the converted graph; false when it was not run.
    """

    mode: Literal["compile", "aoti"]
    kernels: tuple[InductorKernel, ...]
    fallbacks: tuple[Fallback, ...]
    remarks: tuple[Remark, ...]
    inputs: tuple[InputSpec | None, ...]
    calling: CallingConvention = field(compare=False)
    package: bytes = field(compare=False, default=b"")
    compiled: Callable[[list[Any]], Any] | None = field(compare=False, default=None)
    state: tuple[tuple[Tensor, Tensor], ...] = field(compare=False, default=())
    verified: Verification = field(compare=False, default=NOT_RUN)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, without gradients, and return what the model returns.

        Buffers that the model writes to (a key-value cache) keep their state from one call to the next.

        Raises:
            LoweringError: the arguments are not those that the program was compiled for.
        """
        flat = self.calling.flatten(args, kwargs)
        wrong = [
            (position, spec)
            for position, spec in enumerate(self.inputs)
            if spec is not None and not spec.accepts(flat[position])
        ]
        if wrong:
            got = "; ".join(f"{spec}, got {_describe(flat[position])}" for position, spec in wrong)
            raise LoweringError(f"the program was compiled for {got}. Compile with dynamic_shapes for other sizes.")
        with torch.no_grad():
            return self._run(flat)

    run = __call__

    def run_flat(self, *args: Any, **kwargs: Any) -> list[Any]:
        return pytree.tree_leaves(self(*args, **kwargs))

    def fate(self, node: str) -> str:
        left = next((f"in float: {one.reason}" for one in self.fallbacks if one.node == node), None)
        taken = (f"{kernel.precision}, {kernel.kernel}" for kernel in self.kernels if kernel.node == node)
        return next(taken, left or "part of generated code, or removed while lowering")

    def reset(self) -> None:
        for buffer, first in self.state:
            buffer.copy_(first)
        self.__dict__.pop("_loaded", None)  # a package is loaded anew

    def _file(self) -> bytes:
        """A package, which torch alone loads elsewhere: torch._inductor.aoti_load_package."""
        if self.mode != "aoti":
            raise LoweringError("mode='compile' makes code for this process only; lower with mode='aoti' to save it")
        return self.package

    def profile(self, *args: Any, runs: int = 20, **kwargs: Any) -> Profile:
        """Run it so many times on these arguments and tell where the time goes. For programs lowered with profile=True.

        Raises:
            LoweringError: the program was lowered without it, or the arguments do not fit.
        """
        return take_profile(lambda: self(*args, **kwargs), runs, self.kernels)

    def count(self, precision: str) -> int:
        """How many quantized operators run in this precision."""
        return super().count(precision) + (len(self.fallbacks) if precision == "float" else 0)

    def sections(self) -> dict[str, Sequence[Any]]:
        return {"Kernels": self.kernels, "Quantized, and yet in floating point": self.fallbacks}

    def to_dict(self) -> dict[str, Any]:
        fallbacks = [asdict(fallback) for fallback in self.fallbacks]
        return {"mode": self.mode, "fallbacks": fallbacks, **self.account()}

    def __str__(self) -> str:
        kinds: tuple[Precision, ...] = ("int8", "dynamic", "weight only", "float16")
        counts = ", ".join(f"{self.count(kind)} {kind}" for kind in kinds if self.count(kind)) or "none"
        return f"Inductor program ({self.mode}): quantized operators {counts}; {len(self.fallbacks)} fell back to float"

    def _run(self, flat: list[Any]) -> Any:
        return self._loaded(flat) if self.compiled is None else self.compiled(flat)

    @cached_property
    def _loaded(self) -> Callable[[list[Any]], Any]:
        folder = tempfile.TemporaryDirectory(prefix="pt2e_quant")
        path = write_file(Path(folder.name) / "model.pt2", self.package)
        with quietly():
            loader = torch._inductor.aoti_load_package(str(path)).loader
        folder.cleanup()  # the loader has unpacked it into a folder of its own
        # The loaded package would parse this description, and that of its inputs, in every call.
        tree = pytree.treespec_loads(loader.get_call_spec()[1])
        return lambda flat: pytree.tree_unflatten(loader.boxed_run([x for x in flat if isinstance(x, Tensor)]), tree)


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
