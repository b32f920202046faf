"""prepare_pt2e: carry out a plan by inserting one observer for each sharing group."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..checks import checked
from ..errors import AnnotationError, CaptureError, CaptureWarning, CoverageError
from ..fake_quantize import is_fake_quantizer
from ..graph.attributes import attribute, free_name, written_attributes
from ..graph.devices import device_of
from ..graph.module import ExportedModule, collector_paused, drops, finish, is_guard, mode_switch
from ..graph.nested import every_node, graphs, name_nested
from ..graph.values import copy_value
from ..meta import AROUND_KEY, FOLDED_KEY, RECORD_KEY, WEIGHT_OBSERVERS_KEY
from ..observer.derived import DerivedObserver
from ..passes.decompose import decompositions
from ..passes.plain_control_flow import to_plain_functions
from ..passes.runner import run_everywhere, run_pass
from ..quantizer.base import Quantizer
from ..quantizer.compose import callback_of, quantizer_name
from ..specs import EdgeOrNode
from ..where import copy_origin, describe_site, in_graph, locate, node_id
from .authors import calibrating, code_of
from .capture import Captured, capture
from .coverage import check_required
from .decisions import nothing_quantized, opaque_decisions
from .making import make_observers
from .plan import Plan, Point, make_plan
from .record import GroupRecord, PointRecord, Record

__all__ = ["checked_name", "observed", "prepare_pt2e"]

_CALLER = 6  # frames between a warning and the call of prepare_pt2e: the two decorators are some


@collector_paused()
@checked(CaptureError, but=("model", "quantizer"))
def prepare_pt2e(
    model: ExportedProgram | GraphModule,
    quantizer: Quantizer,
    *,
    require: Iterable[str] = (),
    allow_empty: bool = False,
    decompose: Iterable[str] | None = None,
) -> ExportedModule:
    """Insert the observers that a quantizer asks for; run calibration data through the result, then `convert_pt2e` it.

    Args:
        model: an exported float model: what torch.export.export returns, or its .module(). It stays as it was.
        quantizer: a Quantizer of this package, or any object with the same methods.
        require: what must be quantized: families of ops ("linear", "conv"), or names and globs of nodes and modules.
        allow_empty: return a graph without observers, instead of raising, when nothing was annotated.
        decompose: what to write as simple ops first: "sdpa" (fused attention), "rnn" (LSTM, GRU and RNN: cells, and
            layers of fixed length). None is what the quantizer's backend needs (`Quantizer.decompose`), () is nothing.

    Returns:
        A module with the calling convention of `model`. Observers are submodules `activation_post_process_N`. Those
        of constant tensors (weights) hang in the graph without being called: a weight is observed once, at convert.
        Nested graphs (torch.cond, while_loop, ...) hold observers of their own. train() and eval() work on it.

    Raises:
        CaptureError: `model` is not an exported model, or was prepared before.
        TargetingError, AnnotationError, SharingError, SpecError: what the quantizer asks for cannot be done.
        CoverageError: nothing would be quantized, or less than `require` demands; lists the misses with reasons.
    """
    name = checked_name(quantizer)
    captured = capture(model, decompositions(decompose, quantizer))
    return finish(observed(captured, quantizer, name, require, allow_empty))


def observed(
    captured: Captured,
    quantizer: Quantizer,
    name: str,
    require: Iterable[str],
    allow_empty: bool,
    *,
    to_train: bool = False,
) -> ExportedModule:
    """The captured graph annotated, with its observers and its record; still a draft."""
    gm = _annotate(quantizer, captured.gm)
    parts = [part for _, part in graphs(gm, opaque=False)]
    plans = [make_plan(part, name) for part in parts]
    decisions = [decision for plan in plans for decision in plan.decisions] + opaque_decisions(gm)
    if not allow_empty and not any(plan.groups for plan in plans) and not any(one.quantized for one in decisions):
        raise CoverageError(nothing_quantized(parts, decisions, name))
    check_required(decisions, require)
    points: list[PointRecord] = []
    groups: list[GroupRecord] = []
    observers: list[nn.Module] = []
    for part, plan in zip(parts, plans, strict=True):
        made = make_observers(plan, to_train=to_train)
        _call_back(quantizer, part, plan, made)
        names = _register(part, made)
        points += _insert(part, plan, made, names)
        groups += _group_records(part, plan, made, names)
        observers += made
    if observers and not any(map(is_fake_quantizer, observers)):
        _warn_of_training(gm)
    gm.meta[RECORD_KEY] = Record(
        stage="prepared",
        quantizer=name,
        decisions=decisions,
        points=points,
        groups=groups,
        unused_rules=[rule for rule in plans[0].unused_rules if all(rule in plan.unused_rules for plan in plans)],
        folded=[fold for _, part in graphs(captured.gm) for fold in part.meta.get(FOLDED_KEY, ())],
        bytes_before=captured.state_bytes,
        example_inputs=captured.example_inputs,
        state=_state_to_restore(gm, observers),
    )
    return run_pass(to_plain_functions, _guarded(gm, points))


def _warn_of_training(gm: ExportedModule) -> None:
    """Calibration sees what the deployed model will compute, so nothing in it may drop values or take statistics."""
    for node in every_node(gm):
        name = mode_switch(node)
        if drops(node) or (name is not None and bind(node)[name] is True):
            warnings.warn(
                f"the model was exported in training mode:\n{locate(node)}\n  Dropout draws random numbers there, and "
                "batch norm normalizes with the statistics of each batch and is folded into no layer. Export "
                "model.eval(); or call prepared.eval() before calibration, where the batch norms are no matter.",
                CaptureWarning,
                stacklevel=_CALLER,
            )
            return


def _guarded(gm: ExportedModule, points: list[PointRecord]) -> ExportedModule:
    """Runs count for observers as a whole or not at all; observers of weights outlive dead-code elimination."""
    gm.meta[AROUND_KEY] = calibrating
    gm.meta[WEIGHT_OBSERVERS_KEY] = {
        point.observer: attribute(gm, point.observer) for point in points if point.constant
    }
    return gm


def checked_name(quantizer: object) -> str:
    """The name of a quantizer, which is one.

    Raises:
        CaptureError: it is none.
    """
    if isinstance(quantizer, type) or not callable(getattr(quantizer, "annotate", None)):
        kind = f"the class {quantizer.__name__}" if isinstance(quantizer, type) else type(quantizer).__name__
        raise CaptureError(
            f"the second argument is a Quantizer, got {kind}; "
            "for example XNNPACKQuantizer().set_global(get_symmetric_quantization_config())"
        )
    return quantizer_name(quantizer)


def _annotate(quantizer: Quantizer, gm: ExportedModule) -> ExportedModule:
    """What the quantizer does to the graph and all that are nested in it: rewrites, annotations, its own checks."""
    gm = run_everywhere(lambda graph: _transform(quantizer, graph), gm, name="transform_for_annotation")
    name_nested(gm)
    gm = run_everywhere(lambda graph: quantizer.annotate(graph) or graph, gm, name="annotate")
    for _, part in graphs(gm, opaque=False):
        with code_of(f"validate() of {quantizer_name(quantizer)}"):
            quantizer.validate(part)
    return gm


def _transform(quantizer: Quantizer, gm: GraphModule) -> GraphModule:
    """The quantizer's rewrites. Meanwhile the guard of the input shapes is out: passes that trace refuse its call."""
    guards = [(node.name, str(node.target), node.all_input_nodes) for node in gm.graph.nodes if is_guard(node)]
    for node in filter(is_guard, list(gm.graph.nodes)):
        gm.graph.erase_node(node)
    transformed = quantizer.transform_for_annotation(gm)
    for name, target, inputs in guards if isinstance(transformed, GraphModule) else ():
        named = {node.name: node for node in transformed.graph.nodes}
        if any(node.name not in named for node in inputs):
            continue  # the rewrites changed the signature that it guards
        if not hasattr(transformed, target):
            transformed.add_module(target, attribute(gm, target))
        first_op = next(node for node in transformed.graph.nodes if node.op not in ("placeholder", "get_attr"))
        with transformed.graph.inserting_before(first_op):
            guard = transformed.graph.call_module(target, tuple(named[node.name] for node in inputs))
        if name not in named:
            guard.name = name  # the graph remembers the name as taken
    return transformed


