"""Random configurations for the fuzz tests: rule quantizers under many configs, and annotations thrown at the graph."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch.fx import GraphModule, Node

from pt2e_quant.graph.values import is_float_tensor
from pt2e_quant.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from pt2e_quant.quantizer import (
    ComposableQuantizer,
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationConfig,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.pt2e.kit import DYNAMIC, WEIGHT_ONLY, Toy

__all__ = ["STATIC_INT8", "Recipe", "Scatter", "recipes"]

aten = torch.ops.aten
EPS = 2**-20

ACT = QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=EPS), -128, 127, torch.per_tensor_affine)
WEIGHT = QuantizationSpec(
    torch.int8, PerChannelMinMaxObserver.with_args(eps=EPS), -127, 127, torch.per_channel_symmetric, ch_axis=0
)
WEIGHT_TENSOR = QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=EPS), -127, 127, torch.per_tensor_symmetric)
UNSIGNED = replace(ACT, dtype=torch.uint8, quant_min=0, quant_max=255)
PER_CHANNEL, PER_TENSOR = QuantizationConfig(ACT, ACT, WEIGHT), QuantizationConfig(ACT, ACT, WEIGHT_TENSOR)


@dataclass(frozen=True)
class Recipe:
    """A quantizer by name; `static` when 8-bit min-max ranges are all that it asks for."""

    name: str
    make: Callable[[], Quantizer]
    static: bool = False

    def __repr__(self) -> str:
        return f"Recipe({self.name!r})"


class Scatter(Quantizer):
    """Puts a legal spec on each float input and output with some probability, and shares at random.

    Args:
        seed: of the choices, which are made in graph order.
        broken: also makes what no engine can carry out: shares with strangers, claims integers and several outputs.
    """

    def __init__(self, seed: int, broken: bool = False) -> None:
        self.seed, self.broken = seed, broken

    def annotate(self, model: GraphModule) -> GraphModule:
        self._random = random.Random(self.seed)
        self._sites: list[Node | tuple[Node, Node]] = []
        for node in model.graph.nodes:
            if node.op == "call_function" and self._random.random() < 0.7:
                self._annotate(node)
        return model

    def validate(self, model: GraphModule) -> None:
        pass

    def _annotate(self, node: Node) -> None:
        inputs = {}
        for source in node.all_input_nodes:
            if self._wanted(source):
                inputs[source] = self._spec(source)
                self._sites.append((source, node))
        output = None
        if self._wanted(node):
            output = self._spec(node)
            self._sites.append(node)
        node.meta["quantization_annotation"] = QuantizationAnnotation(
            inputs, output, allow_implicit_sharing=self._random.random() < 0.8, _annotated=True
        )

    def _wanted(self, node: Node) -> bool:
        fits = is_float_tensor(node) or (self.broken and self._random.random() < 0.1)
        return fits and self._random.random() < 0.7

    def _spec(self, node: Node) -> object:
        rank = node.meta["val"].dim() if is_float_tensor(node) else 1
        simple = [
            ACT,
            ACT,
            UNSIGNED,
            replace(ACT, dtype=torch.int16, quant_min=-32768, quant_max=32767),
            replace(ACT, observer_or_fake_quant_ctr=HistogramObserver),
            replace(ACT, observer_or_fake_quant_ctr=MovingAverageMinMaxObserver.with_args(averaging_constant=0.3)),
            FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine),
            QuantizationSpec(torch.float16, PlaceholderObserver),
            replace(ACT, observer_or_fake_quant_ctr=PlaceholderObserver.with_args(eps=EPS), is_dynamic=True),
        ]
        if rank:
            simple.append(replace(WEIGHT, ch_axis=self._random.randrange(rank)))
        chance = self._random.random()
        if self._sites and chance < 0.25:
            return SharedQuantizationSpec(self._random.choice(self._sites))
        if self._sites and chance < 0.3:
            site = self._random.choice(self._sites)
            return DerivedQuantizationSpec([site], half_the_scale, torch.int8, -128, 127, torch.per_tensor_affine)
        if self.broken and chance < 0.33:
            return SharedQuantizationSpec(node)
        return self._random.choice(simple)


def half_the_scale(observers: list[object]) -> tuple[torch.Tensor, torch.Tensor]:
    scale, zero_point = observers[0].calculate_qparams()
    return scale / 2, zero_point


def _xnnpack(**kwargs: bool) -> Quantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**kwargs))


def _x86(**kwargs: bool) -> Quantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(**kwargs))


def _mixed() -> Quantizer:
    """Dynamic linears, static everything else, multiplications in float."""
    linears = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    linears.set_filter_function(lambda node: node.target is aten.linear.default)
    return ComposableQuantizer([linears, _xnnpack(is_per_channel=True)])


STATIC_INT8 = (
    Recipe("xnnpack min-max per channel", lambda: XNNPACKQuantizer(PER_CHANNEL), static=True),
    Recipe("xnnpack min-max per tensor", lambda: XNNPACKQuantizer(PER_TENSOR), static=True),
    Recipe("toy per channel", lambda: Toy(PER_CHANNEL), static=True),
    Recipe("toy uint8", lambda: Toy(QuantizationConfig(UNSIGNED, UNSIGNED, WEIGHT)), static=True),
)
OTHERS = (
    Recipe("xnnpack per channel", lambda: _xnnpack(is_per_channel=True)),
    Recipe("xnnpack per tensor", lambda: _xnnpack()),
    Recipe("xnnpack dynamic", lambda: _xnnpack(is_per_channel=True, is_dynamic=True)),
    Recipe("x86", _x86),
    Recipe("x86 dynamic", lambda: _x86(is_dynamic=True)),
    Recipe("mixed", _mixed),
    Recipe("activations only", lambda: Toy(PER_CHANNEL.activation_only())),
    Recipe("toy dynamic", lambda: Toy(DYNAMIC)),
    Recipe("toy weight only", lambda: Toy(WEIGHT_ONLY)),
)


def recipes() -> st.SearchStrategy[Recipe]:
    """One of the above, or annotations scattered over the graph."""
    scatter = st.builds(
        lambda seed, broken: Recipe(f"Scatter({seed}, {broken})", lambda: Scatter(seed, broken)),
        st.integers(0, 10_000),
        st.booleans(),
    )
    return st.one_of(st.sampled_from(STATIC_INT8), st.sampled_from(OTHERS), scatter)
