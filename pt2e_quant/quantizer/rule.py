"""Rules: a pattern with a spec on each capture and on the output, and the reasons for which it is refused.

    @rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[grouped])
    def conv_relu(x, w, b):
        return relu(conv(x, w, b))

A spec is a literal (QuantizationSpec, FixedQParamsQuantizationSpec, ...), a *role* that stands for a field of the
user's QuantizationConfig (INPUT, OUTPUT, WEIGHT, BIAS), a function of that config, `same_as("x")`, `one_scale(spec)`
for a list of tensors, or INHERIT. Captures without one stay float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from ..checks import checked
from ..errors import AnnotationError
from ..graph.values import is_float_tensor, is_quantizable
from ..meta import ANNOTATION_KEY
from ..reasons import Reason, Refusal
from ..specs import QuantizationAnnotation, QuantizationSpecBase, SharedQuantizationSpec, is_per_channel
from .config import QuantizationConfig
from .pattern import Match, Pattern, trace
from .reading import output_spec, read_spec

__all__ = [
    "BIAS",
    "INHERIT",
    "INPUT",
    "OUTPUT",
    "WEIGHT",
    "Inherit",
    "OneScale",
    "Role",
    "Rule",
    "SameAs",
    "one_scale",
    "rule",
    "same_as",
]

Unless = Callable[[Match], "str | None"]
"""Looks at a match and returns the reason why the rule does not apply to it, or None; `because` gives it a code."""


@dataclass(frozen=True)
class Role:
    """A field of the user's QuantizationConfig, looked up when the rule matches.

    axis: dimension of this op's tensor that holds the channels, when it is not the one that the config names.
    """

    name: str
    axis: int | None = None

    def at(self, axis: int) -> Role:
        """The same role for a tensor whose channels lie on another dimension."""
        return replace(self, axis=axis)

    def resolve(self, config: QuantizationConfig) -> QuantizationSpecBase | None:
        spec: QuantizationSpecBase | None = getattr(config, self.name)
        if self.axis is not None and spec is not None and is_per_channel(read_spec(spec).qscheme):
            return replace(spec, ch_axis=self.axis)  # type: ignore[type-var]
        return spec


INPUT = Role("input_activation")
OUTPUT = Role("output_activation")
WEIGHT = Role("weight")
BIAS = Role("bias")


@dataclass(frozen=True)
class SameAs:
    """Share the qparams of another capture of the rule."""

    name: str


@dataclass(frozen=True)
class Inherit:
    """Share the qparams that the producer of this capture was given; the rule applies only where there are any."""


INHERIT = Inherit()


@dataclass(frozen=True)
class OneScale:
    """For a list capture: the first tensor has the spec, the others share its qparams."""

    spec: QuantizationSpecBase | Role


@checked(AnnotationError)
def same_as(name: str) -> SameAs:
    """Share one scale and zero point with the capture `name` of the same rule."""
    return SameAs(name)


@checked(AnnotationError)
def one_scale(spec: QuantizationSpecBase | Role) -> OneScale:
    """For a list capture (`*tensors`): all its tensors share one scale and zero point."""
    return OneScale(spec)


FromConfig = Callable[[QuantizationConfig], QuantizationSpecBase | None]
SpecLike = QuantizationSpecBase | Role | FromConfig | OneScale | SameAs | Inherit | None


@dataclass(frozen=True)
class Rule:
    """See the module docstring; made by `rule`."""

    name: str
    pattern: Pattern = field(repr=False)
    specs: dict[str, SpecLike]
    output: SpecLike = None
    unless: tuple[Unless, ...] = ()

    def __post_init__(self) -> None:
        names = {capture.name for capture in self.pattern.captures}
        for name, spec in (*self.specs.items(), ("output", self.output)):
            if name not in names and name != "output":
                raise AnnotationError(f"rule {self.name!r} has a spec for {name!r}; its captures are {sorted(names)}")
            if not isinstance(spec, SameAs):
                continue
            other = self.specs.get(spec.name)
            if other is None or isinstance(other, SameAs):
                why = "has no spec in this rule" if other is None else f"shares with {other.name!r}; name that one"
                raise AnnotationError(f"rule {self.name!r} lets {name!r} share with {spec.name!r}, which {why}")
        if isinstance(self.output, (Inherit, OneScale)):
            raise AnnotationError(
                f"rule {self.name!r}: an output is one tensor with no producer; give it a spec, a role or same_as(...)"
            )

    @property
    def inherits(self) -> bool:
        """True when the rule only passes on what its producer was given."""
        return any(isinstance(spec, Inherit) for spec in self.specs.values())

    @property
    def passes_on(self) -> bool:
        """True when the output has the qparams of an input, or the rule follows its producer: it has no own range."""
        return self.inherits or isinstance(self.output, SameAs)

    @property
    def rounds_anew(self) -> bool:
        """True when its output has a range of its own, and no weight makes it worth the rounding."""
        has_weight = any(isinstance(spec, Role) and spec.name == WEIGHT.name for spec in self.specs.values())
        return self.output is not None and not isinstance(self.output, SameAs) and not has_weight

    def refusal(self, match: Match) -> Refusal | None:
        """The first reason against this match, None when the rule applies."""
        for name, node in match.pairs():
            if self.specs.get(name) is None:
                continue
            if "val" not in node.meta:
                reason = f"{name!r} ({node.name}) has no meta['val'], its dtype is unknown; export the model again"
                return Refusal(self.name, reason, "no_value")
            if not is_quantizable(node):
                reason = f"{name!r} ({node.name}) is {_dtype(node)}, only float32, float16 and bfloat16 are quantized"
                return Refusal(self.name, reason, "dtype" if is_float_tensor(node) else "non_float")
            if isinstance(self.specs[name], Inherit) and output_spec(node) is None:
                return Refusal(self.name, "its input is not quantized", "input_not_quantized")
        reasons = (check(match) for check in self.unless)
        return next((self._refused(reason) for reason in reasons if reason is not None), None)

    def _refused(self, reason: str) -> Refusal:
        if isinstance(reason, Reason):
            return Refusal(self.name, str(reason), reason.code)
        return Refusal(self.name, reason)

    def apply(self, match: Match, config: QuantizationConfig) -> None:
        """Write the annotations of this rule on the matched nodes."""
        inputs: dict[Node, dict[Node, QuantizationSpecBase | None]] = {node: {} for node in match.nodes}
        anchors: dict[str, tuple[Node, Node]] = {}
        sharing_last = sorted(match.pairs(), key=lambda pair: isinstance(self.specs.get(pair[0]), SameAs))
        for name, node in sharing_last:
            user = match.users[name]
            spec = self._input_spec(name, node, config, anchors)
            if spec is not None:
                inputs[user].setdefault(node, spec)
                anchors.setdefault(name, (node, user))
        for node in match.nodes:
            output = self._output_spec(config, anchors) if node is match.root else None
            node.meta[ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map=inputs[node],
                output_qspec=output,
                _annotated=True,
                rule=self.name,
                ties_inputs=any(map(_is_tied, inputs[node].values())),
            )

    def _input_spec(
        self, name: str, node: Node, config: QuantizationConfig, anchors: dict[str, tuple[Node, Node]]
    ) -> QuantizationSpecBase | None:
        spec = self.specs.get(name)
        if isinstance(spec, Inherit):
            return SharedQuantizationSpec(node)
        if isinstance(spec, SameAs):
            return SharedQuantizationSpec(anchors[spec.name]) if spec.name in anchors else None
        if isinstance(spec, OneScale):
            if name in anchors:
                return SharedQuantizationSpec(anchors[name])
            spec = spec.spec
        return _resolve(spec, config)

    def _output_spec(
        self, config: QuantizationConfig, anchors: dict[str, tuple[Node, Node]]
    ) -> QuantizationSpecBase | None:
        if isinstance(self.output, SameAs):
            return SharedQuantizationSpec(anchors[self.output.name]) if self.output.name in anchors else None
        return _resolve(self.output, config)  # type: ignore[arg-type]  # neither Inherit nor OneScale, see __post_init__


def _is_tied(spec: QuantizationSpecBase | None) -> bool:
    """It shares with another input; INHERIT shares with the output of a producer."""
    return isinstance(spec, SharedQuantizationSpec) and not isinstance(spec.edge_or_node, Node)


def _resolve(
    spec: QuantizationSpecBase | Role | FromConfig | None, config: QuantizationConfig
) -> QuantizationSpecBase | None:
    if isinstance(spec, Role):
        return spec.resolve(config)
    return spec(config) if callable(spec) else spec


@checked(AnnotationError)
def rule(
    *, output: SpecLike = None, unless: Iterable[Unless] = (), name: str | None = None, **captures: SpecLike
) -> Callable[[Callable[..., Any]], Rule]:
    """Turn a pattern function into a Rule.

    Args:
        output: spec of the value that the pattern computes.
        unless: functions of the match that return a reason for which the rule is not applied, or None.
        name: name in reports; the function's name by default.
        captures: spec of each capture, by parameter name.

    Raises:
        AnnotationError: a spec names no capture, or shares with one that has none.
    """

    def make(function: Callable[..., Any]) -> Rule:
        return Rule(name or function.__name__, trace(function), captures, output, tuple(unless))

    return make


def _dtype(node: Node) -> str:
    value = node.meta.get("val")
    return str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
