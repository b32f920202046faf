"""The quantizers of other packages that this engine runs as they are: how to build each, and what it needs.

Each import stands inside a function: a package that is absent, or that takes seconds to load, concerns one entry only.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram

__all__ = ["QUANTIZERS", "Entry", "missing"]

_TORCHAO = "torchao.quantization.pt2e.quantizer"
_BACKENDS = "executorch.backends"


@dataclass(frozen=True)
class Entry:
    """make: builds the quantizer; module: where its class is; needs: packages beyond those of the test environment.

    strict, trace: how its package exports a model: with a record of source functions, with decompositions.
    models: those of foreign_models.py that it gets; slow: those that take seconds.
    quantizes: False for quantizers that are made to leave all in float.
    """

    make: Callable[[], Any]
    module: str
    needs: tuple[str, ...] = ()
    strict: bool = False
    trace: Callable[[ExportedProgram, Any], ExportedProgram] | None = None
    models: tuple[str, ...] = ("cnn", "mlp", "words", "attention")
    slow: tuple[str, ...] = ()
    quantizes: bool = True


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _get(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# --- torchao ----------------------------------------------------------------------------------------------------------


def _inductor(kind: str, **options: Any) -> Any:
    """X86InductorQuantizer and its two relatives, with the default configuration of each."""
    module = importlib.import_module(f"{_TORCHAO}.{kind}_inductor_quantizer")
    names = {"x86": "X86", "arm": "Arm", "xpu": "XPU"}
    config = getattr(module, f"get_default_{kind}_inductor_quantization_config")(**options)
    return getattr(module, f"{names[kind]}InductorQuantizer")().set_global(config)


def _embedding() -> Any:
    return _get(f"{_TORCHAO}.embedding_quantizer", "EmbeddingQuantizer")()


def _composed() -> Any:
    linear = _xnnpack("torchao.testing.pt2e._xnnpack_quantizer", is_per_channel=True)
    return _get(f"{_TORCHAO}.composable_quantizer", "ComposableQuantizer")([_embedding(), linear])


# --- executorch -------------------------------------------------------------------------------------------------------


def _xnnpack(module: str, **options: Any) -> Any:
    """Without its patterns with batch norm, which serve training and take seconds to trace."""
    made = importlib.import_module(module)
    quantizer = made.XNNPACKQuantizer().set_global(made.get_symmetric_quantization_config(**options))
    if hasattr(quantizer, "SUPPORTED_PATTERNS"):
        quantizer.SUPPORTED_PATTERNS = [one for one in quantizer.SUPPORTED_PATTERNS if "_bn" not in one.name]
    return quantizer


def _vulkan(**options: Any) -> Any:
    module = importlib.import_module(f"{_BACKENDS}.vulkan.quantizer.vulkan_quantizer")
    return module.VulkanQuantizer().set_global(module.get_symmetric_quantization_config(**options))


def _qnn(precision: str, blocks: dict[str, tuple[int, ...]] | None = None, **options: Any) -> Any:
    """Qualcomm's, kept from fetching a toolkit and, on some hosts, from disabling oneDNN for the whole process."""
    setup = importlib.import_module(f"{_BACKENDS}.qualcomm.utils.qnn_sdk_setup")
    module = importlib.import_module(f"{_BACKENDS}.qualcomm.quantizer.quantizer")
    with mock.patch.object(setup, "setup_qnn_sdk"), mock.patch.object(module, "disable_mkldnn_on_amd"):
        quantizer = module.QnnQuantizer()
    quantizer.set_default_quant_config(module.QuantDtype[precision], **options)
    quantizer.set_block_size_map(blocks or {})
    return quantizer


_PER_CHANNEL = {"is_conv_per_channel": True, "is_linear_per_channel": True, "is_embedding_per_channel": True}


def _enn(**options: Any) -> Any:
    module = importlib.import_module(f"{_BACKENDS}.samsung.quantizer")
    quantizer = module.EnnQuantizer()
    quantizer.setup_quant_params(module.Precision.A8W8, **options)
    return quantizer


def _cadence(name: str) -> Any:
    return _get(f"{_BACKENDS}.cadence.aot.quantizer.quantizer", name)()


def _cadence_trace(program: ExportedProgram, quantizer: Any) -> ExportedProgram:
    """As its compiler does: decomposed, but for the ops of its patterns."""
    remove = _get("torch._inductor.decomposition", "remove_decompositions")
    table = torch.export.default_decompositions()
    remove(table, quantizer.get_ops_to_preserve_from_decomposition())
    return program.run_decompositions(table)