def _call_back(quantizer: Any, gm: GraphModule, plan: Plan, observers: list[nn.Module]) -> None:
    """Let the quantizer see and change the observer of each site; sites of one group must keep one observer."""
    callback = callback_of(quantizer)
    if callback is None:
        return
    table: dict[EdgeOrNode, nn.Module] = {site: observers[number] for site, number in plan.group_of.items()}
    with code_of(f"prepare_obs_or_fq_callback of {quantizer_name(quantizer)}"):
        callback(gm, table)
    _check_table(quantizer_name(quantizer), table, plan)
    exchanged: dict[int, nn.Module] = {}
    for number, group in enumerate(plan.groups):
        chosen = {id(table[site]): table[site] for site in group.members}
        if len(chosen) != 1:
            raise AnnotationError(
                f"prepare_obs_or_fq_callback of {quantizer_name(quantizer)} gave different observers to tensors that "
                f"share qparams: {', '.join(map(describe_site, group.members))}. Give all of them the same one."
            )
        (new,) = chosen.values()
        exchanged[id(observers[number])] = new
        observers[number] = new
    for observer in observers:
        if isinstance(observer, DerivedObserver):
            observer.sources = [exchanged.get(id(source), source) for source in observer.sources]


def _check_table(name: str, table: dict[EdgeOrNode, nn.Module], plan: Plan) -> None:
    for site in plan.group_of:
        if not isinstance(table.get(site), nn.Module):
            what = f"gave {table[site]!r} to" if site in table else "took out"
            raise AnnotationError(
                f"prepare_obs_or_fq_callback of {name} {what} {describe_site(site)}. Each tensor keeps an observer, a "
                "module; to leave it in float, do not annotate it."
            )


