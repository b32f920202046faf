"""RuleQuantizer: a Quantizer made of rules and of the user's selectors. A backend declares rules, this walks the graph.

    class MyQuantizer(RuleQuantizer):
        rules = (conv_relu, conv, add, reshape)
        transforms = (lift_scalars,)

The first rule that fits a node takes it. Rules with INHERIT come last, in the order of the graph, so that they see what
their producers were given. Every float op that no rule took gets a Refusal with the reason.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import CaptureError, TargetingError
from ..graph.constants import Constants
from ..graph.values import is_float_tensor
from ..meta import ANNOTATION_KEY, FOLDED_KEY, UNUSED_RULES_KEY
from ..ops import EMBEDDING, resolve
from ..passes.runner import Pass
from ..reasons import Refusal, refusals, refuse
from .base import Quantizer
from .config import QuantizationConfig
from .masks import MASK_REASON, masked
from .overwritten import Overwritten, overwritten_reason
from .pattern import Match
from .reading import input_specs, is_annotated
from .rule import Rule
from .small_values import SmallValues
from .streams import Streams
from .targeting import Choice, Targets

__all__ = ["RuleQuantizer"]

Self = TypeVar("Self", bound="RuleQuantizer")


class RuleQuantizer(Quantizer):
    """A quantizer that declares `rules`; users pick a QuantizationConfig per node, module, operator or globally.

    Class attributes, for a backend to set:
        rules: the first that fits a node takes it.
        reasons: what to say of ops that no rule starts from, or fits, by overload.
        transforms: rewrites before annotation, graph in, graph out.
        trims_outputs: quantize an output only where an integer op reads it. An op whose output has the qparams of its
            input, or none but those, is then left in float altogether. For backends whose kernels can end in float.
        spares_streams: leave in float what norms and recurrences would make a static recipe pay for (`streams`), unless
            a selector narrower than the global one asks for it. For backends with integer kernels for sums and means.
        precisions: what a search for mixed precision may give an op that has a weight, by name ('int8', 'int4'), each a
            function that makes the configuration. 'float' goes without saying.
        modes: what makes the configuration of 'static', 'dynamic', 'weight_only' and others, for recipes.
        lowers_to: the lowering that runs its graphs: 'executorch', 'inductor' or 'onnx'; '' for none of this package.

    Args:
        config: the global configuration; `set_global` sets it later.
        rules: overrides the class attribute, for a quantizer that needs no class of its own.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    reasons: ClassVar[Mapping[Any, str]] = {}
    transforms: ClassVar[tuple[Pass, ...]] = ()
    trims_outputs: ClassVar[bool] = False
    spares_streams: ClassVar[bool] = False
    precisions: ClassVar[Mapping[str, Callable[[], QuantizationConfig]]] = {}
    modes: ClassVar[Mapping[str, Callable[..., QuantizationConfig]]] = {}
    lowers_to: ClassVar[str] = ""

    @checked(TargetingError, but=("config",))
    def __init__(self, config: QuantizationConfig | None = None, rules: tuple[Rule, ...] | None = None) -> None:
        self._rules = type(self).rules if rules is None else tuple(rules)
        self._targets = Targets()
        if config is not None:
            self.set_global(config)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """With selectors of its own and the same rules: their reasons know ops of a pattern by identity."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        held = vars(self).items()
        vars(copied).update({name: value if name == "_rules" else copy.deepcopy(value, memo) for name, value in held})
        return copied

    @property
    def name(self) -> str:
        return type(self).__name__

    def copy(self: Self) -> Self:
        """A quantizer with the same selectors; those that are set on one do not reach the other."""
        other = copy.copy(self)
        other._targets = self._targets.copy()
        return other

    @property
    def global_config(self) -> QuantizationConfig | None:
        """What `set_global` was given last; None before."""
        return self._targets.everything if isinstance(self._targets.everything, QuantizationConfig) else None

    @property
    def selects_by_module(self) -> bool:
        """A selector reads where a node comes from: by module name or type, or in a function of the user."""
        targets = self._targets
        return bool(targets.module_names or targets.module_types or targets.filter_function)

    def set_global(self: Self, config: QuantizationConfig | None) -> Self:
        """Configuration of every node that no other selector matches; None is float."""
        _check_config(config)
        self._targets.everything = config
        return self

    def set_operator_type(self: Self, operator: Any, config: QuantizationConfig | None) -> Self:
        """Configuration of an operator: an overload (aten.conv2d.default) or a packet (aten.conv2d, all overloads)."""
        _check_config(config)
        resolve(operator)  # raises for what is no operator
        self._targets.operators[operator] = config
        return self

    @checked(TargetingError, but=("config",))
    def set_module_type(self: Self, module_type: type | str, config: QuantizationConfig | None) -> Self:
        """Configuration of all ops inside modules of a class (or its subclasses), given as class or qualified name."""
        _check_config(config)
        self._targets.module_types[module_type] = config
        return self

    @checked(TargetingError, but=("config",))
    def set_module_name(self: Self, module_name: str, config: QuantizationConfig | None) -> Self:
        """Configuration of all ops inside the module at a dotted path, or at each path that fits a glob ("block.*")."""
        _check_config(config)
        self._targets.module_names[module_name] = config
        return self

    @checked(TargetingError, but=("config",))
    def set_node_name(self: Self, node_name: str, config: QuantizationConfig | None) -> Self:
        """Configuration of a graph node by its name, or of every node whose name fits a glob ("conv2d_*")."""
        _check_config(config)
        self._targets.nodes[node_name] = config
        return self

    @checked(TargetingError, but=("config",))
    def set_filter_function(self: Self, accept: Callable[[Node], bool]) -> Self:
        """Quantize only nodes for which `accept(node)` is true; it comes on top of every selector."""
        self._targets.filter_function = accept
        return self

    @checked(CaptureError)
    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        for transform in type(self).transforms:
            model = transform(model)
        return model

    @checked(CaptureError)
    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate every match of a rule.

        Raises:
            TargetingError: no configuration was set at all, or a selector matches nothing in this graph.
        """
        if self._targets.is_empty:
            raise TargetingError(f"{self.name} has no configuration; call set_global(...) or another set_ method")
        _Annotator(self, model, self._targets.choose(model, model.meta.get(FOLDED_KEY, ()))).run()
        return model

    def validate(self, model: GraphModule) -> None:
        """Rules can only say what the backend runs, so there is nothing left to check."""


