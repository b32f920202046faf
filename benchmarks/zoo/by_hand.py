"""Nets of the zoo that are written here: one small one of each family that nets in use belong to."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import models
from benchmarks.zoo.net import BOTH, DYNAMIC, enter

__all__: list[str] = []

HAND = "by hand"


def conv_bn(into: int, out: int, size: int, act: type[nn.Module] = nn.ReLU, **options: int) -> nn.Sequential:
    options.setdefault("padding", size // 2)
    return nn.Sequential(nn.Conv2d(into, out, size, bias=False, **options), nn.BatchNorm2d(out), act())


# Images ---------------------------------------------------------------------------------------------------------------


class _Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(channels, channels, 1, nn.Mish), conv_bn(channels, channels, 3, nn.Mish)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


class _Yolo(nn.Module):
    """Stages that split, bottlenecks with Mish, pyramid pooling, an upsampled second head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 16, 3, nn.Mish, stride=2), conv_bn(16, 32, 3, nn.Mish, stride=2))
        self.left, self.right = conv_bn(32, 16, 1, nn.Mish), conv_bn(32, 16, 1, nn.Mish)
        self.deep = nn.Sequential(_Bottleneck(16), _Bottleneck(16))
        self.down = conv_bn(32, 64, 3, nn.Mish, stride=2)
        self.pools = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in (5, 9))
        self.after = conv_bn(192, 32, 1, nn.LeakyReLU)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge = conv_bn(64, 32, 3, nn.LeakyReLU)
        self.small, self.large = nn.Conv2d(32, 18, 1), nn.Conv2d(32, 18, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        near = torch.cat([self.left(x), self.deep(self.right(x))], 1)
        x = self.down(near)
        far = self.after(torch.cat([x, *(pool(x) for pool in self.pools)], 1))
        return self.large(far), self.small(self.merge(torch.cat([self.up(far), near], 1)))


@enter(HAND)
def yolo() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Yolo(), (torch.randn(1, 3, 96, 96),)


class _UNet(nn.Module):
    """Three levels; down by pooling, up by transposed convolutions, skips by cat."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [width, width * 2, width * 4]
        self.first = self._twice(3, sizes[0])
        self.down = nn.ModuleList(self._twice(a, b) for a, b in itertools.pairwise(sizes))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in itertools.pairwise(sizes))
        self.after = nn.ModuleList(self._twice(2 * a, a) for a in sizes[:-1])
        self.head = nn.Conv2d(width, 4, 1)

    @staticmethod
    def _twice(into: int, out: int) -> nn.Sequential:
        return nn.Sequential(conv_bn(into, out, 3), conv_bn(out, out, 3))

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.first(x)]
        for down in self.down:
            kept.append(down(F.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for up, after in zip(reversed(self.up), reversed(self.after), strict=True):
            x = after(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)


@enter(HAND)
def unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _UNet(), (torch.randn(1, 3, 64, 64),)


@enter(HAND)
def gan_generator() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layers: list[nn.Module] = []
    for into, out, stride, padding in ((64, 64, 1, 0), (64, 32, 2, 1), (32, 16, 2, 1)):
        layers += [nn.ConvTranspose2d(into, out, 4, stride, padding, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()), (torch.randn(2, 64, 1, 1),)


@enter(HAND)
def mobilenet_v3() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = models.mobilenet_v3()
    return model.module, (torch.randn(1, 3, 96, 96),)


class _Scaled(nn.Module):
    def __init__(self, channels: int, factor: float) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(channels, channels, 3), nn.Conv2d(channels, channels, 3, padding=1))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.add(x, self.body(x), alpha=self.factor))


@enter(HAND)
def resnet_scaled() -> tuple[nn.Module, tuple[Tensor, ...]]:
    blocks = [_Scaled(24, factor) for factor in (0.1, 0.2, 0.3)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)]
    return nn.Sequential(conv_bn(3, 24, 3), *blocks, *head), (torch.randn(1, 3, 48, 48),)


class _Dense(nn.Module):
    def __init__(self, into: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(into + i * growth), nn.ReLU(), nn.Conv2d(into + i * growth, growth, 3, padding=1)
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


@enter(HAND)
def densenet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = nn.Sequential(
        conv_bn(3, 16, 3, stride=2), _Dense(16, 8, 4), conv_bn(48, 24, 1), nn.AvgPool2d(2), _Dense(24, 8, 4),
        nn.BatchNorm2d(56), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(56, 10),
    )  # fmt: skip
    return net, (torch.randn(1, 3, 64, 64),)


class _Mixed(nn.Module):
    def __init__(self, into: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([
            conv_bn(into, 16, 1),
            nn.Sequential(conv_bn(into, 12, 1), conv_bn(12, 24, 3)),
            nn.Sequential(conv_bn(into, 8, 1), conv_bn(8, 12, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(into, 12, 1)),
            nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn(into, 8, 1)),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


@enter(HAND)
def inception() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = nn.Sequential(
        conv_bn(3, 24, 3, stride=2), _Mixed(24), _Mixed(72), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(72, 10)
    )
    return net, (torch.randn(1, 3, 48, 48),)


class _Shuffled(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(
            conv_bn(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return nn.functional.channel_shuffle(torch.cat([left, self.body(right)], 1), 2)


@enter(HAND)
def shufflenet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = nn.Sequential(
        conv_bn(3, 32, 3, stride=2), _Shuffled(32), _Shuffled(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip
    return net, (torch.randn(1, 3, 64, 64),)


class _Excited(nn.Module):
    """An inverted bottleneck of EfficientNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = channels * 4
        self.expand = conv_bn(channels, wide, 1, nn.SiLU)
        self.depth = conv_bn(wide, wide, 5, nn.SiLU, groups=wide)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 8, 1), nn.SiLU(), nn.Conv2d(8, wide, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        return x + self.project(y * self.gate(y))


@enter(HAND)
def efficientnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = nn.Sequential(
        conv_bn(3, 24, 3, nn.SiLU, stride=2), _Excited(24), _Excited(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 10),
    )  # fmt: skip
    return net, (torch.randn(1, 3, 64, 64),)


@enter(HAND)
def super_resolution() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.PReLU(32), nn.Conv2d(32, 32, 3, padding=1), nn.PReLU(),
        nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip
    return net, (torch.randn(1, 3, 32, 32),)


class _VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv_bn(1, 16, 3, nn.ELU, stride=2), conv_bn(16, 32, 3, nn.ELU, stride=2))
        self.mean, self.spread = nn.Linear(32 * 49, 16), nn.Linear(32 * 49, 16)
        self.lift = nn.Linear(16, 32 * 49)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 3, 2, 1, output_padding=1), nn.ELU(),
            nn.ConvTranspose2d(16, 1, 3, 2, 1, output_padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(x).flatten(1)
        mean = self.mean(y)
        z = mean + noise * torch.exp(0.5 * self.spread(y).clamp(-4, 4))
        return self.up(self.lift(z).reshape(-1, 32, 7, 7)), mean


@enter(HAND)
def vae() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _VAE(), (torch.randn(2, 1, 28, 28), torch.randn(2, 16))


class _Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(3, 16, 3, stride=2), conv_bn(16, 32, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(32, 32),
        )  # fmt: skip

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.body(one), self.body(other)
        return F.cosine_similarity(a, b), torch.linalg.vector_norm(a - b, dim=1)


@enter(HAND)
def siamese() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Siamese(), (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))