def _coreml(**options: Any) -> Any:
    """With the patterns that the models here have: it exports each, hundreds in all, which takes two minutes."""
    utils = importlib.import_module(f"{_BACKENDS}.apple.coreml.quantizer._coreml_quantizer_utils")
    utils._supported_activations, utils._supported_activations_no_inplace = (torch.nn.functional.relu,), ()
    for name in ("get_conv_pattern", "get_linear_pattern", "get_binary_op_act_pattern"):
        if not hasattr(getattr(utils, name), "__wrapped__"):
            setattr(utils, name, _made_once(getattr(utils, name)))
    config = _get("coremltools.optimize.torch.quantization", "LinearQuantizerConfig")
    module = importlib.import_module(f"{_BACKENDS}.apple.coreml.quantizer._coreml_quantizer")
    for name in [name for name in module._AnnotationPatternRegistry.REGISTRY if "_bn" in name]:
        del module._AnnotationPatternRegistry.REGISTRY[name]  # folded before it is asked
    return module.CoreMLQuantizer(config.from_dict({"global_config": options}))


def _made_once(pattern: Callable[..., Any]) -> Callable[..., Any]:
    """Copies of a pattern that is exported once, for matching changes it."""
    known = functools.cache(pattern)
    return functools.wraps(pattern)(lambda *args, **keywords: copy.deepcopy(known(*args, **keywords)))


def _arm(name: str, *spec: str) -> Any:
    module = importlib.import_module(f"{_BACKENDS}.arm.quantizer")
    made = {
        "TOSAQuantizer": lambda text: _get(f"{_BACKENDS}.arm.tosa", "TosaSpecification").create_from_string(text),
        "EthosUQuantizer": lambda text: _get(f"{_BACKENDS}.arm.ethosu", "EthosUCompileSpec")(text),
        "VgfQuantizer": lambda: _get(f"{_BACKENDS}.arm.vgf", "VgfCompileSpec")(),
    }
    return getattr(module, name)(made[name](*spec)).set_global(module.get_symmetric_quantization_config())


def _openvino(mode: str) -> Any:
    module = importlib.import_module(f"{_BACKENDS}.openvino.quantizer.quantizer")
    return module.OpenVINOQuantizer(mode=module.QuantizationMode[mode])


# --- the table --------------------------------------------------------------------------------------------------------

_TOSA = ("tosa_serializer",)  # of tosa-tools, which the Makefile installs where it has a build
_CADENCE = {
    "CadenceDefaultQuantizer": ("cnn", "mlp", "words"),
    "CadenceWakeWordQuantizer": ("cnn",),
    "CadenceFusedConvReluQuantizer": ("cnn",),
    "CadenceWithLayerNormQuantizer": ("attention",),
    "CadenceWithSoftmaxQuantizer": ("attention",),
    "CadenceW8A32MixedQuantizer": ("words",),
    "CadenceWith16BitLinearActivationsQuantizer": ("mlp", "cnn"),
    "CadenceWith16BitConvActivationsQuantizer": ("cnn",),
    "CadenceWith16BitMatmulActivationsQuantizer": ("attention",),
    "CadenceNopQuantizer": ("mlp",),
    "CadenceRmsNormNopQuantizer": ("mlp",),
}

