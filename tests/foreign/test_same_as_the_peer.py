"""Quantizers of other packages run through this engine as they are, and come out as torchao's own prepare and convert.

Each gets the same export and the same data through both engines; what differs stands in the tables below, with the
reason. Two things differ in form only and are evened out first, where FORMS says that they occur.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._ops import OpOverloadPacket
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import QuantizationError
from tests.foreign.foreign_models import exported
from tests.foreign.foreign_quantizers import QUANTIZERS, missing
from tests.nets import ConvNet, export
from tests.peer.canonical import differences

pytest.importorskip("torchao")

ZERO_POINTS = (
    "zero points per channel are int64 here, whatever the observer said: ExecuTorch's kernels read nothing else"
)
PACKETS = "ops are named with their overload here, as in every exported graph; torchao's observers leave it out"

FORMS = {
    "qnn, 8a8w, per channel": {ZERO_POINTS},
    "qnn, 16a4w, per channel": {ZERO_POINTS},
    "qnn, per block": {ZERO_POINTS, PACKETS},
    "tosa": {ZERO_POINTS},
    "ethos-u": {ZERO_POINTS},
    "vgf": {ZERO_POINTS},
}


@dataclass(frozen=True)
class Difference:
    """What differs on purpose, as 'site: ours / theirs', for some quantizers on one model."""

    quantizers: tuple[str, ...]
    model: str
    reason: str
    lines: tuple[str, ...]


DYNAMIC = ("x86 inductor, dynamic", "arm inductor, dynamic", "xnnpack, dynamic", "vulkan, dynamic")

DIFFERENCES = (
    Difference(
        (*DYNAMIC, "vulkan, dynamic, 4-bit weights"),
        "attention",
        "each linear reads a dequantize of its own, with run-time qparams as with fixed ones",
        ("dequantize_per_tensor.tensor: 3 / 1 times",),
    ),
    Difference(
        ("tosa", "ethos-u", "vgf"),
        "attention",
        "a parameter is stored as it is read, after the reshape that the quantizer put there",
        (
            "add.Tensor#1[1]: int8 per tensor of a constant / int8 per tensor of reshape.default#5",
            "mul.Tensor#5[1]: int8 per tensor of a constant / int8 per tensor of reshape.default#4",
            "reshape.default#4[0]: absent / int8 per tensor of a constant",
            "reshape.default#5[0]: absent / int8 per tensor of a constant",
        ),
    ),
    Difference(
        ("CadenceWith16BitLinearActivationsQuantizer",),
        "cnn",
        "batch norm is folded into every kind of convolution; torchao leaves it after aten.convolution",
        (
            "<built-in function getitem>#0[0]: float of max_pool2d_with_indices.default#0 "
            "/ float of _native_batch_norm_legit_no_training.default#0",
            "<built-in function getitem>#1[0]: absent / float of _native_batch_norm_legit_no_training.default#1",
            "<built-in function getitem>#2[0]: absent / float of max_pool2d_with_indices.default#0",
            *(
                f"_native_batch_norm_legit_no_training.default#{n}[{i}]: absent / float of "
                + (f"convolution.default#{n}" if i == 0 else "a constant")
                for n in range(2)
                for i in range(5)
            ),
            "convolution.default#0[1]: float of a constant, other values",
            "convolution.default#0[2]: float of a constant / absent",
            "convolution.default#1[1]: float of a constant, other values",
            "convolution.default#1[2]: float of a constant, other values",
            "hardtanh.default#0[0]: float of convolution.default#1 / float of <built-in function getitem>#1",
            "mean.dim#0[0]: float of <built-in function getitem>#0 / float of <built-in function getitem>#2",
            "relu.default#0[0]: float of convolution.default#0 / float of <built-in function getitem>#0",
        ),
    ),
)

EXPECTED = {(name, entry.model): entry.lines for entry in DIFFERENCES for name in entry.quantizers}


def is_quick(name: str, model: str) -> bool:
    """The first and the last model of each quantizer, and where something differs: the rest is more of the same."""
    entry = QUANTIZERS[name]
    return model not in entry.slow and ((name, model) in EXPECTED or model in (entry.models[0], entry.models[-1]))


CASES = [
    pytest.param(name, model, marks=[] if is_quick(name, model) else [pytest.mark.slow])
    for name, entry in QUANTIZERS.items()
    for model in entry.models
]


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    """Foreign packages warn while they load, build and annotate. What this engine warns of stays an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torchao|executorch|coremltools|nncf|openvino)\.")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # of Arm's passes
        yield


