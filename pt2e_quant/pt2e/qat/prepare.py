"""prepare_qat_pt2e: the plan of prepare_pt2e carried out for training, with batch norms that go on training.

Before this: capture folds batch norms as for calibration. After it: the user's own training loop, then `convert_pt2e`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ...checks import checked
from ...errors import CaptureError, CoverageError
from ...fake_quantize import FakeQuantize, is_fake_quantizer
from ...fake_quantize.rounding import ready_to_compile
from ...graph.attributes import attribute
from ...graph.module import ExportedModule, collector_paused, finish
from ...graph.nested import graphs
from ...meta import RECORD_KEY, SET_ASIDE_KEY
from ...passes.decompose import decompositions
from ...quantizer.base import Quantizer
from ..capture import capture
from ..prepare import checked_name, observed
from .batch_norm import SetAside, unfold_batch_norm
from .dropout import pass_over_dropouts
from .fixed import warn_of_what_is_fixed
from .start import shape_learned_scales, start_from_calibration

__all__ = ["prepare_qat_pt2e"]


@collector_paused()
@checked(CaptureError, but=("model", "quantizer"))
def prepare_qat_pt2e(
    model: ExportedProgram | GraphModule,
    quantizer: Quantizer,
    *,
    require: Iterable[str] = (),
    allow_empty: bool = False,
    decompose: Iterable[str] | None = None,
    calibration: Any = None,
) -> ExportedModule:
    """Insert the fake quantizers that a quantizer asks for; train the result, then `convert_pt2e` it.

    A layer before a batch norm is rounded as it will be once that is folded into it, and the batch norm goes on
    training; see `batch_norm` beside this file. Those that cannot be folded train as they are, and `explain` says why.
    A CaptureWarning names branches on `self.training` that the export fixed, batch norms without a momentum, and
    attention whose dropout an export in evaluation left out.

    Args:
        model: an exported float model, in training or in evaluation mode. It stays as it was: the result has
            parameters of its own.
        quantizer: one whose specs make fake quantizers, such as
            XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=True)).
        require, allow_empty, decompose: as in `prepare_pt2e`.
        calibration: what activations are rounded to from the start, instead of what training shows: a calibrated model
            that `prepare_pt2e` returned for the same export; the path of a file that `save_calibration` wrote of one;
            or batches, in which MSEObserver finds the ranges. The observers of activations rest then, until
            `enable_observer`; scales that are parameters (`with_learned_scales`) are learned from there on.

    Returns:
        A module with the calling convention and in the mode of `model`, on which train() and eval() work.

    Raises:
        CaptureError, TargetingError, AnnotationError, SharingError, SpecError: as in `prepare_pt2e`.
        CoverageError: nothing would be quantized, or less than `require` demands; or nothing would be rounded.
        CalibrationError: `calibration` is for another model, or saw no data at a tensor.
    """
    name = checked_name(quantizer)
    captured = capture(model, decompositions(decompose, quantizer), to_train=True)
    norms = {path: part.meta.pop(SET_ASIDE_KEY, []) for path, part in graphs(captured.gm)}
    gm = observed(captured, quantizer, name, require, allow_empty, to_train=True)
    if not allow_empty and not any(map(is_fake_quantizer, gm.modules())):
        raise CoverageError(_nothing_rounded(name))
    _unfold(gm, norms)
    finish(gm.train(captured.training))  # as a draft, so that code is generated once
    warn_of_what_is_fixed(gm, captured.training)
    shape_learned_scales(gm)
    ready_to_compile()
    if calibration is not None:
        start_from_calibration(gm, calibration)
    return gm.train(captured.training)


def _unfold(gm: GraphModule, norms: Mapping[str, Iterable[SetAside]]) -> None:
    """Bring back, by graph, what was folded for annotation."""
    record = gm.meta[RECORD_KEY] = replace(gm.meta[RECORD_KEY], trained=True)
    points = record.points_by_graph()
    for path, part in graphs(gm):
        pass_over_dropouts(part)
        unfold_batch_norm(part, norms.get(path, ()), {point.producer for point in points[path]})
        _expect_shapes(part)


def _expect_shapes(gm: GraphModule) -> None:
    """Buffers have the sizes of later from the start, for what is built on them before the first batch."""
    for call in gm.graph.find_nodes(op="call_module"):
        module, value = attribute(gm, str(call.target)), getattr(call.args[0], "meta", {}).get("val")
        if isinstance(module, FakeQuantize) and isinstance(value, Tensor):
            module.expect(tuple(value.shape))


def _nothing_rounded(name: str) -> str:
    return (
        f"{name} asks for observers alone, which round nothing, so there is nothing to train for. Take its "
        "configuration for training (is_qat=True), or specs whose observer_or_fake_quant_ctr is a fake quantizer; to "
        "calibrate, use prepare_pt2e."
    )
