"""check_quantizer: does a quantizer keep what the Quantizer contract promises? For authors, in their own tests.

    def test_my_quantizer_conforms():
        assert_conforms(MyQuantizer().set_global(MY_CONFIG))

Each model is annotated several times, in copies that are the same model; the annotations are read by their fields, so
quantizers of other packages can be checked as well. At last the model is prepared, calibrated and converted.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..checks import checked
from ..errors import QuantizationError
from ..graph.module import clone, is_guard
from ..pt2e.capture import capture
from ..quantizer.compose import quantizer_name
from .annotation_checks import Found, annotation_findings, first_line
from .claims import Said, claims, fingerprint, what_was_said
from .conversion_checks import Backend, conversion_findings
from .converted import CONVERTED_RULES
from .finding import Finding
from .models import default_models
from .running import run
from .variants import backwards, shuffled, without_metadata

__all__ = ["RULES", "assert_conforms", "check_quantizer"]

RULES = {
    "contract": "transform_for_annotation, annotate and validate are there and return what they should",
    "runs": "its methods raise nothing on a model that torch.export made, nor do prepare_pt2e and convert_pt2e with it",
    "claims-something": "at least one of the models gets an annotation",
    "same-model": "transform_for_annotation leaves what the model computes as it was",
    "only-annotates": "annotate writes annotations: no node, no argument, no recorded value, no parameter changes",
    "deterministic": "the same graph gets the same annotations each time",
    "idempotent": "annotating an annotated graph changes nothing",
    "order-independent": "the order in which the nodes of a graph stand, or were made, changes no annotation",
    "ops-and-values-only": "with meta['val'] as the only metadata, a graph gets the same annotations",
    "disjoint-claims": "no two parts of a composed quantizer want the same node differently",
    "keys-are-inputs": "an annotation gives specs to inputs of its own node",
    "one-tensor": "what gets a spec is one tensor: for an op with several outputs, the getitem after it",
    "floats-only": "integers and booleans get no spec",
    "legal-specs": "range, scheme and axis of each spec fit its dtype and tensor, and an observer can be made of it",
    "sharing-solvable": "tensors that share or derive their qparams lead to one that has a spec of its own",
    "constant-weights": "what gets a spec as the weight of an op is a constant, or the reason why not is recorded",
    "folds-possible": "a batch norm that is claimed can be folded; one that cannot runs in float",
    "becomes-integer": "every claim is quantized in the converted graph",
    "backend-runs-it": "the backend accepts the converted graph",
    **CONVERTED_RULES,
}
"""Every rule by its id, with what it demands."""

Models = Mapping[str, ExportedProgram] | Iterable[ExportedProgram]


@checked(QuantizationError, but=("models",))
def check_quantizer(
    quantizer: object,
    models: Models | None = None,
    *,
    backend: Backend | None = None,
    ignore: Iterable[str] = (),
) -> list[Finding]:
    """Where a quantizer breaks one of RULES.

    Args:
        quantizer: of this package or of another; configured as a user would.
        models: exported in eval mode, with example inputs, which also calibrate them; `default_models()` when None.
        backend: looks at each converted graph and returns, or raises as LoweringError, what it cannot run.
        ignore: ids of rules to leave out. Selectors by module name or type read more than ops and values; the rule
            "ops-and-values-only" is left out by itself where a quantizer says that it has some.

    Returns:
        One finding for each place, in the order of the models and of RULES.

    Raises:
        QuantizationError: `ignore` names no rule, or a model is no ExportedProgram with example inputs.
    """
    ignored = set(ignore)
    if not ignored <= RULES.keys():
        unknown = ", ".join(sorted(ignored - RULES.keys()))
        raise QuantizationError(f"no rule is called {unknown}; the rules are {', '.join(RULES)}")
    named = _named(default_models() if models is None else models)
    found = [Finding("contract", "", "", message) for message in _contract(quantizer)]
    if not found:
        cases = [_Case(name, model, quantizer, backend) for name, model in named.items()]
        found = [finding for case in cases for finding in case.findings()]
        if not any(case.annotated for case in cases) and not found:
            message = (
                f"no node of {', '.join(named)} was annotated; is a configuration set, and an op of yours in them?"
            )
            found.append(Finding("claims-something", "", "", message))
    return [finding for finding in dict.fromkeys(found) if finding.rule not in ignored]


@checked(QuantizationError, but=("models",))
def assert_conforms(
    quantizer: object, models: Models | None = None, *, backend: Backend | None = None, ignore: Iterable[str] = ()
) -> None:
    """Raise an AssertionError that lists what `check_quantizer` finds; arguments as there."""
    found = check_quantizer(quantizer, models, backend=backend, ignore=ignore)
    if found:
        lines = [f"{quantizer_name(quantizer)} breaks {len({finding.rule for finding in found})} rules:"]
        lines += [f"  {finding}" for finding in found]
        lines += [f"  [{rule}] {RULES[rule]}" for rule in RULES if rule in {finding.rule for finding in found}]
        raise AssertionError("\n".join(lines))


def _named(models: Models) -> dict[str, ExportedProgram]:
    if isinstance(models, Tensor) or not isinstance(models, Iterable):
        raise QuantizationError(f"check_quantizer takes exported models, by name or in a list, got {models!r}")
    named = dict(models) if isinstance(models, Mapping) else {f"model {i}": model for i, model in enumerate(models)}
    for name, model in named.items():
        if not isinstance(model, ExportedProgram) or model.example_inputs is None:
            raise QuantizationError(
                f"{name} is {type(model).__name__}; check_quantizer takes what torch.export.export(model.eval(), "
                "inputs) returns, with its example inputs"
            )
    return named


def _contract(quantizer: object) -> Iterator[str]:
    if isinstance(quantizer, type):
        yield f"{quantizer.__name__} is a class; make a quantizer of it and configure that"
        return
    for name in ("transform_for_annotation", "annotate", "validate"):
        if not callable(getattr(quantizer, name, None)):
            yield f"{type(quantizer).__name__} has no method {name}"


@dataclass
class _Case:
    """One quantizer on one model."""

    name: str
    model: ExportedProgram
    quantizer: Any
    backend: Backend | None
    annotated: bool = False
    written: list[str] = field(default_factory=list)

    def findings(self) -> Iterator[Finding]:
        try:
            for rule, where, message in self._check():
                yield Finding(rule, self.name, where, message)
        except _Raised as raised:
            yield Finding(raised.rule, self.name, "", str(raised))

    def _check(self) -> Found:
        captured = _without_guards(capture(self.model).gm)
        graph = self._run("transform_for_annotation", clone(captured))
        yield from self._same_model(captured, graph)
        fresh = clone(graph)
        before = _structure(fresh)
        first = self._run("annotate", fresh)
        self.annotated = any(True for _ in claims(first))
        for where, message in _changes(before, _structure(first)):
            yield "only-annotates", where, message
        again = fingerprint(self._run("annotate", clone(graph)))
        moods = list(_compare("deterministic", fingerprint(first), again, "again"))
        yield from moods
        if not moods:  # otherwise nothing that follows could be told from chance
            sound = annotation_findings(first)
            yield from sound
            yield from self._repeated(captured, graph, first)
            if not sound:
                self._run("validate", first)
                if self.annotated:
                    yield from conversion_findings(self.model, self.quantizer, first, self.backend)
        for name in dict.fromkeys(self.written):
            yield "only-annotates", name, "its values were changed in place"

    def _same_model(self, captured: GraphModule, graph: GraphModule) -> Found:
        expected = run(clone(captured), self.model)
        try:
            actual = run(clone(graph), self.model)
        except Exception as error:  # noqa: BLE001  # whatever an op says to arguments that it was not made for
            text = f"after transform_for_annotation the model raises {type(error).__name__}: {first_line(error)}"
            yield "same-model", "", text
            return
        if len(expected) != len(actual):
            yield "same-model", "", f"{len(expected)} outputs before transform_for_annotation, {len(actual)} after it"
            return
        for number, (one, other) in enumerate(zip(expected, actual, strict=True)):
            if isinstance(one, Tensor) and (other.shape != one.shape or not _is_close(other, one)):
                yield "same-model", f"output {number}", "transform_for_annotation changed its value"

    def _repeated(self, captured: GraphModule, graph: GraphModule, first: GraphModule) -> Found:
        """The rules that compare one annotation of the model with another."""
        expected, said = fingerprint(first), what_was_said(first)
        again = self._run("annotate", first)
        for where, message in _difference(said, what_was_said(again), "at first", "the second time"):
            yield "idempotent", where, message
        for variant in (backwards(graph), shuffled(graph, 1), shuffled(graph, 2)):
            try:
                found = fingerprint(self._run("annotate", variant))
            except _Raised as raised:
                yield "order-independent", "", f"in another order of the nodes, {raised}"
                break
            differences = list(_compare("order-independent", expected, found, "in another order of the nodes"))
            yield from differences
            if differences:
                break
        if not _reads_modules(self.quantizer):
            try:
                bare = self._run("annotate", self._run("transform_for_annotation", without_metadata(captured)))
                found = fingerprint(bare)
            except _Raised as raised:
                yield "ops-and-values-only", "", f"without other metadata, {raised}"
            else:
                yield from _compare("ops-and-values-only", expected, found, "without other metadata")
        yield from self._parts(graph)

    def _parts(self, graph: GraphModule) -> Found:
        owner: dict[str, tuple[str, dict[str, Said]]] = {}
        for number, part in enumerate(getattr(self.quantizer, "quantizers", ())):
            title = f"part {number} ({quantizer_name(part)})"
            by_node: dict[str, dict[str, Said]] = defaultdict(dict)
            for where, said in what_was_said(_call(part, "annotate", clone(graph))).items():
                by_node[where.rpartition(" -> ")[2]][where] = said
            for node, mine in by_node.items():
                first, other = owner.setdefault(node, (title, mine))
                for where, message in itertools.islice(_difference(other, mine, first, title), 1):
                    yield "disjoint-claims", where, message

    def _run(self, method: str, gm: GraphModule) -> GraphModule:
        before = _versions(gm)
        result = _call(self.quantizer, method, gm)
        self.written += [name for name, (tensor, version) in before.items() if tensor._version != version]
        return result


class _Raised(Exception):
    """A method of the quantizer raised, or returned no graph; ends the case."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def _call(quantizer: Any, method: str, gm: GraphModule) -> GraphModule:
    try:
        result = getattr(quantizer, method)(gm)
    except Exception as error:
        raise _Raised("runs", f"{method} raised {type(error).__name__}: {first_line(error)}") from error
    if method == "validate":
        return gm
    if not isinstance(result, GraphModule):
        raise _Raised("contract", f"{method} must return the GraphModule, it returned {type(result).__name__}")
    return result


