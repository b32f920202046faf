"""What an export fixed is named, once, with the line; what it did not fix is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import prepare_qat_pt2e
from pt2e_quant.errors import CaptureWarning
from tests.nets import export
from tests.pt2e.kit import Toy
from tests.qat.kit import TRAINED, images


class Branch(nn.Module):
    """A head for training alone, chosen by a branch, an expression and a helper; and a loop that asks nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.helper = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.training and x.dim() == 2:
            x = x + self.helper(x)
        scale = 2.0 if not self.training else 1.0
        return shaken(x, self.training) * scale


def shaken(x: Tensor, training: bool) -> Tensor:
    if training:
        return x + 1
    return x * 3


class Innocent(nn.Module):
    """What follows train(), what computes the same, and what torch does inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, dropout=0.1)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.use_checkpointing = False
        self.other = nn.Module()

    def forward(self, x: Tensor, training: float = 0.0) -> Tensor:
        x = nn.functional.dropout(self.layer(x), 0.2, self.training)
        if self.use_checkpointing and self.training:
            return self.layer(x)
        if self.other.training is None:
            x = x + 1
        return self.encoder(self.attention(x, x, x)[0])


def messages(model: nn.Module, *inputs: Tensor, **kwargs: object) -> list[str]:
    program = export(model, *inputs, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare_qat_pt2e(program, Toy().set_global(TRAINED))
    assert {(one.category, one.filename) for one in caught} <= {(CaptureWarning, __file__)}
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(
    ("strict", "train"), [(False, True), (False, False), pytest.param(True, False, marks=pytest.mark.slow)]
)
def test_branches_on_the_mode_are_named_with_their_lines_in_one_warning(strict, train):
    (message,) = messages(Branch(), images(1, 2, 3), strict=strict, train=train)
    named = [line.partition(": ")[2] for line in message.splitlines() if "test_fixed_by_export.py:" in line]
    assert sorted(named) == [
        "if self.training and x.dim() == 2:", "if training:", "scale = 2.0 if not self.training else 1.0",
    ]  # fmt: skip


def test_what_follows_the_mode_is_not_named():
    assert messages(Innocent(), images(1, 3, 2, 4), train=True) == []


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_attention_exported_in_evaluation_is_named_once(strict):
    (message,) = messages(Innocent(), images(1, 3, 2, 4), train=False, strict=strict)
    assert "the dropout of 2 nn.MultiheadAttention" in message
    assert "= aten.softmax.int(" in message
    assert "in module 'attention' (MultiheadAttention), test_fixed_by_export.py:" in message
    assert "export the model in training mode" in message


def test_norms_without_momentum_are_named():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, momentum=0.2), nn.BatchNorm2d(4, momentum=None, track_running_stats=False),
    )  # fmt: skip
    (message,) = messages(model, images(1, 2, 3, 6, 6))
    assert "running statistics of 2 batch norms never move" in message
    assert "in module '1' (BatchNorm2d)" in message


def test_a_program_whose_source_is_gone_has_no_branches_to_name(tmp_path):
    torch.export.save(export(Branch(), images(1, 2, 3)), tmp_path / "branch.pt2")
    program = torch.export.load(tmp_path / "branch.pt2")
    for node in program.graph.nodes:
        if "stack_trace" in node.meta:
            node.meta["stack_trace"] = node.meta["stack_trace"].replace(__file__, "/gone/model.py")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        prepare_qat_pt2e(program, Toy().set_global(TRAINED))
