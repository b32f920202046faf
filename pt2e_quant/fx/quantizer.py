"""QConfigMappingQuantizer: a QConfigMapping and a BackendConfig as annotations, which the engine carries out.

On a symbolic graph, patterns are modules, functions and methods; on an exported one, the ATen operators of their names.
What flows: `select` gives each node a qconfig, `Patterns` finds what the backend computes as one, `fitting` says in
which types; the annotation of a match names a spec for each float tensor that it takes, and for what it gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ..backend_config import BackendConfig, DTypeConfig, ObservationType
from ..checks import checked
from ..errors import TargetingError
from ..graph.attributes import set_attribute
from ..graph.values import is_float_tensor
from ..meta import ANNOTATION_KEY
from ..nn.rows import ROWS
from ..qconfig import QConfigAny
from ..qconfig_mapping import QConfigMapping
from ..quantizer.base import Quantizer
from ..reasons import refuse
from ..specs import QuantizationAnnotation, QuantizationSpecBase, SharedQuantizationSpec
from .matching import Match, Patterns, module_of
from .recipes import Recipe, fitting, read_recipe
from .selection import select
from .units import Unit

__all__ = ["QConfigMappingQuantizer"]

_FLOAT = Recipe(torch.float32)


class QConfigMappingQuantizer(Quantizer):
    """Annotates what a mapping gives a qconfig to and a backend has a pattern for.

    Args:
        mapping: which part of the model gets which qconfig.
        backend_config: the patterns, and the types that they run in.
        is_qat: modules of symbolic graphs become those to train.
        units: modules that are taken as one operator, by path.
    """

    @checked(TargetingError)
    def __init__(
        self,
        mapping: QConfigMapping,
        backend_config: BackendConfig,
        *,
        is_qat: bool = False,
        units: Mapping[str, Unit] | None = None,
    ) -> None:
        self.mapping, self.backend_config, self.is_qat = mapping, backend_config, is_qat
        self.units = dict(units or {})
        self._qconfigs: dict[Node, QConfigAny] = {}
        self._recipes: dict[int, tuple[Any, Recipe]] = {}
        self._outputs: dict[Node, Recipe] = {}

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Put the modules to train in, where that is asked for."""
        chosen = select(model, self.mapping)
        patterns = Patterns(one for one in self.backend_config.configs if one.qat_module is not None)
        for node in model.graph.find_nodes(op="call_module") if self.is_qat else ():
            match, qconfig = next(patterns.ending_at(model, node), None), chosen[node]
            if match is not None and qconfig is not None:
                self._train(model, match, qconfig)
        self._qconfigs.update(chosen)
        return model

    def _train(self, model: GraphModule, match: Match, qconfig: Any) -> None:
        fits = fitting(match.config, self._recipe(qconfig.activation), self._recipe(qconfig.weight))
        if not isinstance(fits, str):
            module: Any = module_of(model, match.nodes[0])
            module.qconfig = qconfig
            made = match.config.qat_module.from_float(module)  # type: ignore[union-attr]
            set_attribute(model, str(match.nodes[0].target), made.train(module.training))

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate a graph whose nodes have values."""
        exported = any(isinstance(node.target, OpOverload) for node in model.graph.nodes)
        configs = [one for one in self.backend_config.configs if exported or one.fuser_method is None]
        qconfigs = self._qconfigs or select(model, self.mapping)
        matches = {match.nodes[0]: match for match in Patterns(configs).find(model)}
        inside = {node for match in matches.values() for node in match.nodes}
        self._outputs = {}
        for node in model.graph.nodes:
            if node.op == "call_module" and str(node.target) in self.units:
                self._annotate_unit(node, self.units[str(node.target)], qconfigs[node])
            elif node in matches:
                self._annotate(matches[node], qconfigs[node])
            elif node in qconfigs and node not in inside and ANNOTATION_KEY not in node.meta:
                self._refuse([node], f"backend {self.backend_config.name!r} has no pattern for it", "unsupported_op")
        return model

    def validate(self, model: GraphModule) -> None:
        """Whatever is annotated, the backend has a pattern for."""

    def _annotate(self, match: Match, qconfig: QConfigAny) -> None:
        observed = match.config.observation_type is not ObservationType.INPUT_OUTPUT_NOT_OBSERVED
        if not observed or any(ANNOTATION_KEY in node.meta for node in match.nodes):
            return
        if qconfig is None:
            self._refuse(match.nodes, "the QConfigMapping gives it None, or nothing", "config_none")
            return
        activation, weight = self._recipe(qconfig.activation), self._recipe(qconfig.weight)
        parameters = _parameters(match)
        has_weight = match.config.root_module is not None or "weight" in parameters
        if activation.reuses:
            self._pass_on(match)
            return
        types = fitting(match.config, activation, weight if has_weight else None)
        if isinstance(types, str):
            self._refuse(match.nodes, types, "configuration")
            return
        module = module_of(match.nodes[0].graph.owning_module, match.nodes[0])  # type: ignore[arg-type]
        if module is not None:
            module.qconfig = qconfig  # type: ignore[assignment]  # what convert makes its weight with
        specs = {parameters["weight"]: weight.spec} if "weight" in parameters and weight.spec is not None else {}
        self._write(match, types, activation, specs, set(parameters.values()))

    def _annotate_unit(self, node: Node, unit: Unit, qconfig: QConfigAny) -> None:
        recipe = _FLOAT if qconfig is None else self._recipe(qconfig.activation)
        taken = [node.args[index] for index in unit.takes if index < len(node.args)]
        specs = {one: self._input(one, recipe) for one in taken if isinstance(one, Node)}
        given = {one: spec for one, spec in specs.items() if spec is not None and not recipe.is_dynamic}
        node.meta[ANNOTATION_KEY] = QuantizationAnnotation(given, None, _annotated=True, rule=unit.rule)  # type: ignore[arg-type]

    def _write(
        self, match: Match, types: DTypeConfig, activation: Recipe, weights: dict[Node, Any], parameters: set[Node]
    ) -> None:
        edges = _inputs(match, parameters)
        if activation.spec is None or (types.is_dynamic and activation.dtype is torch.float16):
            self._claim(match, {match.nodes[0]: weights}, None, activation)
        elif types.is_dynamic:
            given = {} if _is_recurrent(match) else dict.fromkeys(edges, activation.spec)
            self._claim(match, _by_node(weights, match, given), None, activation)
        elif not edges:
            self._refuse(match.nodes, "it takes no float tensor", "non_float")
        else:
            self._write_static(match, activation, weights, edges)

    def _write_static(
        self, match: Match, activation: Recipe, weights: dict[Node, Any], edges: list[tuple[Node, Node]]
    ) -> None:
        shares = _observation(match, len(edges)) is ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
        given: dict[tuple[Node, Node], Any] = {}
        for edge in edges:
            given[edge] = SharedQuantizationSpec(edges[0]) if shares and given else self._input(edge[0], activation)
        if None in given.values():
            reason = "its qconfig has the grid of its result alone, and what computes its input is not quantized"
            self._refuse(match.nodes, reason, "input_not_quantized")
            return
        output: QuantizationSpecBase | None = SharedQuantizationSpec(edges[0]) if shares else activation.spec
        if not is_float_tensor(match.nodes[-1]):
            output = None  # several tensors, such as chunks
        self._claim(match, _by_node(weights, match, given), output, activation)

    def _input(self, producer: Node, activation: Recipe) -> QuantizationSpecBase | None:
        """The grid of the producer where it has one of this type, else one of the tensor's own."""
        known = self._outputs.get(producer)
        if known is not None and known.dtype is activation.dtype:
            return SharedQuantizationSpec(producer)
        if activation.grid is None:
            return activation.spec
        qconfig = self.mapping.global_qconfig  # a grid that is fixed is that of the result
        usual = _FLOAT if qconfig is None else self._recipe(qconfig.activation)
        return usual.spec if usual.dtype is activation.dtype and not usual.is_dynamic else None

    def _pass_on(self, match: Match) -> None:
        """An operator whose qconfig says that it has the grid of its input."""
        edges = _inputs(match, set())
        known = self._outputs.get(edges[0][0]) if edges else None
        if known is None:
            reason = "its qconfig takes the grid of its input, which is not quantized"
            self._refuse(match.nodes, reason, "input_not_quantized")
            return
        given = {edges[0]: SharedQuantizationSpec(edges[0][0])}
        self._claim(match, _by_node({}, match, given), SharedQuantizationSpec(edges[0]), known)

    def _claim(
        self, match: Match, specs: dict[Node, dict[Node, Any]], output: QuantizationSpecBase | None, recipe: Recipe
    ) -> None:
        for node in match.nodes:
            last = node is match.nodes[-1]
            node.meta[ANNOTATION_KEY] = QuantizationAnnotation(
                specs.get(node, {}), output if last else None, _annotated=True, rule=match.rule
            )
        if output is not None:
            self._outputs[match.nodes[-1]] = recipe

    def _refuse(self, nodes: Iterable[Node], reason: str, code: str) -> None:
        for node in nodes:
            refuse(node, type(self).__name__, reason, code)

    def _recipe(self, make: Any) -> Recipe:
        if id(make) not in self._recipes:
            self._recipes[id(make)] = make, read_recipe(make)  # kept, so that no other gets its id
        return self._recipes[id(make)][1]


