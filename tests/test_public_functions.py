"""Every public function takes 40 wrong values for each of its arguments: what comes out is an error of this package.

A new public name is found by itself. Where it needs an argument that no value is known for, the test asks for one.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from pt2e_quant import QuantizationError, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.backend_config import get_native_backend_config
from pt2e_quant.calibration import save_calibration
from pt2e_quant.debug import Budget
from pt2e_quant.eager import prepare, quantize_dynamic
from pt2e_quant.fake_quantize import FakeQuantize
from pt2e_quant.fx import PrepareCustomConfig
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.lowering.onnx import lower_to_onnx
from pt2e_quant.nn import quantized
from pt2e_quant.nn.quantized import dynamic, reference
from pt2e_quant.observer import FixedQParamsObserver, MappingType, MinMaxObserver, PerTensor
from pt2e_quant.observer.factory import PartialWrapper
from pt2e_quant.qconfig import QConfig, default_dynamic_qconfig
from pt2e_quant.qconfig_mapping import QConfigMapping
from pt2e_quant.qtensor import QTensor
from pt2e_quant.quantize_fx import prepare_fx
from pt2e_quant.quantizer import ComposableQuantizer, op
from pt2e_quant.schemes import Cell, Scheme
from pt2e_quant.specs import QuantizationSpec
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

LIBRARY = (
    "algorithms", "backend_config", "calibration", "compat", "debug", "eager", "eager.helpers", "errors",
    "fake_quantize", "fx", "kernels", "lowering.executorch", "lowering.inductor", "nn.intrinsic.quantized",
    "nn.intrinsic.quantized.dynamic", "nn.quantized", "nn.quantized.dynamic", "nn.quantized.functional", "observer",
    "pt2e", "pt2e.representation",
    "qconfig", "qconfig_mapping", "quantize_fx", "quantizer", "qtensor", "report", "schemes", "specs", "testing",
)  # fmt: skip
BACKENDS = ("arm_inductor", "cache", "decoder", "embedding", "x86_inductor", "xnnpack", "xpu_inductor")
ROOMS = ("pt2e_quant", *(f"pt2e_quant.{room}" for room in LIBRARY), *(f"quantizers.{file}" for file in BACKENDS))


def failing(*arguments: object, **named: object) -> None:
    raise RuntimeError("code of the user")


WRONG: dict[str, Any] = {
    repr(value)[:24]: value
    for value in (
        None, True, 0, -1, 3, 10**30, 3.7, -1.5, float("nan"), float("inf"), "", "int8", "\0", b"x", [], [1, 2], ["a"],
        [None], (), (1, "a"), {}, {"a": 1}, {1: None}, set(), object(), int, failing, torch.int8, torch.float32,
        torch.ones(2), torch.full((2, 3), float("nan")), torch.ones(0), torch.tensor(2.0), nn.ReLU(), numpy.int64(3),
        range(3), 1j, ..., slice(1), iter("ab"),
    )
}  # fmt: skip
FEW = [value for value in WRONG.values() if value is None or type(value) in (int, float, str, list, torch.Tensor)][::3]


# Good values, by the name of the argument -----------------------------------------------------------------------------


@functools.cache
def exported() -> torch.export.ExportedProgram:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    return torch.export.export(net, (torch.rand(2, 4, generator=torch.Generator().manual_seed(0)),))


@functools.cache
def prepared() -> torch.fx.GraphModule:
    made = prepare_pt2e(exported(), XNNPACKQuantizer().set_global(get_symmetric_quantization_config()))
    made(torch.rand(2, 4))
    return made


@functools.cache
def converted() -> torch.fx.GraphModule:
    return convert_pt2e(prepared())


def node() -> torch.fx.Node:
    return next(one for one in exported().module().graph.nodes if one.op == "call_function")


def configured(module: Any) -> nn.Module:
    module.qconfig = default_dynamic_qconfig
    return module  # type: ignore[no-any-return]


def calibrated() -> nn.Module:
    made = prepare(configured(nn.Linear(4, 3)))
    made(torch.rand(2, 4))
    return made


RELU = op(torch.ops.aten.relu.default)
QCONFIG = QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.qint8))


def prepared_fx() -> Any:
    made = prepare_fx(nn.Linear(4, 3).eval(), QConfigMapping().set_global(QCONFIG), (torch.rand(2, 4),))
    made(torch.rand(2, 4))
    return made


GOOD: dict[str, Callable[[], Any]] = {
    **{name: lambda: 4 for name in ("in_channels", "in_features", "input_size", "input_dim", "embed_dim")},
    **{name: lambda: 4 for name in ("num_channels", "num_embeddings", "num_features", "normalized_shape")},
    **{name: lambda: 4 for name in ("embedding_dim", "hidden_dim", "hidden_size", "out_channels", "out_features")},
    **{name: lambda: 2 for name in ("kernel_size", "num_groups", "num_heads", "output_size")},
    **{name: lambda: 0.5 for name in ("max_", "negative_slope", "number", "output_scale", "threshold", "value")},
    **{name: lambda: codes_of(4, 4) for name in ("a", "b")},
    "bias": lambda: None,
    "dim": lambda: 0,
    "indices": lambda: torch.tensor([[0, 1]]),
    "kernel": lambda: "exact",
    "min_": lambda: -0.5,
    "output_zero_point": lambda: 3,
    "tensors": lambda: [codes_of(4)],
    "bn": lambda: nn.BatchNorm2d(4).eval(),
    "conv": lambda: nn.Conv2d(4, 4, 1).eval(),
    "convt": lambda: nn.ConvTranspose2d(4, 4, 1).eval(),
    "default_dict": dict,
    "float_module_class": lambda: nn.Linear,
    "float_op": lambda: nn.functional.hardswish,
    "linear": lambda: nn.Linear(4, 4).eval(),
    "op_list": lambda: [nn.Conv2d, nn.BatchNorm2d],
    "relu": lambda: nn.ReLU().eval(),
    "accept": lambda: lambda node: True,
    "activation": lambda: MinMaxObserver,
    "actual": lambda: torch.ones(2),
    "actual_results": dict,
    "backend": lambda: "x86",
    "backend_config": get_native_backend_config,
    "example_inputs": lambda: (torch.rand(2, 4),),
    "qconfig_mapping": lambda: QConfigMapping().set_global(QCONFIG),
    "prepare_custom_config": PrepareCustomConfig,
    "batches": lambda: [(torch.rand(2, 4),)],
    "budget": lambda: Budget(sqnr=10.0),
    "by": lambda: "a rule",
    "calib_data": list,
    "cell": lambda: Cell("int8", "tensor", "static"),
    "code": lambda: "shape",
    "codes": lambda: torch.ones(2, dtype=torch.int8),
    "config": get_symmetric_quantization_config,
    "converted": converted,
    "data": lambda: [(torch.rand(2, 4),)],
    "debug_handle": lambda: 3,
    "derive_qparams_fn": lambda: lambda observers: (torch.tensor(0.5), torch.tensor(3)),
    "derived_from": lambda: [node()],
    "dtype": lambda: torch.int8,
    "edge_or_node": node,
    "ep": exported,
    "exact": exported,
    "found": converted,
    "edge_or_node_to_obs_or_fq": dict,
    "enabled": lambda: True,
    "function": lambda: lambda x: RELU(x),
    "global_qconfig": lambda: QCONFIG,
    "gm": lambda: exported().module(),
    "granularity": PerTensor,
    "group": lambda: 2,
    "group_size": lambda: 2,
    "high": lambda: torch.tensor(3.0),
    "index": lambda: 0,
    "input": lambda: torch.rand(2),
    "input_activation": lambda: None,
    "input_shape": lambda: (2, 4),
    "known": lambda: ["int8"],
    "low": lambda: torch.tensor(-1.5),
    "mapping": lambda: {nn.Linear: dynamic.Linear},
    "mapping_type": lambda: MappingType.SYMMETRIC,
    "mod": prepared,
    "model": exported,
    "module": nn.ReLU,
    "is_qat": lambda: False,
    "mod_list": lambda: [nn.Linear(4, 3).eval(), nn.ReLU().eval()],
    "module_name": lambda: "0",
    "module_name_regex": lambda: "0",
    "module_type": lambda: nn.Linear,
    "name": lambda: "xnnpack",
    "node": node,
    "node_name": lambda: "linear",
    "object_type": lambda: nn.Linear,
    "obs_dict": dict,
    "observer": lambda: MinMaxObserver,
    "observer_or_fake_quant_ctr": lambda: MinMaxObserver,
    "operator": lambda: torch.ops.aten.linear.default,
    "output_activation": lambda: None,
    "path": lambda: "calibration",
    "prepared": prepared,
    "program": lambda: None,
    "q": lambda: torch.ones(2, dtype=torch.int8),
    "q1": lambda: QCONFIG,
    "q2": lambda: QCONFIG,
    "qconfig": lambda: QCONFIG,
    "qconfig_dict": dict,
    "qscheme": lambda: torch.per_tensor_affine,
    "quantizer": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config()),
    "quantizer_name": lambda: "one",
    "quantizers": lambda: [XNNPACKQuantizer().set_global(get_symmetric_quantization_config())],
    "reason": lambda: "because",
    "ref": lambda: torch.ones(2),
    "ref_results": dict,
    "record": lambda: explain(converted()).record,
    "reference": lambda: None,
    "run_args": list,
    "run_fn": lambda: lambda model: None,
    "runtime": lambda: None,
    "scale": lambda: torch.tensor(0.5),
    "scales": lambda: torch.tensor([0.5, 0.25]),
    "scheme": lambda: Scheme(dtype="int8"),
    "shape": lambda: (4, 3),
    "spec": lambda: QuantizationSpec(torch.int8, MinMaxObserver),
    "target": lambda: 22.0,
    "target_dtype": lambda: torch.int8,
    "text": lambda: explain(converted()).to_json(),
    "values": dict,
    "width": lambda: 4,
    "weight": lambda: MinMaxObserver.with_args(dtype=torch.qint8),
    "x": lambda: torch.rand(2),
    "zero_point": lambda: torch.tensor(3),
    "zero_points": lambda: torch.tensor([3, 2]),
    "axis": lambda: 0,
    "block_size": lambda: (1, 2),
}


def codes_of(*shape: int) -> QTensor:
    return QTensor(torch.full(shape, 7, dtype=torch.uint8), 0.5, 3)


def weight_of(*shape: int) -> QTensor:
    return QTensor(torch.ones(shape, dtype=torch.int8), 0.5, 0)


NUMBERS: dict[str, Any] = {"scale": 0.5, "zero_point": 3}
IMAGES: dict[str, Any] = {"input": codes_of(1, 4, 6, 6)}
NORM: dict[str, Any] = {**NUMBERS, **dict.fromkeys(("weight", "bias"), nn.Parameter(torch.ones(4)))}
OTHERWISE = {
    **dict.fromkeys(("ELU", "Hardswish", "LeakyReLU"), NUMBERS),
    **dict.fromkeys(("GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LayerNorm"), NORM),
    "Quantize": {**NUMBERS, "dtype": torch.quint8},
    **dict.fromkeys(("add", "cat", "matmul", "multiply", "on_grid"), NUMBERS),
    **{name: {"x": codes_of(4)} for name in ("add_scalar", "multiply_scalar")},
    **{name: {"weight": codes_of(4, 3)} for name in ("embedding", "embedding_bag")},
    **{name: {**IMAGES, **NUMBERS} for name in ("celu", "elu", "hardswish")},
    **dict.fromkeys(
        (
            "adaptive_avg_pool2d",
            "avg_pool2d",
            "clamp",
            "hardsigmoid",
            "hardtanh",
            "interpolate",
            "leaky_relu",
            "max_pool2d",
            "threshold",
            "upsample",
            "upsample_bilinear",
            "upsample_nearest",
        ),
        IMAGES,
    ),
    **{name: {"input": codes_of(1, 4, 6, 6, 6)} for name in ("adaptive_avg_pool3d", "avg_pool3d")},
    **{name: {**IMAGES, "size": 8} for name in ("interpolate", "upsample", "upsample_bilinear", "upsample_nearest")},
    "max_pool1d": {"input": codes_of(1, 4, 6)},
    **{
        f"conv{n}d": {"input": codes_of(1, 4, *[6] * n), "weight": weight_of(4, 4, *[1] * n), "bias": None}
        for n in (1, 2, 3)
    },
    "linear": {"input": codes_of(2, 4), "weight": weight_of(3, 4)},
    "FixedQParamsObserver": {"scale": 0.5, "zero_point": 3},
    "FixedQParamsQuantizationSpec": {"scale": 0.5, "zero_point": 3},
    "FixedQParamsFakeQuantize": {"observer": FixedQParamsObserver.with_args(scale=0.5, zero_point=3)},
    "quantize_dynamic": {"model": nn.Sequential(nn.Linear(4, 3))},
    "prepare": {"model": configured(nn.Linear(4, 3))},
    "convert": {"module": calibrated()},
    "prepare_qat": {"model": configured(nn.Linear(4, 3))},
    "default_eval_fn": {"model": nn.Linear(4, 3)},
    "eager_to_pt2e": {"model": configured(nn.Linear(4, 3)).eval(), "example_inputs": (torch.ones(2, 4),)},
    "load_file": {"file": io.BytesIO()},
    "swap_module": {"mod": configured(nn.Linear(4, 3))},
    "swap_report": {"model": quantize_dynamic(nn.Linear(4, 3))},
    "prepare_fx": {"model": nn.Linear(4, 3).eval()},
    "prepare_qat_fx": {"model": nn.Linear(4, 3)},
    "fuse_fx": {"model": nn.Linear(4, 3).eval()},
    "convert_fx": {"graph_module": prepared_fx()},
    "convert_to_reference_fx": {"graph_module": prepared_fx()},
    "QConfigMappingQuantizer": {"mapping": QConfigMapping()},
    "StandaloneModuleConfigEntry": {"prepare_custom_config": PrepareCustomConfig()},
    "why": {"name": "linear"},
    "check_quantizer": {"models": {"net": exported()}},
    "assert_conforms": {"models": {"net": exported()}},
}
"""Where an argument of the same name is another one."""

MADE_HERE = {
    "Refusal", "Match", "Op", "Pattern", "Rule", "Constants",  # of the kit: `refuse`, `op`, `trace`, `rule` make them
    "PartialWrapper", "ExecutorchProgram", "ExecutorchMethods", "InductorProgram",
    "Step", "Sketch", "Format", "Cell", "Advice",
    "Gates", "Geometry", "Layers", "Post", "Product", "Weight",  # of kernels: modules make them
}  # fmt: skip
"""Classes whose objects functions of this package make; they hold what they are given."""

READ_LATER = {
    "QuantizationAnnotation", "QuantizationConfig",  # of other packages too: prepare_pt2e reads them, with a place
    "prepare_obs_or_fq_callback", "validate",  # for backends to fill in
}  # fmt: skip


ALLOWED: dict[str, tuple[type[Exception], ...]] = {
    "assert_conforms": (AssertionError,),
    **dict.fromkeys(("LSTM", "LSTMCell", "MultiheadAttention"), (UserWarning,)),  # torch's, of sizes of 0
    "PlaceholderObserver": (FutureWarning,),  # the tests make errors of warnings
    "PerTokenPlaceholderObserver": (FutureWarning,),
}
"""What docstrings say is raised besides."""

LONG = ("check_quantizer", "assert_conforms")
"""Good values take seconds."""


# What is public -------------------------------------------------------------------------------------------------------


def public() -> Iterator[tuple[str, Any]]:
    """Each once, by its name; with its room where another one has the name."""
    seen: set[int] = set()
    names: set[str] = set()
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and id(value) not in seen and not _is_left_out(name, value):
                seen.add(id(value))
                yield (f"{room.rpartition('pt2e_quant.')[2]}.{name}" if name in names else name), value
                names.add(name)


_MADE_IN = ("algorithms", "calibration", "compat", "debug", "eager", "pt2e", "testing")
RESULTS = tuple(f"pt2e_quant.{room}" for room in _MADE_IN)
"""Dataclasses of these rooms are results."""


def _is_left_out(name: str, value: Any) -> bool:
    if not inspect.isclass(value):
        return isinstance(value, PartialWrapper) or name in ("lower_to_executorch", "lower_to_inductor", "did_you_mean")
    without_door = issubclass(value, BaseException | enum.Enum) or inspect.isabstract(value) or "Base" in name
    result = dataclasses.is_dataclass(value) and value.__module__.startswith(RESULTS)
    return without_door or result or getattr(value, "_is_protocol", False) or name in MADE_HERE


OBJECTS: dict[str, Callable[[], Any]] = {
    "Report": lambda: explain(converted()),
    "XNNPACKQuantizer": XNNPACKQuantizer,
    "ComposableQuantizer": lambda: ComposableQuantizer(GOOD["quantizers"]()),
    "QConfigMapping": QConfigMapping,
    "FakeQuantize": FakeQuantize,
}


def methods() -> Iterator[tuple[str, Any]]:
    """Public methods of the objects that a user holds. A module's own are torch's."""
    for owner, make in OBJECTS.items():
        for name in dir(type(make())):
            if not name.startswith("_") and callable(getattr(make(), name)) and not hasattr(nn.Module, name):
                yield f"{owner}.{name}", getattr(make(), name)


FUNCTIONS = {**dict(public()), **dict(methods())}


# The sweep ------------------------------------------------------------------------------------------------------------


def base_of(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Good values for all arguments that need one."""
    own = OTHERWISE.get(name.rpartition(".")[2], {})
    needed = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unknown = [one for one in needed if one not in GOOD and one not in own]
    assert unknown == [], f"{name}: GOOD needs a value for {unknown}"
    return {**own, **{one: GOOD[one]() for one in needed if one not in own}}


