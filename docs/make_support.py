"""Makes docs/support.md: which operator each backend runs in integers, under which recipe; and the reason where not.

    python -m docs.make_support

Nothing is written down by hand: each operator below is quantized alone, between two others where it needs neighbours,
and the table says what the quantizer did with it. The other operators are those that a quantizer has a reason for; the
limits are those that rules and contract ask. A test makes the page anew and compares.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import explain, prepare_pt2e
from pt2e_quant.lowering.executorch.xnnpack import limits as xnnpack
from pt2e_quant.lowering.inductor import limits as inductor
from pt2e_quant.quantizer import RuleQuantizer
from quantizers.arm_inductor import ArmInductorQuantizer, get_default_arm_inductor_quantization_config
from quantizers.onnx_runtime import (
    OnnxRuntimeQuantizer,
    get_onnx_runtime_quantization_config,
    get_onnx_runtime_weight_only_config,
)
from quantizers.x86_inductor import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
    get_x86_inductor_int4_weight_only_quantization_config,
    get_x86_inductor_linear_dynamic_fp16_config,
    get_x86_inductor_weight_only_quantization_config,
)
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.xpu_inductor import XPUInductorQuantizer, get_default_xpu_inductor_quantization_config

FILE = Path(__file__).with_name("support.md")
IMAGE, ROWS, SIGNAL = (1, 4, 8, 8), (2, 3, 12), (1, 4, 9)


@dataclass(frozen=True)
class Probe:
    """A model around one operator: `function(net, x)`, the shape of x, and whether x counts tokens."""

    function: Callable[[Any, Tensor], Tensor]
    shape: tuple[int, ...]
    tokens: bool = False


class Net(nn.Module):
    """Everything that a probe may call; `last` reads integers after the operator in question."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.probe = probe
        self.conv, self.other, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.conv1d, self.up1d, self.conv3d = nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3), nn.Conv3d(4, 4, 2)
        self.up, self.depthwise = nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 3, groups=4)
        self.linear, self.after = nn.Linear(12, 16), nn.Linear(16, 12)
        self.table, self.matrix = nn.Embedding(9, 12), nn.Parameter(torch.randn(12, 16))
        self.bags = nn.EmbeddingBag(9, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.probe.function(self, x)


def image(function: Callable[[Tensor], Tensor]) -> Probe:
    """The operator between two convolutions."""
    return Probe(lambda n, x: n.last(function(n.conv(x))), IMAGE)


def flat(function: Callable[[Tensor], Tensor]) -> Probe:
    """The operator after a convolution, before a linear."""
    return Probe(lambda n, x: F.linear(function(n.conv(x)), n.linear.weight), (1, 4, 3, 12))


# The operator in question is the one of this name in the graph, the last of them where there are several.
PROBES: dict[str, Probe] = {
    "conv1d": Probe(lambda n, x: n.conv1d(x), SIGNAL),
    "conv2d": Probe(lambda n, x: n.conv(x), IMAGE),
    "conv2d, depthwise": Probe(lambda n, x: n.depthwise(x), IMAGE),
    "conv3d": Probe(lambda n, x: n.conv3d(x), (1, 4, 4, 4, 4)),
    "conv_transpose1d": Probe(lambda n, x: n.up1d(x), SIGNAL),
    "conv_transpose2d": Probe(lambda n, x: n.up(x), IMAGE),
    "relu after conv_transpose2d": Probe(lambda n, x: F.relu(n.up(x)), IMAGE),
    "relu after uneven pad and conv2d": Probe(lambda n, x: F.relu(n.conv(F.pad(x, (1, 0, 1, 0)))), IMAGE),
    "conv2d after uneven pad": Probe(lambda n, x: n.conv(F.pad(x, (1, 0, 1, 0))), IMAGE),
    "relu after conv2d": Probe(lambda n, x: F.relu(n.conv(x)), IMAGE),
    "hardtanh after conv2d": Probe(lambda n, x: F.hardtanh(n.conv(x), 0.0, 6.0), IMAGE),
    "hardswish after conv2d": Probe(lambda n, x: F.hardswish(n.conv(x)), IMAGE),
    "silu after conv2d": Probe(lambda n, x: F.silu(n.conv(x)), IMAGE),
    "sigmoid after conv2d": Probe(lambda n, x: torch.sigmoid(n.conv(x)), IMAGE),
    "add of conv2d": Probe(lambda n, x: n.last(n.conv(x) + n.other(x)), IMAGE),
    "relu after add of conv2d": Probe(lambda n, x: n.last(F.relu(n.conv(x) + n.other(x))), IMAGE),
    "linear": Probe(lambda n, x: n.linear(x), ROWS),
    "linear, from addmm": Probe(lambda n, x: torch.addmm(n.linear.bias, x, n.matrix), (3, 12)),
    "relu after linear": Probe(lambda n, x: F.relu(n.linear(x)), ROWS),
    "gelu after linear": Probe(lambda n, x: n.after(F.gelu(n.linear(x))), ROWS),
    "add of linear": Probe(lambda n, x: n.after(n.linear(x)) + x, ROWS),
    "relu after add of linear": Probe(lambda n, x: F.relu(n.after(n.linear(x)) + x), ROWS),
    "matmul": Probe(lambda n, x: n.linear(x) @ n.linear(x).transpose(1, 2), ROWS),
    "embedding": Probe(lambda n, x: n.linear(n.table(x)), (2, 3), tokens=True),
    "embedding_bag": Probe(lambda n, x: n.linear(n.bags(x)), (2, 3), tokens=True),
    "add": Probe(lambda n, x: n.last(torch.tanh(x) + x), IMAGE),
    "sub": Probe(lambda n, x: n.last(torch.tanh(x) - x), IMAGE),
    "mul": Probe(lambda n, x: n.last(torch.tanh(x) * x), IMAGE),
    "cat": Probe(lambda n, x: n.last(torch.cat([n.conv(x), n.other(x)], 2)), IMAGE),
    "max_pool2d": image(lambda x: F.max_pool2d(x, 2)),
    "avg_pool2d": image(lambda x: F.avg_pool2d(x, 2)),
    "adaptive_avg_pool2d": image(lambda x: F.adaptive_avg_pool2d(x, 1)),
    "mean over height and width": image(lambda x: x.mean((2, 3), True)),
    "relu": image(lambda x: F.relu(F.max_pool2d(x, 2))),
    "clamp": image(lambda x: F.max_pool2d(x, 2).clamp(max=1.0)),
    "view": flat(lambda x: x.view(4, 3, 12)),
    "flatten": flat(lambda x: x.flatten(1, 2)),
    "permute": image(lambda x: x.permute(0, 1, 3, 2)),
    "slice": image(lambda x: x[:, :, 1:]),
    "unsqueeze": flat(lambda x: x.unsqueeze(0)),
    "pad": image(lambda x: F.pad(x, (0, 1, 0, 1))),
    "pixel_shuffle": flat(lambda x: F.pixel_shuffle(F.pixel_unshuffle(x[:, :, :2], 2), 2)),
    "dropout": image(lambda x: F.dropout(x, 0.3, False)),
    "softmax": Probe(lambda n, x: n.linear(torch.softmax(x, -1)), ROWS),
    "layer_norm": Probe(lambda n, x: n.linear(F.layer_norm(x, (12,))), ROWS),
    "scaled_dot_product_attention": Probe(lambda n, x: n.linear(F.scaled_dot_product_attention(x, x, x)), ROWS),
}
IN_GRAPH = {"mean over height and width": "mean", "linear, from addmm": "linear", "conv2d, depthwise": "conv2d"}


def backends() -> dict[str, tuple[type[RuleQuantizer], dict[str, Any]]]:
    """Quantizer and configurations of each backend, by the names in the table."""
    symmetric, x86 = get_symmetric_quantization_config, get_default_x86_inductor_quantization_config
    arm, onnx = get_default_arm_inductor_quantization_config, get_onnx_runtime_quantization_config
    return {
        "XNNPACK": (
            XNNPACKQuantizer,
            {
                "static": symmetric(is_per_channel=True),
                "static per tensor": symmetric(),
                "dynamic": symmetric(is_per_channel=True, is_dynamic=True),
            },
        ),
        "x86": (
            X86InductorQuantizer,
            {
                "static": x86(),
                "dynamic": x86(is_dynamic=True),
                "weight only": get_x86_inductor_weight_only_quantization_config(),
                "weight only, 4 bits": get_x86_inductor_int4_weight_only_quantization_config(32),
                "fp16": get_x86_inductor_linear_dynamic_fp16_config(),
            },
        ),
        "ONNX": (
            OnnxRuntimeQuantizer,
            {
                "static": onnx(),
                "dynamic": onnx(is_dynamic=True),
                "weight only": get_onnx_runtime_weight_only_config(8),
            },
        ),
        "Arm": (ArmInductorQuantizer, {"static": arm(), "dynamic": arm(is_dynamic=True)}),
        "XPU": (XPUInductorQuantizer, {"static": get_default_xpu_inductor_quantization_config()}),
    }


@dataclass(frozen=True)
class Cell:
    rule: str | None
    reason: str | None


@functools.cache
def cells() -> dict[str, dict[tuple[str, str], Cell]]:
    """For each probe, what each backend and recipe did with its operator."""
    return dict(_probed())


def _probed() -> Iterator[tuple[str, dict[tuple[str, str], Cell]]]:
    for name, probe in PROBES.items():
        x = torch.randint(0, 9, probe.shape) if probe.tokens else torch.randn(probe.shape)
        exported = torch.export.export(Net(probe).eval(), (x,)).module()
        found = {}
        for backend, (quantizer, recipes) in backends().items():
            for recipe, config in recipes.items():
                report = explain(prepare_pt2e(exported, quantizer().set_global(config), allow_empty=True))
                wanted = _in_graph(name)
                of_name = [d for d in report.record.decisions if d.op.split(".")[1].rstrip("_") == wanted]
                decision = of_name[-1] if of_name else None
                found[backend, recipe] = Cell(
                    decision.rule if decision and decision.quantized else None,
                    decision.reason if decision else "it is not in the graph that the quantizer sees",
                )
        yield name, found


def others() -> dict[str, dict[str, str | None]]:
    """Operators without a probe, by name: why each backend leaves them in float, None where it has a rule for them.

    What a reason of one backend says nothing of, it has a rule or no rule for; `_copy` twins share the row of the op.
    """
    probed = {_in_graph(name) for name in PROBES}
    reasons: dict[str, dict[str, str]] = defaultdict(dict)
    rules: dict[str, set[str]] = {}
    for backend, (quantizer, _) in backends().items():
        rules[backend] = {_name(op) for rule in quantizer.rules for op in rule.pattern.root.op.targets}
        for op, reason in quantizer.reasons.items():
            reasons[_name(op)].setdefault(backend, reason)
    return {
        name: {
            backend: None if name in rules[backend] else reasons[name].get(backend, "no rule for it")
            for backend in rules
        }
        for name in sorted(reasons)
        if name not in probed and not name.endswith("_copy")
    }


def _in_graph(name: str) -> str:
    return IN_GRAPH.get(name, name.split(" ")[0])


def _name(op: Any) -> str:
    return str(op).split(".")[1].rstrip("_")


def kernels(limits: Mapping[str, Iterable[Callable[..., object]]]) -> Iterator[str]:
    """What each kernel of a backend takes, in the words of its limits."""
    for name, asked in limits.items():
        said = " ".join(str(limit.__doc__).partition("\n")[0] for limit in asked)
        yield f"- {name}: {said or 'any.'}"


def markdown() -> str:
    """The whole file."""
    columns = [(backend, recipe) for backend, (_, recipes) in backends().items() for recipe in recipes]
    reasons: dict[str, int] = {}
    lines = [
        "# What runs in integers",
        "",
        "Made by `python -m docs.make_support` from what the quantizers do with each operator; do not edit.",
        "`x`: quantized, and the backend has a kernel for it. A number: in floating point, for the reason below.",
        "The tests run XNNPACK, x86 and ONNX, in onnxruntime. Arm and XPU (Intel GPUs) are as Inductor's sources say;",
        "nothing ran there.",
        "",
        "| operator | " + " | ".join(f"{backend}: {recipe}" for backend, recipe in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, found in cells().items():
        marks = []
        for column in columns:
            cell = found[column]
            why = cell.reason or ""
            marks.append("x" if cell.rule else f"{reasons.setdefault(why, len(reasons) + 1)}")
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    names = list(backends())
    lines += ["", "Other operators that a quantizer has something to say of:", ""]
    lines += ["| operator | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, said in others().items():
        marks = ["x" if why is None else f"{reasons.setdefault(why, len(reasons) + 1)}" for why in said.values()]
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    lines += ["", "Reasons:", "", *(f"{number}. {reason}" for reason, number in reasons.items())]
    for_xnnpack = {kernel.name: kernel.limits for kernel in xnnpack.KERNELS}
    lines += ["", "## What XNNPACK's integer kernels take", "", *kernels(for_xnnpack)]
    lines += ["", "## What Inductor's integer kernels take", "", *kernels(inductor.LIMITS), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(markdown())