class _Mixing(nn.Module):
    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.across = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.along = nn.Sequential(nn.Linear(channels, 128), nn.GELU(), nn.Linear(128, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.second(x))


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 8, 8)
        self.blocks = nn.Sequential(_Mixing(36, 64), _Mixing(36, 64))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


@enter(HAND, BOTH)
def mlp_mixer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Mixer(), (torch.randn(1, 3, 48, 48),)


@enter(HAND)
def video_conv3d() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return net, (torch.randn(1, 3, 4, 16, 16),)


# Signals and sequences ------------------------------------------------------------------------------------------------


class _Causal(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.first = nn.Conv1d(channels, channels, 3, dilation=dilation)
        self.second = nn.Conv1d(channels, channels, 3, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(F.pad(x, (self.pad, 0))))
        return torch.relu(x + torch.relu(self.second(F.pad(y, (self.pad, 0)))))


@enter(HAND)
def tcn() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = nn.Sequential(nn.Conv1d(4, 32, 1), *(_Causal(32, 2**i) for i in range(3)), nn.Conv1d(32, 5, 1))
    return net, (torch.randn(1, 4, 64),)


class _Gated(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.filter = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.skip, self.out = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, channels, 1)
        self.dilation = dilation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        padded = F.pad(x, (self.dilation, 0))
        y = torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded))
        return x + self.out(y), self.skip(y)