class _Annotator:
    """One run of a RuleQuantizer over one graph."""

    def __init__(self, quantizer: RuleQuantizer, model: GraphModule, choices: dict[Node, Choice]) -> None:
        self._quantizer = quantizer
        self._model = model
        self._choices = choices
        self._constants = Constants(model)
        self._overwritten = Overwritten(model.graph)
        self._masked = masked(model.graph)
        self._small_values = SmallValues(model)
        self._streams = Streams(model) if quantizer.spares_streams else None
        self._foreign = {node for node in choices if is_annotated(node)}
        self._applied: dict[Node, tuple[Rule, Match]] = {}

    def run(self) -> None:
        rules = self._quantizer._rules
        self._run_independent(rules)
        inheriting: dict[Any, list[Rule]] = defaultdict(list)
        for rule in rules:
            if rule.inherits:
                for target in rule.pattern.root.op.targets:
                    inheriting[target].append(rule)
        for node in self._choices:  # in graph order: producers are settled before their consumers
            for rule in inheriting.get(node.target, ()):
                self._try(rule, node)
        if self._quantizer.trims_outputs:
            self._trim_outputs()
        self._explain_the_rest()
        used = {rule.name for rule, _ in self._applied.values()}
        unused = [name for name in dict.fromkeys(rule.name for rule in rules) if name not in used]
        self._model.meta.setdefault(UNUSED_RULES_KEY, []).extend(unused)

    def _run_independent(self, rules: tuple[Rule, ...]) -> None:
        by_target: dict[Any, list[Node]] = defaultdict(list)
        for node in self._choices:
            by_target[node.target].append(node)
        for rule in rules:
            if not rule.inherits:
                for node in self._candidates(rule, by_target):
                    self._try(rule, node)

    @staticmethod
    def _candidates(rule: Rule, by_target: dict[Any, list[Node]]) -> Iterator[Node]:
        for target in rule.pattern.root.op.targets:
            yield from by_target.get(target, ())

    def _try(self, rule: Rule, node: Node) -> None:
        if is_annotated(node):
            return
        match = rule.pattern.match(node, self._constants)
        if match is None or any(is_annotated(matched) for matched in match.nodes):
            return
        config = self._config(match)
        if config is None:
            return
        match = replace(match, config=config, explicit=self._choices[match.anchor].is_explicit)
        found = self._obstacle(rule, match) or rule.refusal(match) or self._cost(rule, match)
        if found is None:
            rule.apply(match, config)
            self._applied[match.root] = rule, match
            return
        for refused in dict.fromkeys((match.anchor, match.root)):
            refuse(refused, found.by, found.reason, found.code)

    def _trim_outputs(self) -> None:
        """From the last node to the first: what a trimmed op no longer reads need not be quantized for it either."""
        for node in reversed(self._choices):
            if node not in self._applied or any(_reads_integers(user, node) for user in node.users):
                continue
            rule, match = self._applied[node]
            if not rule.passes_on:
                node.meta[ANNOTATION_KEY].output_qspec = None
                continue
            for matched in match.nodes:
                del matched.meta[ANNOTATION_KEY]
            del self._applied[node]
            refuse(node, rule.name, "nothing that runs in integers reads its output", "output_not_read")

    def _obstacle(self, rule: Rule, match: Match) -> Refusal | None:
        """What forbids every rule here: memory that is written to, values that no input changes, and masks."""
        written = self._overwritten
        missed = [(match.root, written.write(match.root))]
        missed += [(node, written.write_missed(node, match.users[name])) for name, node in match.pairs()]
        for tensor, write in missed:
            if write is not None:
                return Refusal(rule.name, overwritten_reason(tensor, write), "overwritten")
        if match.root in self._constants:
            return Refusal(rule.name, "it is computed from parameters alone, no input flows through it", "constant")
        tensors = [match.root, *(node for name, node in match.pairs() if rule.specs.get(name) is not None)]
        return None if self._masked.isdisjoint(tensors) else Refusal(rule.name, MASK_REASON, "mask")

    def _cost(self, rule: Rule, match: Match) -> Refusal | None:
        """What static scales would make the outputs pay for, where nobody asked for it by a narrow selector."""
        if match.explicit or match.config is None or match.config.is_dynamic or match.config.is_weight_only:
            return None
        place = rule.name, match.anchor, match.root
        found = self._small_values.refusal(*place)
        return self._streams.refusal(*place) if found is None and self._streams and rule.rounds_anew else found

    def _config(self, match: Match) -> QuantizationConfig | None:
        """The anchor's config; None when another node of the match was explicitly given a different one."""
        chosen = self._choices[match.anchor]
        for node in match.nodes:
            other = self._choices[node]
            if other.is_explicit and other.config != chosen.config:
                return None
        return chosen.config

    def _explain_the_rest(self) -> None:
        roots = {target for rule in self._quantizer._rules for target in rule.pattern.root.op.targets}
        for node, choice in self._choices.items():
            if node in self._foreign and choice.config is not None and node.target in roots:
                refuse(node, self._quantizer.name, "already annotated by another quantizer", "already_annotated")
            elif not is_annotated(node) and (
                is_float_tensor(node) or "val" not in node.meta or node.target in EMBEDDING
            ):
                if not choice.is_set:
                    refuse(node, self._quantizer.name, "no selector covers it", "not_selected")
                elif choice.config is None:
                    refuse(node, self._quantizer.name, f"kept in float by {choice.selector}", "config_none")
                elif node.target not in roots:
                    refuse(node, self._quantizer.name, self._without_rule(node), "unsupported_op")
                elif not refusals(node):
                    known = type(self._quantizer).reasons.get(node.target)
                    misfit = f"no rule for {node.target} fits these arguments"
                    refuse(node, self._quantizer.name, known or misfit, "unsupported_op" if known else "arguments")

    def _without_rule(self, node: Node) -> str:
        if node.target is operator.getitem:
            return f"one of the outputs of {node.args[0]}, which no rule takes apart"
        return type(self._quantizer).reasons.get(node.target, f"no rule for {node.target}")


def _reads_integers(user: Node, node: Node) -> bool:
    return input_specs(user).get(node) is not None


def _check_config(config: object) -> None:
    """Configurations of other packages have the same fields."""
    if config is not None and not (hasattr(config, "input_activation") and hasattr(config, "weight")):
        raise TargetingError(
            f"a selector takes a QuantizationConfig, or None for float, got {config!r}; each backend has a function "
            "that makes one, such as get_symmetric_quantization_config()"
        )
