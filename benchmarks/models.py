"""Architectures of real size with random weights, built from transformers' configs, for benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

__all__ = ["MODELS", "BenchmarkModel", "chain"]


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


def mobilenet_v2() -> BenchmarkModel:
    """3.5 M parameters, 224 x 224."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    module = _Logits(
        _randomize_batch_norm(MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))), "logits"
    )
    return BenchmarkModel("mobilenet_v2", module.eval(), (torch.randn(1, 3, 224, 224),), dynamic=False)


def bert() -> BenchmarkModel:
    """BERT base, 110 M parameters, 128 tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    module = _Logits(BertModel(BertConfig(attn_implementation="eager")), "pooler_output").eval()
    return BenchmarkModel("bert_base", module, (torch.randint(0, 30000, (1, 128)),), dynamic=True)


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
