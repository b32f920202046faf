"""A small convolutional net and the images it learns: scikit-learn's 1797 handwritten digits of 8 x 8 pixels.

Nothing here knows of quantization. `demo.digits` trains this net, then quantizes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

__all__ = ["DigitsNet", "Images", "load_images", "steps_of", "train"]

Track = Callable[[list[int]], Iterable[int]]


class Images(NamedTuple):
    """Pixels in [0, 1], shape (n, 1, 8, 8), and the digit that each image shows."""

    x: Tensor
    y: Tensor


class Residual(nn.Module):
    """x + pointwise(depthwise(x)), each convolution followed by batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.depthwise_norm(self.depthwise(x)))
        return self.relu(x + self.pointwise_norm(self.pointwise(y)))


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3 x 3 convolution, batch norm and relu: one integer kernel after quantization."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class DigitsNet(nn.Module):
    """Two convolutions, two residual blocks with depthwise convolutions, one convolution, mean, linear."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.stem = conv_bn_relu(1, width // 2)
        self.widen = conv_bn_relu(width // 2, width, stride=2)
        self.blocks = nn.Sequential(Residual(width), Residual(width))
        self.deep = conv_bn_relu(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.blocks(self.widen(self.stem(x))))
        return self.head(adaptive_avg_pool2d(x, 1).flatten(1))


def load_images(held_back: int = 597) -> tuple[Images, Images]:
    """Images to learn from and images held back, split once and for all by a fixed seed."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, held = order[held_back:], order[:held_back]
    return Images(x[learn], y[learn]), Images(x[held], y[held])


def train(
    model: nn.Module,
    images: Images,
    epochs: int,
    batch_size: int = 64,
    track: Track = iter,
    lr: float = 4e-3,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """AdamW on a one-cycle schedule; `track` wraps the epochs, to show progress. Leaves the model in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    steps = steps_of(images, epochs, batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    model.train()
    for _ in track(list(range(epochs))):
        for batch in torch.randperm(len(images.x)).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(model(images.x[batch]), images.y[batch]).backward()
            optimizer.step()
            schedule.step()
            after_step()
    model.eval()


def steps_of(images: Images, epochs: int, batch_size: int = 64) -> int:
    """How many steps `train` makes."""
    return epochs * -(-len(images.x) // batch_size)
