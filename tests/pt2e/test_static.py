"""Static quantization: what the converted graph computes, by hand, and what it looks like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from tests.nets import MLP, ConvNet, Residual, export
from tests.pt2e.kit import (
    ACT,
    PER_CHANNEL,
    STATIC,
    ByHand,
    Toy,
    affine_by_hand,
    annotate,
    calls,
    dequantizes,
    on_grid,
    quantizes,
    relative_error,
    symmetric_by_hand,
    the_call,
)

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

# Both sides multiply the same integers by the same scales in float32; the products of a sum come in another order.
FLOAT32_SUM = 1e-5


def converted(module: nn.Module, *batches: Tensor, **kwargs: object) -> torch.fx.GraphModule:
    prepared = prepare_pt2e(export(module, batches[0], **kwargs), Toy(STATIC))
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)


@pytest.fixture(scope="module")
def mlp() -> tuple[MLP, list[Tensor], torch.fx.GraphModule]:
    """A model, its two calibration batches, and what became of it."""
    torch.manual_seed(0)
    model, batches = MLP(), [torch.randn(8, 10), torch.randn(8, 10) + 0.3]
    return model, batches, converted(model, *batches)


def test_scales_and_zero_points_are_those_of_the_observed_ranges(mlp):
    model, batches, gm = mlp
    with torch.no_grad():
        hidden = [torch.relu(model.up(batch)) for batch in batches]
        outputs = [model.down(batch) for batch in hidden]
    expected = [affine_by_hand(values) for values in (batches, hidden, outputs)]
    activations = [node for node in quantizes(gm) if node.target is decomposed.quantize_per_tensor.default]
    for node, (scale, zero_point) in zip(activations, expected, strict=True):
        assert node.args[1] == pytest.approx(scale, rel=1e-6)  # observers keep ranges in float32
        assert node.args[2] == zero_point


def test_the_output_is_that_of_the_model_with_every_tensor_rounded_by_hand(mlp):
    model, _, gm = mlp
    x = torch.randn(8, 10)
    grids = [node.args[1:3] for node in quantizes(gm)]
    up, down = (on_grid(m.weight, symmetric_by_hand(m.weight), 0, -119, 119) for m in (model.up, model.down))
    hidden = on_grid(torch.relu(on_grid(x, *grids[0]) @ up.T + model.up.bias), *grids[1])
    assert relative_error(gm(x), on_grid(hidden @ down.T, *grids[2])) < FLOAT32_SUM


def test_weights_are_the_integers_that_rounding_by_hand_gives(mlp):
    model, _, gm = mlp
    expected = {
        tuple(module.weight.shape): torch.round(module.weight / symmetric_by_hand(module.weight))
        for module in (model.up, model.down)
    }
    for name in ("_frozen_param0", "_frozen_param1"):
        frozen = gm.get_buffer(name)
        assert frozen.dtype is torch.int8
        assert torch.equal(frozen.float(), expected[tuple(frozen.shape)])


def test_scales_of_weights_are_float32_buffers_and_zero_points_int64(mlp):
    gm = mlp[2]
    kinds = {name: (value.dtype, value.dim()) for name, value in gm.named_buffers() if "frozen" not in name}
    assert kinds == {
        "_scale_0": (torch.float32, 1),
        "_scale_1": (torch.float32, 1),
        "_zero_point_0": (torch.int64, 1),
        "_zero_point_1": (torch.int64, 1),
    }


def test_no_float_copy_of_a_quantized_weight_stays_behind(mlp):
    gm = mlp[2]
    assert [name for name, value in gm.state_dict().items() if value.dtype is torch.float32 and value.dim() > 1] == []
    assert dict(gm.named_parameters()).keys() == {"up.bias"}


def test_a_quantize_of_an_activation_has_python_literals_and_positional_arguments(mlp):
    node = quantizes(mlp[2])[0]
    _, scale, zero_point, *limits = node.args
    assert (type(scale), type(zero_point), limits, node.kwargs) == (float, int, [-120, 115, torch.int8], {})


def test_a_dequantize_undoes_exactly_what_its_quantize_did(mlp):
    pairs = [(q.args[1:], dq.args[1:]) for q in quantizes(mlp[2]) for dq in q.users]
    assert pairs
    assert all(written == read for written, read in pairs)


def test_the_bias_stays_a_float_parameter(mlp):
    model, _, gm = mlp
    bias = calls(gm, aten.linear.default)[0].args[2]
    assert bias.op == "get_attr"
    assert gm.get_parameter(str(bias.target)) is model.up.bias


class Reused(nn.Module):
    """One weight read by two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 10))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.weight), self.weight)


def test_a_weight_that_two_ops_read_is_quantized_and_stored_once():
    gm = converted(Reused(), torch.randn(3, 10))
    assert [name for name, _ in gm.named_buffers() if "frozen" in name] == ["_frozen_param0"]


def test_a_weight_that_two_ops_read_has_one_dequantize_for_each():
    gm = converted(Reused(), torch.randn(3, 10))
    first, second = (node.args[1] for node in calls(gm, aten.linear.default))
    assert first is not second
    assert first.args == second.args


