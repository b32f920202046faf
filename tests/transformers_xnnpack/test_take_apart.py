"""Operators that ExecuTorch takes apart when it lowers are taken apart before; the program computes the same."""

import pytest
import torch
from torch import nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.executorch.passes.take_apart import take_apart
from pt2e_quant.ops import COMPOSITE
from pt2e_quant.passes.own_dequantizes import own_dequantizes
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

F = nn.functional
FORMS = {
    "softplus": lambda x: F.softplus(x, beta=2.0, threshold=15.0),
    "softplus with a step": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    "mish": F.mish,
    "hardshrink": lambda x: F.hardshrink(x, 0.3),
    "softshrink": lambda x: F.softshrink(x, 0.2),
    "celu": lambda x: F.celu(x, 1.5),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "lerp, number": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "lerp, tensor": lambda x: torch.lerp(x, x.flip(1), x.sigmoid()),
    "cosine similarity": lambda x: F.cosine_similarity(x, x.flip(1), dim=1).unsqueeze(1) * x,
    "unfold": lambda x: x.unfold(3, 2, 2).sum(-1),
}


class Between(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(FORMS[self.name](self.first(x)))


def exported(name):
    torch.manual_seed(1)
    x = torch.randn(1, 3, 8, 8)
    return torch.export.export(Between(name).eval(), (x,)), x


@pytest.mark.parametrize("name", FORMS)
def test_the_parts_compute_what_the_whole_computes(name):
    program, x = exported(name)
    before, after = program.module(), take_apart(program.module())
    after.recompile()
    assert not [node for node in after.graph.nodes if node.target in COMPOSITE]
    assert all("val" in node.meta for node in after.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(after(x), before(x), atol=1e-6, rtol=1e-5)  # sums and exponentials in another order


def test_a_graph_without_such_an_operator_stays_as_it_is():
    gm = torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),)).module()
    count = len(gm.graph.nodes)
    assert take_apart(gm) is gm
    assert len(gm.graph.nodes) == count


def test_each_reader_gets_a_dequantize_of_its_own():
    class Shared(nn.Module):
        def forward(self, q):
            x = torch.ops.quantized_decomposed.dequantize_per_tensor.default(q, 0.1, 3, -128, 127, torch.int8)
            return x.relu() + x

    q = torch.arange(-6, 6, dtype=torch.int8)
    gm = torch.export.export(Shared(), (q,)).module()
    expected = gm(q)
    gm = own_dequantizes(gm)
    gm.recompile()
    dequantizes = [node for node in gm.graph.nodes if "dequantize" in str(node.target)]
    assert [len(node.users) for node in dequantizes] == [1, 1]
    assert torch.equal(gm(q), expected)


@pytest.mark.parametrize("name", ["mish", *(pytest.param(n, marks=pytest.mark.slow) for n in FORMS if n != "mish")])
def test_the_file_computes_what_the_graph_computes_between_integer_convolutions(name):
    """Lowering verifies that: it raises beyond what rounding explains."""
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    program, x = exported(name)
    prepared = prepare_pt2e(program, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(True)))
    prepared(x)
    lowered = lower_to_executorch(convert_pt2e(prepared))
    if name in ("mish", "softplus", "celu", "elu", "selu"):
        assert (lowered.delegates, lowered.undelegated) == (1, ())
    assert lowered.verified
    assert lowered.verified.sqnr > 30
