"""What lowering returns: the program as bytes, with an account of what each operator became.

Made by `executorch.lower_to_executorch`. All of it is plain data, except `run`, which loads the bytes into ExecuTorch's
runtime for Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import LoweringError, did_you_mean
from ...latency import Profile
from ..common.calling import CallingConvention
from ..common.entry import quietly
from ..common.program import Fallback, LoweredProgram, Remark, Saved
from ..common.verify import NOT_RUN, Verification
from .profile import take_profile
from .taps import Tap, read_taps

__all__ = ["ExecutorchKernel", "ExecutorchMethods", "ExecutorchProgram", "Loaded", "Sizes"]


@dataclass(frozen=True)
class ExecutorchKernel:
    """An operator inside a delegate, and the arithmetic that it runs in.

    Args:
        node: name of the node of the converted graph that it comes from.
        op: the operator of the lowered graph.
        precision: 'int8': integers in and out; 'dynamic': activations become integers while running, the output is
            floating point; 'float': floating point, between a dequantize and a quantize where its neighbours are int8.
        delegate: index of the delegate that holds it.
    """

    node: str
    op: str
    precision: Literal["int8", "dynamic", "float"]
    delegate: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of the program. file >= delegates + constants; the rest is the schedule, alignment and the header.

    Args:
        file: the whole program.
        delegates: what the delegates hold: their graphs and their weights.
        constants: parameters and buffers of the operators that run outside every delegate.
    """

    file: int
    delegates: int
    constants: int


class Loaded:
    """A program in ExecuTorch's runtime, loaded when it is first needed; its methods share their state.

    Args:
        buffer: the program.
        names: its methods, without those that return constants.
    """

    def __init__(self, buffer: bytes, names: tuple[str, ...]) -> None:
        self.buffer = buffer
        self.names = names
        self._methods: dict[str, Any] = {}

    def method(self, name: str) -> Any:
        """A method to execute.

        Raises:
            LoweringError: the runtime refuses the program.
        """
        if not self._methods:
            self._methods = self._load()
        return self._methods[name]

    def reset(self) -> None:
        """Forget the runtime's state: the next call loads the program anew."""
        self._methods = {}

    def constants(self) -> dict[str, Any]:
        """The methods that return constants, by name."""
        from .runtime import runtime

        with quietly():
            program = runtime().load_program(self.buffer)
        return {name: program.load_method(name) for name in program.method_names - set(self.names)}

    def _load(self) -> dict[str, Any]:
        """All methods at once: loading one writes the initial values of its buffers, which others may share."""
        from .runtime import runtime

        try:
            with quietly():
                program = runtime().load_program(self.buffer)
                return {name: program.load_method(name) for name in self.names}
        except RuntimeError as error:
            raise LoweringError(
                f"ExecuTorch's runtime cannot load this program: {error}\n  {_advice(str(error))}"
            ) from error


def _advice(error: str) -> str:
    """What to do about an error of the runtime, by its code (executorch/runtime/core/error.h)."""
    code = error.replace("0x:", "0x")  # as one of its messages writes it
    if "0x14" in code:  # OperatorMissing
        return (
            "An operator outside every delegate has no kernel in this runtime; lower with preflight=True, which names "
            "it. Write it with other operators, or link its kernel."
        )
    if "0x10" in code:  # NotSupported
        return "A backend cannot run a part that it took. Keep the operators around it in float, and report the model."
    return (
        "A backend refused its delegate. Lower with preflight=True, which names the operator that breaks a rule of the "
        "backend; if that finds nothing, please report it with the model."
    )