def untyped(name: str, function: Callable[..., Any], values: list[Any]) -> list[str]:
    base = base_of(name, function)
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        for value in values:
            try:
                function(**{**base, parameter.name: value})
            except (QuantizationError, *ALLOWED.get(name, ())):
                pass
            except Exception as error:  # noqa: BLE001  # that is the finding
                found.append(f"{parameter.name}={value!r:.30}: {type(error).__name__}: {str(error)[:80]}")
    return found


@pytest.fixture(autouse=True, scope="module")
def _in_a_folder_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("public"))
        save_calibration(prepared(), "calibration")
        yield


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in LONG])
def test_a_wrong_value_is_an_error_of_this_package(name):
    assert untyped(name, FUNCTIONS[name], FEW) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forty_wrong_values_are(name):
    assert untyped(name, FUNCTIONS[name], list(WRONG.values())) == []


HANDED_ON: dict[Any, tuple[Any, ...]] = {
    **{getattr(room, f"{kind}{n}d"): (4, 4, 3) for room in (dynamic, reference) for kind in ("Conv", "ConvTranspose")
       for n in (1, 2, 3)},
    **dict.fromkeys((dynamic.LSTM, dynamic.GRU, reference.Linear, reference.LSTM, reference.LSTMCell), (4, 3)),
    **dict.fromkeys((reference.Embedding, reference.EmbeddingBag), (4, 3)),
}  # fmt: skip
"""Classes that hand their arguments on, with good ones: a signature does not say which they are."""