class _WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 32, 1)
        self.blocks = nn.ModuleList(_Gated(32, 2**i) for i in range(4))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(32, 32, 1), nn.ReLU(), nn.Conv1d(32, 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        total = torch.zeros_like(x)
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.last(total)


@enter(HAND)
def wavenet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _WaveNet(), (torch.randn(1, 1, 256),)


class _Convolution(nn.Module):
    """The convolution module of a conformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.depth = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.wide(self.norm(x).transpose(1, 2)), dim=1)
        return self.narrow(F.silu(self.batch_norm(self.depth(y)))).transpose(1, 2)


class _Conformer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def feed_forward() -> nn.Sequential:
            return nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
            )

        self.before, self.after = feed_forward(), feed_forward()
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.convolution = _Convolution(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.convolution(x)
        return self.last(x + 0.5 * self.after(x))


@enter(HAND, BOTH)
def conformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Conformer(), (torch.randn(1, 32, 64),)


class _CRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(1, 16, 3), nn.MaxPool2d(2), conv_bn(16, 32, 3), nn.MaxPool2d((4, 4)))
        self.rnn, self.head = nn.LSTM(64, 32, bidirectional=True, batch_first=True), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).flatten(1, 2).transpose(1, 2)
        return self.head(self.rnn(y)[0])


@enter(HAND)
def crnn() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _CRNN(), (torch.randn(1, 1, 16, 48),)


class _Tagger(nn.Module):
    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(80, 32), kind(32, 48, batch_first=True), nn.Linear(48, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(ids))[0])


@enter(HAND, BOTH)
def gru_tagger() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Tagger(nn.GRU), (torch.randint(0, 80, (2, 6)),)


@enter(HAND, BOTH)
def lstm_tagger() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Tagger(nn.LSTM), (torch.randint(0, 80, (2, 6)),)


@enter(HAND, BOTH)
def torch_encoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(1, 24, 64),)


class _Selective(nn.Module):
    """The core of Mamba: a scan whose step depends on the input, unrolled."""

    def __init__(self, width: int = 32, state: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.conv = nn.Conv1d(2 * width, 2 * width, 4, padding=3, groups=2 * width)
        self.parts, self.step = nn.Linear(2 * width, 2 * state + 4, bias=False), nn.Linear(4, 2 * width)
        self.decay = nn.Parameter(torch.log(torch.arange(1.0, state + 1).repeat(2 * width, 1)))
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.into(self.norm(x)).chunk(2, -1)
        value = F.silu(self.conv(value.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, write, read = self.parts(value).split([4, self.state, self.state], -1)
        step = F.softplus(self.step(step))
        keep = torch.exp(step.unsqueeze(-1) * -torch.exp(self.decay))
        put = (step * value).unsqueeze(-1) * write.unsqueeze(2)
        held, outputs = torch.zeros_like(put[:, 0]), []
        for t in range(x.shape[1]):
            held = keep[:, t] * held + put[:, t]
            outputs.append((held * read[:, t].unsqueeze(1)).sum(-1))
        return x + self.out(torch.stack(outputs, 1) * F.silu(gate))


@enter(HAND, BOTH)
def mamba_like() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.Sequential(_Selective(), nn.Linear(32, 20)), (torch.randn(1, 8, 32),)


# Tables, points, experts ----------------------------------------------------------------------------------------------


class _DLRM(nn.Module):
    """Embeddings of categories, products of every pair, two perceptrons."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(80, 16) for _ in range(6))
        self.below = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU())
        self.above = nn.Sequential(nn.Linear(37, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
        self.register_buffer("pairs", torch.tril_indices(7, 7, -1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        x = self.below(numbers)
        rows = torch.stack([x, *(table(categories[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(rows, rows.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.above(torch.cat([x, products], 1))


@enter(HAND, BOTH)
def dlrm() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _DLRM(), (torch.randn(16, 13), torch.randint(0, 80, (16, 6)))


class _PointNet(nn.Module):
    """One perceptron for every point, the largest over all points, and a learned rotation in front."""

    def __init__(self) -> None:
        super().__init__()

        def shared(*sizes: int) -> nn.Sequential:
            pairs = itertools.pairwise(sizes)
            return nn.Sequential(*(nn.Sequential(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairs))

        self.look, self.turn = shared(3, 32, 64), nn.Linear(64, 9)
        self.body, self.head = shared(3, 32, 64, 128), nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, points: Tensor) -> Tensor:
        turn = self.turn(self.look(points).amax(2)).reshape(-1, 3, 3) + torch.eye(3)
        return self.head(self.body(torch.bmm(turn, points)).amax(2))


@enter(HAND)
def pointnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _PointNet(), (torch.randn(2, 3, 128),)


class _Experts(nn.Module):
    """Every expert runs, and a gate of the two best weighs them."""

    def __init__(self, width: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        best, where = scores.topk(2, -1)
        weights = torch.zeros_like(scores).scatter(-1, where, best.softmax(-1))
        return x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


@enter(HAND, BOTH)
def experts() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.Sequential(_Experts(), nn.LayerNorm(32), nn.Linear(32, 10)), (torch.randn(4, 12, 32),)


@enter(HAND, BOTH)
def perceptron() -> tuple[nn.Module, tuple[Tensor, ...]]:
    net = nn.Sequential(
        nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 256), nn.Hardswish(),
        nn.Linear(256, 32),
    )  # fmt: skip
    return net, (torch.randn(8, 128),)


@enter(HAND, DYNAMIC)
def bag_of_words() -> tuple[nn.Module, tuple[Tensor, ...]]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(80, 32, mode="mean"), nn.Linear(32, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.bag(ids)))

    return Net(), (torch.randint(0, 80, (4, 10)),)
