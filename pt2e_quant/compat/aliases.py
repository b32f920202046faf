"""THE table of the reference's import roots: old module -> the module of this package that has its names.

After this: `finder` serves imports from it, and `pt2e-quant migrate` rewrites programs by it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from .. import quantization
from ..errors import LegacyImportError, did_you_mean

__all__ = ["ALIASES", "FUNCTIONS", "ROOTS", "home_of", "is_legacy", "missing", "new_module"]

ROOTS = (
    "torch.ao", "torch.quantization",
    *(f"torch.nn.{room}" for room in ("intrinsic", "qat", "quantizable", "quantized")),
)  # fmt: skip
"""All that the reference has is below one of these. torch imports them itself, and so do other libraries."""

FUNCTIONS = ("dequantize", "quantize_per_channel", "quantize_per_tensor")
"""Of torch, and of pt2e_quant; they go with torch's quantized types."""

_QUANTIZATION = {
    "": "quantization",
    **dict.fromkeys(("fuse_modules", "qconfig", "quantize"), "quantization"),  # they have names of several modules
    **dict.fromkeys(("fuser_method_mappings", "quantization_mappings", "quant_type"), "eager.helpers"),
    "stubs": "eager",
    **{name: name for name in ("observer", "fake_quantize", "qconfig_mapping", "quantize_pt2e")},
    **{name: name for name in ("quantizer", "pt2e", "pt2e.representation", "quantize_fx", "fx", "backend_config")},
    "fx.custom_config": "fx.custom_config",
    **dict.fromkeys(("backend_config.backend_config", "backend_config.native"), "backend_config"),
    **dict.fromkeys(("quantizer.quantizer", "quantizer.composable_quantizer"), "quantizer"),
    **dict.fromkeys(("pt2e.generate_numeric_debug_handle", "pt2e._numeric_debugger"), "pt2e.numeric_debugger"),
}
"""Below torch.ao.quantization and torch.quantization -> below pt2e_quant."""

_BACKENDS = {
    "xnnpack_quantizer": "quantizers.xnnpack",
    "x86_inductor_quantizer": "quantizers.x86_inductor",
    "xpu_inductor_quantizer": "quantizers.xpu_inductor",
    "embedding_quantizer": "quantizers.embedding",
}
"""Below torch.ao.quantization.quantizer. Names only: the framework does not import a backend before a program does."""

_FILES = {
    "intrinsic": (),
    "intrinsic.modules": ("fused",),
    "intrinsic.qat": (),
    "intrinsic.qat.modules": ("conv_fused", "linear_fused", "linear_relu"),
    "intrinsic.quantized": (),
    "intrinsic.quantized.modules": ("bn_relu", "conv_add", "conv_relu", "linear_relu"),
    "intrinsic.quantized.dynamic": (),
    "intrinsic.quantized.dynamic.modules": ("linear_relu",),
    "qat": (),
    "qat.modules": ("conv", "embedding_ops", "linear"),
    "qat.dynamic": (),
    "qat.dynamic.modules": ("linear",),
    "quantizable": (),
    "quantizable.modules": ("activation", "rnn"),
    "quantized": (),
    "quantized.functional": (),
    "quantized.modules": (
        "activation", "batchnorm", "conv", "dropout", "embedding_ops", "functional_modules", "linear", "normalization",
        "rnn", "utils",
    ),
    "quantized.dynamic": (),
    "quantized.dynamic.modules": ("conv", "linear", "rnn"),
    "quantized.reference": (),
    "quantized.reference.modules": ("conv", "linear", "rnn", "sparse", "utils"),
}  # fmt: skip
"""Below torch.ao.nn and torch.nn -> the reference's files in it, which pickles name."""

_AT_HOME_IN = {f"{room}.modules": room for room in ("intrinsic", "intrinsic.qat", "qat", "qat.dynamic")}
"""Below pt2e_quant.nn, where that is not the same."""


def _aliases() -> dict[str, str | None]:
    made: dict[str, str | None] = {"torch.ao": None, "torch.ao.nn": "pt2e_quant.nn"}
    for old, new in _QUANTIZATION.items():
        for root in ("torch.ao.quantization", "torch.quantization"):
            made[f"{root}.{old}".rstrip(".")] = f"pt2e_quant.{new}"
    made |= {f"torch.ao.quantization.quantizer.{old}": new for old, new in _BACKENDS.items()}
    for room, files in _FILES.items():
        for root in ("torch.ao.nn", "torch.nn"):
            old = f"{root}.{room}".replace("torch.nn.quantized.reference", "torch.nn.quantized._reference")
            new = f"pt2e_quant.nn.{_AT_HOME_IN.get(room, room)}"
            made |= dict.fromkeys((old, *(f"{old}.{file}" for file in files)), new)
    return made


ALIASES: dict[str, str | None] = _aliases()
"""Old module -> the module that has its names; None for one that has no names, only modules below it."""


def is_legacy(module: str) -> bool:
    """Whether a module is one of the old roots or below one."""
    return any(module == root or module.startswith(f"{root}.") for root in ROOTS)


def new_module(module: str) -> ModuleType | None:
    """The module of this package behind an old one."""
    name = ALIASES[module]
    return None if name is None else importlib.import_module(name)


def home_of(module: str, name: str) -> str | None:
    """The module of this package to import a name of an old module (or of torch) from; None for a name we lack."""
    if module == "torch":
        return "pt2e_quant" if name in FUNCTIONS else None
    ours = new_module(module)
    if ours is None or isinstance(getattr(ours, name, None), ModuleType) or not hasattr(ours, name):
        return None
    return quantization.find_home(name) if ours is quantization else ours.__name__


def missing(name: str) -> LegacyImportError:
    """What to raise for a name, or a module, below the old roots that this package has not."""
    module, _, last = name.rpartition(".")
    ours = new_module(module) if module in ALIASES else None
    known = [*_modules_below(module), *getattr(ours, "__all__", ())]
    return LegacyImportError(f"pt2e_quant has nothing in the place of {name}.{did_you_mean(last, known)}")


def _modules_below(module: str) -> list[str]:
    """The last parts of the old modules directly below one."""
    depth = module.count(".") + 1
    return [name.rpartition(".")[2] for name in ALIASES if name.startswith(f"{module}.") and name.count(".") == depth]
