"""Small networks with the shapes of those that people quantize in FX mode."""

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Dense", "Inception", "InvertedResidual", "Residual", "made"]


def made(kind, seed=0, train=False):
    """One with batch norms that have seen something, so that folding them changes weights."""
    torch.manual_seed(seed)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return model.train(train)


def conv_bn(inside, outside, size, stride=1, groups=1):
    conv = nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside))


class Block(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.first, self.second = conv_bn(inside, outside, 3, stride), conv_bn(outside, outside, 3)
        self.down = conv_bn(inside, outside, 1, stride) if stride > 1 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.second(self.relu(self.first(x)))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class Residual(nn.Module):
    """As ResNet-18."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = conv_bn(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1))
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(torch.flatten(self.mean(self.blocks(self.pool(F.relu(self.stem(x))))), 1))


class Inverted(nn.Module):
    def __init__(self, width, stride, outside):
        super().__init__()
        self.adds = stride == 1 and outside == width
        self.conv = nn.Sequential(
            conv_bn(width, 4 * width, 1), nn.ReLU6(), conv_bn(4 * width, 4 * width, 3, stride, 4 * width), nn.ReLU6(),
            conv_bn(4 * width, outside, 1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class InvertedResidual(nn.Module):
    """As MobileNetV2."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 8, 3, 2), nn.ReLU6(), Inverted(8, 1, 8), Inverted(8, 2, 12))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 10))

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(x.reshape(x.shape[0], -1))


class Layer(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inside), nn.Conv2d(inside, 8, 3, padding=1, bias=False)

    def forward(self, features):
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class Dense(nn.Module):
    """As DenseNet: batch norms before convolutions, concatenations of all that came before."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.layers = nn.ModuleList(Layer(16 + 8 * n) for n in range(3))
        self.norm, self.pool, self.fc = nn.BatchNorm2d(40), nn.AvgPool2d(2), nn.Linear(40, 10)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = self.pool(F.relu(self.norm(torch.cat(features, 1))))
        return self.fc(x.mean([2, 3]))


class Inception(nn.Module):
    """As GoogLeNet: branches side by side."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.one, self.pool = conv_bn(16, 8, 1), nn.MaxPool2d(3, 1, 1)
        self.three = nn.Sequential(conv_bn(16, 8, 1), nn.ReLU(), conv_bn(8, 12, 3), nn.ReLU())
        self.after, self.fc = conv_bn(16, 8, 1), nn.Linear(28, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([F.relu(self.one(x)), self.three(x), F.relu(self.after(self.pool(x)))], 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