def _reads_modules(quantizer: Any) -> bool:
    """Some selector of a user goes by module name or type, or is a function, which may read what it likes."""
    parts = getattr(quantizer, "quantizers", None)
    if parts is not None:
        return any(map(_reads_modules, parts))
    if getattr(quantizer, "selects_by_module", False):
        return True
    return any(
        value for name, value in vars(quantizer).items() if name.startswith("module_") and "function" not in name
    )


def _compare(rule: str, expected: dict[str, Said], actual: dict[str, Said], when: str) -> Found:
    for where, message in _difference(expected, actual, "at first", when):
        yield rule, where, message


def _difference(one: dict[str, Said], other: dict[str, Said], first: str, second: str) -> Iterator[tuple[str, str]]:
    for where in dict.fromkeys((*one, *other)):
        left, right = one.get(where, "nothing"), other.get(where, "nothing")
        if left != right:
            yield where, f"{first}: {left}; {second}: {right}"


def _without_guards(gm: GraphModule) -> GraphModule:
    """Quantizers see no guards of input shapes in prepare_pt2e either."""
    for node in filter(is_guard, list(gm.graph.nodes)):
        gm.graph.erase_node(node)
    return gm


Structure = dict[str, tuple[Any, ...]]


def _structure(gm: GraphModule) -> Structure:
    """What annotate must leave as it is, by the name of the node."""
    return {
        node.name: (position, node.op, node.target, _frozen(node.args), _frozen(node.kwargs), id(node.meta.get("val")))
        for position, node in enumerate(gm.graph.nodes)
    }


def _frozen(arguments: Any) -> str:
    return str(torch.fx.node.map_arg(arguments, lambda node: node))


def _changes(before: Structure, after: Structure) -> Iterator[tuple[str, str]]:
    what = ("place in the graph", "kind", "target", "arguments", "arguments", "recorded value")
    for name in dict.fromkeys((*before, *after)):
        if name not in after:
            yield name, "annotate removed this node"
        elif name not in before:
            yield name, "annotate added this node"
        else:
            changed = [text for text, one, other in zip(what, before[name], after[name], strict=True) if one != other]
            if changed and (changed[-1] != what[0] or before.keys() == after.keys()):
                yield name, f"annotate changed its {changed[-1]}"


def _versions(gm: GraphModule) -> dict[str, tuple[Tensor, int]]:
    """Each parameter and buffer with how often it was written to."""
    return {name: (tensor, tensor._version) for name, tensor in (*gm.named_parameters(), *gm.named_buffers())}


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """Up to the rounding that another order of float32 operations brings."""
    if not expected.is_floating_point():
        return bool(torch.equal(actual, expected))
    largest = float(expected.abs().nan_to_num(0.0, 0.0, 0.0).max()) if expected.numel() else 0.0
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * largest + 1e-7, equal_nan=True)
