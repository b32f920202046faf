"""What a backend's kernels do not take has a code of its kind in the report, with a way out that fits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pt2e_quant import Report, explain, prepare_pt2e
from pt2e_quant.errors import AnnotationError
from pt2e_quant.quantizer import Quantizer, because
from pt2e_quant.reasons import WAYS_OUT
from quantizers.embedding import EmbeddingQuantizer, get_embedding_config
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config, get_symmetric_quantization_config


def xnnpack(is_dynamic: bool = False) -> Quantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(True, is_dynamic=is_dynamic))


def x86() -> Quantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


class Refused(nn.Module):
    """One operator for each kind of limit. image: (batch, 4, 8, 8); table: (5, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unbatched, self.transposed = (
            nn.Conv2d(4, 4, 3),
            nn.Conv2d(4, 4, 3),
            nn.ConvTranspose2d(4, 4, 3, groups=2),
        )
        self.same, self.head = nn.Conv2d(4, 4, 2, padding="same"), nn.Linear(4, 4)
        self.mask = nn.Buffer(torch.tensor([0.0, -1e9]).repeat(4))

    def forward(self, image: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        quantized = self.conv(image)
        return (
            self.unbatched(image[0]),
            self.transposed(image),
            self.same(image),
            self.conv(F.pad(image, (1, 1, 1, 1), value=1.0)),
            F.conv2d(image, weight),
            F.max_pool2d(quantized, 2, ceil_mode=True),
            image + self.mask,
            image @ image,
            self.head(quantized.mean((2, 3))),
        )


def report_of(quantizer: Quantizer) -> Report:
    example = torch.randn(3, 4, 8, 8), torch.randn(4, 4, 3, 3)
    exported = torch.export.export(Refused().eval(), example, dynamic_shapes=({0: Dim("batch", min=2, max=8)}, None))
    return explain(prepare_pt2e(exported, quantizer))


REPORTS = {"xnnpack": xnnpack, "xnnpack dynamic": lambda: xnnpack(is_dynamic=True), "x86": x86}


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return {name: report_of(make()) for name, make in REPORTS.items()}


@pytest.mark.parametrize(
    ("quantizer", "node", "code"),
    [
        ("xnnpack", "conv2d_1", "shape"),
        ("xnnpack", "conv_transpose2d", "groups"),
        ("xnnpack", "conv2d_4", "computed_operand"),
        ("xnnpack", "max_pool2d", "dynamic_shape"),
        ("xnnpack", "add", "range"),
        ("xnnpack", "pad", "padding"),
        ("xnnpack dynamic", "add", "configuration"),
        ("xnnpack dynamic", "conv_transpose2d", "groups"),
        ("xnnpack dynamic", "conv2d", "shape"),
        ("x86", "conv2d_1", "shape"),
        ("x86", "conv2d_2", "padding"),
        ("x86", "conv2d_4", "computed_operand"),
        ("x86", "max_pool2d", "dynamic_shape"),
        ("x86", "matmul", "not_asked_for"),
        ("x86", "add", "unsupported_op"),
    ],
)
def test_the_code_says_which_kind_of_limit_it_is(reports, quantizer, node, code):
    (decision,) = [decision for decision in reports[quantizer].skipped if decision.node == node]
    assert decision.code == code, decision
    assert f"{code}: {WAYS_OUT[code]}" in reports[quantizer].why(node)


@pytest.mark.parametrize(
    ("quantizer", "model", "example", "code"),
    [
        (XNNPACKQuantizer().set_global(get_8da4w_config(32)), nn.Linear(48, 4), torch.randn(2, 48), "group_size"),
        (EmbeddingQuantizer(get_embedding_config(4)), nn.Embedding(5, 7), torch.arange(3), "shape"),
    ],
)
def test_weights_that_do_not_split_say_so(quantizer, model, example, code):
    (skipped,) = explain(prepare_pt2e(torch.export.export(model, (example,)), quantizer, allow_empty=True)).skipped
    assert skipped.code == code


def test_a_reason_of_no_known_kind_is_an_error():
    with pytest.raises(AnnotationError, match="'colour' is no code of a reason; there are unsupported_op"):
        because("colour", "it is green")


def test_a_reason_with_a_code_is_its_text():
    assert because("shape", "it is flat") == "it is flat"