@dataclass(frozen=True, repr=False)
class ExecutorchProgram(LoweredProgram):
    """A program for ExecuTorch (.pte), or one method of it, and what every operator of the model became in it.

    Args:
        buffer: the program, as it stands in a .pte file.
        delegates: how many parts of the model a backend took; 1 when it took everything.
        undelegated: operators outside every delegate, each with the reason.
        kernels: operators inside the delegates, each with its arithmetic.
        remarks: differences to expect between the program and the converted graph.
        sizes: where the bytes are.
        calling: how the arguments of the model become the program's inputs.
        outputs: the structure of what the model returns.
        loaded: the program in the runtime, which all methods of a file share.
        method: name of the method in the file.
        verified: what running it showed, against the converted graph; false when it was not run.
        taps: the tensors inside that the runtime can show.
        origins: by node of the converted graph, the name of the node of the program exported first that it computes.
    """

    buffer: bytes
    delegates: int
    undelegated: tuple[Fallback, ...]
    kernels: tuple[ExecutorchKernel, ...]
    remarks: tuple[Remark, ...]
    sizes: Sizes
    calling: CallingConvention = field(compare=False)
    outputs: pytree.TreeSpec = field(compare=False)
    loaded: Loaded = field(compare=False)
    method: str = "forward"
    verified: Verification = field(compare=False, default=NOT_RUN)
    taps: tuple[Tap, ...] = field(compare=False, default=())
    origins: Mapping[str, str] = field(compare=False, default_factory=dict)

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Execute the program in ExecuTorch's runtime, with the arguments that the model takes; its outputs, flat.

        The program is loaded at the first call. Buffers that the model writes to (a key-value cache) keep their state
        from one call to the next.

        Raises:
            LoweringError: the arguments do not fit the model, or the runtime refuses the program or the arguments.
        """
        inputs = self.calling.flatten(args, kwargs)
        try:
            with torch.no_grad():
                outputs = self.loaded.method(self.method).execute(inputs)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)
            raise LoweringError(
                f"ExecuTorch's runtime failed on inputs {shapes}: {error}\n"
                "  Sizes must lie within those that the model was lowered for (dynamic_shapes), and dtypes must agree."
            ) from error
        return tuple(outputs)

    run_flat = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Execute it as `run` does, and return what the model returns."""
        return pytree.tree_unflatten(self.run(*args, **kwargs), self.outputs)

    def inner_values(self, *args: Any, **kwargs: Any) -> dict[tuple[str, str], Tensor]:
        """Run it from its first state, and read what the runtime writes down: results of operators outside every
        delegate, and of delegates; by the name of the float node that they are the value of, and of the converted one.
        """
        found = read_taps(self.buffer, self.method, self.calling.flatten(args, kwargs), self.taps)
        return {(self.origins.get(tap.node, tap.node), tap.node): value for tap, value in found.items()}

    def profile(self, *args: Any, runs: int = 20, **kwargs: Any) -> Profile:
        """Run it so many times on these arguments, from its first state, and tell where the time goes.

        Products in delegates and operators outside of them are joined with their nodes.

        Raises:
            LoweringError: the arguments do not fit, or the runtime was built without its event tracer.
        """
        self.run(*args, **kwargs)  # which says what is wrong with them
        self.reset()
        return take_profile(self.buffer, self.method, self.calling.flatten(args, kwargs), runs, self.kernels, self.taps)

    def fate(self, node: str) -> str:
        left = next((f"not delegated: {one.reason}" for one in self.undelegated if one.node == node), None)
        taken = (f"{kernel.precision}, delegate {kernel.delegate}" for kernel in self.kernels if kernel.node == node)
        return next(taken, left or "removed while lowering")

    def constant(self, name: str) -> Any:
        """A constant of the program: 'input_0_scale', 'output_1_zero_point', ... of its integer inputs and outputs.

        Raises:
            LoweringError: the program has no constant of this name.
        """
        constants = self.loaded.constants()
        if name not in constants:
            raise LoweringError(f"the program has no constant {name!r}.{did_you_mean(name, constants)}")
        return constants[name].execute([])[0]

    def reset(self) -> None:
        """Give the buffers that the model writes to what they started with, in all methods of the file."""
        self.loaded.reset()

    def sections(self) -> dict[str, Sequence[Any]]:
        floating = [f"{kernel.node} ({kernel.op})" for kernel in self.kernels if kernel.precision == "float"]
        return {
            "Outside every delegate, in portable kernels": self.undelegated,
            "In a delegate, in floating point": floating if len(floating) < len(self.kernels) else (),
        }

    def to_dict(self) -> dict[str, Any]:
        undelegated = [asdict(left) for left in self.undelegated]
        return {
            "delegates": self.delegates, "sizes": asdict(self.sizes), "undelegated": undelegated, **self.account(),
        }  # fmt: skip

    def _file(self) -> bytes:
        return self.buffer

    def __str__(self) -> str:
        sizes = self.sizes
        kinds = ", ".join(f"{self.count(kind)} {kind}" for kind in ("int8", "dynamic", "float") if self.count(kind))
        plural = "s" if self.delegates != 1 else ""
        inside = f"{len(self.kernels)} operators in {self.delegates} delegate{plural}" + (
            f" ({kinds})" if kinds else ""
        )
        return (
            f"ExecuTorch program, {_size(sizes.file)} (delegates {_size(sizes.delegates)}, constants outside "
            f"{_size(sizes.constants)}): {inside}, {len(self.undelegated)} outside"
        )


@dataclass(frozen=True, repr=False)
class ExecutorchMethods(Saved, Mapping[str, ExecutorchProgram]):
    """A program of several methods: `program["decode"].run(...)`; each has its own account.

    Args:
        buffer: the program, as it stands in a .pte file.
        methods: the methods by name.
        shared: names of the buffers that methods write to and share, such as key-value caches.
        sizes: where the bytes are; what methods share counts once.
    """

    buffer: bytes
    methods: dict[str, ExecutorchProgram]
    shared: tuple[str, ...]
    sizes: Sizes

    def __getitem__(self, name: str) -> ExecutorchProgram:
        return self.methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def reset(self) -> None:
        """Give the buffers that the methods write to what they started with."""
        for method in self.methods.values():
            method.reset()

    def text(self) -> str:
        """All there is to tell, for people: the summary, then each method's account."""
        return "\n".join([str(self), *(f"{name}: {method.text()}" for name, method in self.methods.items())])

    def to_dict(self) -> dict[str, Any]:
        methods = {name: method.to_dict() for name, method in self.methods.items()}
        return {"sizes": asdict(self.sizes), "shared": list(self.shared), "methods": methods}

    def _file(self) -> bytes:
        return self.buffer

    def __str__(self) -> str:
        buffers = f", {len(self.shared)} buffers shared" if self.shared else ""
        return f"ExecuTorch program, {_size(self.sizes.file)}: methods {', '.join(self.methods)}{buffers}"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
