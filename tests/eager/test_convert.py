"""prepare and convert beside torch.ao's on the same model, and what is an error here and silent there."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant.eager import (
    DeQuantStub,
    QuantStub,
    convert,
    default_eval_fn,
    fuse_modules,
    prepare,
    quantize,
    swap_report,
)
from pt2e_quant.errors import ConversionError, CoverageError
from pt2e_quant.nn import intrinsic, quantized
from pt2e_quant.nn.quantized import FloatFunctional
from pt2e_quant.qconfig import default_qconfig, float_qparams_weight_only_qconfig, get_default_qconfig


class Net(nn.Module):
    """Residual, with what eager mode knows: a fused convolution, functionals, an activation, a norm."""

    def __init__(self, stubs: Any = (QuantStub, DeQuantStub), functional: Any = FloatFunctional) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = (kind() for kind in stubs)
        self.conv1, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.act, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Hardswish(), nn.GroupNorm(2, 8)
        self.sum, self.drop, self.fc = functional(), nn.Dropout(), nn.Linear(8, 5)
        nn.init.uniform_(self.bn.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.bn(self.conv1(self.quant(x))))
        y = self.sum.add_relu(self.norm(self.act(self.conv2(y))), y)
        return self.dequant(self.fc(self.drop(y.mean((2, 3)))))


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = [["conv1", "bn", "relu"]]


def calibrated(model: nn.Module, **options: Any) -> Any:
    made = fuse_modules(model.eval(), ROWS)
    made.qconfig = get_default_qconfig("x86")  # type: ignore[assignment]
    made = prepare(made, **options)
    made(X)
    return made


def peers() -> Any:
    import torch.ao.quantization as theirs

    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's modules and types are deprecated
        functional = torch.ao.nn.quantized.FloatFunctional
        model = theirs.fuse_modules(Net((theirs.QuantStub, theirs.DeQuantStub), functional).eval(), ROWS)
        model.qconfig = theirs.get_default_qconfig("x86")
        prepared = theirs.prepare(model)
        prepared(X)
        return prepared, theirs.convert(prepared)


def classes(model: nn.Module) -> dict[str, str]:
    """Without what packed modules hold."""
    return {n: type(m).__name__ for n, m in model.named_modules() if "_packed_params" not in n}


def grids(model: nn.Module) -> dict[str, tuple[float, int]]:
    return {
        n: (float(m.scale), int(m.zero_point))
        for n, m in model.named_modules()
        if hasattr(m, "scale") and hasattr(m, "zero_point")
    }


@pytest.mark.filterwarnings("ignore")
def test_observers_classes_grids_and_outputs_are_the_peers() -> None:
    prepared = calibrated(Net())
    wanted_prepared, wanted = peers()
    assert classes(prepared) == classes(wanted_prepared)
    assert list(prepared.state_dict()) == list(wanted_prepared.state_dict())
    made = convert(prepared)
    assert classes(made) == classes(wanted)
    for name, (scale, zero_point) in grids(wanted).items():
        assert grids(made)[name][0] == pytest.approx(scale, rel=1e-6)
        assert grids(made)[name][1] == zero_point
    step = grids(wanted)["fc"][0]
    assert (made(X) - wanted(X)).abs().max() <= 2 * step  # a layer rounds ties its own way, and the last adds a step


def test_the_model_that_was_given_is_left_alone_unless_in_place() -> None:
    model = Net().eval()
    model.qconfig = default_qconfig  # type: ignore[assignment]
    prepared = prepare(model)
    assert not hasattr(model.fc, "activation_post_process")
    assert prepare(model, inplace=True) is model
    model(X)
    assert convert(model, inplace=True) is model
    assert isinstance(model.fc, quantized.Linear)
    assert isinstance(prepared.fc, nn.Linear)


def test_nothing_of_prepare_is_left_after_convert() -> None:
    made = convert(calibrated(Net()))
    assert not any(hasattr(module, "qconfig") for module in made.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
    kept = convert(calibrated(Net()), remove_qconfig=False)
    assert kept.qconfig == get_default_qconfig("x86")


def test_hooks_of_the_user_stay_and_see_quantized_tensors() -> None:
    prepared, seen = calibrated(Net()), list[bool]()
    prepared.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_quantized))
    prepared.conv2.register_forward_hook(lambda module, inputs, output: seen.append(output.is_quantized))
    prepared(X)
    convert(prepared)(X)
    assert seen == [False, False, True, True]


def test_a_qconfig_of_none_leaves_a_module_in_float_and_the_report_says_so() -> None:
    model = nn.Sequential(QuantStub(), nn.Linear(3, 3), DeQuantStub(), nn.Linear(3, 3)).eval()
    model.qconfig, model[3].qconfig = default_qconfig, None  # type: ignore[assignment]
    prepared = prepare(model)
    prepared(torch.randn(4, 3))
    made = convert(prepared)
    assert [type(one) for one in made] == [quantized.Quantize, quantized.Linear, quantized.DeQuantize, nn.Linear]  # type: ignore[attr-defined]
    assert [(one.name, "given None" in one.reason) for one in swap_report(made).stayed] == [("3", True)]


def test_a_module_that_stands_twice_is_observed_once_and_stays_one() -> None:
    linear = nn.Linear(3, 3)
    model = nn.Sequential(QuantStub(), nn.Sequential(linear), nn.Sequential(linear), DeQuantStub()).eval()
    model.qconfig = default_qconfig  # type: ignore[assignment]
    prepared: Any = prepare(model)
    assert len(prepared[1][0]._forward_hooks) == 1
    prepared(torch.randn(4, 3))
    made: Any = convert(prepared)
    assert made[1][0] is made[2][0]


def test_a_subclass_that_keeps_forward_is_quantized_and_another_named() -> None:
    class Plain(nn.Linear):
        pass

    class Loud(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(QuantStub(), Plain(3, 3), DeQuantStub(), Loud(3, 3)).eval()
    model.qconfig = default_qconfig  # type: ignore[assignment]
    prepared = prepare(model)
    prepared(torch.randn(4, 3))
    made = convert(prepared)
    assert isinstance(made[1], quantized.Linear)  # type: ignore[index]
    assert "has a forward of its own" in swap_report(made).stayed[0].reason


def test_embeddings_take_the_qconfig_of_their_own() -> None:
    model: Any = nn.Sequential(nn.Embedding(10, 4), QuantStub(), nn.Linear(4, 2), DeQuantStub()).eval()
    model.qconfig, model[0].qconfig = default_qconfig, float_qparams_weight_only_qconfig
    tokens = torch.arange(10)
    made = quantize(model, default_eval_fn, [[(tokens, None)]])
    assert isinstance(made[0], quantized.Embedding)  # type: ignore[index]
    # the 8-bit steps of the input, the weight and the result, of values of about 1
    assert (made(tokens) - model(tokens)).abs().max() < 0.05


class Observed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)

    @classmethod
    def from_float(cls, module: Any) -> Observed:
        return cls(module)


class Mine(nn.Linear):
    pass


def test_custom_modules_go_through_their_own_classes() -> None:
    model: Any = nn.Sequential(QuantStub(), nn.Sequential(Mine(3, 3)), DeQuantStub()).eval()
    model.qconfig = default_qconfig

    prepared: Any = prepare(
        model, prepare_custom_config_dict={"float_to_observed_custom_module_class": {Mine: Observed}}
    )
    assert isinstance(prepared[1][0], Observed)
    assert hasattr(prepared[1][0], "activation_post_process")
    prepared(torch.randn(4, 3))
    into = {"observed_to_quantized_custom_module_class": {Observed: Final}}
    made: Any = convert(prepared, convert_custom_config_dict=into)
    assert isinstance(made[1][0], Final)


class Final(nn.Module):
    @classmethod
    def from_observed(cls, module: Any) -> Final:
        return cls()


def test_lists_say_what_is_observed() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1))).eval()
    model.qconfig = default_qconfig
    only = prepare(model, allow_list=[nn.Linear], observer_non_leaf_module_list=None)
    assert [name for name, _ in only.named_modules() if name.endswith("post_process")] == ["0.activation_post_process"]
    whole = prepare(model, observer_non_leaf_module_list=[nn.Sequential])
    assert [name for name, _ in whole.named_modules() if "." not in name and "post" in name] == [
        "activation_post_process"
    ]


def test_reference_modules_have_the_grid_of_the_weight() -> None:
    prepared = calibrated(Net())
    made: Any = convert(prepared, is_reference=True)
    static: Any = convert(prepared)
    assert isinstance(made.conv2, quantized.reference.Conv2d)
    assert torch.equal(made.conv2.get_quantized_weight().int_repr(), static.conv2.weight().int_repr())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: prepare(nn.Linear(3, 3)), CoverageError, "no module of Linear has a qconfig"),
        (lambda: prepare(calibrated(Net())), ConversionError, "is observed already"),
        (
            lambda: convert(nn.Sequential(nn.Linear(3, 3))),
            ConversionError,
            "nothing of Sequential would be quantized. 0",
        ),
        (
            lambda: prepare(Net(), prepare_custom_config_dict={"float_to_observed_module_class": {}}),
            ConversionError,
            "Did you mean 'float_to_observed_custom_module_class'",
        ),
    ],
)
def test_what_cannot_be_done_is_said(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        change()


def test_a_model_that_saw_no_data_is_an_error() -> None:
    model = copy.deepcopy(Net()).eval()
    model.qconfig = default_qconfig  # type: ignore[assignment]
    with pytest.raises(
        ConversionError, match="Net has observers, none of which saw data; run at least one batch"
    ) as caught:
        convert(prepare(model))
    assert "load_quantized(float_model, state_dict)" in str(caught.value)


def test_a_module_that_never_ran_stays_float_and_is_named() -> None:
    """As the unused sums of torchvision's MobileNetV2."""
    model = Net().eval()
    model.extra, model.spare, model.qconfig = nn.Linear(3, 3), FloatFunctional(), default_qconfig  # type: ignore[assignment]
    prepared = prepare(model)
    prepared(X)
    made: Any = convert(prepared)
    assert isinstance(made.extra, nn.Linear)
    assert [(one.name, "never ran" in one.reason) for one in swap_report(made).stayed] == [
        ("extra", True),
        ("spare", True),
    ]


def test_containers_are_one_module() -> None:
    made = convert(calibrated(Net()))
    assert isinstance(made.conv1, intrinsic.quantized.ConvReLU2d)
