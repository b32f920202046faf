"""Architectures of real size with random weights, built from transformers' configs, for benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

__all__ = [
    "MODELS", "BenchmarkModel", "Inverted", "bert", "chain", "mlp", "mobilenet_v2", "mobilenet_v3", "resnet18",
    "resnet50", "vit",
]  # fmt: skip


@dataclass(frozen=True)
class BenchmarkModel:
    """A model, an input, and whether its recipe is dynamic (no calibration) or static."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    dynamic: bool

    def export(self) -> ExportedProgram:
        with torch.no_grad():
            return torch.export.export(self.module, self.inputs)


class _Logits(nn.Module):
    """A transformers model with tensors in and one tensor out."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.model(*inputs), self.output)


def _randomize_batch_norm(module: nn.Module) -> nn.Module:
    """Statistics other than (0, 1), so that folding them is visible in the output."""
    generator = torch.Generator().manual_seed(7)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.running_mean.normal_(0, 0.2, generator=generator)
            child.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


def resnet18() -> BenchmarkModel:
    """11.7 M parameters, 224 x 224."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000
    )
    module = _Logits(_randomize_batch_norm(ResNetForImageClassification(config)), "logits").eval()
    return BenchmarkModel("resnet18", module, (torch.randn(1, 3, 224, 224),), dynamic=False)


def resnet50() -> BenchmarkModel:
    """25.6 M parameters, 224 x 224, bottleneck blocks."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    module = _Logits(_randomize_batch_norm(ResNetForImageClassification(ResNetConfig(num_labels=1000))), "logits")
    return BenchmarkModel("resnet50", module.eval(), (torch.randn(1, 3, 224, 224),), dynamic=False)


def mobilenet_v2() -> BenchmarkModel:
    """3.5 M parameters, 224 x 224."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    module = _Logits(
        _randomize_batch_norm(MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))), "logits"
    )
    return BenchmarkModel("mobilenet_v2", module.eval(), (torch.randn(1, 3, 224, 224),), dynamic=False)


class _Excite(nn.Module):
    """Squeeze and excitation, as in MobileNetV3: scale channels by a gate of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)
        self.relu, self.gate = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(self.relu(self.down(self.pool(x)))))


class Inverted(nn.Module):
    """Expand, depthwise convolution, squeeze and excitation, project; added to its input where shapes agree."""

    def __init__(self, into: int, wide: int, out: int, size: int, stride: int, excite: bool, hard: bool) -> None:
        super().__init__()
        act = nn.Hardswish if hard else nn.ReLU
        layers: list[nn.Module] = []
        if wide != into:
            layers += [nn.Conv2d(into, wide, 1, bias=False), nn.BatchNorm2d(wide, eps=1e-3), act()]
        layers += [
            nn.Conv2d(wide, wide, size, stride, size // 2, groups=wide, bias=False), nn.BatchNorm2d(wide, eps=1e-3),
            act(),
        ]  # fmt: skip
        layers += [_Excite(wide)] if excite else []
        layers += [nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out, eps=1e-3)]
        self.layers, self.adds = nn.Sequential(*layers), stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet_v3() -> BenchmarkModel:
    """5.5 M parameters in the shape of MobileNetV3-Large, 224 x 224."""
    torch.manual_seed(0)
    rows = [
        (16, 16, 16, 3, 1, False, False), (16, 64, 24, 3, 2, False, False), (24, 72, 24, 3, 1, False, False),
        (24, 72, 40, 5, 2, True, False), (40, 120, 40, 5, 1, True, False), (40, 120, 40, 5, 1, True, False),
        (40, 240, 80, 3, 2, False, True), (80, 200, 80, 3, 1, False, True), (80, 184, 80, 3, 1, False, True),
        (80, 184, 80, 3, 1, False, True), (80, 480, 112, 3, 1, True, True), (112, 672, 112, 3, 1, True, True),
        (112, 672, 160, 5, 2, True, True), (160, 960, 160, 5, 1, True, True), (160, 960, 160, 5, 1, True, True),
    ]  # fmt: skip
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16, eps=1e-3), nn.Hardswish(),
        *(Inverted(*row) for row in rows),
        nn.Conv2d(160, 960, 1, bias=False), nn.BatchNorm2d(960, eps=1e-3), nn.Hardswish(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000),
    )  # fmt: skip
    module = _randomize_batch_norm(module).eval()
    return BenchmarkModel("mobilenet_v3", module, (torch.randn(1, 3, 224, 224),), dynamic=False)


def mlp() -> BenchmarkModel:
    """Four layers of width 1024."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    module = nn.Sequential(*layers, nn.Linear(1024, 1024)).eval()
    return BenchmarkModel("mlp", module, (torch.randn(1, 1024),), dynamic=False)


def bert() -> BenchmarkModel:
    """BERT base, 110 M parameters, 128 tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    module = _Logits(BertModel(BertConfig(attn_implementation="eager")), "pooler_output").eval()
    return BenchmarkModel("bert_base", module, (torch.randint(0, 30000, (1, 128)),), dynamic=True)


def vit() -> BenchmarkModel:
    """ViT-B/16, 86 M parameters, 224 x 224: 197 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    module = _Logits(ViTForImageClassification(ViTConfig(num_labels=1000)), "logits").eval()
    return BenchmarkModel("vit_b_16", module, (torch.randn(1, 3, 224, 224),), dynamic=True)


def tiny_bert() -> BenchmarkModel:
    """Two layers of width 128, for tests."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=1000,
        attn_implementation="eager",
    )  # fmt: skip
    module = _Logits(BertModel(config), "pooler_output").eval()
    return BenchmarkModel("tiny_bert", module, (torch.randint(0, 1000, (1, 24)),), dynamic=True)


MODELS = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2, "bert_base": bert}


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2)


def chain(length: int) -> tuple[GraphModule, tuple[Tensor]]:
    """A convolution and `length` value-preserving ops that must all share its output's qparams.

    The ops are written into an exported graph of two of them: torch.export of 20,000 takes more than 20 GB.
    """
    x = (torch.randn(1, 3, 4, 4),)
    with torch.no_grad():
        gm = torch.export.export(_Chain(), x).module()
    pair = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    last = pair[-1]
    for number in range(length - 2):
        like = pair[number % 2]
        with gm.graph.inserting_after(last):
            added = gm.graph.call_function(like.target, (last, *like.args[1:]))
        added.meta = dict(like.meta)
        last.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
        last = added
    gm.recompile()
    return gm, x