def _register(gm: GraphModule, observers: list[nn.Module]) -> list[str]:
    """Add the observers as submodules, on the model's device; one that serves several groups is added once."""
    names: dict[int, str] = {}
    device = device_of(gm)
    free = free_name(gm, "activation_post_process_")
    for observer in observers:
        if id(observer) not in names:
            names[id(observer)] = next(free)
            gm.add_module(names[id(observer)], observer)
            if device is not None and device.type not in ("cpu", "meta"):
                observer.to(device)
    return [names[id(observer)] for observer in observers]


def _insert(gm: GraphModule, plan: Plan, observers: list[nn.Module], names: list[str]) -> list[PointRecord]:
    watched: dict[int, Node] = {}
    records = []
    seen_once = _seen_at_convert(gm, plan, observers)
    last_input = next((node for node in reversed(gm.graph.nodes) if node.op == "placeholder"), None)
    locations = [locate(_spoken_for(point)) for point in plan.points]  # of the model, before observers stand in it
    for point, location in zip(plan.points, locations, strict=True):
        observer, name = observers[point.group], names[point.group]
        if not getattr(observer, "site", ""):
            observer.site = location  # type: ignore[assignment]
        value = watched.get(id(point.source), point.producer)
        deferred = point.producer in seen_once
        after = last_input if value.op == "placeholder" and last_input is not None else value
        with gm.graph.inserting_after(after):
            node = gm.graph.get_attr(name) if deferred else gm.graph.call_module(name, (value,))
        copy_origin(node, _spoken_for(point), "prepare_pt2e")
        if not deferred:
            copy_value(node, point.producer)
            for consumer in point.consumers:
                consumer.replace_input_with(value, node)
            watched[id(point)] = node
        consumers = tuple(node_id(consumer) for consumer in point.consumers)
        records.append(PointRecord(node_id(value), consumers, in_graph(gm, name), deferred, location))
    return records


def _seen_at_convert(gm: GraphModule, plan: Plan, observers: list[nn.Module]) -> set[Node]:
    """Constants that are observed once, at convert, instead of in every run.

    Not those of fake-quantizers, which must round weights in every training step; nor of observers that see activations
    as well, since an average over batches depends on what comes in between; nor what is computed from either.
    """
    calibrated = {id(observers[point.group]) for point in plan.points if not point.constant}
    points: dict[Node, list[Point]] = defaultdict(list)
    for point in plan.points:
        points[point.producer].append(point)
    found: set[Node] = set()
    running: set[Node] = set()
    for node in gm.graph.nodes:
        here = points.get(node, ())
        if not running.isdisjoint(node.all_input_nodes):
            running.add(node)
        every = (observers[point.group] for point in here)
        live = node in running or any(is_fake_quantizer(one) or id(one) in calibrated for one in every)
        if here and here[0].constant and not live:
            found.add(node)
        elif here and here[0].constant:
            running.update(consumer for point in here for consumer in point.consumers)
    return found


def _spoken_for(point: Point) -> Node:
    """The node to name when talking of a point: the producer, or for a parameter the op that uses it."""
    if point.producer.op == "get_attr" and point.consumers:
        return point.consumers[0]
    return point.producer


def _state_to_restore(gm: GraphModule, observers: list[nn.Module]) -> dict[str, Tensor]:
    """Buffers that calibration writes to, as they are now. What training writes to them is to stay, so then none."""
    if any(map(is_fake_quantizer, observers)):
        return {}
    return {name: attribute(gm, name).detach().clone() for name in written_attributes(gm)}


def _group_records(gm: GraphModule, plan: Plan, observers: list[nn.Module], names: list[str]) -> list[GroupRecord]:
    return [
        GroupRecord(
            observer=in_graph(gm, name),
            kind=group.spec.kind,
            spec=str(group.spec),
            members=tuple(map(describe_site, group.members)),
            observer_class=type(observer).__name__,
            dropped=tuple(f"{describe_site(site)}: {spec}" for site, spec in group.dropped.items()),
        )
        for group, observer, name in zip(plan.groups, observers, names, strict=True)
    ]
