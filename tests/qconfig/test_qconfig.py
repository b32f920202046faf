"""QConfig and QConfigMapping against torch.ao, the peer, and the errors that are their own."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from torch import nn

import pt2e_quant.qconfig as ours
import pt2e_quant.qconfig_mapping as our_mapping
from pt2e_quant.errors import SpecError
from pt2e_quant.observer import MinMaxObserver
from pt2e_quant.qconfig import QConfig
from pt2e_quant.qconfig_mapping import QConfigMapping

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns on import; here it is the oracle
    import torch.ao.quantization.qconfig as theirs
    import torch.ao.quantization.qconfig_mapping as their_mapping
    from torch.ao.quantization.fx.qconfig_mapping_utils import _maybe_adjust_qconfig_for_module_type_or_name

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*reduce_range"),
    pytest.mark.filterwarnings("ignore:.*VNNI"),
    pytest.mark.filterwarnings("ignore:.*Vector Neural Network"),
]

BACKENDS = ["x86", "fbgemm", "qnnpack", "onednn"]
NAMES = [name for name in ours.__all__ if name.endswith(("_qconfig", "_qconfig_v2", "_4bit")) and name[:3] != "get"]
DEPRECATED = {"QConfigDynamic", "get_default_qconfig_dict", "get_default_qat_qconfig_dict"}
OBSERVED = ("dtype", "qscheme", "quant_min", "quant_max", "is_dynamic", "ch_axis", "averaging_constant")


def facts(recipe) -> list:
    """What a recipe makes, told by class and by everything that decides about qparams."""
    if recipe is None:
        return []
    made = recipe()
    inner = getattr(made, "activation_post_process", made)
    eps = getattr(inner, "eps", None)
    found = [type(made).__name__, type(inner).__name__, None if eps is None else float(eps)]
    return found + [getattr(inner, name, None) for name in OBSERVED]


def check(mine, peer) -> None:
    for name in ("activation", "weight"):
        got, expected = facts(getattr(mine, name)), facts(getattr(peer, name))
        if got[0] in ("PlaceholderObserver", "NoopObserver", "ReuseInputObserver", "RecordingObserver"):
            got[2:4], expected[2:4] = [], []  # casts and placeholders have no range to speak of
            got, expected = got[:2], expected[:2]
        assert got == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_ready_made_qconfig_makes_what_the_reference_makes(name):
    check(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_qconfig_of_a_backend_makes_what_the_reference_makes(backend):
    check(ours.get_default_qconfig(backend), theirs.get_default_qconfig(backend))
    for version in (0, 1):
        check(ours.get_default_qat_qconfig(backend, version), theirs.get_default_qat_qconfig(backend, version))


@pytest.mark.parametrize("function", [ours.get_default_qconfig, ours.get_default_qat_qconfig])
def test_unknown_backends_and_versions_are_refused(function):
    with pytest.raises(SpecError, match="'xnnpack'; pass one of x86, fbgemm, qnnpack, onednn"):
        function("xnnpack")
    with pytest.raises(SpecError, match="version 2 of the default qconfigs"):
        function(version=2)


def test_every_name_of_the_peer_is_here_but_for_what_it_deprecates():
    assert set(theirs.__all__) - set(ours.__all__) == DEPRECATED
    assert set(their_mapping.__all__) == set(our_mapping.__all__)


@pytest.mark.parametrize("name", ["activation", "weight"])
def test_an_object_instead_of_a_recipe_is_refused(name):
    recipes = {"activation": MinMaxObserver, "weight": MinMaxObserver, name: MinMaxObserver()}
    with pytest.raises(SpecError, match=f"QConfig: {name} is an object of MinMaxObserver"):
        QConfig(**recipes)


def test_a_qconfig_is_a_value():
    def make(dtype):
        return QConfig(MinMaxObserver.with_args(dtype=dtype), nn.Identity)

    assert make(torch.int8) == make(torch.int8) == pickle.loads(pickle.dumps(make(torch.int8)))
    assert make(torch.int8) != make(torch.uint8)
    assert ours.qconfig_equals(make(torch.int8), make(torch.int8))
    assert not ours.qconfig_equals(make(torch.int8), None)
    assert len({make(torch.int8), make(torch.int8)}) == 1


# --- mappings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["get_default_qconfig_mapping", "get_default_qat_qconfig_mapping"])
def test_the_mapping_of_a_backend_is_that_of_the_reference(name, backend):
    mine, peer = getattr(our_mapping, name)(backend), getattr(their_mapping, name)(backend)
    check(mine.global_qconfig, peer.global_qconfig)
    assert set(mine.object_type_qconfigs) == set(peer.object_type_qconfigs)
    for kind, qconfig in mine.object_type_qconfigs.items():
        check(qconfig, peer.object_type_qconfigs[kind])


A, B, C, D, E = (QConfig(MinMaxObserver.with_args(eps=2.0**-n), MinMaxObserver) for n in range(5))


def filled(kind) -> QConfigMapping:
    return (
        kind()
        .set_global(A)
        .set_object_type(nn.Linear, B)
        .set_object_type(torch.relu, None)
        .set_module_name_regex("encoder.*proj[0-9]+", C)
        .set_module_name_regex("encoder.*", D)
        .set_module_name("encoder.head", E)
        .set_module_name("decoder.float", None)
        .set_module_name_object_type_order("decoder", nn.Linear, 1, D)
    )


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, torch.relu])
@pytest.mark.parametrize(
    "name",
    ["", "x", "encoder", "encoder.a.proj3", "encoder.a", "encoder.head", "encoder.head.b.proj1", "decoder.float.c"],
)
def test_precedence_is_that_of_the_reference(name, kind):
    mine, peer = filled(QConfigMapping), filled(their_mapping.QConfigMapping)
    assert mine.qconfig_for(name, kind) == _maybe_adjust_qconfig_for_module_type_or_name(peer, kind, name, A)


def test_a_position_is_stronger_than_everything():
    mapping = filled(QConfigMapping).set_module_name("decoder", None)
    assert mapping.qconfig_for("decoder", nn.Linear, 0) is None
    assert mapping.qconfig_for("decoder", nn.Linear, 1) == D
    assert mapping.qconfig_for("decoder", nn.Conv2d, 1) is None


def test_a_dictionary_holds_all_of_a_mapping():
    mapping = filled(QConfigMapping)
    assert mapping.to_dict() == filled(their_mapping.QConfigMapping).to_dict()
    assert QConfigMapping.from_dict(mapping.to_dict()) == mapping
    assert QConfigMapping.from_dict({}) == QConfigMapping()
    assert mapping != mapping.from_dict(mapping.to_dict()).set_global(None)


def test_a_pattern_set_again_keeps_its_place():
    mapping = filled(QConfigMapping).set_module_name_regex("encoder.*proj[0-9]+", E)
    assert mapping.qconfig_for("encoder.a.proj3", nn.Conv2d) == E


def test_its_text_names_every_entry():
    text = repr(filled(QConfigMapping))
    for part in ("global: QConfig(", "object_type", "encoder.*proj", "encoder.head", "decoder.float',): None"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mapping: mapping.set_global(MinMaxObserver), "is not a QConfig"),
        (lambda mapping: mapping.set_module_name("a", "int8"), "'int8' is not a QConfig"),
        (lambda mapping: mapping.set_module_name_regex("a(", None), "is not a regular expression"),
        (lambda mapping: mapping.from_dict({"module_names": []}), r"keys \['module_names'\] mean nothing"),
    ],
)
def test_nonsense_is_refused_when_it_is_set(change, message):
    with pytest.raises(SpecError, match=message):
        change(QConfigMapping())