def _parameters(match: Match) -> dict[str, Node]:
    """The arguments of the first operator that are no activations, by name."""
    node, found = match.nodes[0], {}
    if node.op != "call_function":
        return {}
    indexes = match.config._input_type_to_index
    if isinstance(node.target, OpOverload):  # here weights are arguments, of what are modules elsewhere
        indexes = indexes or ({"weight": 1, "bias": 2} if match.config.root_module or match.config.fuser_method else {})
    for name, index in indexes.items():
        given = node.kwargs.get(name, node.args[index] if index < len(node.args) else None)
        if isinstance(given, Node):
            found[name] = given
    return found


def _inputs(match: Match, parameters: set[Node]) -> list[tuple[Node, Node]]:
    """The uses of float tensors by the operators of a match, in the order of their arguments."""
    return [
        (source, node)
        for node in match.nodes
        for source in node.all_input_nodes
        if source not in match.nodes and source not in parameters and is_float_tensor(source)
    ]


def _by_node(weights: dict[Node, Any], match: Match, given: dict[tuple[Node, Node], Any]) -> dict[Node, Any]:
    specs: dict[Node, dict[Node, Any]] = {match.nodes[0]: dict(weights)}
    for (source, node), spec in given.items():
        specs.setdefault(node, {})[source] = spec
    return specs


def _observation(match: Match, count: int) -> ObservationType:
    return match.config._num_tensor_args_to_observation_type.get(count, match.config.observation_type)


def _is_recurrent(match: Match) -> bool:
    """Recurrent layers and cells quantize what they take themselves."""
    root = match.config.root_module
    return root is not None and root.__name__ in ROWS and ROWS[root.__name__].kernel == "recurrent"
