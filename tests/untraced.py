"""Coverage looks away while torch, Inductor and ExecuTorch work: traced, they take two to four times as long.

Most of the time of these tests goes into exporting and compiling, and a tracer makes lines of others slow without
counting them. Named here are functions that do much of that work and call little of ours back; where they do, in the
kernels of our operators for instance, only what is called from elsewhere too is counted.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["EXECUTORCH", "INDUCTOR", "TORCH", "look_away"]

TORCH = (
    "torch.export.export",
    "torch.export.ExportedProgram.run_decompositions",
    "torch.fx.Graph.python_code",
)
INDUCTOR = (
    "torch._inductor.freezing.freeze",
    "torch._inductor.fx_passes.joint_graph.lazy_init",
    "torch._inductor.fx_passes.post_grad.lazy_init",
    "torch._inductor.graph.GraphLowering.compile_to_module",
    "torch._inductor.graph.GraphLowering.run",
    "torch._inductor.pattern_matcher.PatternMatcherPass.apply",
)
EXECUTORCH = (
    "executorch.backends.xnnpack.xnnpack_preprocess.XnnpackBackend.preprocess",
    "executorch.exir.EdgeProgramManager.to_executorch",
    "executorch.exir.program._program._gen_edge_manager_for_partitioners",
)


def look_away(names: tuple[str, ...]) -> None:
    """Let these functions and methods, given as `module.function` or `module.Class.method`, run untraced."""
    for name in names:
        place, _, last = name.rpartition(".")
        owner = _untraced(_module_or_class)(place)
        found = vars(owner)[last]
        static = isinstance(found, staticmethod)
        quick = _untraced(found.__func__ if static else found)
        setattr(owner, last, staticmethod(quick) if static else quick)


def _module_or_class(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(importlib.import_module(module), last)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tracer = sys.gettrace()
        if tracer is None:
            return function(*args, **kwargs)
        sys.settrace(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(tracer)

    return run
