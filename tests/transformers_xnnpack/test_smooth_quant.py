"""SmoothQuant keeps the function and moves outliers; what static int8 cannot hold is found and falls back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import smooth_quant, worst_ops
from pt2e_quant.errors import CalibrationError
from pt2e_quant.lowering.inductor import lower_to_inductor
from quantizers.x86_inductor import X86InductorQuantizer
from quantizers.x86_inductor import get_default_x86_inductor_quantization_config as X86
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import sqnr
from tests.transformers_xnnpack.small_transformers import calls

WIDTH = 16
LINEAR = torch.ops.aten.linear.default
STATIC = get_symmetric_quantization_config(is_per_channel=True)
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)


class Block(nn.Module):
    """Pre-norm attention of two heads and a gated MLP, with channels far larger than the others after the norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-3), nn.RMSNorm(WIDTH, eps=1e-3)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (True, False, True))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)
        with torch.no_grad():
            self.norm1.weight[3], self.norm2.weight[5], self.v.weight[7], self.up.weight[2] = 60.0, -40.0, 30.0, 20.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).view(y.shape[0], -1, 2, WIDTH // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q * 0.01, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def batches(count: int = 4) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 6, WIDTH, generator=generator),) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Block().eval()


@pytest.fixture(scope="module")
def exported(model):
    return torch.export.export(model, batches()[0])


@pytest.fixture(scope="module")
def smoothed(exported):
    return smooth_quant(exported, batches())


def static_sqnr(model: nn.Module, graph, dynamic=()) -> float:
    quantizer = XNNPACKQuantizer().set_operator_type(LINEAR, STATIC)
    for site in dynamic:
        quantizer.set_node_name(site.node, DYNAMIC)
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for batch in batches():
            prepared(*batch)
        converted = convert_pt2e(prepared)
        every = [(model(*batch), converted(*batch)) for batch in batches()]
    return sqnr(*(torch.cat(parts) for parts in zip(*every, strict=True)))


def test_the_float_outputs_stay(model, smoothed):
    for batch in batches(6):
        torch.testing.assert_close(smoothed[0](*batch), model(*batch), rtol=1e-4, atol=1e-4)


def test_the_division_goes_into_norms_and_linears_where_the_algebra_holds(smoothed):
    folded = {linear: one.folded_into for one in smoothed[1] for linear in one.linears}
    assert folded == {
        "linear": "layer_norm", "linear_1": "layer_norm", "linear_2": "layer_norm",
        "linear_3": "linear_2",  # out after v, through attention
        "linear_4": "rms_norm", "linear_5": "rms_norm",
        "linear_6": "linear_5",  # down after up, through the product with the gate
    }  # fmt: skip
    assert len(calls(smoothed[0], torch.ops.aten.mul.Tensor)) == 2  # as before: q * 0.01 and the gate


def test_the_given_model_stays_as_it_was(model, exported):
    before = {name: value.clone() for name, value in exported.state_dict.items()}
    smooth_quant(exported, batches(1))
    assert all(torch.equal(before[name], value) for name, value in exported.state_dict.items())


def test_static_int8_gains(model, exported, smoothed):
    """Each group's error falls by 5 dB or more (its gain); what the quantized outputs cost stays."""
    assert min(one.gain for one in smoothed[1]) > 3
    assert static_sqnr(model, smoothed[0]) > static_sqnr(model, exported) + 4


def test_factors_follow_the_formula_for_one_alpha():
    """s = max|x|^0.5 / max|W|^0.5 for each channel, up to a common factor, which changes nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([40.0, 1.0, 1.0, 0.5]))
    x = torch.randn(64, 4)
    gm, (done,) = smooth_quant(torch.export.export(net, (x,)), [(x,)], alphas=(0.5,))
    assert done.alpha == 0.5
    peak, reach = net[0](x).abs().amax(0), net[1].weight.abs().amax(0)
    (linear,) = calls(gm, LINEAR)
    factor = getattr(gm, str(linear.args[1].target)) / net[1].weight
    expected = (peak / reach).sqrt()
    torch.testing.assert_close(factor[0] / factor[0, 0], expected / expected[0], rtol=1e-4, atol=1e-5)


def test_where_the_input_is_read_elsewhere_a_product_is_inserted_or_nothing_is_done():
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
            nn.init.constant_(self.norm.weight[:1], 50.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return y + self.linear(y)

    net, x = PostNorm().eval(), torch.randn(32, 8)
    exported = torch.export.export(net, (x,))
    gm, (done,) = smooth_quant(exported, [(x,)])
    assert done.alpha > 0
    assert done.folded_into is None
    assert len(calls(gm, torch.ops.aten.mul.Tensor)) == 1
    torch.testing.assert_close(gm(x), net(x), rtol=1e-4, atol=1e-4)
    gm, (done,) = smooth_quant(exported, [(x,)], products=False)
    assert (done.alpha, done.gain) == (0.0, 1.0)
    assert not calls(gm, torch.ops.aten.mul.Tensor)


def test_a_weight_that_two_linears_share_is_left_alone():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.linear(x)))

    x = torch.randn(16, 8) * torch.tensor([100.0] + [1.0] * 7)
    _, done = smooth_quant(torch.export.export(Shared().eval(), (x,)), [(x,)])
    assert [one.alpha for one in done] == [0.0, 0.0]


def test_no_data_is_an_error(exported):
    with pytest.raises(CalibrationError, match="there is no batch in the data"):
        smooth_quant(exported, [])
    with pytest.raises(CalibrationError, match="there is no batch in the data"):
        worst_ops(exported, [], target=20.0)


def test_the_worst_linear_is_found_first(exported):
    fallen, kept = worst_ops(exported, batches(2), target=1000.0)
    assert (len(fallen), kept) == (7, [])
    assert [site.sqnr for site in fallen] == sorted(site.sqnr for site in fallen)


def test_a_target_that_holds_already_needs_no_fallback(exported):
    assert worst_ops(exported, batches(2), target=-50.0)[0] == []


def test_falling_back_to_dynamic_reaches_the_target(model, exported):
    plain = static_sqnr(model, exported)
    fallen, kept = worst_ops(exported, batches(2), target=plain + 8)
    assert kept
    assert static_sqnr(model, exported, fallen) > plain + 5  # dynamic linears round, too


class InPlace(nn.Module):
    """A value is written to after the linear that made it, and one that a linear reads beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0
        y.add_(self.first(x))
        return self.second(y) + y


def test_in_place_operators_are_measured_like_others():
    class OutOfPlace(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2.0 + self.first(x)
            return self.second(y) + y

    one, other = (
        worst_ops(torch.export.export(kind().eval(), batches(1)[0]), batches(2), target=100.0)[0]
        for kind in (InPlace, OutOfPlace)
    )
    assert [site.sqnr for site in one] == pytest.approx([site.sqnr for site in other])


def x86_static_sqnr(model: nn.Module, graph, dynamic=()) -> float:
    quantizer = X86InductorQuantizer().set_global(X86())
    for site in dynamic:
        quantizer.set_node_name(site.node, X86(is_dynamic=True))
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for batch in batches():
            prepared(*batch)
        converted = convert_pt2e(prepared)
        program = lower_to_inductor(converted)
        assert sum(kernel.precision == "dynamic" for kernel in program.kernels) == len(dynamic)
        every = [(model(*batch), program(*batch)) for batch in batches()]
    return sqnr(*(torch.cat(parts) for parts in zip(*every, strict=True)))


@pytest.mark.slow
def test_inductor_runs_what_falls_back_as_dynamic_kernels(model, exported):
    """Inductor's dynamic linears have one scale for a whole tensor: what they gain depends on the data."""
    plain = x86_static_sqnr(model, exported)
    fallen, kept = worst_ops(exported, batches(2), target=plain + 3, outputs=False)
    assert fallen
    assert kept
    assert x86_static_sqnr(model, exported, fallen) > plain - 1


def test_shares_of_the_error_add_up_and_are_told_with_the_place(exported):
    fallen, kept = worst_ops(exported, batches(2), target=20.0)
    assert sum(site.share for site in (*fallen, *kept)) == pytest.approx(1.0)
    worst = (fallen + kept)[0]
    assert worst.module
    assert str(worst).startswith(f"{worst.node} in {worst.module}: {worst.sqnr:.1f} dB when quantized alone, ")
