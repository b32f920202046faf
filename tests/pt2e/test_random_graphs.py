"""Random rows of ops, with views, writes and modules called twice: nothing is lost and noise stays noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export
from tests.pt2e.kit import DYNAMIC, STATIC, WEIGHT_ONLY, Toy, dequantizes

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))

QUANTIZERS = {
    "static": lambda: Toy(STATIC),
    "dynamic": lambda: Toy(DYNAMIC),
    "weight only": lambda: Toy(WEIGHT_ONLY),
    "xnnpack": lambda: XNNPACKQuantizer(get_symmetric_quantization_config(is_per_channel=True)),
}


def write_part(p: Tensor, q: Tensor) -> Tensor:
    p[:, 1:3] = 0.5
    return p


def add_to_view(p: Tensor, q: Tensor) -> Tensor:
    view = p[:, :2]
    view += 0.25
    return p


MODULES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False),
    "conv, norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-3)),
    "conv, norm, relu": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "transposed, norm": lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    "linear": lambda: nn.Linear(6, 6),
    "norm": lambda: nn.BatchNorm2d(4, eps=1e-2),
}
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda p, q: F.relu(p),
    "relu_": lambda p, q: F.relu_(p),
    "add": lambda p, q: p + q,
    "add_": lambda p, q: p.add_(q.clone()),  # of overlapping memory add_ would complain
    "cat": lambda p, q: torch.cat([p, q], 1)[:, ::2],
    "halves": lambda p, q: torch.cat(p.chunk(2, 1)[::-1], 1),
    "gate": lambda p, q: p * torch.sigmoid(q),
    "reshape": lambda p, q: p.reshape(p.shape[0], -1).view(p.shape),
    "turn": lambda p, q: p.permute(0, 1, 3, 2),
    "pool": lambda p, q: F.max_pool2d(p, 3, 1, 1),
    "dropout": lambda p, q: F.dropout(p, 0.15, training=False),
    "clamp": lambda p, q: p.clamp(-1, 1.5),
    "scale": lambda p, q: p * 0.5 + 0.125,
    "write part": write_part,
    "add to view": add_to_view,
}


class Net(nn.Module):
    """Each step reads two of the results before it; two of the results are the outputs."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.mods = nn.ModuleDict({name: MODULES[name]() for name, _, _ in steps if name in MODULES})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        results = [x * 1.0]
        for name, first, second in self.steps:
            p, q = results[first % len(results)], results[second % len(results)]
            results.append(self.mods[name](p) if name in MODULES else FUNCTIONS[name](p, q))
        return results[-1], results[len(results) // 2] + 1.0


STEPS = st.lists(
    st.tuples(st.sampled_from([*MODULES, *FUNCTIONS]), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=8
)


def check(quantizer: str, steps: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    with torch.no_grad():  # autograd forbids some of the writes
        model = Net(steps)
        exported = export(model, X)
        expected = model(X)
        prepared = prepare_pt2e(exported, QUANTIZERS[quantizer](), allow_empty=True)
        for actual, wanted in zip(prepared(X), expected, strict=True):
            torch.testing.assert_close(
                actual, wanted, rtol=1e-4, atol=1e-4
            )  # batch norms of depth 8, folded in float32
        converted = convert_pt2e(prepared)
        for actual, wanted in zip(converted(X), expected, strict=True):
            noise = (actual - wanted).square().mean() / wanted.square().mean().clamp_min(1e-4)
            assert noise < 0.15**2  # 8 steps of 8 bits; a lost write or a wrong scale is of the size of the signal
        assert all(len(node.users) == 1 for node in dequantizes(converted))


@settings(max_examples=6, derandomize=True)
@given(steps=STEPS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_any_row_of_ops_is_prepared_exactly_and_converted_closely(quantizer, steps):
    check(quantizer, steps)


@pytest.mark.slow
@settings(max_examples=100)
@given(steps=STEPS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_many_rows_of_ops_are_prepared_exactly_and_converted_closely(quantizer, steps):
    check(quantizer, steps)