QUANTIZERS: dict[str, Entry] = {
    **{
        f"{kind} inductor{', dynamic' if dynamic else ''}": Entry(
            functools.partial(_inductor, kind, **{"is_dynamic": True} if dynamic else {}),
            f"{_TORCHAO}.{kind}_inductor_quantizer",
        )
        for kind, dynamic in (("x86", False), ("x86", True), ("arm", False), ("arm", True), ("xpu", False))
    },
    "embedding": Entry(_embedding, f"{_TORCHAO}.embedding_quantizer", models=("words",)),
    "composable": Entry(_composed, f"{_TORCHAO}.composable_quantizer"),
    "torchao xnnpack": Entry(
        lambda: _xnnpack("torchao.testing.pt2e._xnnpack_quantizer"), "torchao.testing.pt2e._xnnpack_quantizer"
    ),
    **{
        f"xnnpack, {name}": Entry(
            functools.partial(_xnnpack, f"{_BACKENDS}.xnnpack.quantizer.xnnpack_quantizer", **options),
            f"{_BACKENDS}.xnnpack.quantizer.xnnpack_quantizer",
        )
        for name, options in {
            "per tensor": {},
            "per channel": {"is_per_channel": True},
            "dynamic": {"is_per_channel": True, "is_dynamic": True},
        }.items()
    },
    **{
        f"vulkan, {name}": Entry(
            functools.partial(_vulkan, **options), f"{_BACKENDS}.vulkan.quantizer.vulkan_quantizer"
        )
        for name, options in {
            "weights": {},
            "dynamic": {"is_dynamic": True},
            "dynamic, 4-bit weights": {"is_dynamic": True, "weight_bits": 4},
        }.items()
    },
    **{
        f"qnn, {name}": Entry(functools.partial(_qnn, **options), f"{_BACKENDS}.qualcomm.quantizer.quantizer")
        for name, options in {
            "8a8w": {"precision": "use_8a8w"},
            "8a8w, per channel": {"precision": "use_8a8w", **_PER_CHANNEL},
            "16a8w": {"precision": "use_16a8w"},
            "16a16w": {"precision": "use_16a16w"},
            "16a4w, per channel": {"precision": "use_16a4w", **_PER_CHANNEL},
        }.items()
    },
    "qnn, per block": Entry(
        lambda: _qnn("use_16a4w_block", {"linear": (1, 5)}),
        f"{_BACKENDS}.qualcomm.quantizer.quantizer",
        models=("mlp",),
    ),
    "enn, per channel": Entry(lambda: _enn(is_per_channel=True), f"{_BACKENDS}.samsung.quantizer.quantizer"),
    "enn, per tensor": Entry(lambda: _enn(is_per_channel=False), f"{_BACKENDS}.samsung.quantizer.quantizer"),
    "example": Entry(
        lambda: _get(f"{_BACKENDS}.example.example_quantizer", "ExampleQuantizer")(),
        f"{_BACKENDS}.example.example_quantizer",
        strict=True,
    ),
    **{
        name: Entry(
            functools.partial(_cadence, name),
            f"{_BACKENDS}.cadence.aot.quantizer.quantizer",
            strict=True,
            trace=_cadence_trace,
            models=models,
            slow=models[1:],
            quantizes="Nop" not in name,
        )
        for name, models in _CADENCE.items()
    },
    **{
        f"coreml, {name}": Entry(
            functools.partial(_coreml, **options),
            f"{_BACKENDS}.apple.coreml.quantizer._coreml_quantizer",
            needs=("coremltools",),
            strict=True,
            models=("cnn", "mlp"),
        )
        for name, options in {
            "symmetric": {"quantization_scheme": "symmetric"},
            "affine": {"quantization_scheme": "affine", "weight_per_channel": False},
            "weights": {"quantization_scheme": "symmetric", "activation_dtype": "float32"},
        }.items()
    },
    "tosa": Entry(
        lambda: _arm("TOSAQuantizer", "TOSA-1.0+INT"),
        f"{_BACKENDS}.arm.quantizer.arm_quantizer",
        _TOSA,
        slow=("attention",),
    ),
    "ethos-u": Entry(
        lambda: _arm("EthosUQuantizer", "ethos-u55-128"),
        f"{_BACKENDS}.arm.quantizer.arm_quantizer",
        _TOSA,
        slow=("attention",),
    ),
    "vgf": Entry(lambda: _arm("VgfQuantizer"), f"{_BACKENDS}.arm.quantizer.arm_quantizer", _TOSA, slow=("attention",)),
    "cortex-m": Entry(
        lambda: _get(f"{_BACKENDS}.cortex_m.quantizer.quantizer", "CortexMQuantizer")(),
        f"{_BACKENDS}.cortex_m.quantizer.quantizer",
        _TOSA,
    ),
    **{
        f"openvino, {mode.lower()}": Entry(
            functools.partial(_openvino, mode), f"{_BACKENDS}.openvino.quantizer.quantizer", models=models
        )
        for mode, models in {
            "INT8_SYM": ("cnn", "mlp", "words"),
            "INT8_MIXED": ("cnn", "mlp", "words"),
            "INT8_TRANSFORMER": ("attention",),
            "INT8WO_SYM": ("cnn", "mlp", "words"),
            "INT8WO_ASYM": ("cnn", "mlp", "words"),
            "INT4WO_SYM": ("cnn", "words"),  # its groups of 128 do not fit the 10 channels of the others
            "INT4WO_ASYM": ("cnn", "words"),
        }.items()
    },
}
