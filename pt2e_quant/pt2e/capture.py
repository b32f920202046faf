"""From what the user hands in to a graph of our own that the engine may change. First step of prepare.

Accepts a torch.export.ExportedProgram or its .module(), strict or not, captured with or without gradients; everything
else is an error that says how to export. The caller's model is never touched: graphs and the buffers that the model
writes to are copied, what is only read is shared.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..errors import CaptureError
from ..graph.attributes import own_state, own_written, state_bytes
from ..graph.module import ExportedModule, captured_mode, clone, drop_dead, is_guard
from ..graph.nested import name_nested
from ..passes.fold_batch_norm import fold_batch_norm
from ..passes.follow_in_place import follow_in_place
from ..passes.inline_regions import inline_regions
from ..passes.nested_constants import move_constants_in
from ..passes.nested_modules import locate_nested_modules
from ..passes.runner import Pass, run_everywhere, run_pass
from .qat.batch_norm import fold_for_training
from .record import record_of

__all__ = ["Captured", "capture"]

_HOW_TO_EXPORT = "Export it first: exported = torch.export.export(model.eval(), example_inputs)"


ExampleInputs = tuple[tuple[Any, ...], dict[str, Any]]


class Captured(NamedTuple):
    """A private copy of an exported graph, ready to annotate.

    state_bytes: size of the parameters and buffers before that
    training: it was exported in training mode
    """

    gm: ExportedModule
    example_inputs: ExampleInputs | None
    state_bytes: int
    training: bool


def capture(model: object, steps: Iterable[Pass] = (), *, to_train: bool = False) -> Captured:
    """Copy an exported graph and bring it into the form that quantizers expect.

    Args:
        model: an ExportedProgram or its module.
        steps: rewrites to run last, such as the decompositions that a backend asks for.
        to_train: in evaluation mode, whatever it was exported in, with parameters of its own, and with all that it
            takes to bring the folded batch norms back.

    Raises:
        CaptureError: the model is not an exported one, or was prepared or converted before.
    """
    example_inputs = model.example_inputs if isinstance(model, ExportedProgram) else None
    exported = _checked(model.module() if isinstance(model, ExportedProgram) else model)
    inline = functools.partial(inline_regions, to_train=to_train)
    draft = run_pass(inline, clone(exported), inline_regions.__name__)
    draft = run_everywhere(drop_dead, name_nested(draft))  # what nobody reads is not quantized either
    draft = run_pass(locate_nested_modules, run_pass(move_constants_in, draft))
    draft = run_everywhere(follow_in_place, draft)
    training = captured_mode(draft)
    if to_train:
        own_state(draft.eval())
    else:
        own_written(draft)
    before = state_bytes(draft)
    gm = run_everywhere(fold_for_training if to_train else fold_batch_norm, draft)
    for step in steps:
        gm = run_everywhere(step, gm)
    return Captured(gm, example_inputs, before, training)


def _checked(model: object) -> GraphModule:
    record = record_of(model)
    if record is not None:
        raise CaptureError(
            f"this model was {record.stage} before (by {record.quantizer}). Preparing needs an exported float model; "
            "keep the ExportedProgram and prepare that, or call convert_pt2e on a prepared model."
        )
    if isinstance(model, GraphModule):
        what = _what_no_export_has(model)
        if what is not None:
            raise CaptureError(f"this GraphModule {what}, so torch.export did not make it. {_HOW_TO_EXPORT}")
        return model
    if isinstance(model, nn.Module):
        raise CaptureError(
            f"prepare_pt2e needs an exported model, got the nn.Module {type(model).__name__}. {_HOW_TO_EXPORT}"
        )
    raise CaptureError(f"prepare_pt2e needs an exported model, got {type(model).__name__}. {_HOW_TO_EXPORT}")


def _what_no_export_has(gm: GraphModule) -> str | None:
    for node in gm.graph.nodes:
        if node.op == "call_method" or (node.op == "call_module" and not is_guard(node)):
            return f"calls {node.target} where ATen ops are expected"
    return None if any("val" in node.meta for node in gm.graph.nodes) else "carries no recorded values (meta['val'])"
