"""What a backend quantizes, as values, and the native table, which holds what the reference's does."""

import pytest
import torch
import torch.ao.quantization.backend_config as reference
from torch import nn

import pt2e_quant.backend_config as ours_package
from pt2e_quant.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    DTypeWithConstraints,
    ObservationType,
    get_native_backend_config,
)
from pt2e_quant.errors import SpecError
from pt2e_quant.nn import intrinsic
from pt2e_quant.nn.quantized import reference as reference_modules

STATIC = DTypeConfig(torch.quint8, torch.quint8, torch.qint8, torch.float)


@pytest.fixture(scope="module")
def native():
    return get_native_backend_config()


def test_a_dictionary_gives_the_same_config_back(native):
    assert BackendConfig.from_dict(native.to_dict()).to_dict() == native.to_dict()


def test_the_keys_of_the_dictionaries_are_the_references():
    ours, theirs = (
        package.BackendConfig("demo").set_backend_pattern_config(
            package.BackendPatternConfig(nn.Linear)
            .add_dtype_config(package.DTypeConfig(torch.quint8, weight_dtype=torch.qint8, is_dynamic=True))
            .set_root_module(nn.Linear)
            .set_fuser_method(len)
        )
        for package in (ours_package, reference)
    )
    ours, theirs = ours.to_dict(), theirs.to_dict()
    assert ours.keys() == theirs.keys()
    assert ours["configs"][0].keys() == theirs["configs"][0].keys()
    assert ours["configs"][0]["dtype_configs"][0].keys() == theirs["configs"][0]["dtype_configs"][0].keys()


def test_the_native_table_holds_all_float_patterns_of_the_references(native):
    """Their names: classes of the reference's own packages stand under ours."""

    def words(pattern):
        sequence = pattern if isinstance(pattern, tuple) else (pattern,)
        return tuple(getattr(one, "__name__", one) for one in sequence)

    ours = {words(config.sequence) for config in native.configs}
    theirs = {words(config.pattern) for config in reference.get_native_backend_config().configs}
    trained = {words(c.pattern) for c in reference.get_native_backend_config().configs if ".qat." in str(c.pattern)}
    assert theirs - ours - trained == set()


def test_a_row_gives_the_reference_class_of_the_product_in_a_fused_module(native):
    config = next(c for c in native.configs if c.pattern is intrinsic.ConvReLU2d)
    assert config.root_module is nn.Conv2d
    assert config.reference_quantized_module is reference_modules.Conv2d


def test_a_pattern_that_is_set_again_replaces_the_first():
    config = BackendConfig().set_backend_pattern_config(BackendPatternConfig(nn.Linear))
    config.set_backend_pattern_config(BackendPatternConfig(nn.Linear).add_dtype_config(STATIC))
    assert [one.dtype_configs for one in config.configs] == [[STATIC]]


def test_a_nested_pattern_runs_from_the_inside_out():
    config = BackendPatternConfig()._set_pattern_complex_format((nn.ReLU, (nn.BatchNorm2d, nn.Conv2d)))
    assert config.sequence == (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


def test_a_pattern_has_one_of_two_forms():
    config = BackendPatternConfig().set_pattern(nn.Conv2d)
    assert (config.pattern, config.sequence) == (nn.Conv2d, (nn.Conv2d,))
    with pytest.raises(SpecError, match="only one of"):
        config._set_pattern_complex_format((nn.ReLU, nn.Conv2d))
    with pytest.raises(SpecError, match="only one of"):
        BackendPatternConfig()._set_pattern_complex_format((nn.ReLU, nn.Conv2d)).set_pattern(nn.Conv2d)


def test_a_config_has_a_name():
    assert BackendConfig("one").set_name("other").to_dict()["name"] == "other"


def test_constraints_keep_their_type():
    fixed = DTypeWithConstraints(torch.quint8, scale_exact_match=1 / 256, zero_point_exact_match=0)
    assert DTypeConfig(fixed).input_dtype is torch.quint8
    assert DTypeConfig.from_dict(DTypeConfig(fixed).to_dict()) == DTypeConfig(fixed)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: DTypeConfig("quint8"),
        lambda: DTypeConfig.from_dict({"input_dtype": 8}),
        lambda: DTypeWithConstraints(torch.quint8, "0"),
        lambda: BackendConfig().set_backend_pattern_config(BackendPatternConfig()),
        lambda: BackendConfig.from_dict({"configs": [3]}),
        lambda: BackendPatternConfig.from_dict({"dtype_configs": [3]}),
        lambda: BackendPatternConfig.from_dict({"observation_type": 1}),
        lambda: BackendPatternConfig(nn.Linear)._set_pattern_complex_format((nn.ReLU, nn.Linear)),
        lambda: BackendPatternConfig()._set_pattern_complex_format((nn.ReLU, (1, 2, 3))).sequence,
    ],
)
def test_what_does_not_fit_is_an_error_of_ours(wrong):
    with pytest.raises(SpecError):
        wrong()


def test_observation_types_have_the_references_numbers():
    assert {one.name: one.value for one in ObservationType} == {
        one.name: one.value for one in reference.ObservationType
    }
