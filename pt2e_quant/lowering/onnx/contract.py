"""What an ONNX file cannot say: found before anything is exported."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...errors import LoweringError
from ...graph.attributes import written_attributes
from ...graph.nested import written_inputs
from ...where import locate
from ..common.entry import written_input

__all__ = ["check_onnx_contract"]

_OUTSIDE = (torch.bfloat16, torch.complex64, torch.complex128)


def check_onnx_contract(model: GraphModule) -> None:
    """Refuse what would be lost or could not run.

    Raises:
        LoweringError: names every such node, with the reason and the way out.
    """
    found = [*_state(model), *_inputs(model), *_outputs(model)]
    if found:
        places = "\n".join(f"- {one}" for one in found)
        raise LoweringError(f"the model breaks {len(found)} ONNX requirement{'s' * (len(found) > 1)}:\n{places}")


def _state(model: GraphModule) -> Iterator[str]:
    for name in written_attributes(model):
        yield (
            f"the model writes to its buffer {name!r}, and a file of ONNX keeps no state from one run to the next. "
            "Take the buffer as an input and return it"
        )


def _inputs(model: GraphModule) -> Iterator[str]:
    for node, by in written_inputs(model).items():
        yield written_input(node, by, "onnxruntime")
    for node in model.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype in _OUTSIDE:
            dtype = str(value.dtype).removeprefix("torch.")
            without = f"its input is {dtype}, for which onnxruntime has no kernels on processors"
            yield f"{without}. Export it in float32\n    {locate(node)}"


def _outputs(model: GraphModule) -> Iterator[str]:
    for index, value in enumerate(pytree.tree_leaves(model.graph.output_node().args[0])):
        if not isinstance(value, Node):
            yield f"output {index} is {value!r}, and a file of ONNX returns tensors alone. Leave it out"