def build(name: str) -> Any:
    entry = QUANTIZERS[name]
    if absent := missing(entry.needs):
        pytest.skip(f"{entry.module} needs {', '.join(absent)}")
    return entry.make()


def program_and_data(name: str, model: str, quantizer: Any) -> tuple[torch.export.ExportedProgram, Any]:
    entry = QUANTIZERS[name]
    program, data = exported(model, entry.strict)
    return (entry.trace(program, quantizer) if entry.trace else program), data


def ours(program: torch.export.ExportedProgram, data: Any, quantizer: Any) -> GraphModule:
    prepared = prepare_pt2e(program, quantizer, allow_empty=True)
    for batch in data:
        prepared(*batch)
    return convert_pt2e(prepared)


def theirs(program: torch.export.ExportedProgram, data: Any, quantizer: Any) -> GraphModule:
    """Without the guard of input shapes, which the passes of several packages refuse."""
    from torchao.quantization.pt2e import quantize_pt2e as peer

    with torch.no_grad():
        prepared = peer.prepare_pt2e(program.module(check_guards=False), quantizer)
        for batch in data:
            prepared(*batch)
        return peer.convert_pt2e(prepared)


def even_out(gm: GraphModule) -> set[str]:
    """Bring a graph of torchao to the forms of this engine; which ones it was not in."""
    found = set()
    for node in gm.graph.nodes:
        if isinstance(node.target, OpOverloadPacket):
            node.target = node.target.default
            found.add(PACKETS)
        if "quantize_per_channel" in str(node.target):
            name = str(node.args[2].target)
            zero_point = getattr(gm, name)
            if zero_point.dtype is torch.int32:
                setattr(gm, name, zero_point.to(torch.int64))
                found.add(ZERO_POINTS)
    return found


@pytest.mark.parametrize(("name", "model"), CASES)
def test_a_foreign_quantizer_gives_what_torchao_gives(name, model):
    quantizer = build(name)
    program, data = program_and_data(name, model, quantizer)
    one, other = ours(program, data, quantizer), theirs(program, data, QUANTIZERS[name].make())
    forms = even_out(other)
    assert differences(one, other) == sorted(EXPECTED.get((name, model), ()))
    assert forms == FORMS.get(name, set())
    torch.testing.assert_close(one(*data[0]), other(*data[0]))
    assert bool(explain(one).quantized) is QUANTIZERS[name].quantizes


def test_every_listed_difference_belongs_to_a_case():
    cases = {(name, model) for name, entry in QUANTIZERS.items() for model in entry.models}
    assert EXPECTED.keys() <= cases
    assert FORMS.keys() <= QUANTIZERS.keys()
    assert sum(len(entry.quantizers) for entry in DIFFERENCES) == len(EXPECTED)


def test_nearly_all_cases_are_equal():
    """So that the tables above cannot grow into the rule."""
    assert len(EXPECTED) <= 9 < 0.1 * len(CASES)


def test_what_a_quantizer_refuses_is_refused_in_its_own_words():
    """X86InductorQuantizer takes no convolution with padding='same', to both engines."""
    program = export(ConvNet(), torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match="is not an aten conv2d operator") as refused:
        theirs(program, (), build("x86 inductor"))
    with pytest.raises(QuantizationError, match=f"pass 'annotate' failed.*{refused.value}"):
        prepare_pt2e(program, build("x86 inductor"))