@pytest.mark.parametrize("kind", HANDED_ON, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_arguments_that_are_handed_on_are_checked_too(kind):
    good, found = HANDED_ON[kind], []
    for place in range(len(good)):
        for value in FEW:
            error = raised(lambda at=place, value=value: kind(*good[:at], value, *good[at + 1 :]))
            if error is not None and not isinstance(error, QuantizationError):
                found.append(f"{place}: {value!r:.30}: {type(error).__name__}: {error}")
    assert found == []


MODULES = (
    quantized.Linear, quantized.Conv2d, quantized.BatchNorm2d, quantized.LayerNorm, quantized.Hardswish,
    quantized.PReLU, quantized.Embedding, quantized.QFunctional, dynamic.Linear, dynamic.Conv2d, dynamic.LSTM,
    dynamic.LSTMCell,
)  # fmt: skip
CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    **{f"{kind.__module__}.{kind.__name__}.from_float": kind.from_float for kind in MODULES},
    "Linear.from_reference": quantized.Linear.from_reference,
    "Embedding.from_reference": quantized.Embedding.from_reference,
    "LayerNorm.from_reference": lambda value: quantized.LayerNorm.from_reference(value, 0.5, 3),
    "Linear.set_weight_bias": lambda value: quantized.Linear(4, 3).set_weight_bias(value, None),
    "Linear.set_weight_bias, bias": lambda value: quantized.Linear(4, 3).set_weight_bias(weight_of(3, 4), value),
    "Conv2d.set_weight_bias": lambda value: quantized.Conv2d(4, 3, 1).set_weight_bias(value, None),
    "Conv2d.forward": lambda value: quantized.Conv2d(4, 3, 1)(value),
    "Embedding.set_weight": lambda value: quantized.Embedding(4, 3).set_weight(value),
    "LSTM.set_weight_bias": lambda value: dynamic.LSTM(4, 3).set_weight_bias(value),
    "QFunctional.cat": lambda value: quantized.QFunctional().cat(value),
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of LSTM.set_weight_bias([...])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_and_setters_refuse_what_is_no_module_and_no_weight(name):
    errors = [(value, raised(lambda value=value: CONVERSIONS[name](value))) for value in WRONG.values()]
    assert [(value, error) for value, error in errors if error and not isinstance(error, QuantizationError)] == []


SIMPLE = {
    "int": int,
    "bool": bool,
    "str": str,
    "torch.dtype": torch.dtype,
    "Tensor": torch.Tensor,
    "GraphModule": object,
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.rpartition(".")[2] not in READ_LATER])
def test_what_is_of_no_kind_is_refused_by_every_argument_of_a_simple_kind(name):
    """An object() is no number, text, dtype, tensor or graph, whatever else it may stand for."""
    function = FUNCTIONS[name]
    base, taken = base_of(name, function), []
    for parameter in inspect.signature(function).parameters.values():
        if str(parameter.annotation).removesuffix(" | None") not in SIMPLE:
            continue
        try:
            function(**{**base, parameter.name: object()})
        except QuantizationError:
            continue
        taken.append(parameter.name)
    assert taken == []


# Lowering: slow, since good values compile ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lower", [lower_to_executorch, lower_to_inductor, lower_to_onnx])
def test_lowering_refuses_forty_wrong_values_of_each_argument(lower):
    assert untyped(lower.__name__, functools.partial(lower, model=converted()), list(WRONG.values())) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["executorch", "inductor"])
def test_programs_refuse_forty_wrong_values(backend):
    if backend == "executorch":
        program: Any = lower_to_executorch(converted())
    else:
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
        ready = prepare_pt2e(exported(), quantizer)
        ready(torch.rand(2, 4))
        program = lower_to_inductor(convert_pt2e(ready))
    problems = [
        f"run({value!r:.30}): {type(error).__name__}"
        for value in WRONG.values()
        if (error := raised(lambda value=value: program.run(value))) and not isinstance(error, QuantizationError)
    ]
    for name in ("verify", "save", "fate"):
        problems += untyped(name, getattr(program, name), list(WRONG.values()))
    assert problems == []


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return error
    return None