class Fork(nn.Module):
    """A convolution read by a float op, by a quantized one and by the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.next = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.conv(x)
        return x, self.next(x), torch.sigmoid(x)


def test_every_dequantize_has_one_user():
    gm = converted(Fork(), torch.randn(1, 3, 4, 4))
    assert len(the_call(gm, aten.sigmoid.default).args[0].args[0].users) == 3
    assert all(len(node.users) == 1 for node in dequantizes(gm))


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: torch.cat([x, x], 1), aten.cat.default),
        (lambda x: x + x, aten.add.Tensor),
    ],
    ids=["cat", "add"],
)
def test_an_op_that_reads_a_tensor_twice_has_two_dequantizes(function, op):
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    node = the_call(converted(Model(), torch.randn(2, 3)), op)
    first, second = node.all_input_nodes
    assert first.args == second.args
    assert all(len(item.users) == 1 for item in (first, second))


def test_value_preserving_ops_keep_the_scale_of_their_producer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2))
    pool = the_call(converted(model, torch.randn(1, 3, 9, 9)), aten.max_pool2d.default)
    (after,) = pool.users
    assert pool.args[0].args[1:] == after.args[1:]


def test_what_is_inside_a_pattern_is_not_rounded():
    gm = converted(Residual(), torch.randn(2, 4, 6, 6))
    assert [str(user.target) for user in the_call(gm, aten.add.Tensor).users] == [
        "quantized_decomposed.quantize_per_tensor.default"
    ]
    (relu,) = (user for node in calls(gm, aten.relu.default) for user in node.users)
    assert relu.target is aten.mul.Tensor  # no rule of this backend takes relu alone or mul


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("net", [ConvNet, Residual], ids=lambda kind: kind.__name__)
def test_a_quantized_model_stays_close_to_the_float_one(net, strict):
    """8 bits: 20 dB is far below what MinMax ranges give on normal data (30 to 40 dB), and far above noise (0 dB)."""
    torch.manual_seed(0)
    x = torch.randn(4, 4 if net is Residual else 3, 16, 16)
    model = net()
    gm = converted(model, x, strict=strict)
    expected = model(x)
    noise = (gm(x) - expected).square().mean() / expected.square().mean()
    assert -10 * torch.log10(noise).item() > 20


def test_unfolded_weights_give_the_same_values_and_stay_in_float():
    x = torch.randn(3, 10)
    prepared = prepare_pt2e(export(MLP(), x), Toy(STATIC))
    prepared(x)
    unfolded = convert_pt2e(prepared, fold_quantize=False)
    assert unfolded.get_parameter("down.weight").dtype is torch.float32
    torch.testing.assert_close(unfolded(x), convert_pt2e(prepared)(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_get_their_own_dtype_back(dtype):
    model, x = MLP().to(dtype), torch.randn(3, 10, dtype=dtype)
    gm = converted(model, x)
    activations = [node for node in dequantizes(gm) if "per_tensor" in str(node.target)]
    assert [node.kwargs for node in dequantizes(gm)] == [{"out_dtype": dtype}] * len(dequantizes(gm))
    assert activations
    assert gm(x).dtype is dtype
    # 8-bit steps (1 / 235 of a range) and half-precision sums of 24 products stay below 5 percent of the largest value
    assert relative_error(gm(x).float(), model(x).float()) < 0.05


def test_float32_models_have_no_out_dtype(mlp):
    assert {tuple(node.kwargs) for node in dequantizes(mlp[2])} == {()}


def test_a_computed_constant_weight_folds():
    """weight_norm computes the weight from two parameters; both are gone and the integers are those of its value."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    gm = converted(model, torch.randn(3, 6))
    expected = torch.round(model.weight / symmetric_by_hand(model.weight))
    assert torch.equal(gm._frozen_param0.float(), expected)
    assert dict(gm.named_parameters()).keys() == {"bias"}


class WithKeywords(nn.Module):
    """Inputs by keyword and in a dict, integer and boolean ones among them; a dict with None comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, *, tokens: Tensor, options: dict[str, Tensor]) -> dict[str, Tensor | None]:
        x = self.table(tokens + 1).masked_fill(options["mask"].unsqueeze(-1), 0.0)
        return {"logits": self.head(x), "count": options["mask"].sum(), "nothing": None}


def test_keyword_inputs_and_dict_outputs_keep_their_structure():
    torch.manual_seed(0)
    inputs = {"tokens": torch.randint(0, 10, (2, 4)), "options": {"mask": torch.rand(2, 4) > 0.5}}
    model = WithKeywords().eval()
    prepared = prepare_pt2e(torch.export.export(model, (), inputs), Toy(STATIC))
    prepared(**inputs)
    outputs, expected = convert_pt2e(prepared)(**inputs), model(**inputs)
    assert outputs.keys() == expected.keys()
    assert outputs["nothing"] is None
    assert outputs["count"] == expected["count"]
    assert relative_error(outputs["logits"], expected["logits"]) < 0.05  # two or three of the 235 steps of 8 bits


def test_a_custom_annotation_may_leave_the_output_in_float():
    """Quantized inputs and a float output: the rounding is that of the inputs alone."""
    model, x = nn.Linear(6, 5), torch.randn(3, 6)

    def function(gm: torch.fx.GraphModule) -> None:
        node = the_call(gm, aten.linear.default)
        annotate(node, {node.args[0]: ACT, node.args[1]: PER_CHANNEL})

    prepared = prepare_pt2e(export(model, x), ByHand(function))
    prepared(x)
    scale, zero_point = affine_by_hand([x])
    weight = on_grid(model.weight, symmetric_by_hand(model.weight), 0, -119, 119)
    expected = on_grid(x, scale, zero_point) @ weight.T + model.bias
    assert relative_error(convert_pt2e(prepared)(x), expected) < FLOAT32_SUM
