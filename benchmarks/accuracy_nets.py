"""Nets for handwritten digits that `benchmarks.accuracy` quantizes, trained with a seed and kept for the next run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.qat_accuracy import accuracy
from demo.model import DigitsNet, conv_bn_relu, load_images, train

__all__ = ["EPOCHS", "NETS", "accuracy", "trained"]

KEPT = Path("out/accuracy")


class TinyBlock(nn.Module):
    """Attention with four heads and two linears with gelu, each behind a layer norm, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.merge(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class TinyViT(nn.Module):
    """Patches of 2 x 2 pixels, two blocks, the mean of all patches, a linear."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(TinyBlock(width), TinyBlock(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


def plain() -> nn.Module:
    """Four convolutions with batch norm and relu, a pool, a linear."""
    convs = (conv_bn_relu(1, 8), conv_bn_relu(8, 16, stride=2), conv_bn_relu(16, 16), conv_bn_relu(16, 16))
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "depthwise": partial(DigitsNet, 24), "vit": TinyViT}
EPOCHS = {"plain": 15, "depthwise": 12, "vit": 30}


def trained(name: str, seed: int) -> tuple[nn.Module, ExportedProgram]:
    """The net of this name in evaluation mode, trained with this seed, and exported for any number of images."""
    learn, _ = load_images()
    torch.manual_seed(seed)
    net, path = NETS[name](), KEPT / f"{name}_{seed}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(net, learn, EPOCHS[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    shapes = ({0: Dim("batch", min=1, max=4096)},)
    return net.eval(), torch.export.export(net, (learn.x[:2],), dynamic_shapes=shapes)
