"""quantize_dynamic beside torch.ao's on the same models, and where it goes further: subclasses, names, reports."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant.eager import default_dynamic_mapping, propagate_qconfig_, quantize_dynamic, swap_module, swap_report
from pt2e_quant.errors import CalibrationError, ConversionError, TargetingError
from pt2e_quant.nn import intrinsic
from pt2e_quant.nn.quantized import Embedding, EmbeddingBag, dynamic
from pt2e_quant.qconfig import default_dynamic_qconfig, float16_dynamic_qconfig, per_channel_dynamic_qconfig
from pt2e_quant.qtensor import quantize_per_tensor
from pt2e_quant.sqnr import sqnr


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.head = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.lstm(self.embed(tokens))[0])


TOKENS = torch.arange(18).reshape(2, 9)


class Loud(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Plain(nn.Linear):
    pass


def peer(model: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic as theirs

    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's types and modules are deprecated
        return theirs(model, *arguments, **options)  # type: ignore[no-any-return]


def classes(model: nn.Module) -> dict[str, str]:
    """By path, those of the modules that a user sees, without what a packed one holds."""
    hidden = ("_packed_params", "_all_weight_values")
    return {n: type(m).__name__ for n, m in model.named_modules() if not any(part in n for part in hidden)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (None, torch.qint8),
        (None, torch.float16),
        (None, torch.quint8),
        ({nn.Linear}, torch.qint8),
        ({"head.0", nn.LSTM}, torch.qint8),
        ({"head"}, torch.float16),
    ],
)
def test_the_same_modules_are_swapped_as_by_the_peer(spec: Any, dtype: torch.dtype) -> None:
    ours, theirs = quantize_dynamic(Tagger(), spec, dtype), peer(Tagger(), spec, dtype)
    assert classes(ours) == classes(theirs)
    assert [m.training for m in ours.modules()] == [False] * len(list(ours.modules()))
    wanted = Tagger().eval()(TOKENS)
    assert sqnr(wanted, ours(TOKENS)) > sqnr(wanted, theirs(TOKENS)) - 0.1  # float16: sums in another order
    assert not any(hasattr(module, "qconfig") for module in ours.modules())


def test_the_model_that_was_given_is_left_alone_unless_in_place() -> None:
    model = Tagger()
    before = copy.deepcopy(model.state_dict())
    quantize_dynamic(model)
    assert model.training
    assert isinstance(model.head[0], nn.Linear)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert quantize_dynamic(model, inplace=True) is model
    assert isinstance(model.head[0], dynamic.Linear)


def test_a_model_that_is_one_layer_is_replaced_itself() -> None:
    assert isinstance(quantize_dynamic(nn.Linear(4, 3)), dynamic.Linear)
    kept = nn.Linear(4, 3)
    assert quantize_dynamic(kept, inplace=True) is kept
    assert "cannot be replaced in place" in swap_report(kept).stayed[0].reason


def test_a_subclass_is_swapped_unless_it_computes_something_else() -> None:
    made = quantize_dynamic(nn.Sequential(Plain(4, 4), Loud(4, 4)), {nn.Linear})
    assert [type(module) for module in made] == [dynamic.Linear, Loud]  # type: ignore[attr-defined]
    (stayed,) = swap_report(made).stayed
    assert (stayed.name, stayed.kind) == ("1", "Loud")
    assert "forward of its own" in stayed.reason


def test_a_mapping_names_the_form_of_a_subclass() -> None:
    mapping = {**default_dynamic_mapping(), Loud: dynamic.Linear}
    assert isinstance(quantize_dynamic(nn.Sequential(Loud(4, 4)), mapping=mapping)[0], dynamic.Linear)  # type: ignore[index]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"haed"}, "no module 'haed'. Did you mean 'head'"),
        ({"head.3": default_dynamic_qconfig}, "no module 'head.3'"),
        ({nn.GRU}, r"no module of \['GRU'\]"),
        ({3}, "the path of a module or by a class of modules, not by 3"),
        ({"head": 8}, "'head' is given 8; give a QConfig"),
    ],
)
def test_a_key_that_matches_nothing_is_an_error(spec: Any, message: str) -> None:
    with pytest.raises(TargetingError, match=message):
        quantize_dynamic(Tagger(), spec)


def test_one_class_of_several_that_is_not_there_is_reported() -> None:
    made = quantize_dynamic(Tagger(), {nn.Linear, nn.GRU})
    assert swap_report(made).unused == ("GRU",)
    assert "no module is a GRU" in swap_report(made).text()


def test_a_type_without_defaults_is_an_error() -> None:
    with pytest.raises(ConversionError, match=r"no defaults for weights of torch.int16; pass one of torch.qint8"):
        quantize_dynamic(Tagger(), dtype=torch.int16)


def test_a_dict_gives_each_its_own_and_none_leaves_float() -> None:
    made: Any = quantize_dynamic(
        Tagger(), {nn.Linear: per_channel_dynamic_qconfig, "head.2": None, "lstm": float16_dynamic_qconfig}
    )
    assert made.head[0].weight().axis == 0
    assert type(made.head[2]) is nn.Linear
    assert made.lstm.dtype is torch.float16


def test_what_a_qconfig_cannot_do_names_the_module_and_the_way_out() -> None:
    with pytest.raises(ConversionError, match=r"module 'embed', Embedding: .*give its path the qconfig None"):
        quantize_dynamic(Tagger(), {"": default_dynamic_qconfig})


def test_the_report_says_what_was_swapped_and_what_stayed() -> None:
    report = swap_report(quantize_dynamic(nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.BatchNorm1d(4))))
    assert [(one.name, one.before, one.after) for one in report.swapped] == [("1", "Linear", "DynamicQuantizedLinear")]
    assert [(one.name, one.kind) for one in report.stayed] == [("0", "Conv1d"), ("2", "BatchNorm1d")]
    assert str(report).splitlines()[0] == "1 modules quantized, 2 with parameters stayed float"
    with pytest.raises(ConversionError, match="has no report"):
        swap_report(nn.Linear(2, 2))


def test_a_module_in_two_places_stays_one() -> None:
    shared = nn.Linear(4, 4)
    made: Any = quantize_dynamic(nn.Sequential(shared, shared))
    assert made[0] is made[1]
    assert isinstance(made[0], dynamic.Linear)


def test_hooks_go_along() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    quantize_dynamic(model)(torch.ones(1, 4))
    assert seen == ["before", "after"]


@pytest.mark.filterwarnings("ignore")  # of nested tensors, which torch calls a prototype
@pytest.mark.parametrize("mask", [None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])], ids=["whole", "padded"])
def test_transformer_encoders_run_in_evaluation(mask: Tensor | None) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    made: Any = quantize_dynamic(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted, given = model(x, src_key_padding_mask=mask), made(x, src_key_padding_mask=mask)
    keep = slice(0, 3)  # torch's kernel writes zeros to padded places
    assert sqnr(wanted[:, keep], given[:, keep]) > 30  # 8-bit inputs and weights of four linears
    assert isinstance(made.layers[0].linear1, dynamic.Linear)
    assert type(made.layers[0].self_attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    reasons = {one.name: one.reason for one in swap_report(made).stayed}
    assert "computes with its weight" in reasons["layers.0.self_attn.out_proj"]


@pytest.mark.parametrize("dtype", [torch.quint8, torch.quint4x2])
def test_embeddings_take_their_types(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"one": nn.Embedding(10, 4), "bag": nn.EmbeddingBag(10, 4)})
    made = quantize_dynamic(model, dtype=dtype)
    assert isinstance(made["bag"], EmbeddingBag)  # type: ignore[index]
    assert isinstance(made["one"], Embedding) == (dtype is torch.quint8)  # type: ignore[index]


def test_propagate_qconfig_goes_from_the_outside_to_the_inside() -> None:
    model = Tagger()
    model.head[2].qconfig = None  # type: ignore[assignment]
    propagate_qconfig_(model, {"head": default_dynamic_qconfig, nn.Linear: float16_dynamic_qconfig, "head.0": None})
    given = {name: module.qconfig for name, module in model.named_modules()}
    assert given == {
        "": None, "embed": None, "lstm": None, "head": default_dynamic_qconfig, "head.0": None,
        "head.1": default_dynamic_qconfig, "head.2": None,
    }  # fmt: skip


def test_swap_module_leaves_alone_what_has_no_qconfig() -> None:
    linear: Any = nn.Linear(4, 3)
    assert swap_module(linear, default_dynamic_mapping(), {}) is linear
    linear.qconfig = default_dynamic_qconfig
    assert isinstance(swap_module(linear, default_dynamic_mapping(), {}), dynamic.Linear)


def test_a_fused_linear_counts_as_a_linear() -> None:
    model: Any = nn.Sequential(intrinsic.LinearReLU(nn.Linear(8, 4), nn.ReLU())).eval()
    made: Any = quantize_dynamic(model, {nn.Linear})
    assert isinstance(made[0], intrinsic.quantized.dynamic.LinearReLU)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert sqnr(model(x), made(x)) > 35


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_is_an_error_wherever_it_stands(value: float) -> None:
    quantized = quantize_dynamic(nn.Sequential(nn.Linear(24, 5)))
    for at in range(48):  # torch's kernel sees a NaN in some of these places alone
        x = torch.ones(2, 24)
        x.view(-1)[at] = value
        with pytest.raises(CalibrationError, match="finite"):
            quantized(x)


def test_finite_values_whose_sum_is_not_are_taken() -> None:
    quantized: Any = quantize_dynamic(nn.Sequential(nn.Linear(2, 1, bias=False)))
    quantized[0].set_weight_bias(quantize_per_tensor(torch.tensor([[1.0, 0.0]]), 1.0, 0, torch.qint8), None)
    x = torch.full((1, 2), 3e38)  # float32 ends at 3.4e38
    torch.testing.assert_close(quantized(x), torch.tensor([[3e38]]))  # the upper end of a range has a code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(), (0,), (3,)])
def test_the_type_and_the_leading_dimensions_of_the_input_are_kept(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    made = quantize_dynamic(nn.Sequential(intrinsic.LinearReLU(nn.Linear(24, 5), nn.ReLU())))(
        torch.randn(*rows, 24, dtype=dtype)
    )
    assert (made.dtype, made.shape) == (dtype, (*rows, 5))
    assert not (made < 0).any()
