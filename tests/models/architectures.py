"""transformers' ResNet, MobileNetV2 and BERT from configs, with random weights, small enough for the quick tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.models import BenchmarkModel
from tests.nets import randomize

__all__ = ["SMALL", "small_bert", "small_mobilenet_v2", "small_resnet"]


class Output(nn.Module):
    """A transformers model with one tensor out."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.model(*inputs), self.name)


def small_resnet() -> BenchmarkModel:
    """Four stages of one basic block, 64 x 64."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic", num_labels=10
    )
    module = Output(randomize(ResNetForImageClassification(config)), "logits").eval()
    return BenchmarkModel("small_resnet", module, (torch.randn(1, 3, 64, 64),), dynamic=False)


def small_mobilenet_v2() -> BenchmarkModel:
    """All 17 inverted residuals at a quarter of their width, 64 x 64."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=64, num_labels=10)
    module = Output(randomize(MobileNetV2ForImageClassification(config)), "logits").eval()
    return BenchmarkModel("small_mobilenet_v2", module, (torch.randn(1, 3, 64, 64),), dynamic=False)


def small_bert() -> BenchmarkModel:
    """Two layers of width 128 and a vocabulary so small that linears, not embeddings, make the size."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=100,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    module = Output(BertModel(config), "pooler_output").eval()
    return BenchmarkModel("small_bert", module, (torch.randint(0, 100, (1, 24)),), dynamic=True)


SMALL = {"resnet": small_resnet, "mobilenet_v2": small_mobilenet_v2, "bert": small_bert}
