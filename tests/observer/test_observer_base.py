"""What all observers have in common: the arguments they accept, the input they return, checkpoints, errors."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from observer_data import REFERENCES, torch_ao

import pt2e_quant.observer as ours
from pt2e_quant.errors import CalibrationError, QuantizationError, SpecError

RANGE_OBSERVERS = [
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "PerChannelMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "HistogramObserver",
]
OBSERVERS = [*RANGE_OBSERVERS, "FixedQParamsObserver", "PlaceholderObserver"]
NEEDED = {"FixedQParamsObserver": {"scale": 0.037, "zero_point": 11}}


def make(name: str, module: object = ours, **arguments: object):
    return getattr(module, name)(**NEEDED.get(name, {}), **arguments)


# --- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVERS)
def test_positional_arguments_have_the_order_of_the_reference(name):
    def names(kind: type) -> list[str]:
        return [p for p in inspect.signature(kind).parameters if p not in ("kwargs", "factory_kwargs")]

    assert names(getattr(ours, name)) == names(getattr(torch_ao, name))


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": torch.int8},
        {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127, "eps": 2**-12},
        {"dtype": torch.uint8, "quant_min": 0, "quant_max": 200},
        {"dtype": torch.int16},
        {"dtype": torch.uint16},
        {"dtype": torch.int32},
    ],
)
def test_attributes_and_buffers_are_those_of_the_reference(name, reference, arguments):
    mine, theirs = make(name, **arguments), make(name, reference, **arguments)
    for attribute in ("dtype", "qscheme", "quant_min", "quant_max", "is_dynamic", "reduce_range"):
        assert getattr(mine, attribute) == getattr(theirs, attribute), attribute
    assert mine.has_customized_qrange == theirs.has_customized_qrange
    assert {k: (v.shape, v.dtype) for k, v in mine.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.state_dict().items()
    }
    assert torch.equal(mine.eps, theirs.eps)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_the_fields_of_a_spec_are_accepted(name):
    per_channel = "PerChannel" in name
    fields = {
        "dtype": torch.int8,
        "quant_min": -100,
        "quant_max": 90,
        "qscheme": torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        "is_dynamic": False,
        **({"ch_axis": 1} if per_channel else {}),
    }
    observer = getattr(ours, name).with_args(eps=2**-12)(**fields)
    assert {field: getattr(observer, field) for field in fields} == fields
    unset = getattr(ours, name)(dtype=torch.int8, quant_min=None, quant_max=None, qscheme=None)
    assert (unset.quant_min, unset.quant_max) == (-128, 127)
    assert unset.qscheme == (torch.per_channel_affine if per_channel else torch.per_tensor_affine)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_a_bound_that_is_not_given_is_that_of_the_dtype(name):
    observer = make(name, dtype=torch.int8, quant_min=-127)
    assert (observer.quant_min, observer.quant_max) == (-127, 127)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("MinMaxObserver", {"quant_min": -128, "quant_max": 127}, r"\[-128, 127\] is not a range of torch.quint8"),
        ("MinMaxObserver", {"dtype": torch.int8, "quant_min": 5, "quant_max": 5}, "is not a range"),
        ("MinMaxObserver", {"quant_min": 16, "quant_max": 240}, "must contain 0"),
        ("MinMaxObserver", {"dtype": torch.float16}, "PlaceholderObserver for a cast"),
        ("MinMaxObserver", {"dtype": torch.int64}, "at most 32 bits"),
        ("MinMaxObserver", {"dtype": "int8"}, "must be a torch.dtype"),
        ("MinMaxObserver", {"qscheme": torch.per_channel_affine}, "pass one of torch.per_tensor_affine"),
        ("MinMaxObserver", {"eps": 0.0}, "eps is the smallest scale"),
        ("PerChannelMinMaxObserver", {"qscheme": torch.per_tensor_affine}, "pass one of torch.per_channel_affine"),
        ("PerChannelMinMaxObserver", {"is_dynamic": True}, "per tensor or per token"),
        ("MovingAveragePerChannelMinMaxObserver", {"is_dynamic": True}, "per tensor or per token"),
        ("MovingAveragePerChannelMinMaxObserver", {"averaging_constant": 1.5}, r"in \(0, 1\], got 1.5"),
        ("MovingAverageMinMaxObserver", {"averaging_constant": 0.0}, r"in \(0, 1\], got 0.0"),
        ("MovingAverageMinMaxObserver", {"is_dynamic": True}, "use averaging_constant=1"),
        ("HistogramObserver", {"is_dynamic": True}, "is_dynamic=True; use PlaceholderObserver"),
        ("HistogramObserver", {"bins": 0}, "needs an integer dtype, 1 to 16777216 bins"),
        ("HistogramObserver", {"dtype": torch.float8_e4m3fn}, "needs an integer dtype"),
        ("FixedQParamsObserver", {"dtype": torch.float32}, "need an integer dtype"),
        ("FixedQParamsObserver", {"qscheme": torch.per_channel_affine}, "a per-tensor scheme"),
        ("FixedQParamsObserver", {"is_dynamic": True}, "is_dynamic=False"),
        ("FixedQParamsObserver", {"quant_max": 256}, r"\[0, 256\] is not a range of torch.quint8"),
        ("FixedQParamsObserver", {"quant_min": 12}, r"zero_point 11 lies outside \[12, 255\]"),
        ("PlaceholderObserver", {"dtype": torch.int8, "quant_max": 128}, r"\[-128, 128\] is not a range"),
        ("PlaceholderObserver", {"eps": float("nan")}, "eps is the smallest scale"),
    ],
)
def test_illegal_arguments_are_refused(name, arguments, message):
    with pytest.raises(SpecError, match=message):
        make(name, **arguments)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("inf"), float("nan")])
def test_a_fixed_scale_must_be_a_step(scale):
    with pytest.raises(SpecError, match="finite and greater than 0"):
        ours.FixedQParamsObserver(scale=scale, zero_point=0)


def test_a_reduced_range_has_one_bit_less():
    """No warning as in the reference: the ready-made qconfigs for x86 reduce the range."""
    for arguments, bounds in [({"dtype": torch.qint8}, (-64, 63)), ({}, (0, 127)), ({"quant_max": 201}, (0, 100))]:
        observer = ours.MinMaxObserver(reduce_range=True, **arguments)
        assert (observer.quant_min, observer.quant_max) == bounds
    with pytest.raises(SpecError, match=r"use torch\.qint8"):
        ours.MinMaxObserver(reduce_range=True, qscheme=torch.per_tensor_symmetric)


def test_8_bit_floats_have_a_range_as_well():
    observer = ours.MinMaxObserver(dtype=torch.float8_e4m3fn, qscheme=torch.per_tensor_symmetric)
    observer(torch.tensor([-896.0, 20.0]))
    assert (observer.quant_min, observer.quant_max) == (-448, 448)
    assert [end.item() for end in observer.calculate_qparams()] == [2.0, 0]


@pytest.mark.parametrize(
    ("arguments", "zero_point"),
    [({}, 128), ({"quant_min": 0, "quant_max": 255}, 127), ({"quant_min": 0, "quant_max": 200}, 100)],
)
def test_the_middle_of_unsigned_bounds_is_rounded_as_the_reference_does(arguments, zero_point):
    symmetric = {"dtype": torch.uint8, "qscheme": torch.per_tensor_symmetric, **arguments}
    for module in (ours, torch_ao):
        observer = module.MinMaxObserver(**symmetric)
        observer(torch.tensor([-1.0, 3.0]))
        assert observer.calculate_qparams()[1].item() == zero_point


# --- watching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_input_comes_back_unchanged(name, dtype):
    x = (torch.randn(3, 5) * 4).to(dtype).requires_grad_()
    before = x.detach().clone()
    observer = make(name)
    assert observer(x) is x
    assert torch.equal(x, before)
    assert x.grad_fn is None
    assert all(not b.requires_grad and b.dtype in (torch.float32, torch.int32) for b in observer.buffers())


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_give_the_range_of_the_same_numbers_in_float32(name, dtype):
    x = (torch.randn(4, 3000) * 11).to(dtype)
    observers = make(name), make(name)
    observers[0](x)
    observers[1](x.float())
    for mine, expected in zip(observers[0].state_dict().values(), observers[1].state_dict().values(), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_the_layout_in_memory_does_not_matter(name):
    x = torch.randn(2, 8, 33, 70)
    views = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "strided": torch.randn(2, 8, 33, 140)[..., ::2].copy_(x),
    }
    expected = make(name)
    expected(x)
    for view in views.values():
        observer = make(name)
        observer(view)
        for mine, theirs in zip(observer.buffers(), expected.buffers(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_an_empty_tensor_is_no_data(name):
    observer = make(name)
    observer(torch.empty(0, 7))
    assert not observer.has_data
    observer(torch.tensor([[-1.5], [2.5]]))
    state = copy.deepcopy(observer.state_dict())
    observer(torch.empty(2, 0))
    assert observer.has_data
    assert all(torch.equal(state[key], value) for key, value in observer.state_dict().items())


@pytest.mark.parametrize("name", ["FixedQParamsObserver", "PlaceholderObserver"])
def test_some_observers_need_no_data(name):
    assert make(name).has_data


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
@pytest.mark.parametrize("kind", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_observers_run_in_every_grad_mode(name, kind):
    observer = make(name)
    with kind():
        observer(torch.tensor([[-1.0, 2.0], [3.0, -0.5]]))
    observer(torch.tensor([[-4.0, 2.0], [5.0, -0.5]]))
    assert observer.has_data


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_an_observer_can_forget(name):
    observer = make(name)
    fresh = copy.deepcopy(observer.state_dict())
    observer(torch.randn(3, 4))
    observer.reset_min_max_vals()
    assert not observer.has_data
    assert all(torch.equal(fresh[key], value) for key, value in observer.state_dict().items())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_qparams_without_data_are_an_error_that_names_the_place(name):
    observer = make(name)
    observer.site = "node add_3 = aten.add.Tensor(x, y)"
    with pytest.raises(CalibrationError, match=r"node add_3 .* saw no data.*\n.*Run at least one batch"):
        observer.calculate_qparams()


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_nan_is_an_error_and_leaves_no_trace(name):
    observer = make(name)
    observer.site = "node exp = aten.exp.default(x)"
    observer(torch.tensor([[-1.5, 0.5], [2.5, 1.0], [0.0, 0.25]]))
    state = copy.deepcopy(observer.state_dict())
    with pytest.raises(CalibrationError, match=r"node exp .*: 2 NaN among 6 values") as error:
        observer(torch.tensor([[-3.0, 0.75], [2.0, torch.inf], [torch.nan, torch.nan]]))
    assert "leave this place in float" in str(error.value)
    assert all(torch.equal(state[key], value) for key, value in observer.state_dict().items())


def test_an_observer_outside_of_a_graph_says_what_it_is():
    with pytest.raises(CalibrationError, match=r"a MinMaxObserver outside of any graph: 1 NaN among 1 values"):
        ours.MinMaxObserver()(torch.tensor([torch.nan]))


def test_a_base_class_does_not_know_how_to_forget():
    class Mine(ours.UniformQuantizationObserverBase):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            return self._calculate_qparams(torch.tensor(-1.0), torch.tensor(float("inf")))

    with pytest.raises(NotImplementedError, match="Mine"):
        Mine().reset_min_max_vals()
    with pytest.raises(QuantizationError, match=r"a Mine outside of any graph: \[-1, inf\] is not a range"):
        Mine().calculate_qparams()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("name", OBSERVERS)
def test_state_dicts_load_both_ways(name, reference):
    arguments = {} if name == "PlaceholderObserver" else {"dtype": torch.quint8}
    mine, theirs = make(name, **arguments), make(name, reference, **arguments)
    for observer in (mine, theirs):
        observer(torch.randn(6, 500) * 3)
    for source, target in ((mine, make(name, reference, **arguments)), (theirs, make(name, **arguments))):
        target.load_state_dict(source.state_dict(), strict=True)
        if name != "PlaceholderObserver":
            for expected, got in zip(source.calculate_qparams(), target.calculate_qparams(), strict=True):
                assert expected.tolist() == got.tolist()


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_an_observer_that_was_never_run_can_be_saved_and_loaded(name):
    observer = make(name)
    observer(torch.randn(3, 4))
    observer.load_state_dict(make(name, torch_ao).state_dict())
    assert not observer.has_data


def test_checkpoints_of_early_versions_load():
    channels = ours.PerChannelMinMaxObserver()
    state = {"min_vals": torch.tensor([-1.5, 0.0]), "max_vals": torch.tensor([2.0, 7.5])}  # version 1: eps no buffer
    channels.load_state_dict(state)
    assert (channels.min_val.tolist(), channels.max_val.tolist()) == ([-1.5, 0.0], [2.0, 7.5])
    histogram = ours.HistogramObserver(bins=4)
    empty = {"min_val": torch.tensor([]), "max_val": torch.tensor([]), "histogram": torch.zeros(4)}
    histogram.load_state_dict(empty)
    assert not histogram.has_data
    assert histogram.min_val.shape == ()


@pytest.mark.parametrize("name", RANGE_OBSERVERS)
def test_a_missing_key_is_reported(name):
    state = make(name).state_dict()
    del state["max_val"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"max_val\""):
        make(name).load_state_dict(state)


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_can_be_copied_pickled_and_printed(name):
    observer = make(name)
    observer.site = "input x"
    observer(torch.randn(3, 4))
    file = io.BytesIO()
    torch.save(observer, file)
    file.seek(0)
    for twin in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer)), torch.load(file, weights_only=False)):
        assert twin.site == "input x"
        assert repr(twin) == repr(observer)
