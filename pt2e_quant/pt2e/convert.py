"""convert_pt2e: turn observers into quantize/dequantize pairs and weights into integers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch._ops import OpOverloadPacket
from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import CalibrationError, ConversionError
from ..graph.attributes import attribute, own_state, own_written, set_attribute, state_bytes
from ..graph.constants import Constants
from ..graph.module import ExportedModule, clone, collector_paused, finish, tidy, uncompiled
from ..graph.nested import graphs
from ..graph.values import copy_value
from ..meta import ANNOTATION_KEY, AROUND_KEY, RECORD_KEY, REFUSALS_KEY, WEIGHT_OBSERVERS_KEY
from ..observer.derived import DerivedObserver
from ..passes.fold_weights import fold_weights
from ..passes.nested_constants import move_constants_out
from ..passes.plain_control_flow import to_operators
from ..passes.runner import run_everywhere, run_pass
from ..where import copy_origin, in_graph
from .authors import code_of
from .histograms import with_histograms
from .integer_buffers import make_buffers_integer
from .observed import ObserverReading, QParams, read_observer, read_qparams, with_qparams
from .present import check_present
from .qat.batch_norm import fold_trained
from .qat.dropout import observe_dropouts
from .qdq import PairWriter
from .quantized_io import QuantizedIO, quantize_io
from .record import PointRecord, Record, record_of
from .representation import reference_representation_rewrite

__all__ = ["convert_pt2e", "converted_record", "prepared_record", "replace_observers"]

Readings = dict[str, ObserverReading]
"""Of the observers that one graph calls, by name."""


@collector_paused()
@checked(ConversionError, but=("model",))
def convert_pt2e(
    model: GraphModule,
    *,
    fold_quantize: bool = True,
    quantized_io: QuantizedIO | None = None,
    integer_buffers: Iterable[str] = (),
    allow_uncalibrated: bool = False,
    use_reference_representation: bool = False,
) -> ExportedModule:
    """Replace the observers of a prepared, calibrated model by q/dq pairs. The prepared model stays as it was.

    Args:
        model: what `prepare_pt2e` returned, after calibration data ran through it, or `prepare_qat_pt2e`, after
            training; compiled or not. Dynamic and weight-only configurations need no data to calibrate.
        fold_quantize: store quantized weights as integers; False leaves weight -> quantize -> dequantize in the graph.
        quantized_io: inputs and outputs of the model that are to be integers; `explain(converted).inputs` and
            `.outputs` have their scale and zero point.
        integer_buffers: names or globs of buffers that the model writes to (key-value caches), to be stored as
            integers with the qparams of what is written to them; `explain(converted).buffers` has those.
        allow_uncalibrated: leave tensors whose observer never saw data in floating point instead of raising.
        use_reference_representation: write the quantized ops in integer arithmetic, rounding as XNNPACK does; see
            `representation.reference_representation_rewrite`, which offers other roundings.

    Returns:
        A module with the calling convention of the exported model. Buffers that it writes to start from what they held
        before calibration; after training they keep what they hold. What was trained is returned in evaluation mode.

    Raises:
        ConversionError: `model` is not a prepared one, its parameters are on the meta device, training left NaN in
            them, or an input, output or buffer cannot become integers.
        CalibrationError: observers of static tensors never saw data; each is named.
    """
    record = with_histograms(prepared_record(model := uncompiled(model)), model)
    gm = run_pass(to_operators, clone(model))
    if record.trained:
        gm = run_everywhere(observe_dropouts, run_everywhere(fold_trained, gm.eval()))
    qparams = replace_observers(gm, record, allow_uncalibrated)
    gm = run_pass(move_constants_out, run_everywhere(fold_weights if fold_quantize else tidy, gm))
    record = make_buffers_integer(gm, integer_buffers, record)
    if quantized_io is not None:
        record = quantize_io(gm, quantized_io, record)
    finish(gm)
    if record.trained:
        own_state(gm)  # training may go on
    gm.meta[RECORD_KEY] = converted_record(gm, record, qparams)
    return reference_representation_rewrite(gm) if use_reference_representation else gm


_HOW_TO_PREPARE = "Call prepared = prepare_pt2e(exported, quantizer), run calibration data through it, then convert it."


def converted_record(gm: GraphModule, record: Record, qparams: Mapping[str, QParams]) -> Record:
    """The record of a finished graph, with what its observers have settled on, by their names."""
    groups = [with_qparams(group, qparams.get(group.observer)) for group in record.groups]
    return replace(record, stage="converted", state={}, groups=groups, bytes_after=state_bytes(gm))


def prepared_record(model: object, by: str = "convert_pt2e", of: str = "prepare_pt2e") -> Record:
    """The record of a prepared model, which can be converted.

    Raises:
        ConversionError: it was not prepared, is converted already, or has no weights.
    """
    record = record_of(model)
    if record is None:
        is_wrapper = record_of(getattr(model, "module", None)) is not None
        way_out = "It wraps a prepared model: pass its .module." if is_wrapper else _HOW_TO_PREPARE
        raise ConversionError(
            f"{by} needs what {of} returned, got {type(model).__name__} without a record of it. " + way_out
        )
    if record.stage == "converted":
        raise ConversionError(f"this model is converted already; {by} takes the prepared model")
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())  # type: ignore[attr-defined]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise ConversionError(
            f"{len(empty)} parameters and buffers are on the meta device, where they have shapes and no values: "
            f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}.\n"
            "  Load the weights, prepared.load_state_dict(state, assign=True), and calibrate, before convert_pt2e."
        )
    if record.trained:
        _expect_numbers(model)  # type: ignore[arg-type]
    return record


def _expect_numbers(model: nn.Module) -> None:
    lost = [name for name, value in model.named_parameters() if value.isnan().any()]
    if lost:
        raise ConversionError(
            f"{len(lost)} parameters hold NaN, which integers would hide: {', '.join(lost[:5])}"
            f"{', ...' if len(lost) > 5 else ''}.\n"
            "  Training diverged. Go back to a checkpoint, and lower the learning rate or clip the gradients."
        )


def _restore_observers(gm: ExportedModule) -> None:
    """Bring back the observers of constants that dead-code elimination took out of the graph since prepare."""
    for name, observer in gm.meta.pop(WEIGHT_OBSERVERS_KEY, {}).items():
        path, _, leaf = name.rpartition(".")
        if not hasattr(gm.get_submodule(path), leaf):
            set_attribute(gm, name, observer)


def replace_observers(gm: ExportedModule, record: Record, allow_uncalibrated: bool) -> dict[str, QParams]:
    """Put q/dq pairs in the place of the observers of all graphs; the qparams by the names of the observers.

    Raises:
        CalibrationError: an observer of a static tensor never saw data.
    """
    _restore_observers(gm)
    gm.meta.pop(AROUND_KEY, None)
    own_written(gm, record.state)
    points = record.points_by_graph()
    calls: dict[str, list[Node]] = {}
    readings: dict[str, Readings] = {}
    for path, part in graphs(gm):
        _observe_constants(part, points[path])
        calls[path] = _observer_calls(part, points[path])
        readings[path] = {
            name: read_observer(attribute(part, name)) for name in dict.fromkeys(map(_called, calls[path]))
        }
    silent = {
        in_graph(part, name) for path, part in graphs(gm) for name, one in readings[path].items() if not one.has_data
    }
    if silent and not allow_uncalibrated:
        raise CalibrationError(_uncalibrated(silent, record))
    qparams: dict[str, QParams] = {}
    for path, part in graphs(gm):
        qparams |= _emit(part, calls[path], readings[path])
        for node in part.graph.nodes:
            node.meta.pop(ANNOTATION_KEY, None)
            node.meta.pop(REFUSALS_KEY, None)
    return qparams


def _called(call: Node) -> str:
    return str(call.target)


def _observe_constants(gm: GraphModule, points: list[PointRecord]) -> None:
    """Make the calls that prepare left out: run copies of the weights' observers over today's weights."""
    _copy_observers(gm, points)
    constants = Constants(gm)
    nodes = {node.name: node for node in gm.graph.nodes}
    watched = [point for point in points if point.constant]
    check_present((name for point in watched for name in (point.producer, *point.consumers)), nodes)
    for point in watched:
        constants.value(nodes[point.producer])  # kept; below, calls come to stand between constants and what they make
    seen: dict[tuple[str, str], Node] = {}
    for point in watched:
        producer = nodes[point.producer]
        observer = attribute(gm, point.observer)
        value = seen.get((point.producer, point.consumers[0]), producer) if point.consumers else producer
        held = constants.value(producer)
        with code_of(f"{type(observer).__name__} on {producer.name}, {list(held.shape)},", ConversionError):
            observer.to(held.device)(held)
        with gm.graph.inserting_after(value):
            call = gm.graph.call_module(point.observer, (value,))
        consumers = [nodes[name] for name in point.consumers]
        copy_origin(call, consumers[0] if consumers else producer, "convert_pt2e")
        copy_value(call, producer)
        for consumer in consumers:
            consumer.replace_input_with(value, call)
            seen[(point.producer, consumer.name)] = call


def _copy_observers(gm: GraphModule, points: list[PointRecord]) -> None:
    """Own copies of the observers that see weights here, and of those that derive from them."""
    weights = {point.observer for point in points if point.constant}
    memo: dict[int, Any] = {}  # one for all copies: a derived observer must find the copy of its source
    for name in dict.fromkeys(point.observer for point in points):
        observer = attribute(gm, name)
        if name in weights or isinstance(observer, DerivedObserver):
            gm.add_module(name, copy.deepcopy(observer, memo))


def _observer_calls(gm: GraphModule, points: list[PointRecord]) -> list[Node]:
    names = {point.observer for point in points}
    return [node for node in gm.graph.nodes if node.op == "call_module" and node.target in names]


def _uncalibrated(silent: set[str], record: Record) -> str:
    points = [point for point in record.points if point.observer in silent]
    lines = [f"{len(silent)} observers never saw data, so {len(points)} tensors have no range:"]
    for point in points[:20]:
        lines.append(f"  {point.observer} on " + point.location.replace("\n", "\n  "))
    if len(points) > 20:
        lines.append(f"  ... and {len(points) - 20} more")
    lines.append(
        "  Run calibration data through the prepared model before convert_pt2e. For parts that it never reaches, keep "
        "them in float (config None), or convert_pt2e(..., allow_uncalibrated=True)."
    )
    return "\n".join(lines)


def _emit(gm: GraphModule, calls: list[Node], readings: Readings) -> dict[str, QParams]:
    """Replace each observer call; the qparams that each observer gave, by its name seen from the outermost graph."""
    writer = PairWriter(gm)
    known: dict[str, QParams] = {}
    for call in calls:
        name = _called(call)
        reading = readings[name]
        if not reading.has_data:
            call.replace_all_uses_with(call.args[0])  # type: ignore[arg-type]
            gm.graph.erase_node(call)
        elif reading.writes_pairs:
            _convert_itself(gm, call, reading.observer)
        else:
            if name not in known:
                known[name] = read_qparams(reading)
            writer.replace(call, known[name])
    _name_overloads(gm)
    return {in_graph(gm, name): qparams for name, qparams in known.items()}


def _convert_itself(gm: GraphModule, call: Node, observer: Any) -> None:
    """Let an observer of another package write its own q/dq; what its readers read then is recorded like ours."""
    readers = list(call.users)
    observer.convert(gm, call)
    for made in {source for reader in readers for source in reader.all_input_nodes}:
        if "val" in call.meta and "val" not in made.meta and made.op != "get_attr":
            copy_value(copy_origin(made, call, "convert_pt2e"), call)


def _name_overloads(gm: GraphModule) -> None:
    """Other packages call torch.ops.x.f where exported graphs have torch.ops.x.f.default; folding looks at that."""
    for node in gm.graph.nodes:
        if isinstance(node.target, OpOverloadPacket) and len(node.target.overloads()) == 1:
            node.target = getattr(node.target, node.target.overloads()[0])
            if "from_node" not in node.meta:
                copy_origin(node, node.all_input_nodes[0], "convert_pt2e")
